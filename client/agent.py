"""The site's agent: dials the coordinator, holds the control stream, does its tasks, and reconnects for ever.

Its work outlives its line. A task is worked on in a thread of its own (`client.job`) while this one reconnects; the
update is on disk before it is sent (`client.outbox`); what breaks off goes on where it was (`client.transfer`).
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import logging
import os
import queue
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

from client.control import Control, Ended, Said
from client.datasets import Cancelled
from client.gate import Gate, OpenGate
from client.job import Job
from client.room import MakeRoom, no_room
from client.secure_task import SecureTask
from client.task_records import KINDS
from client.tasks import Tasks
from client.work import Keeper, Spender, Worker
from common.errors import (
    ApprovalError,
    DataError,
    IdentityError,
    NetworkError,
    PlanMismatchError,
    RunFolderError,
    WardroundError,
)
from common.security.audit import NO_AUDIT, Audit
from common.security.certificates import Identity
from common.version import VERSION
from common.wire import federation_pb2 as pb
from common.wire import federation_pb2_grpc as rpc
from common.wire.channel import (
    CHANNEL_OPTIONS,
    Address,
    channel_credentials,
    connection_refusal,
    connection_trouble,
)

_log = logging.getLogger("wardround.site")
_LONGEST_PAUSE = 10.0
_SILENT_SECONDS = 60.0
_REFUSALS = 3  # in a row, before what answers at an address that was never right counts as wrong
_STOP_SECONDS = 1.0  # for the coordinator to hear that this site stops
_CANCEL_SECONDS = 2.0  # for a batch under way to end, once this site stops
_STOP = object()


class Agent:
    """One site in one study.

    Parameters
    ----------
    study : the study's name.
    site : this site's name, as in the study and its certificate.
    worker : does the work.
    address, identity : the coordinator's address and this site's certificate.
    folder : this site's own, for the broadcast and for the update that has no answer yet.
    report : called with a few words whenever what the agent does changes; from several threads.
    make_room : called where the disk is too full for a broadcast or an update, from several threads; see `MakeRoom`.
    audit : where this site records what it does.
    gate : says which tasks are worked on.
    secure : this site's side of secure sums, in a study that has them; nothing of its updates leaves otherwise, and
        nothing is said of how many cases it has.
    renewed : the identity as it is by now, asked before each dial; `wardround-site rotate` may have renewed it.
    """

    def __init__(
        self,
        study: str,
        site: str,
        worker: Worker,
        address: Address,
        identity: Identity,
        folder: Path,
        report: Any = lambda status: None,
        make_room: MakeRoom = no_room,
        *,
        audit: Audit = NO_AUDIT,
        gate: Gate | None = None,
        secure: SecureTask | None = None,
        renewed: Callable[[], Identity] | None = None,
    ) -> None:
        run = identity.run
        self._envelope = pb.Envelope(study=study, plan_digest=worker.digest, site=site)
        self._site = site
        if isinstance(worker, Keeper):
            worker = worker.of_run(run)
        elif isinstance(worker, Spender):
            worker = worker.for_run(run)
        self._worker = worker
        self._address = address
        self._identity = identity
        self._renewed = renewed or (lambda: identity)
        self._report = report
        self._process = os.urandom(16)
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._waiting: collections.deque[Any] = collections.deque()
        self._stopping = threading.Event()
        self._tasks = Tasks(
            self._envelope,
            self._worker,
            folder / "broadcast",
            folder / "updates" / f"{study}-{worker.digest.hex()[:16]}-{run.hex()[:16]}",
            stopping=self._stopping,
            report=report,
            done=self._events.put,
            make_room=make_room,
            audit=audit,
            gate=gate or OpenGate(),
            secure=secure,
        )
        told = secure is None
        self._training_cases = worker.training_cases if told else 0
        self._validation_cases = worker.validation_cases if told else 0
        self._audit = audit
        self._channel: Any = None
        self._silent_until = 0.0  # by time.monotonic(); until then a failed dial is no news
        self._welcomed = False
        self._dialled = False  # and recorded, since it was last welcomed
        self._refusals = 0
        self._paused = ""

    def stop(self) -> None:
        """Ends `run` soon, from another thread or a signal handler."""
        self._stopping.set()
        self._events.put(_STOP)
        timer = threading.Timer(_STOP_SECONDS, self._hang_up)  # where the line is stuck
        timer.daemon = True
        timer.start()

    def _hang_up(self) -> None:
        channel = self._channel
        if channel is not None:
            channel.close()

    def run(self) -> str:
        """Takes part until the study is over; returns the coordinator's closing words ("" when stopped).

        Raises
        ------
        PlanMismatchError : the coordinator's study or plan is another.
        IdentityError : the coordinator refuses this site's certificate, or is not who the certificate says.
        NetworkError : what answers at the address is no coordinator, or one whose certificate has another name.
        DataError : the site's data became unusable.
        ApprovalError : the site's operator does not approve the study any more.
        RunFolderError : the site's work folder cannot be read or written any more.
        """
        cases = {"training_cases": self._worker.training_cases, "validation_cases": self._worker.validation_cases}
        self._report({"state": "connecting", "notice": "", "connected": False, **cases})
        self._audit.record(
            "started",
            study=self._envelope.study,
            plan=self._envelope.plan_digest.hex(),
            version=VERSION,
            training_cases=self._training_cases,
            validation_cases=self._validation_cases,
        )
        self._audit.sign_head()
        pause = 0.2
        try:
            while not self._stopping.is_set():
                started = time.monotonic()
                try:
                    finished = self._attend()
                    if finished is not None:
                        self._report({"state": "finished", "notice": finished})
                        return finished
                except grpc.RpcError as error:
                    if self._stopping.is_set():
                        break
                    self._raise_if_final(error)
                    self._lost(connection_trouble(self._address, error.details() or str(error.code())))
                except ValueError:  # gRPC's word for a channel that `stop` closed
                    if not self._stopping.is_set():
                        raise
                if time.monotonic() - started > _LONGEST_PAUSE:
                    pause = 0.2
                self._stopping.wait(pause * random.uniform(0.5, 1.0))
                pause = min(pause * 2, _LONGEST_PAUSE)
            _log.info("%s: stopped; start it again with the same command to go on", self._site)
            return ""
        finally:
            self._tasks.cancel(_CANCEL_SECONDS)
            with contextlib.suppress(RunFolderError):  # what ends the site is the error to show
                self._audit.record("stopped", progress_messages=self._tasks.progress_messages())
                self._audit.sign_head()

    def _lost(self, words: str) -> None:
        if self._paused:
            words = f"{self._paused}; {words}"
        working = self._tasks.working
        lost = {"notice": words, "connected": False}
        self._report(lost if working else {**lost, "state": "reconnecting"})
        if time.monotonic() >= self._silent_until:
            _log.info("%s; trying until it answers%s", words, ", and working meanwhile" if working else "")
            self._silent_until = time.monotonic() + _SILENT_SECONDS

    def _attend(self) -> str | None:
        """Holds one control stream; returns closing words, or None when the stream ended without any."""
        hello = pb.Hello(
            version=VERSION,
            training_cases=self._training_cases,
            validation_cases=self._validation_cases,
            process=self._process,
        )
        with grpc.secure_channel(
            str(self._address), channel_credentials(self._current_identity()), options=CHANNEL_OPTIONS
        ) as channel:
            self._channel = channel
            if self._stopping.is_set():  # `stop` may have closed the channel before this one
                return None
            if not self._dialled:  # once for all dials up to the one that is answered: they all say the same
                self._audit.record(
                    "dialled",
                    coordinator=str(self._address),
                    version=VERSION,
                    training_cases=hello.training_cases,
                    validation_cases=hello.validation_cases,
                )
                self._dialled = True
            stub = rpc.FederationStub(channel)  # type: ignore[no-untyped-call]
            control = Control(stub, self._envelope, hello, self._check, self._events)
            self._tasks.attend(control, stub)
            try:
                return self._follow(control)
            except (ApprovalError, IdentityError, DataError, RunFolderError):
                control.finish(_LONGEST_PAUSE)  # the coordinator ends the stream when it has read the reason
                raise
            finally:
                self._tasks.attend(None, None)
                control.close()

    def _current_identity(self) -> Identity:
        try:
            renewed = self._renewed()
        except WardroundError as error:
            if self._identity.not_after <= datetime.datetime.now(datetime.UTC):
                raise  # what this site holds is of no more use
            _log.warning("%s; dialling with the identity from before", error)
            return self._identity
        if renewed != self._identity:
            _log.info("%s: dials with its renewed certificate, until %s", self._site, f"{renewed.not_after:%Y-%m-%d}")
            self._report({"certificate_expires": renewed.not_after.timestamp()})
            self._identity = renewed
        return renewed

    def _follow(self, control: Control) -> str | None:
        while True:
            event = self._next(control)
            if event is _STOP:
                control.say(leaving=pb.Leaving(reason="stopped by its operator"))
                control.finish(_STOP_SECONDS)
                return None
            if isinstance(event, Job):
                self._tasks.worked(event)
            elif isinstance(event, Ended):
                if event.error is not None:
                    raise event.error
                return None
            elif isinstance(event.body, pb.Finished):
                with contextlib.suppress(Cancelled):  # by `stop`
                    self._tasks.finish()
                    return str(event.body.reason)
            elif isinstance(event.body, pb.Task):
                try:
                    wait = self._tasks.begin(event.body, event.count)
                    if wait is not None:
                        self._again(event, wait)
                except Cancelled:  # a newer message waits, or `stop`
                    if not self._stopping.is_set():
                        _log.info("round %d: given up, the coordinator has gone on", event.body.name.round)
            elif isinstance(event.body, pb.SecureStep):
                with contextlib.suppress(Cancelled):
                    self._tasks.secure_step(event.body)
            elif isinstance(event.body, pb.Pausing):
                self._paused = event.body.reason or "the coordinator was stopped and will be back"
                _log.info("%s", self._paused)
                self._report({"notice": self._paused})
            elif isinstance(event.body, pb.Welcome):
                self._audit.record("connected", coordinator=str(self._address))
                self._dialled = False
                _log.info("connected to %s (version %s)", self._address, event.body.version)
                there = {"notice": "", "connected": True}
                self._report(there if self._tasks.working else {**there, "state": "connected"})
                self._silent_until, self._welcomed, self._refusals, self._paused = 0.0, True, 0, ""

    def _again(self, event: Said, seconds: float) -> None:
        """Has a task come once more; by then it may be that of a line, or a wish, that is no more."""
        timer = threading.Timer(seconds, self._events.put, [event])
        timer.daemon = True
        timer.start()

    def _next(self, control: Control) -> Any:
        """The next event; of tasks that wait, the newest is the one that counts."""
        if not self._waiting:
            self._waiting.append(self._events.get())
        while not self._events.empty():
            self._waiting.append(self._events.get())
        if _STOP in self._waiting:
            return _STOP
        while True:
            event = self._waiting.popleft() if self._waiting else self._events.get()
            if isinstance(event, Said | Ended) and event.control is not control:
                continue  # of a stream before this one
            if isinstance(event, Said) and isinstance(event.body, pb.Task) and event.count != control.asked:
                continue
            return event

    def _check(self, message: pb.CoordinatorMessage) -> None:
        """The coordinator speaks to this site, of this study, by this plan."""
        theirs = message.envelope
        if theirs != self._envelope:
            raise PlanMismatchError(
                f"plan: the coordinator at {self._address} runs study {theirs.study!r} with plan "
                f"{theirs.plan_digest.hex()[:16]}, this site {self._envelope.study!r} with plan "
                f"{self._envelope.plan_digest.hex()[:16]}; use the coordinator's study file and the same version "
                "of Wardround"
            )
        if message.WhichOneof("body") == "task" and message.task.name.kind not in KINDS:
            raise PlanMismatchError(
                f"task of kind {message.task.name.kind}: not known to this version; install the coordinator's"
            )

    def _raise_if_final(self, error: Any) -> None:
        code, details = error.code(), error.details() or ""
        if code is grpc.StatusCode.FAILED_PRECONDITION:
            raise PlanMismatchError(
                f"{details}; use the coordinator's study file and the same version of Wardround"
            ) from error
        if code in (
            grpc.StatusCode.PERMISSION_DENIED,
            grpc.StatusCode.UNAUTHENTICATED,
            grpc.StatusCode.ABORTED,  # another process speaks as this site
        ):
            raise IdentityError(f"the coordinator at {self._address} refuses this site: {details}") from error
        if code is grpc.StatusCode.UNIMPLEMENTED:
            raise NetworkError(
                f"{self._address}: something answers there that is no coordinator; check the address"
            ) from error
        if (refused := connection_refusal(self._address, details)) and not self._welcomed:
            # Once it was there, whatever else answers is in the way, such as a VPN's log-in page: it will go.
            self._refusals += 1
            if self._refusals >= _REFUSALS:
                raise refused from error
