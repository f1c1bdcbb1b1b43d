"""What a site does for a task: the broadcast down, the work, the update up, and what becomes of it."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import grpc

from client.control import Control
from client.datasets import Cancelled
from client.gate import Gate, Refusal
from client.job import Job
from client.outbox import Outbox, PendingUpdate, TaskKey
from client.room import MakeRoom, no_room
from client.secure_task import Masked, SecureTask, Step
from client.tally import Tally
from client.task_records import CONTENTS, CONTENTS_PRIVATE, CONTENTS_SECURE, KIND_NUMBERS, KINDS, named, offered, sent
from client.transfer import BroadcastStore, join_scalars, upload, was_taken
from client.work import Keeper, Spender, Worker
from common.errors import BudgetSpentError, DataError, PolicyFileError, ProtocolError, RunFolderError, WireError
from common.privacy.accounting import BUDGET_SPENT
from common.security.audit import NO_AUDIT, Audit
from common.wire import federation_pb2 as pb
from common.wire.partial import disk_hit
from common.wire.tensors import read_tensors

_log = logging.getLogger("wardround.site")
_STAGES = {"train": "training", "evaluate": "evaluation"}
_PROGRESS_SECONDS = 0.5
_ALIVE_SECONDS = 20.0  # where nothing is said but that it goes on
_SETTLE_SECONDS = 10.0
_TRIES = 3
_T = TypeVar("_T")


class Tasks:
    """The tasks of one agent, one at a time. Its methods are called by one thread; the work is done in another.

    Parameters
    ----------
    envelope : of the agent's messages.
    worker : does the work.
    broadcasts, updates : folders for the broadcast, and for an update without an answer (of this run alone).
    stopping : set when the agent is to end.
    report : see `Agent`.
    done : called, in another thread, with a job that has ended; its `worked` is due then.
    make_room : called where the disk is full.
    audit : where it is recorded what comes and what goes, before it goes.
    gate : says which tasks are worked on.
    secure : takes part in secure sums, where the study has them: no update is sent but through it.
    """

    def __init__(
        self,
        envelope: pb.Envelope,
        worker: Worker,
        broadcasts: Path,
        updates: Path,
        *,
        stopping: threading.Event,
        report: Callable[[dict[str, Any]], None],
        done: Callable[[Job], None],
        make_room: MakeRoom = no_room,
        audit: Audit = NO_AUDIT,
        gate: Gate,
        secure: SecureTask | None = None,
    ) -> None:
        self._envelope = envelope
        self._gate = gate
        self._secure = secure
        self._worker = worker
        self._keeper = worker if isinstance(worker, Keeper) else None
        self._spender = worker if isinstance(worker, Spender) else None
        self._broadcasts = BroadcastStore(broadcasts, make_room)
        self._outbox = Outbox(updates, make_room)
        self._stopping = stopping
        self._report = report
        self._done = done
        self._control: Control | None = None
        self._stub: Any = None
        self._task: pb.Task | None = None  # what the coordinator waits for on this line
        self._job: Job | None = None
        self._progress_due = 0.0
        self._audit = audit
        self._tally = Tally()
        self._progress_messages = 0  # since they were last recorded

    @property
    def working(self) -> bool:
        """Whether there is work under way."""
        return self._job is not None and not self._job.ended.is_set()

    def attend(self, control: Control | None, stub: Any) -> None:
        """A control stream has opened, with the service beside it; None where it has ended."""
        self._control, self._stub, self._task = control, stub, None

    def begin(self, task: pb.Task, count: int) -> float | None:
        """Does a task, up to its work's beginning; goes on with what there is of it. `count`: see `Said`.

        Returns
        -------
        None, or where the site's policy does not allow the task yet, the seconds after which to begin it again.

        Raises
        ------
        ApprovalError, IdentityError : the study is not approved any more; the coordinator was told so.
        Cancelled : the coordinator asks something newer, or the agent is to stop.
        DataError, RunFolderError : the site cannot go on; the coordinator was told so.
        grpc.RpcError : the line broke.
        """
        disk_hit("site.task", self._broadcasts.folder)
        key = TaskKey.of(KINDS[task.name.kind], task)
        self._task = task
        if self._job is not None and self._job.key == key and not self._job.cancelled:
            self._job.task = task
            self._say(self._job, self._job.batch, self._job.batches)
            return None
        self._end_job()
        try:
            pending = self._update_of(key)
            refusal = self._gate.refusal(key.kind, key.number)
            if refusal is not None and (pending is None or refusal.opens_in is None):  # hours bound when work begins
                return self._refuse(task, key, refusal)
            self._audit.record("task-received", **named(task.name), broadcast=task.broadcast.sha256.hex())
            if pending is not None:
                _log.info("round %d (%s): its update is here already, and is sent", key.number, key.kind)
                self._deliver(pending, task)
                return None
            self._settle(None)
            self._start(task, key, count)
        except RunFolderError:
            self._fail(task, "its work folder can no longer be used")
            raise
        except WireError as error:
            _log.warning("round %d (%s): %s", key.number, key.kind, error)
            self._fail(task, "broadcast or update were damaged on the line, several times")
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise
            _log.info("round %d (%s): over already", key.number, key.kind)
        return None

    def worked(self, job: Job) -> None:
        """A job has ended: sends its update if the coordinator waits for it; raises as `begin` does."""
        if job is not self._job:
            return
        self._job = None
        task = self._task
        if isinstance(job.error, BudgetSpentError):  # the site stays: it validates, and hears the study's end
            _log.warning("%s", job.error)
            self._fail(job.task, BUDGET_SPENT)
            self._report({"state": "waiting", "batch": 0, "batches": 0, "notice": str(job.error)})
            return
        if job.error is not None:
            reason = "its work folder can no longer be used"
            if isinstance(job.error, DataError):
                reason = "its data can no longer be read"
            if isinstance(job.error, DataError | RunFolderError):
                self._fail(job.task, reason)
            raise job.error
        if job.pending is None or task is None or TaskKey.of(KINDS[task.name.kind], task) != job.key:
            return  # it is in the outbox until its task comes again
        refusal = self._gate.refusal(job.key.kind, job.key.number)
        if refusal is not None and refusal.opens_in is None:  # hours bound when work begins, all else until it is sent
            self._refuse(task, job.key, refusal)
            return  # it is in the outbox, should the task come again and be allowed
        try:
            self._deliver(job.pending, task)
        except RunFolderError:
            self._fail(task, "its work folder can no longer be used")
            raise
        except WireError as error:
            _log.warning("round %d (%s): %s", job.key.number, job.key.kind, error)
            self._fail(task, "broadcast or update were damaged on the line, several times")
        except Cancelled:
            pass

    def finish(self) -> None:
        """The study is over: what waits for an answer gets it, and nothing of the study's transfers stays here."""
        self._end_job()
        try:
            self._settle(_SETTLE_SECONDS)
        except grpc.RpcError as error:
            _log.warning(
                "whether the last update was taken could not be heard (%s); start the site again while the coordinator "
                "runs with --serve",
                error.details(),
            )
        self._broadcasts.clear()
        if self._spender is not None:
            self._spender.finished()

    def cancel(self, seconds: float) -> None:
        """Ends the work; waits so long for a batch under way."""
        if self._job is not None:
            self._job.cancel()
            self._job.ended.wait(seconds)

    # --- the parts of a task ------------------------------------------------------------------------------------------

    def _refuse(self, task: pb.Task, key: TaskKey, refusal: Refusal) -> float | None:
        """Tells both sides why a task is not worked on; returns how long to wait, where that helps."""
        _log.warning("round %d (%s): refused: %s", key.number, key.kind, refusal.words)
        self._fail(task, refusal.reason)
        if refusal.error is not None:
            raise refusal.error
        state = {"state": "refusing", "round": key.number, "batch": 0, "batches": 0}
        self._report({**state, "notice": f"round {key.number} ({key.kind}): {refusal.words}"})
        return refusal.opens_in

    def _start(self, task: pb.Task, key: TaskKey, count: int) -> None:
        control = self._control
        assert control is not None

        def step() -> None:
            if self._stopping.is_set() or control.asked != count:
                raise Cancelled

        self._report({"notice": ""})
        self._say_stage(task, "download")
        tensors = _again_if_damaged(lambda: self._broadcasts.fetch(self._stub, self._envelope, task, step))
        self._audit.record(
            "broadcast-received",
            **named(task.name),
            bytes=self._broadcasts.received,
            sha256=task.broadcast.sha256.hex(),
        )
        self._report(self._tally.downloaded(self._broadcasts.received))
        broadcast = join_scalars(tensors, task.scalars, self._worker.expected(key.kind))
        self._say_stage(task, _STAGES[key.kind])
        self._progress_due = 0.0
        self._job = Job(
            task,
            key,
            self._worker,
            self._outbox,
            broadcast,
            self._broadcasts.seconds,
            on_batch=self._say,
            done=self._done,
        )

    def secure_step(self, step: pb.SecureStep) -> None:
        """Answers a step of secure aggregation for the task under way; raises as `begin` does."""
        task = self._task
        if (
            self._secure is None
            or task is None
            or (task.name.kind, task.name.round) != (step.task.kind, step.task.round)
        ):
            return  # of a round that is over
        kind = KINDS[task.name.kind]
        key = TaskKey.of(kind, task)
        pending = self._update_of(key)
        if pending is None:
            return
        refusal = self._gate.refusal(kind, key.number)
        if refusal is not None and refusal.opens_in is None:
            self._refuse(task, key, refusal)
            return
        asked = Step(kind, key.number, step.task.attempt, key.weights, step.session, step.content)
        try:
            answer = self._secure.answer(asked, lambda: read_tensors(pending.path, digest=pending.sha256))
            if isinstance(answer, bytes):
                self._say_secure(step.task, answer)
            else:
                self._upload_masked(answer, pending, step.task)
        except (ProtocolError, PolicyFileError) as error:
            _log.warning("round %d (%s): refused: %s", key.number, kind, error)
            self._fail(task, f"it refused the secure sum: {type(error).__name__}")
            self._report({"state": "refusing", "round": key.number, "notice": f"round {key.number}: {error}"})
        except RunFolderError:
            self._fail(task, "its work folder can no longer be used")
            raise
        except WireError as error:
            _log.warning("round %d (%s): %s", key.number, kind, error)
            self._fail(task, "its update was damaged on its disk or on the line")

    def _say_secure(self, name: pb.TaskName, content: bytes = b"") -> None:
        if self._control is not None:
            self._control.say(secure=pb.SecureStep(task=name, content=content))

    def _upload_masked(self, masked: Masked, pending: PendingUpdate, name: pb.TaskName) -> None:
        """Sends a masked update; what it says beside is the same whatever the data are."""
        header = pb.UploadHeader(
            envelope=self._envelope,
            task=name,
            blob=pb.Blob(sha256=masked.sha256, size=masked.size),
            timing=pb.Timing(),
            broadcast_sha256=bytes.fromhex(pending.key.broadcast),
        )

        def step() -> None:
            if self._stopping.is_set():
                raise Cancelled

        def asked(position: int) -> None:
            self._tally.uploaded(masked.size - position)
            about = {"bytes": masked.size - position, "of_bytes": masked.size, "sha256": masked.sha256.hex()}
            contents = CONTENTS_SECURE[pending.key.kind]
            self._audit.record(
                "update-sent", **named(name), **about, broadcast=pending.key.broadcast, contents=contents, cases=0
            )

        self._say_stage(pb.Task(name=name), "upload")
        receipt = _again_if_damaged(lambda: upload(self._stub, header, masked.path, asked=asked, step=step))
        self._record_answer(masked.sha256, name, receipt.accepted)
        if not receipt.accepted:
            _log.warning("round %d: its masked update was not taken: %s", name.round, receipt.reason)

    def _deliver(self, pending: PendingUpdate, task: pb.Task) -> None:
        """Sends an update and does what its receipt says; in a study with secure sums, says that it is ready."""
        if self._secure is not None:
            _log.info("round %d (%s): ready for the secure sum", pending.key.number, pending.key.kind)
            self._say_secure(task.name)
            self._report({"state": "waiting", "round": pending.key.number, "batch": 0, "batches": 0, "notice": ""})
            return
        key, keeper = pending.key, self._keeper if pending.key.kind == "train" else None
        header = self._header(pending, task.name)

        def step() -> None:
            if self._stopping.is_set():
                raise Cancelled

        def begins() -> None:
            if keeper is not None:
                keeper.sending(key.number)

        def offer() -> pb.UploadReceipt:
            self._audit.record("update-offered", **offered(header))
            return upload(self._stub, header, pending.path, begins=begins, asked=asked, ends=ends, step=step)

        def asked(position: int) -> None:
            contents = CONTENTS if self._spender is None else CONTENTS_PRIVATE
            self._tally.uploaded(pending.size - position)
            self._audit.record("update-sent", **sent(pending, task.name, position, contents[key.kind]))

        def ends() -> None:
            if keeper is not None:
                keeper.sent(key.number)

        self._say_stage(task, "upload")
        began = time.monotonic()
        try:
            receipt = _again_if_damaged(offer)
        except WireError:
            self._answered(pending, accepted=False)
            raise
        disk_hit("site.receipt", pending.path)
        self._record_answer(pending.sha256, task.name, receipt.accepted)
        self._answered(pending, accepted=receipt.accepted)
        self._report(self._tally.answered(pending, time.monotonic() - began, accepted=receipt.accepted))
        if receipt.accepted:
            _log.info("round %d (%s): sent after %.1f s of work", key.number, key.kind, pending.work)
            self._report({"state": "waiting", "round": key.number, "batch": 0, "batches": 0, "notice": ""})
        else:
            _log.warning("round %d (%s): not taken: %s", key.number, key.kind, receipt.reason)
            self._report({"state": "waiting", "notice": f"round {key.number}: not taken: {receipt.reason}"})

    def _record_answer(self, sha256: bytes, name: pb.TaskName, accepted: bool) -> None:
        self._audit.record(
            "update-answered",
            **named(name),
            accepted=accepted,
            sha256=sha256.hex(),
            progress_messages=self.progress_messages(),
        )
        self._audit.sign_head()

    def progress_messages(self) -> int:
        """How many messages about progress were sent since this was last asked."""
        count, self._progress_messages = self._progress_messages, 0
        return count

    def _settle(self, seconds: float | None) -> None:
        """Ends the wait of an update that nobody asks for any more: was it taken, before the line broke?"""
        pending = self._outbox.pending()
        if pending is None:
            return
        accepted = False
        if self._keeper is not None and pending.key.kind == "train" and self._fits(pending):
            name = pb.TaskName(kind=KIND_NUMBERS[pending.key.kind], round=pending.key.number, attempt=1)
            header = self._header(pending, name)
            self._audit.record("update-asked-after", **offered(header))
            accepted = was_taken(self._stub, header, seconds)
            _log.info("round %d: its update was %s", pending.key.number, "taken" if accepted else "not taken")
        self._answered(pending, accepted=accepted)

    def _answered(self, pending: PendingUpdate, *, accepted: bool) -> None:
        if self._keeper is not None and pending.key.kind == "train" and self._fits(pending):
            self._keeper.answered(pending.key.number, accepted)
        self._outbox.release()
        disk_hit("site.released", pending.path)

    def _update_of(self, key: TaskKey) -> PendingUpdate | None:
        """The finished update of a task, where it is here already."""
        pending = self._outbox.pending()
        return pending if pending is not None and pending.key == key and self._fits(pending) else None

    def _fits(self, pending: PendingUpdate) -> bool:
        """Whether what a keeper holds is of this very update."""
        if self._keeper is None or pending.key.kind != "train":
            return True
        return self._keeper.held(pending.key.number).hex() == pending.kept

    def _header(self, pending: PendingUpdate, name: pb.TaskName) -> pb.UploadHeader:
        privacy = None
        if self._spender is not None and pending.key.kind == "train":
            spent = self._spender.spent()
            privacy = pb.Privacy(epsilon=spent.epsilon, delta=spent.delta)
        return pb.UploadHeader(
            envelope=self._envelope,
            task=name,
            blob=pb.Blob(sha256=pending.sha256, size=pending.size),
            timing=pb.Timing(download=pending.download, work=pending.work, cases=pending.cases),
            broadcast_sha256=bytes.fromhex(pending.key.broadcast),
            privacy=privacy,
        )

    def _end_job(self) -> None:
        """Ends the work on an older task, which takes up to a batch."""
        if self._job is None:
            return
        job, self._job = self._job, None
        if not job.ended.is_set():
            _log.info("round %d (%s): given up, the coordinator has gone on", job.key.number, job.key.kind)
        job.cancel()
        while not job.ended.wait(0.05):
            if self._stopping.is_set():
                raise Cancelled

    # --- what is said -------------------------------------------------------------------------------------------------

    def _say(self, job: Job, batch: int, batches: int) -> None:
        """In the job's thread: how far it is, about twice a second; how often tells no count that is not shown."""
        counted = self._counts_shown(job.key.kind)
        if time.monotonic() >= self._progress_due or (batch in (1, batches) and counted):
            self._progress_due = time.monotonic() + (_PROGRESS_SECONDS if counted else _ALIVE_SECONDS)
            self._say_stage(job.task, _STAGES[job.key.kind], batch, batches)

    def _counts_shown(self, kind: str) -> bool:
        """Whether batches may be told: with secure sums they give the number of cases away, in private training by
        their times who was drawn."""
        return self._secure is None and not (self._spender is not None and kind == "train")

    def _say_stage(self, task: pb.Task, stage: str, batch: int = 0, batches: int = 0) -> None:
        control = self._control
        if control is not None:
            self._progress_messages += 1
            shown = (batch, batches) if self._counts_shown(KINDS[task.name.kind]) else (0, 0)
            control.say(progress=pb.Progress(task=task.name, stage=stage, batch=shown[0], batches=shown[1]))
        self._report({"state": stage, "round": task.name.round, "batch": batch, "batches": batches})

    def _fail(self, task: pb.Task, reason: str) -> None:
        if self._control is not None:
            with contextlib.suppress(RunFolderError):  # it may be the very failure
                self._audit.record("failure-sent", **named(task.name), reason=reason)
            self._control.say(failure=pb.Failure(task=task.name, reason=reason))


def _again_if_damaged(transfer: Callable[[], _T]) -> _T:
    """Repeats a transfer that arrived damaged; the third time it is an error."""
    for _ in range(_TRIES - 1):
        try:
            return transfer()
        except WireError as error:
            _log.warning("%s", error)
    return transfer()
