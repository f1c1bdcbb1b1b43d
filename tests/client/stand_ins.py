"""A coordinator that does what a test says, a worker that a test holds, and the agent that runs between them.

The coordinator is real gRPC over TLS but holds no rounds; with the real one the agent is tested in
`tests/server/service`.
"""

from __future__ import annotations

import contextlib
import hashlib
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from client.agent import Agent
from client.gate import Gate
from common.security.audit import NO_AUDIT, Audit
from common.security.certificates import Identity
from common.wire import federation_pb2 as pb
from common.wire import federation_pb2_grpc as rpc
from common.wire.channel import SERVER_OPTIONS, Address, server_credentials
from common.wire.tensors import TensorSpec, encode_chunks

PATIENCE = 20.0  # seconds until a test gives up
PROMPT = 5.0  # what a stop may take on a machine that does much else; waiting for a timeout of gRPC's takes longer
STOPPED = "alpha: stopped; start it again with the same command to go on"
PLAN = b"\x07" * 32
ENVELOPE = pb.Envelope(study="digits", plan_digest=PLAN, site="alpha")
BROADCAST = b"".join(encode_chunks([np.arange(40_000, dtype=np.float32)]))
SCALARS = b"".join(encode_chunks([np.float32(0.5)]))


def task(number: int, kind: int = pb.TRAIN) -> pb.Task:
    blob = pb.Blob(sha256=hashlib.sha256(BROADCAST).digest(), size=len(BROADCAST))
    return pb.Task(name=pb.TaskName(kind=kind, round=number, attempt=1), broadcast=blob, scalars=SCALARS)


def eventually(condition: Callable[[], Any]) -> None:
    """Waits until the condition holds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


class Coordinator(rpc.FederationServicer):
    """Says what the test puts into `says` and keeps what it hears.

    `says` takes bodies of messages, whole messages, status codes (the stream ends with it) and None (it just ends).
    Each download serves the next of `serves` from the offset asked for on, each upload is answered by the next of
    `answers`; by default all is well. Of an upload it holds the first of `holds` bytes, and all of those in `taken`.
    """

    def __init__(self, identity: Identity, port: int = 0) -> None:
        self.says: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.serves: list[Any] = []
        self.answers: list[Callable[[pb.UploadReceipt], None]] = []
        self.breaks: list[grpc.StatusCode] = []
        self.heard: list[pb.SiteMessage] = []
        self.offsets: list[int] = []
        self.holds: list[int] = []
        self.taken: set[bytes] = set()
        self.offered: list[pb.UploadHeader] = []
        self.uploads: list[tuple[pb.UploadHeader, bytes]] = []
        self.streams = 0
        self.open = 0
        self._pool = ThreadPoolExecutor(8)
        self._server = grpc.server(self._pool, options=SERVER_OPTIONS)
        self._port = self._server.add_secure_port(f"127.0.0.1:{port}", server_credentials(identity))
        self.address = Address("127.0.0.1", self._port)
        rpc.add_FederationServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        self._server.start()

    def say(self, **body: Any) -> None:
        self.says.put(pb.CoordinatorMessage(envelope=ENVELOPE, **body))

    def stages(self) -> list[str]:
        """What the site said of how far it is, repetitions left out."""
        said = [message.progress.stage for message in self.heard if message.WhichOneof("body") == "progress"]
        return [stage for index, stage in enumerate(said) if index == 0 or said[index - 1] != stage]

    def failures(self) -> list[str]:
        return [message.failure.reason for message in self.heard if message.WhichOneof("body") == "failure"]

    @property
    def downloads(self) -> int:
        return len(self.offsets)

    def left(self) -> list[str]:
        return [message.leaving.reason for message in self.heard if message.WhichOneof("body") == "leaving"]

    def stop(self) -> None:
        self.says.put(None)
        self._server.stop(grace=None).wait()
        self._pool.shutdown()

    def Attend(self, requests: Any, context: Any) -> Iterator[pb.CoordinatorMessage]:
        self.heard.append(next(requests))
        self.streams += 1
        self.open += 1
        if not context.add_callback(self._closed):
            self._closed()
        ended = threading.Event()

        def listen() -> None:
            with contextlib.suppress(Exception):  # the site hung up
                self.heard.extend(requests)
            ended.set()

        threading.Thread(target=listen, daemon=True).start()
        yield pb.CoordinatorMessage(envelope=ENVELOPE, welcome=pb.Welcome(version="test"))
        while not ended.is_set():
            try:
                said = self.says.get(timeout=0.01)
            except queue.Empty:
                continue
            if not context.is_active():  # it is for the stream that comes next
                self.says.put(said)
                return
            if said is None:
                return
            if isinstance(said, grpc.StatusCode):
                context.abort(said, "the test says so")
            yield said

    def _closed(self) -> None:
        self.open -= 1

    def Download(self, request: pb.DownloadRequest, context: Any) -> Iterator[pb.Chunk]:
        self.offsets.append(request.offset)
        content = self.serves.pop(0) if self.serves else BROADCAST
        if isinstance(content, grpc.StatusCode):
            context.abort(content, "the test says so")
        for begin in range(request.offset, len(content), 2**14):
            yield pb.Chunk(data=content[begin : begin + 2**14])
        if self.breaks:
            context.abort(self.breaks.pop(0), "the line breaks")

    def Upload(self, requests: Any, context: Any) -> Iterator[pb.UploadReply]:
        header = next(requests).header
        self.offered.append(header)
        receipt = pb.UploadReceipt(envelope=header.envelope, task=header.task, accepted=True)
        if header.blob.sha256 in self.taken:
            yield pb.UploadReply(receipt=receipt)
            return
        position = self.holds.pop(0) if self.holds else 0
        yield pb.UploadReply(position=position)
        data = b"".join(message.data for message in requests)
        if len(data) != header.blob.size - position:
            return  # the site wanted to know, or broke off
        if position == 0:
            assert header.blob.sha256 == hashlib.sha256(data).digest()
        self.uploads.append((header, data))
        if self.answers:
            self.answers.pop(0)(receipt)
        yield pb.UploadReply(receipt=receipt)


class Worker:
    """Sends the round's number; when told to hold, works until it is let go or its work is ended."""

    digest = PLAN
    training_cases = 3
    validation_cases = 1

    def __init__(self) -> None:
        self.begun: list[tuple[str, int]] = []
        self.ended: list[int] = []
        self.broadcast: Sequence[Any] = ()
        self.error: Exception | None = None
        self.swallow = False
        self.go = threading.Event()
        self.go.set()
        self.stuck = threading.Event()
        self.stuck.set()

    def expected(self, kind: str) -> Sequence[TensorSpec]:
        return (TensorSpec("float32", ()), TensorSpec("float32", (40_000,)))

    def work(self, kind: str, round_number: int, broadcast: Sequence[Any], on_batch: Any) -> Sequence[Any]:
        self.begun.append((kind, round_number))
        self.broadcast = broadcast
        if self.error is not None:
            raise self.error
        try:
            on_batch(1, 2)
            self.stuck.wait(PATIENCE)
            while not self.go.wait(0.005):
                on_batch(1, 2)
        except Exception:
            self.ended.append(round_number)
            if not self.swallow:
                raise
        return [np.full(5, round_number, np.float32)]

    def cases(self, kind: str) -> int:
        return self.training_cases if kind == "train" else self.validation_cases


class Running:
    """An agent in a thread, what it reported, and how it ended."""

    def __init__(
        self,
        address: Address,
        identity: Identity,
        worker: Worker,
        folder: Path | None = None,
        site: str = "alpha",
        audit: Audit = NO_AUDIT,
        gate: Gate | None = None,
        renewed: Callable[[], Identity] | None = None,
    ) -> None:
        self.reports: list[dict[str, Any]] = []
        self._temporary = tempfile.TemporaryDirectory() if folder is None else None
        self.folder = folder or Path(self._temporary.name if self._temporary else "")
        report = self.reports.append
        self.agent = Agent(
            "digits", site, worker, address, identity, self.folder, report, audit=audit, gate=gate, renewed=renewed
        )
        self.end: Future[str] = Future()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            self.end.set_result(self.agent.run())
        except BaseException as error:
            self.end.set_exception(error)

    def said(self, field: str) -> Any:
        """What it last reported of a field."""
        return next((report[field] for report in reversed(self.reports) if field in report), "")

    def state(self) -> str:
        return str(self.said("state"))

    def stop(self) -> None:
        self.agent.stop()
        self.end.exception(PATIENCE)


def hold_at_work(coordinator: Coordinator, worker: Worker) -> None:
    """Gives the site the task of round 1 and waits until its worker is at it, where `worker.go` holds it."""
    worker.go.clear()
    coordinator.say(task=task(1))
    eventually(lambda: worker.begun)


# What a coordinator may make of a receipt: its `answers`. ------------------------------------------------------------


def again(receipt: pb.UploadReceipt) -> None:
    receipt.accepted, receipt.again, receipt.reason = False, True, "damaged"


def of_another_round(receipt: pb.UploadReceipt) -> None:
    receipt.task.round += 1


def of_another_site(receipt: pb.UploadReceipt) -> None:
    receipt.envelope.site = "beta"


def refused(receipt: pb.UploadReceipt) -> None:
    receipt.accepted, receipt.reason = False, "round 1 is closed"
