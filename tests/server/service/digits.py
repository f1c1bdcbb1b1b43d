"""A round without training, and both ends of its line: over gRPC and TLS.

A round here broadcasts its state, and every site sends one number in many copies. The round's result reads the numbers
as the digits of one, in the order in which they were added: 123 is "1, then 2, then 3".
"""

from __future__ import annotations

import asyncio
import hashlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
import tensorflow_federated as tff

from common.security.certificates import Identity
from common.study import parse_study
from common.wire import federation_pb2 as pb
from common.wire import federation_pb2_grpc as rpc
from common.wire.channel import CHANNEL_OPTIONS, SERVER_OPTIONS, Address, channel_credentials, server_credentials
from common.wire.tensors import TensorSpec, encode_chunks
from server.federation import Call, Federation, SiteData
from server.journal import Journal
from server.rounds import Stage
from server.service import answer

PATIENCE = 20.0  # seconds until a test gives up; nothing here takes one
SITES = ("alpha", "beta", "gamma")
DIGITS = {"alpha": 1, "beta": 2, "gamma": 3, "delta": 4}
SIZE = 200
STUDY = parse_study(
    """
study: digits
seed: 1
task: {dimensions: 2, channels: 1, classes: [background, cell]}
model: {filters: 4, depth: 2}
preprocessing: {patch: [16, 16]}
training: {rounds: 9}
cohort: {sites: [alpha, beta, gamma], quorum: 2, deadline: 10m}
"""
)
STATE = tff.to_type([("weights", (np.float32, [SIZE])), ("rate", np.float32)])


class Digits:
    """A round of a plan whose result shows which numbers were added and in which order; nothing is compiled."""

    process = SimpleNamespace(initialize=object(), next=object())
    state_type = STATE
    result_type = tff.to_type([("state", STATE), ("metrics", [("count", np.int32)])])
    broadcast = (TensorSpec("float32", (SIZE,)), TensorSpec("float32", ()))
    sent = (TensorSpec("float32", (SIZE,)), TensorSpec("int32", ()))
    secure = ()

    def initialize(self) -> list[Any]:
        return [np.zeros(SIZE, np.float32), np.float32(0.5)]

    def prepare(self, weights: Any, rate: Any) -> list[Any]:
        return [weights, rate]

    def zero(self) -> list[Any]:
        return [np.zeros(SIZE, np.float32), np.int32(0)]

    def accumulate(self, total: list[Any], update: Sequence[Any]) -> None:
        total[:] = [total[0] * 10 + update[0], total[1] + update[1]]

    def report(self, total: Any, count: Any) -> list[Any]:
        return [total, count]

    def update(self, state: Sequence[Any], report: Sequence[Any]) -> list[Any]:
        return [report[0], state[1], report[1]]


PLAN: Any = SimpleNamespace(study=STUDY, train=Digits(), evaluate=None, digest=b"\x07" * 32)


def update_of(site: str) -> list[Any]:
    """What the site sends."""
    return [np.full(SIZE, DIGITS[site], np.float32), np.int32(1)]


def blob_of(tensors: Sequence[Any]) -> bytes:
    """The tensors as they cross the wire."""
    return b"".join(encode_chunks(tensors))


def broadcast_of(weight: float) -> bytes:
    """What a round on a state of this weight broadcasts."""
    return blob_of([np.full(SIZE, weight, np.float32)])


def sha256(blob: bytes) -> bytes:
    return hashlib.sha256(blob).digest()


def eventually(condition: Callable[[], Any]) -> Any:
    """Waits until the condition holds, and returns what it returned."""
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
    return found


class Coordinator:
    """A federation and its service on a real port, in the loop of another thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, folder: Path, identity: Identity, port: int = 0) -> None:
        self._loop = loop
        self.published = folder / "published"
        self.updates = folder / "updates"
        self.updates.mkdir(exist_ok=True)
        self.journal_file = folder / "journal.sqlite"
        self._rounds: list[Future[Any]] = []
        self._stopped = False
        self._do(self._start(identity, port))

    async def _start(self, identity: Identity, port: int) -> None:
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        port = self._server.add_secure_port(f"127.0.0.1:{port}", server_credentials(identity))
        self.address = Address("127.0.0.1", port)
        self.journal = Journal(self.journal_file)
        self.federation = Federation(PLAN, self.updates, self.journal)
        await answer(self._server, self.federation, self.published)

    def open(self, number: int = 1, *, weight: float = 0.0) -> Future[Any]:
        """Begins a round on a state of this weight; the future holds its result."""
        state = [np.full(SIZE, weight, np.float32), np.float32(0.5)]
        argument = (state, [SiteData(site, number) for site in SITES])
        result = asyncio.run_coroutine_threadsafe(self.federation.invoke(PLAN.train.process.next, argument), self._loop)
        self._rounds.append(result)
        eventually(lambda: result.done() or (self.call is not None and self.call.round.number == number))
        return result

    @property
    def call(self) -> Call | None:
        return self.federation.call

    def stage(self, site: str) -> Stage:
        """Where the site is within the round under way."""
        assert self.call is not None
        return self.call.round.answers[site].stage

    def pass_deadline(self) -> None:
        """As if the round's time were over."""

        async def expire() -> None:
            assert self.call is not None
            self.call.deadline = 0.0
            self.call.announce()

        self._do(expire())

    def pause(self, reason: str) -> None:
        """As when the coordinator is stopped."""
        self._loop.call_soon_threadsafe(self.federation.pause, reason)

    def touch(self, site: str) -> None:
        """As when a site is revoked."""
        self._loop.call_soon_threadsafe(self.federation.give_task, site)

    def finish(self) -> None:
        """The study is over."""
        self._loop.call_soon_threadsafe(self.federation.finish, "over")

    def files(self) -> list[str]:
        """What lies in the folder of updates, files that are still being written among them."""
        return sorted(path.name for path in self.updates.iterdir())

    def stop(self) -> None:
        """Ends as a process does, in the middle of whatever is under way."""
        if self._stopped:
            return
        self._stopped = True
        for result in self._rounds:
            result.cancel()
        self._do(self._server.stop(grace=0))
        self.journal.close()

    def _do(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(PATIENCE)


class Stream:
    """A control stream in raw messages."""

    def __init__(self, site: Site, envelope: pb.Envelope, process: bytes) -> None:
        self._outbox: queue.SimpleQueue[pb.SiteMessage | None] = queue.SimpleQueue()
        self.say(envelope, hello=pb.Hello(version="test", training_cases=1, process=process))
        self._call = site.stub.Attend(iter(self._outbox.get, None), timeout=PATIENCE)

    def say(self, envelope: pb.Envelope, **body: Any) -> None:
        self._outbox.put(pb.SiteMessage(envelope=envelope, **body))

    def next(self) -> Any:
        """The next message's body."""
        message = next(self._call)
        return getattr(message, message.WhichOneof("body"))

    def refusal(self) -> tuple[grpc.StatusCode, str]:
        """How the stream ends."""
        return refusal(lambda: list(self._call))

    def close(self) -> None:
        self._outbox.put(None)
        self._call.cancel()


class Upload:
    """An upload of which the test decides when each part is sent."""

    def __init__(self, site: Site, header: pb.UploadHeader) -> None:
        self._messages: queue.SimpleQueue[pb.UploadMessage | None] = queue.SimpleQueue()
        self.say(header=header)
        self._call = site.stub.Upload(iter(self._messages.get, None), timeout=PATIENCE)

    def say(self, **body: Any) -> None:
        self._messages.put(pb.UploadMessage(**body))

    def send(self, data: bytes, piece: int = 100) -> None:
        for begin in range(0, len(data), piece):
            self.say(data=data[begin : begin + piece])

    def next(self) -> Any:
        """The next answer: a position, or the receipt."""
        reply = next(self._call)
        return getattr(reply, reply.WhichOneof("body"))

    def end(self) -> pb.UploadReceipt:
        """Nothing more is sent; the receipt."""
        self._messages.put(None)
        *_, last = self._call
        assert last.WhichOneof("body") == "receipt"
        return last.receipt

    def break_off(self) -> None:
        self._messages.put(None)
        self._call.cancel()


class Site:
    """A site in raw calls: says what an agent says, and what it never would."""

    def __init__(self, coordinator: Coordinator, name: str, identity: Identity) -> None:
        self.name = name
        self._channel = grpc.secure_channel(
            str(coordinator.address), channel_credentials(identity), options=CHANNEL_OPTIONS
        )
        self.stub: Any = rpc.FederationStub(self._channel)  # type: ignore[no-untyped-call]
        self.envelope = pb.Envelope(study="digits", plan_digest=PLAN.digest, site=name)

    def attend(self, envelope: pb.Envelope | None = None, process: bytes = b"") -> Stream:
        return Stream(self, envelope or self.envelope, process)

    def header(
        self, blob: bytes, *, number: int = 1, envelope: pb.Envelope | None = None, weight: float = 0.0
    ) -> pb.UploadHeader:
        """What this site says of an update; its round broadcasts a state of this weight."""
        return pb.UploadHeader(
            envelope=envelope or self.envelope,
            task=pb.TaskName(kind=pb.TRAIN, round=number, attempt=1),
            blob=pb.Blob(sha256=sha256(blob), size=len(blob)),
            broadcast_sha256=sha256(broadcast_of(weight)),
        )

    def begin_upload(self, blob: bytes, **of: Any) -> Upload:
        """Offers an update; see `header`."""
        return Upload(self, self.header(blob, **of))

    def upload(self, tensors: Sequence[Any] | None = None, **of: Any) -> pb.UploadReceipt:
        """Sends a whole update, the site's own unless given another."""
        blob = blob_of(update_of(self.name) if tensors is None else tensors)
        upload = self.begin_upload(blob, **of)
        answer = upload.next()
        if isinstance(answer, int):
            upload.send(blob[answer:])
            answer = upload.next()
        upload.break_off()
        return answer

    def close(self) -> None:
        self._channel.close()


class Worker:
    """Sends the site's digit; works until it is let go, when told to hold."""

    training_cases = 3
    validation_cases = 1

    def __init__(self, site: str, *, digest: bytes = PLAN.digest, hold: bool = False) -> None:
        self.digest = digest
        self.begun: list[int] = []
        self.go = threading.Event()
        self._update = update_of(site)
        if not hold:
            self.go.set()

    def expected(self, kind: str) -> Sequence[TensorSpec]:
        return PLAN.train.broadcast

    def work(self, kind: str, round_number: int, broadcast: Sequence[Any], on_batch: Any) -> Sequence[Any]:
        self.begun.append(round_number)
        on_batch(1, 2)
        while not self.go.wait(0.005):
            on_batch(1, 2)
        return self._update

    def cases(self, kind: str) -> int:
        return self.training_cases


def begun_upload(coordinator: Coordinator, site: Site, blob: bytes, size: int) -> Upload:
    """An upload of which so many bytes are at the coordinator."""
    upload = site.begin_upload(blob)
    assert upload.next() == 0
    upload.send(blob[:size])
    eventually(lambda: [path.stat().st_size for path in coordinator.updates.glob("*.upload")] == [size])
    return upload


def refusal(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str]:
    """The status and the words with which the call fails."""
    with pytest.raises(grpc.RpcError) as raised:
        call()
    error: Any = raised.value
    return error.code(), error.details()


def summed(result: Future[Any]) -> int:
    """The numbers that were added, in their order."""
    found = result.result(PATIENCE)
    (number,) = set(found["state"]["weights"].tolist())
    assert found["metrics"]["count"] == len(str(int(number)))
    return int(number)


WHOLE = blob_of(update_of("alpha"))
"""What alpha sends, whole."""
