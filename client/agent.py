"""The site's agent: dials the coordinator, holds the control stream, does its tasks, and reconnects for ever."""

from __future__ import annotations

import logging
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from client.datasets import Cancelled
from client.transfer import BroadcastStore, join_scalars, upload
from client.work import Keeper, Worker
from common.errors import DataError, IdentityError, NetworkError, PlanMismatchError, RunFolderError, WireError
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
_KINDS = {pb.TRAIN: "train", pb.EVALUATE: "evaluate"}
_STAGES = {"train": "training", "evaluate": "evaluation"}
_PROGRESS_SECONDS = 0.5
_LONGEST_PAUSE = 10.0
_SILENT_SECONDS = 60.0
_TRIES = 3
_T = TypeVar("_T")


class Agent:
    """One site in one study.

    Parameters
    ----------
    study : the study's name.
    site : this site's name, as in the study and its certificate.
    worker : does the work.
    address, identity : the coordinator's address and this site's certificate.
    report : called with a few words whenever what the agent does changes.
    """

    def __init__(
        self,
        study: str,
        site: str,
        worker: Worker,
        address: Address,
        identity: Identity,
        report: Callable[[dict[str, Any]], None] = lambda status: None,
    ) -> None:
        self._envelope = pb.Envelope(study=study, plan_digest=worker.digest, site=site)
        self._site = site
        self._worker = worker.of_run(_run_of(identity)) if isinstance(worker, Keeper) else worker
        self._address = address
        self._identity = identity
        self._report = report
        self._broadcasts = BroadcastStore()
        self._stopping = threading.Event()
        self._channel: Any = None
        self._silent_until = 0.0  # by time.monotonic(); until then a failed dial is no news

    def stop(self) -> None:
        """Ends `run` soon, from another thread or a signal handler."""
        self._stopping.set()
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
        RunFolderError : the site's work folder cannot be read or written any more.
        """
        self._report({"state": "connecting", "notice": ""})
        pause = 0.2
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
            if time.monotonic() - started > 60:
                pause = 0.2
            self._stopping.wait(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 2, _LONGEST_PAUSE)
        _log.info("%s: stopped; start it again with the same command to go on", self._site)
        return ""

    def _lost(self, words: str) -> None:
        self._report({"state": "reconnecting", "notice": words})
        if time.monotonic() >= self._silent_until:
            _log.info("%s; trying until it answers", words)
            self._silent_until = time.monotonic() + _SILENT_SECONDS

    def _attend(self) -> str | None:
        """Holds one control stream; returns closing words, or None when the stream ended without any."""
        outbox: queue.SimpleQueue[pb.SiteMessage | None] = queue.SimpleQueue()
        hello = pb.Hello(
            version=VERSION,
            training_cases=self._worker.training_cases,
            validation_cases=self._worker.validation_cases,
        )
        outbox.put(pb.SiteMessage(envelope=self._envelope, hello=hello))
        with grpc.secure_channel(
            str(self._address), channel_credentials(self._identity), options=CHANNEL_OPTIONS
        ) as channel:
            self._channel = channel
            if self._stopping.is_set():  # `stop` may have closed the channel before this one
                return None
            stub = rpc.FederationStub(channel)  # type: ignore[no-untyped-call]
            stream = stub.Attend(_drain(outbox))
            inbox = _Inbox(stream, self._check)
            try:
                while (received := inbox.next()) is not None:
                    body, superseded = received
                    if isinstance(body, pb.Finished):
                        return str(body.reason)
                    if isinstance(body, pb.Task):
                        self._do(body, superseded, stub, outbox)
                    elif isinstance(body, pb.Welcome):
                        _log.info("connected to %s (version %s)", self._address, body.version)
                        self._report({"state": "connected", "notice": ""})
                        self._silent_until = 0.0
            except (DataError, RunFolderError):
                outbox.put(None)  # nothing more from here; the coordinator ends the stream when it has read the reason
                inbox.ended.wait(_LONGEST_PAUSE)
                raise
            finally:
                outbox.put(None)
                stream.cancel()
        return None

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

    def _do(
        self,
        task: pb.Task,
        superseded: threading.Event,
        stub: Any,
        outbox: queue.SimpleQueue[pb.SiteMessage | None],
    ) -> None:
        kind = _KINDS.get(task.name.kind)
        if kind is None:
            raise PlanMismatchError(
                f"task of kind {task.name.kind}: not known to this version; install the coordinator's"
            )
        number = task.name.round
        keeper = self._worker if kind == "train" and isinstance(self._worker, Keeper) else None
        last = 0.0

        def say(stage: str, batch: int = 0, batches: int = 0) -> None:
            progress = pb.Progress(task=task.name, stage=stage, batch=batch, batches=batches)
            outbox.put(pb.SiteMessage(envelope=self._envelope, progress=progress))
            self._report({"state": stage, "round": number, "batch": batch, "batches": batches})

        def on_batch(batch: int, batches: int) -> None:
            nonlocal last
            if superseded.is_set() or self._stopping.is_set():
                raise Cancelled
            if batch in (1, batches) or time.monotonic() - last >= _PROGRESS_SECONDS:
                last = time.monotonic()
                say(_STAGES[kind], batch, batches)

        try:
            say("download")
            tensors = _again_if_damaged(lambda: self._broadcasts.fetch(stub, self._envelope, task))
            broadcast = join_scalars(tensors, task.scalars, self._worker.expected(kind))
            say(_STAGES[kind])
            started = time.monotonic()
            update = self._worker.work(kind, number, broadcast, on_batch)
            seconds = time.monotonic() - started
            if superseded.is_set() or self._stopping.is_set():
                raise Cancelled
            say("upload")
            timing = pb.Timing(download=self._broadcasts.seconds, work=seconds, cases=self._worker.cases(kind))
            header = pb.UploadHeader(envelope=self._envelope, task=task.name, timing=timing)
            via = stub if keeper is None else _Told(stub, keeper, number)
            receipt = _again_if_damaged(lambda: upload(via, header, update))
            if keeper is not None:
                keeper.answered(number, receipt.accepted)
            if receipt.accepted:
                _log.info("round %d (%s): sent after %.1f s of work", number, kind, seconds)
                self._report({"state": "waiting", "round": number, "batch": 0, "batches": 0})
            else:
                _log.warning("round %d (%s): not taken: %s", number, kind, receipt.reason)
        except Cancelled:
            if not self._stopping.is_set():
                _log.info("round %d (%s): given up, the coordinator has gone on or away", number, kind)
        except DataError as error:
            self._fail(task, outbox, "its data can no longer be read")
            raise error
        except RunFolderError as error:
            self._fail(task, outbox, "its work folder can no longer be used")
            raise error
        except WireError as error:
            _log.warning("round %d (%s): %s", number, kind, error)
            if keeper is not None:
                keeper.answered(number, False)
            self._fail(task, outbox, "broadcast or update were damaged on the line, several times")
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise
            _log.info("round %d (%s): over already", number, kind)

    def _fail(self, task: pb.Task, outbox: queue.SimpleQueue[pb.SiteMessage | None], reason: str) -> None:
        outbox.put(pb.SiteMessage(envelope=self._envelope, failure=pb.Failure(task=task.name, reason=reason)))

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
        if refused := connection_refusal(self._address, details):
            raise refused from error


class _Inbox:
    """Reads the coordinator's messages in a thread, so that a newer task can end the work on an older one."""

    def __init__(self, stream: Any, check: Callable[[pb.CoordinatorMessage], None]) -> None:
        self._items: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._newest = threading.Event()
        self.ended = threading.Event()
        threading.Thread(target=self._read, args=(stream, check), daemon=True, name="wardround-inbox").start()

    def _read(self, stream: Any, check: Callable[[pb.CoordinatorMessage], None]) -> None:
        try:
            for message in stream:
                check(message)
                kind = message.WhichOneof("body")
                if kind is None:  # a word of a later version
                    continue
                if kind != "welcome":
                    self._newest.set()
                    self._newest = threading.Event()
                self._items.put((getattr(message, kind), self._newest))
            self._items.put(None)
        except BaseException as error:  # whatever it is, whoever waits for a message must hear of it
            self._items.put(error)
        self._newest.set()
        self.ended.set()

    def next(self) -> tuple[Any, threading.Event] | None:
        """The next message's body and an event that a newer message sets; None at the end of the stream."""
        item = self._items.get()
        while isinstance(item, tuple) and isinstance(item[0], pb.Task) and not self._items.empty():
            item = self._items.get()  # the newest task is the one that counts
        if isinstance(item, BaseException):
            raise item
        found: tuple[Any, threading.Event] | None = item
        return found


class _Told:
    """A stub whose `Upload` tells a keeper how far a round's update is; the keeper's RunFolderError ends it."""

    def __init__(self, stub: Any, keeper: Keeper, round_number: int) -> None:
        self._stub = stub
        self._keeper = keeper
        self._round = round_number

    def Upload(self, messages: Iterator[pb.UploadMessage]) -> pb.UploadReceipt:
        """As the stub's."""
        over = False
        failures: list[RunFolderError] = []

        def told() -> Iterator[pb.UploadMessage]:  # read by a thread of gRPC's, where an exception would be lost
            for message in messages:
                if message.WhichOneof("body") == "blob":
                    if over:
                        return
                    try:
                        self._keeper.sent(self._round)
                    except RunFolderError as error:
                        failures.append(error)
                        return  # without its last message nobody takes the update
                yield message

        self._keeper.sending(self._round)
        try:
            receipt: pb.UploadReceipt = self._stub.Upload(told())
        finally:
            over = True
            if failures:
                raise failures[0]
        return receipt


def _run_of(identity: Identity) -> bytes:
    """What tells runs apart: the authority that signed the certificates of both sides."""
    return x509.load_pem_x509_certificate(identity.authority).fingerprint(hashes.SHA256())


def _again_if_damaged(transfer: Callable[[], _T]) -> _T:
    """Repeats a transfer that arrived damaged; the third time it is an error."""
    for _ in range(_TRIES - 1):
        try:
            return transfer()
        except WireError as error:
            _log.warning("%s", error)
    return transfer()


def _drain(outbox: queue.SimpleQueue[pb.SiteMessage | None]) -> Iterator[pb.SiteMessage]:
    while (message := outbox.get()) is not None:
        yield message
