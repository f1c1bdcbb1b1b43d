"""The agent against a coordinator that does what the test says: work, damage on the line, refusals, and being stopped.

The coordinator here is real gRPC over TLS but holds no rounds; with the real one the agent is tested in
`tests/server/service`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import http.server
import logging
import queue
import ssl
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from client import agent
from client.agent import Agent
from client.gate import Gate
from common.errors import DataError, IdentityError, NetworkError, PlanMismatchError, RunFolderError, WardroundError
from common.security.audit import NO_AUDIT, Audit
from common.security.certificates import Identity, ensure_simulation_identities, issue, load_identity
from common.wire import federation_pb2 as pb
from common.wire import federation_pb2_grpc as rpc
from common.wire.channel import SERVER_OPTIONS, Address, server_credentials
from common.wire.tensors import TensorSpec, decode, encode_chunks

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


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Identity]:
    folder = tmp_path_factory.mktemp("identities")
    ensure_simulation_identities(folder, "digits", ["alpha"], ["127.0.0.1"])
    issue(folder / "renewed", folder / "authority", "alpha", "site")
    return {
        "alpha": load_identity(folder / "sites" / "alpha"),
        "renewed": load_identity(folder / "renewed"),
        "coordinator": load_identity(folder / "coordinator"),
    }


@pytest.fixture
def start(identities: dict[str, Identity]) -> Iterator[Callable[..., Coordinator]]:
    made: list[Coordinator] = []

    def begin(port: int = 0) -> Coordinator:
        made.append(Coordinator(identities["coordinator"], port))
        return made[-1]

    yield begin
    for one in made:
        one.stop()


@pytest.fixture
def coordinator(start: Callable[..., Coordinator]) -> Coordinator:
    return start()


@pytest.fixture
def worker() -> Worker:
    return Worker()


@pytest.fixture
def site(coordinator: Coordinator, identities: dict[str, Identity], worker: Worker) -> Iterator[Running]:
    running = Running(coordinator.address, identities["alpha"], worker)
    yield running
    running.agent.stop()
    running.end.exception(PATIENCE)


# Its identity. ------------------------------------------------------------------------------------------------------


def test_a_renewed_certificate_is_taken_when_the_site_dials_next(
    start: Callable[..., Coordinator], identities: dict[str, Identity], monkeypatch: pytest.MonkeyPatch
) -> None:
    dialled: list[Identity] = []
    current = [identities["alpha"]]
    credentials = agent.channel_credentials

    def noted(identity: Identity) -> Any:
        dialled.append(identity)
        return credentials(identity)

    monkeypatch.setattr(agent, "channel_credentials", noted)
    first = start()
    site = Running(first.address, current[0], Worker(), renewed=lambda: current[0])
    eventually(lambda: site.state() == "connected")
    current[0] = identities["renewed"]
    assert dialled == [identities["alpha"]]  # it goes on over its line
    first.stop()
    start(first.address.port)
    eventually(lambda: site.state() == "connected" and len(dialled) > 1)
    site.stop()
    assert set(dialled[1:]) == {identities["renewed"]}
    assert site.said("certificate_expires") == identities["renewed"].not_after.timestamp()


def test_an_identity_that_cannot_be_read_for_a_while_ends_no_site(
    start: Callable[..., Coordinator], identities: dict[str, Identity]
) -> None:
    asked: list[int] = []

    def unreadable() -> Identity:
        asked.append(1)
        raise IdentityError("north: cannot be read (No such file or directory); check its rights")

    site = Running(start().address, identities["alpha"], Worker(), renewed=unreadable)
    eventually(lambda: site.state() == "connected")
    site.stop()
    assert asked


def test_an_identity_that_ended_and_has_no_successor_ends_the_site(
    start: Callable[..., Coordinator], identities: dict[str, Identity]
) -> None:
    def ended() -> Identity:
        raise IdentityError("north: the certificate expired; ask for a new invitation")

    over = dataclasses.replace(identities["alpha"], not_after=datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC))
    site = Running(start().address, over, Worker(), renewed=ended)
    assert isinstance(site.end.exception(PATIENCE), IdentityError)


# Its tasks. ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name", "cases"), [(pb.TRAIN, "train", 3), (pb.EVALUATE, "evaluate", 1)])
def test_a_task_is_downloaded_worked_on_and_sent(
    coordinator: Coordinator, site: Running, worker: Worker, kind: int, name: str, cases: int
) -> None:
    coordinator.say(task=task(4, kind))
    eventually(lambda: coordinator.uploads)
    assert worker.begun == [(name, 4)]
    assert worker.broadcast[0] == np.float32(0.5)  # the scalar of the task, where the plan has it
    np.testing.assert_array_equal(worker.broadcast[1], np.arange(40_000, dtype=np.float32))
    ((header, data),) = coordinator.uploads
    assert (header.envelope, header.task, header.timing.cases) == (ENVELOPE, task(4, kind).name, cases)
    np.testing.assert_array_equal(decode(data)[0], np.full(5, 4, np.float32))
    eventually(lambda: site.state() == "waiting")
    assert coordinator.heard[0].hello.training_cases == 3
    assert header.broadcast_sha256 == hashlib.sha256(BROADCAST).digest()
    eventually(lambda: len(coordinator.stages()) == 3)
    assert coordinator.stages() == ["download", {"train": "training", "evaluate": "evaluation"}[name], "upload"]
    assert all(message.envelope == ENVELOPE for message in coordinator.heard)


def test_a_broadcast_that_is_here_already_is_not_downloaded_again(coordinator: Coordinator, site: Running) -> None:
    for number in (1, 2):
        coordinator.say(task=task(number))
        eventually(lambda number=number: len(coordinator.uploads) == number)
    assert coordinator.downloads == 1


_DAMAGED = {
    "altered": BROADCAST[:-3] + b"\xff" + BROADCAST[-2:],
    "cut off": BROADCAST[:70_000],
    "empty": b"",
    "too long": BROADCAST + b"x",
}


@pytest.mark.parametrize("damage", _DAMAGED)
def test_a_damaged_broadcast_is_fetched_again(
    coordinator: Coordinator, site: Running, worker: Worker, damage: str
) -> None:
    coordinator.serves = [_DAMAGED[damage]] * 2
    coordinator.say(task=task(1))
    eventually(lambda: coordinator.uploads)
    assert coordinator.downloads == 3
    np.testing.assert_array_equal(worker.broadcast[1], np.arange(40_000, dtype=np.float32))


def test_a_broadcast_damaged_three_times_is_a_failure_and_the_site_stays(
    coordinator: Coordinator, site: Running, worker: Worker
) -> None:
    coordinator.serves = [BROADCAST[:70_000]] * 3
    coordinator.say(task=task(1))
    eventually(coordinator.failures)
    assert coordinator.failures() == ["broadcast or update were damaged on the line, several times"]
    assert worker.begun == []
    coordinator.say(task=task(2))
    eventually(lambda: coordinator.uploads)
    assert coordinator.streams == 1


def test_a_broadcast_of_a_round_that_is_over_is_no_failure(
    coordinator: Coordinator, site: Running, worker: Worker
) -> None:
    coordinator.serves = [grpc.StatusCode.NOT_FOUND]
    coordinator.say(task=task(1))
    eventually(lambda: coordinator.downloads)
    coordinator.say(task=task(2))
    eventually(lambda: coordinator.uploads)
    assert worker.begun == [("train", 2)]
    assert (coordinator.streams, coordinator.failures()) == (1, [])


def _again(receipt: pb.UploadReceipt) -> None:
    receipt.accepted, receipt.again, receipt.reason = False, True, "damaged"


def _of_another_round(receipt: pb.UploadReceipt) -> None:
    receipt.task.round += 1


def _of_another_site(receipt: pb.UploadReceipt) -> None:
    receipt.envelope.site = "beta"


def _refused(receipt: pb.UploadReceipt) -> None:
    receipt.accepted, receipt.reason = False, "round 1 is closed"


@pytest.mark.parametrize("answer", [_again, _of_another_round, _of_another_site])
def test_an_update_without_a_valid_receipt_is_sent_again(
    coordinator: Coordinator, site: Running, worker: Worker, answer: Callable[[pb.UploadReceipt], None]
) -> None:
    coordinator.answers = [answer, answer]
    coordinator.say(task=task(1))
    eventually(lambda: len(coordinator.uploads) == 3)
    assert coordinator.uploads[0] == coordinator.uploads[1] == coordinator.uploads[2]
    eventually(lambda: site.state() == "waiting")
    assert worker.begun == [("train", 1)]
    assert coordinator.failures() == []


def test_an_update_that_arrives_damaged_three_times_is_a_failure(coordinator: Coordinator, site: Running) -> None:
    coordinator.answers = [_again] * 3
    coordinator.say(task=task(1))
    eventually(coordinator.failures)
    assert len(coordinator.uploads) == 3


def test_a_refused_update_is_not_sent_again(coordinator: Coordinator, site: Running) -> None:
    coordinator.answers = [_refused]
    coordinator.say(task=task(1))
    eventually(lambda: coordinator.uploads)
    coordinator.say(task=task(2))
    eventually(lambda: len(coordinator.uploads) == 2)
    assert [header.task.round for header, _ in coordinator.uploads] == [1, 2]
    assert coordinator.failures() == []


def test_data_that_can_no_longer_be_read_is_told_and_ends_the_agent(
    coordinator: Coordinator, site: Running, worker: Worker
) -> None:
    worker.error = DataError("image 0003.tif: cannot be read")
    coordinator.say(task=task(1))
    eventually(coordinator.failures)
    assert coordinator.failures() == ["its data can no longer be read"]  # and names no file
    with pytest.raises(DataError, match=r"0003\.tif"):
        site.end.result(PATIENCE)


def test_a_work_folder_that_can_no_longer_be_used_is_told_and_ends_the_agent(
    coordinator: Coordinator, site: Running, worker: Worker
) -> None:
    worker.error = RunFolderError("wardround-alpha/personal: cannot be written")
    coordinator.say(task=task(1))
    eventually(coordinator.failures)
    assert coordinator.failures() == ["its work folder can no longer be used"]
    with pytest.raises(RunFolderError, match="wardround-alpha"):
        site.end.result(PATIENCE)


# The end of its work. -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("swallow", [False, True], ids=["raising", "returning"])
def test_a_newer_task_ends_the_work_on_an_older_one(
    coordinator: Coordinator, site: Running, worker: Worker, swallow: bool
) -> None:
    worker.swallow = swallow  # as data sets do: the work ends early and returns something
    worker.go.clear()
    coordinator.say(task=task(1))
    eventually(lambda: worker.begun)
    coordinator.say(task=task(2))
    eventually(lambda: len(worker.begun) == 2)
    assert worker.ended == [1]
    worker.go.set()
    eventually(lambda: coordinator.uploads)
    assert [header.task.round for header, _ in coordinator.uploads] == [2]
    assert (coordinator.streams, coordinator.failures()) == (1, [])


def test_of_several_newer_tasks_the_newest_is_done(coordinator: Coordinator, site: Running, worker: Worker) -> None:
    worker.go.clear()
    coordinator.say(task=task(1))
    eventually(lambda: worker.begun)
    for number in (2, 3, 4):
        coordinator.say(task=task(number))
    eventually(lambda: worker.begun[-1] == ("train", 4))
    worker.go.set()
    eventually(lambda: coordinator.uploads)
    assert [header.task.round for header, _ in coordinator.uploads] == [4]


def test_the_end_of_the_study_ends_the_work_and_the_agent(
    coordinator: Coordinator, site: Running, worker: Worker
) -> None:
    worker.go.clear()
    coordinator.say(task=task(1))
    eventually(lambda: worker.begun)
    coordinator.say(finished=pb.Finished(reason="study digits is complete"))
    assert site.end.result(PATIENCE) == "study digits is complete"
    assert worker.ended == [1]
    assert coordinator.uploads == []
    assert site.state() == "finished"


def test_a_stop_ends_work_at_once(
    coordinator: Coordinator, site: Running, worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "wardround.site")
    worker.go.clear()
    coordinator.say(task=task(1))
    eventually(lambda: worker.begun)
    site.agent.stop()
    assert site.end.result(PROMPT) == ""
    assert worker.ended == [1]
    assert coordinator.uploads == []
    assert coordinator.left() == ["stopped by its operator"]
    assert caplog.messages[-1] == STOPPED
    assert not any("given up" in message for message in caplog.messages)


def test_a_stop_ends_the_wait_for_a_task_at_once(coordinator: Coordinator, site: Running) -> None:
    eventually(lambda: site.state() == "connected")
    site.agent.stop()
    assert site.end.result(PROMPT) == ""
    assert coordinator.left() == ["stopped by its operator"]


def test_a_stop_does_not_wait_for_a_batch_that_takes_long(
    coordinator: Coordinator, site: Running, worker: Worker
) -> None:
    worker.stuck.clear()
    coordinator.say(task=task(1))
    eventually(lambda: worker.begun)
    site.agent.stop()
    assert site.end.result(PROMPT) == ""
    worker.stuck.set()


def test_a_stop_does_not_wait_for_a_line_that_is_stuck(coordinator: Coordinator, site: Running) -> None:
    coordinator.answers = [lambda receipt: time.sleep(PROMPT + 2)]
    coordinator.say(task=task(1))
    eventually(lambda: coordinator.uploads)
    site.agent.stop()
    assert site.end.result(PROMPT) == ""
    assert list(site.folder.glob("updates/*/update.json"))


def test_a_stop_ends_the_search_for_a_coordinator_at_once(
    identities: dict[str, Identity], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "wardround.site")
    site = Running(Address("127.0.0.1", 1), identities["alpha"], Worker())  # nobody is there
    eventually(lambda: site.state() == "reconnecting")
    site.agent.stop()
    assert site.end.result(PROMPT) == ""
    assert caplog.messages[-1] == STOPPED


# The coordinator gone, or another. ----------------------------------------------------------------------------------


def test_a_coordinator_that_goes_away_and_comes_back_is_found_again_and_the_work_went_on(
    start: Callable[..., Coordinator], coordinator: Coordinator, site: Running, worker: Worker
) -> None:
    worker.go.clear()
    coordinator.say(task=task(1))
    eventually(lambda: worker.begun)
    coordinator.stop()
    eventually(lambda: "cannot be reached" in site.said("notice"))
    assert site.state() == "training"
    back = start(coordinator.address.port)
    eventually(lambda: back.heard)
    assert back.heard[0].hello.training_cases == 3
    assert back.heard[0].hello.process == coordinator.heard[0].hello.process
    again = task(1)
    again.name.attempt = 2
    back.say(task=again)
    eventually(lambda: "training" in back.stages())
    worker.go.set()
    eventually(lambda: back.uploads)
    assert back.uploads[0][0].task.attempt == 2
    assert (worker.begun, worker.ended) == ([("train", 1)], [])
    assert back.downloads == 0


def test_work_that_ends_while_the_coordinator_is_away_is_sent_when_it_is_back(
    start: Callable[..., Coordinator], coordinator: Coordinator, site: Running, worker: Worker
) -> None:
    worker.go.clear()
    coordinator.say(task=task(1))
    eventually(lambda: worker.begun)
    coordinator.stop()
    worker.go.set()
    eventually(lambda: list(site.folder.glob("updates/*/update.json")))
    back = start(coordinator.address.port)
    back.say(task=task(1))
    eventually(lambda: back.uploads)
    assert worker.begun == [("train", 1)]
    eventually(lambda: not list(site.folder.glob("updates/*/update.*")))


def test_work_that_nobody_waits_for_any_more_when_the_coordinator_is_back_is_given_up(
    start: Callable[..., Coordinator], coordinator: Coordinator, site: Running, worker: Worker
) -> None:
    worker.go.clear()
    coordinator.say(task=task(1))
    eventually(lambda: worker.begun)
    coordinator.stop()
    back = start(coordinator.address.port)
    back.say(task=task(2))
    eventually(lambda: len(worker.begun) == 2)
    worker.go.set()
    eventually(lambda: back.uploads)
    assert worker.ended == [1]
    assert [header.task.round for header, _ in back.uploads] == [2]


def test_a_coordinator_that_pauses_is_told_of_and_dialled_on(
    start: Callable[..., Coordinator], coordinator: Coordinator, site: Running
) -> None:
    words = "the coordinator was stopped and will be back"
    coordinator.say(pausing=pb.Pausing(reason=words))
    eventually(lambda: site.said("notice") == words)
    coordinator.stop()
    eventually(lambda: site.said("notice").startswith(f"{words}; the coordinator at "))
    back = start(coordinator.address.port)
    eventually(lambda: back.heard and site.said("notice") == "")


def test_a_coordinator_that_is_not_there_is_dialled_for_ever_and_told_once_a_minute(
    identities: dict[str, Identity], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "wardround.site")
    site = Running(Address("127.0.0.1", 1), identities["alpha"], Worker())
    eventually(lambda: len(site.reports) >= 5)  # 1 for `connecting`, 4 failed dials
    words = "the coordinator at 127.0.0.1:1 cannot be reached: nothing listens there (connection refused)"
    assert site.reports[-1] == {"state": "reconnecting", "notice": words, "connected": False}
    assert caplog.messages == [f"{words}; trying until it answers"]
    monkeypatch.setattr(agent, "_SILENT_SECONDS", 0.0)
    site.agent._silent_until = 0.0  # the minute is over
    eventually(lambda: len(caplog.messages) >= 2)
    site.agent.stop()
    site.end.result(PROMPT)


class _Http(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def web(identities: dict[str, Identity], tmp_path: Path) -> Iterator[Callable[[bool], int]]:
    """Starts a web server, with the coordinator's own certificate or without TLS; returns its port."""
    made: list[http.server.ThreadingHTTPServer] = []

    def begin(tls: bool) -> int:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Http)
        server.handle_error = lambda *_: None  # type: ignore[method-assign,assignment]
        if tls:
            pem = tmp_path / "identity.pem"
            pem.write_bytes(identities["coordinator"].certificate + identities["coordinator"].key)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(pem)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        made.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server.server_port

    yield begin
    for server in made:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
def test_a_web_server_is_no_coordinator(identities: dict[str, Identity], web: Callable[[bool], int], tls: bool) -> None:
    port = web(tls)
    site = Running(Address("127.0.0.1", port), identities["alpha"], Worker())
    with pytest.raises(NetworkError, match=rf"127\.0\.0\.1:{port}: .* no coordinator .*; correct --coordinator"):
        site.end.result(PATIENCE)


def test_something_else_that_answers_where_the_coordinator_was_is_waited_for_to_go(
    start: Callable[..., Coordinator], coordinator: Coordinator, identities: dict[str, Identity], site: Running
) -> None:
    eventually(lambda: site.state() == "connected")
    coordinator.stop()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", coordinator.address.port), _Http)  # a VPN's log-in page
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    reports = len(site.reports)
    eventually(lambda: len(site.reports) > reports + 4)
    server.shutdown()
    server.server_close()
    back = start(coordinator.address.port)
    eventually(lambda: back.heard)


def test_a_coordinator_whose_certificate_has_another_name_is_refused(
    coordinator: Coordinator, identities: dict[str, Identity]
) -> None:
    site = Running(Address("localhost", coordinator.address.port), identities["alpha"], Worker())
    with pytest.raises(NetworkError, match=r"does not name 'localhost'; correct --coordinator.* --host localhost"):
        site.end.result(PATIENCE)


def test_a_coordinator_of_another_authority_is_refused(coordinator: Coordinator, tmp_path: Path) -> None:
    ensure_simulation_identities(tmp_path, "digits", ["alpha"], ["127.0.0.1"])
    site = Running(coordinator.address, load_identity(tmp_path / "sites" / "alpha"), Worker())
    with pytest.raises(IdentityError, match="is not the one this site's identity was made for"):
        site.end.result(PATIENCE)


@pytest.mark.parametrize("end", [None, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL], ids=str)
def test_a_stream_that_ends_is_opened_again(coordinator: Coordinator, site: Running, end: Any) -> None:
    coordinator.says.put(end)
    eventually(lambda: coordinator.streams == 2)
    coordinator.say(task=task(1))
    eventually(lambda: coordinator.uploads)


@pytest.mark.parametrize(
    ("code", "error", "words"),
    [
        (grpc.StatusCode.FAILED_PRECONDITION, PlanMismatchError, "use the coordinator's study file"),
        (grpc.StatusCode.PERMISSION_DENIED, IdentityError, "refuses this site: the test says so"),
        (grpc.StatusCode.UNAUTHENTICATED, IdentityError, "refuses this site: the test says so"),
        (grpc.StatusCode.ABORTED, IdentityError, "refuses this site: the test says so"),
        (grpc.StatusCode.UNIMPLEMENTED, NetworkError, "that is no coordinator"),
    ],
    ids=lambda value: value.name if isinstance(value, grpc.StatusCode) else "",
)
def test_a_refusal_is_final(
    coordinator: Coordinator, site: Running, code: grpc.StatusCode, error: type[WardroundError], words: str
) -> None:
    coordinator.says.put(code)
    with pytest.raises(error, match=words):
        site.end.result(PATIENCE)
    assert coordinator.streams == 1


@pytest.mark.parametrize("other", [{"study": "letters"}, {"plan_digest": b"\x08" * 32}, {"site": "beta"}], ids=str)
def test_a_task_of_another_study_plan_or_site_is_not_begun(
    coordinator: Coordinator, site: Running, worker: Worker, other: dict[str, Any]
) -> None:
    envelope = pb.Envelope(**{"study": "digits", "plan_digest": PLAN, "site": "alpha"} | other)
    coordinator.says.put(pb.CoordinatorMessage(envelope=envelope, task=task(1)))
    with pytest.raises(PlanMismatchError):
        site.end.result(PATIENCE)
    assert worker.begun == []
    assert coordinator.downloads == 0
