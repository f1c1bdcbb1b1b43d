"""What the coordinator takes from sites, what it refuses, and what it makes of it: over gRPC and TLS, without training.

A round here broadcasts its state, and every site sends one number in many copies. The round's result reads the numbers
as the digits of one, in the order in which they were added: 123 is "1, then 2, then 3".
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import itertools
import json
import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
import tensorflow_federated as tff

from client.agent import Agent
from client.fetch import fetch
from common.errors import IdentityError, PlanMismatchError, RunFolderError
from common.security.audit import Audit
from common.security.certificates import Identity, ensure_simulation_identities, issue, load_identity
from common.study import parse_study
from common.wire import federation_pb2 as pb
from common.wire import federation_pb2_grpc as rpc
from common.wire.channel import CHANNEL_OPTIONS, SERVER_OPTIONS, Address, channel_credentials, server_credentials
from common.wire.tensors import TensorSpec, decode, encode_chunks, read_tensors
from server.federation import Call, Federation, SiteData
from server.journal import Journal
from server.rounds import Stage
from server.service import answer
from server.serving import FinishedService

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


def refusal(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str]:
    """The status and the words with which the call fails."""
    with pytest.raises(grpc.RpcError) as raised:
        call()
    error: Any = raised.value
    return error.code(), error.details()


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    made = asyncio.new_event_loop()
    thread = threading.Thread(target=made.run_forever, daemon=True)
    thread.start()
    yield made
    made.call_soon_threadsafe(made.stop)
    thread.join()
    made.close()


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Identity]:
    """The coordinator's and the sites', and that of `delta`, whom the authority knows but the study does not."""
    folder = tmp_path_factory.mktemp("identities")
    sites = [*SITES, "delta"]
    ensure_simulation_identities(folder, "digits", sites, ["127.0.0.1"])
    found = {site: load_identity(folder / "sites" / site) for site in sites}
    for role in ("observer", "investigator"):
        issue(folder / role, folder / "authority", "alpha", role)  # type: ignore[arg-type]
        found[role] = load_identity(folder / role)
    return found | {"coordinator": load_identity(folder / "coordinator")}


@pytest.fixture
def started(
    loop: asyncio.AbstractEventLoop, identities: dict[str, Identity], tmp_path: Path
) -> Iterator[Callable[..., Coordinator]]:
    """Starts coordinators on one folder, one after the other."""
    made: list[Coordinator] = []

    def make(port: int = 0) -> Coordinator:
        made.append(Coordinator(loop, tmp_path, identities["coordinator"], port))
        return made[-1]

    yield make
    for one in made:
        with contextlib.suppress(sqlite3.Error):
            one.stop()


@pytest.fixture
def coordinator(started: Callable[..., Coordinator]) -> Coordinator:
    return started()


@pytest.fixture
def connect(identities: dict[str, Identity]) -> Iterator[Callable[..., Site]]:
    """Opens a raw channel to a coordinator as one of the sites."""
    made: list[Site] = []

    def make(coordinator: Coordinator, name: str) -> Site:
        made.append(Site(coordinator, name, identities[name]))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def alpha(coordinator: Coordinator, connect: Callable[..., Site]) -> Site:
    return connect(coordinator, "alpha")


@pytest.fixture
def beta(coordinator: Coordinator, connect: Callable[..., Site]) -> Site:
    return connect(coordinator, "beta")


@pytest.fixture
def gamma(coordinator: Coordinator, connect: Callable[..., Site]) -> Site:
    return connect(coordinator, "gamma")


@pytest.fixture
def run(identities: dict[str, Identity], tmp_path: Path) -> Iterator[Callable[..., Future[str]]]:
    """Runs an agent in a thread; the future holds what its `run` returns or raises."""
    agents: list[tuple[Agent, Future[str]]] = []

    def begin(coordinator: Coordinator, site: str, worker: Worker) -> Future[str]:
        folder = tmp_path / "work" / f"{site}-{len(agents)}"
        agent = Agent("digits", site, worker, coordinator.address, identities[site], folder)
        end: Future[str] = Future()
        agents.append((agent, end))

        def body() -> None:
            try:
                end.set_result(agent.run())
            except BaseException as error:
                end.set_exception(error)

        threading.Thread(target=body, daemon=True).start()
        return end

    yield begin
    for agent, _ in agents:
        agent.stop()
    for _, end in agents:
        end.exception(PATIENCE)


# What sites fetch. -------------------------------------------------------------------------------------------------


def test_a_site_fetches_a_version_while_a_round_is_under_way_and_needs_no_plan(
    coordinator: Coordinator, identities: dict[str, Identity], tmp_path: Path
) -> None:
    round_ = coordinator.open()
    version = coordinator.published / "v1"
    version.mkdir(parents=True)
    (version / "model.tflite").write_bytes(b"x" * 1000)
    entry = {"file": "model.tflite", "sha256": sha256(b"x" * 1000).hex()}
    manifest = {"format": 1, "study": "digits", "version": "v1", "variants": [entry], "documents": {}}
    (version / "manifest.json").write_text(json.dumps(manifest))
    seen: list[bytes] = []

    def verify(manifest: bytes, folder: Path) -> None:
        seen.append(manifest)

    found = fetch(coordinator.address, identities["beta"], tmp_path / "out", study="digits", verify=verify)
    assert seen == [(version / "manifest.json").read_bytes()]
    assert (found.folder / "model.tflite").read_bytes() == b"x" * 1000
    assert not round_.done()
    with pytest.raises(IdentityError, match="'delta' is not in the cohort"):
        fetch(coordinator.address, identities["delta"], tmp_path / "out", verify=verify)


def test_a_site_that_first_connects_in_a_later_round_is_given_that_rounds_task(
    coordinator: Coordinator, alpha: Site, beta: Site, gamma: Site
) -> None:
    for number in (1, 2):
        result = coordinator.open(number)
        alpha.upload(number=number)
        beta.upload(number=number)
        if number == 1:
            coordinator.pass_deadline()
            result.result(PATIENCE)
    stream = gamma.attend()
    assert stream.next().rounds == STUDY.training.rounds  # the welcome
    assert stream.next().name.round == 2
    assert gamma.upload(number=2).accepted
    state = result.result(PATIENCE)["state"]
    assert state["weights"][0] == 123  # the digits of alpha, beta and gamma
    stream.close()


# Who may speak, and by which plan. ----------------------------------------------------------------------------------

_CALLS: dict[str, Callable[[Site, pb.Envelope], Any]] = {
    "attend": lambda site, envelope: list(site.stub.Attend(iter([_hello(envelope)]), timeout=PATIENCE)),
    "download": lambda site, envelope: list(site.stub.Download(pb.DownloadRequest(envelope=envelope))),
    "upload": lambda site, envelope: site.upload(envelope=envelope),
}


def _hello(envelope: pb.Envelope) -> pb.SiteMessage:
    return pb.SiteMessage(envelope=envelope, hello=pb.Hello(version="test"))


@pytest.mark.parametrize("call", _CALLS)
def test_a_message_in_the_name_of_another_site_is_refused(coordinator: Coordinator, alpha: Site, call: str) -> None:
    coordinator.open()
    envelope = pb.Envelope(study="digits", plan_digest=PLAN.digest, site="beta")
    code, words = refusal(lambda: _CALLS[call](alpha, envelope))
    assert code is grpc.StatusCode.PERMISSION_DENIED
    assert "'alpha'" in words
    assert "'beta'" in words
    assert coordinator.files() == []


def test_a_later_message_in_the_name_of_another_site_ends_the_stream(coordinator: Coordinator, alpha: Site) -> None:
    coordinator.open()
    stream = alpha.attend()
    stream.next()
    task = stream.next()
    stolen = pb.Envelope(study="digits", plan_digest=PLAN.digest, site="beta")
    stream.say(stolen, failure=pb.Failure(task=task.name, reason="not mine to say"))
    assert stream.refusal()[0] is grpc.StatusCode.PERMISSION_DENIED
    assert coordinator.stage("beta") is Stage.WAITING


@pytest.mark.parametrize("call", _CALLS)
def test_a_site_outside_the_cohort_is_refused(
    coordinator: Coordinator, connect: Callable[..., Site], call: str
) -> None:
    delta = connect(coordinator, "delta")
    code, words = refusal(lambda: _CALLS[call](delta, delta.envelope))
    assert code is grpc.StatusCode.PERMISSION_DENIED
    assert "'delta' is not in the cohort" in words
    assert "delta" not in coordinator.federation.connections


@pytest.mark.parametrize("call", _CALLS)
@pytest.mark.parametrize("role", ["observer", "investigator"])
def test_a_certificate_of_another_role_is_refused_whatever_its_name(
    coordinator: Coordinator, identities: dict[str, Identity], call: str, role: str
) -> None:
    """Here without `server.access` before it: the service looks for itself."""
    coordinator.open()
    site = Site(coordinator, "alpha", identities[role])
    code, words = refusal(lambda: _CALLS[call](site, site.envelope))
    site.close()
    assert code is grpc.StatusCode.PERMISSION_DENIED
    assert f"the certificate is of {role} 'alpha'" in words
    assert "alpha" not in coordinator.federation.connections


def test_a_site_that_is_barred_is_not_waited_for(
    coordinator: Coordinator, alpha: Site, beta: Site, gamma: Site
) -> None:
    round_ = coordinator.open()
    stream = gamma.attend()
    stream.next(), stream.next()
    alpha.upload()
    beta.upload()
    assert not round_.done()
    coordinator.federation.barred = lambda site: "its certificate was revoked" if site == "gamma" else ""
    coordinator.touch("gamma")
    assert round_.result(PATIENCE)["state"]["weights"][0] == 12
    round_ = coordinator.open(2)  # nor in the next one
    assert coordinator.stage("gamma") is Stage.FAILED
    alpha.upload(number=2)
    beta.upload(number=2)
    assert round_.result(PATIENCE)["state"]["weights"][0] == 12


@pytest.mark.parametrize("call", _CALLS)
@pytest.mark.parametrize("other", [{"plan_digest": b"\x08" * 32}, {"study": "letters"}], ids=["plan", "study"])
def test_another_plan_or_study_is_refused(
    coordinator: Coordinator, alpha: Site, call: str, other: dict[str, Any]
) -> None:
    envelope = pb.Envelope(**{"study": "digits", "plan_digest": PLAN.digest, "site": "alpha"} | other)
    code, words = refusal(lambda: _CALLS[call](alpha, envelope))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert words.startswith("plan: the coordinator runs study 'digits' with plan 0707070707070707")


def test_an_agent_with_another_plan_gives_up(coordinator: Coordinator, run: Callable[..., Future[str]]) -> None:
    end = run(coordinator, "alpha", Worker("alpha", digest=b"\x08" * 32))
    with pytest.raises(
        PlanMismatchError, match=r"0707070707070707.*0808080808080808.*use the coordinator's study file"
    ):
        end.result(PATIENCE)


def test_a_site_with_another_plan_is_told_of_once_at_the_coordinator_until_it_comes_with_the_right_one(
    coordinator: Coordinator, alpha: Site, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "wardround.coordinator")

    def come(plan: int) -> None:
        stream = alpha.attend(pb.Envelope(study="digits", plan_digest=bytes([plan]) * 32, site="alpha"))
        assert stream.refusal()[0] is grpc.StatusCode.FAILED_PRECONDITION

    for _ in range(3):
        come(8)
    assert coordinator.federation.rejected == {"alpha": "study 'digits' and plan 0808080808080808"}
    (words,) = caplog.messages
    assert words.startswith("alpha came with another plan: study 'digits' and plan 0808080808080808, the coordinator")
    assert "with plan 0707070707070707; start the site with the coordinator's study file" in words
    for plan in range(20, 50):
        come(plan)
    assert len(caplog.messages) == 10  # whatever it comes with: the log is not to be filled
    right = alpha.attend()
    assert isinstance(right.next(), pb.Welcome)
    eventually(lambda: not coordinator.federation.rejected)
    come(8)
    assert coordinator.federation.rejected == {}  # the site is here; somebody else has started a second one
    right.close()


def test_a_second_stream_of_a_site_takes_over_and_the_first_is_told(coordinator: Coordinator, alpha: Site) -> None:
    coordinator.open()
    first = alpha.attend()
    assert [type(first.next()) for _ in range(2)] == [pb.Welcome, pb.Task]
    second = alpha.attend()
    assert [type(second.next()) for _ in range(2)] == [pb.Welcome, pb.Task]
    code, words = first.refusal()
    assert code is grpc.StatusCode.ABORTED
    assert "another process attends as 'alpha'" in words
    assert coordinator.stage("alpha") is Stage.ASSIGNED  # the end of the first stream is not the end of the site
    second.close()
    eventually(lambda: coordinator.stage("alpha") is Stage.WAITING)


def test_a_second_stream_of_the_same_process_is_its_own_after_a_broken_line(
    coordinator: Coordinator, alpha: Site
) -> None:
    coordinator.open()
    first = alpha.attend(process=b"one process")
    assert [type(first.next()) for _ in range(2)] == [pb.Welcome, pb.Task]
    second = alpha.attend(process=b"one process")
    assert [type(second.next()) for _ in range(2)] == [pb.Welcome, pb.Task]
    assert first.refusal()[0] is grpc.StatusCode.UNAVAILABLE  # which no site takes as final
    second.close()


def test_a_site_that_leaves_is_taken_off_at_once(coordinator: Coordinator, alpha: Site) -> None:
    coordinator.open()
    stream = alpha.attend()
    assert [type(stream.next()) for _ in range(2)] == [pb.Welcome, pb.Task]
    stream.say(alpha.envelope, leaving=pb.Leaving(reason="stopped by its operator"))
    eventually(lambda: "alpha" not in coordinator.federation.connections)
    assert coordinator.stage("alpha") is Stage.WAITING
    stream.close()


def test_a_coordinator_that_pauses_tells_its_sites(coordinator: Coordinator, alpha: Site) -> None:
    coordinator.open()
    stream = alpha.attend()
    assert [type(stream.next()) for _ in range(2)] == [pb.Welcome, pb.Task]
    coordinator.pause("stopped by its operator")
    assert stream.next().reason == "stopped by its operator"
    stream.close()


def test_of_two_agents_for_one_site_the_first_gives_up(
    coordinator: Coordinator, run: Callable[..., Future[str]]
) -> None:
    first = run(coordinator, "alpha", Worker("alpha"))
    eventually(lambda: "alpha" in coordinator.federation.connections)
    second = run(coordinator, "alpha", Worker("alpha"))
    with pytest.raises(IdentityError, match="another process attends as 'alpha'"):
        first.result(PATIENCE)
    assert "alpha" in coordinator.federation.connections
    coordinator.finish()
    assert second.result(PATIENCE) == "over"


# What is taken as an update. ----------------------------------------------------------------------------------------

_WHOLE = blob_of(update_of("alpha"))
_OTHER_TYPE = blob_of([np.full(SIZE, 1, np.int32), np.float32(1)])
_FLIPPED = _WHOLE[:-7] + bytes([_WHOLE[-7] ^ 1]) + _WHOLE[-6:]


def test_a_damaged_update_leaves_no_file_and_can_be_sent_again(coordinator: Coordinator, alpha: Site) -> None:
    coordinator.open()
    upload = alpha.begin_upload(_WHOLE)
    upload.send(_FLIPPED)
    receipt = upload.end()
    assert (receipt.accepted, receipt.again) == (False, True)
    assert "damaged on its way" in receipt.reason
    assert coordinator.files() == []
    assert coordinator.stage("alpha") is not Stage.DONE

    assert alpha.upload().accepted
    (file,) = coordinator.files()
    assert (coordinator.updates / file).read_bytes() == _WHOLE
    assert [event["site"] for event in coordinator.journal.events("received")] == ["alpha"]


def test_an_update_with_more_bytes_than_it_says_is_not_taken(coordinator: Coordinator, alpha: Site) -> None:
    coordinator.open()
    upload = alpha.begin_upload(_WHOLE)
    upload.say(data=_WHOLE + b"x")
    receipt = upload.end()
    assert (receipt.accepted, receipt.again) == (False, True)
    assert coordinator.files() == []
    assert alpha.upload().accepted


def test_an_update_of_another_size_is_refused_before_it_is_received(coordinator: Coordinator, alpha: Site) -> None:
    coordinator.open()
    receipt = alpha.upload([np.zeros(SIZE * 1000, np.float32), np.int32(1)])
    assert (receipt.accepted, receipt.again) == (False, False)
    assert f"an update has {len(_WHOLE)} bytes" in receipt.reason
    assert coordinator.files() == []
    assert coordinator.stage("alpha") is Stage.FAILED


_POISON: dict[str, tuple[list[Any], str]] = {
    "not a number": ([np.full(SIZE, np.nan, np.float32), np.int32(1)], "not finite"),
    "infinite": ([np.full(SIZE, -np.inf, np.float32), np.int32(1)], "not finite"),
    "one value": ([np.array([0] * (SIZE - 1) + [np.inf], np.float32), np.int32(1)], "not finite"),
    "absurd": ([np.full(SIZE, 1e6, np.float32), np.int32(1)], "absurd"),
    "beyond float32's squares": ([np.full(SIZE, 3e38, np.float32), np.int32(1)], "absurd"),
    "another type": ([np.full(SIZE, 1, np.int32), np.float32(1)], "expected float32"),
}


@pytest.mark.parametrize("poison", _POISON)
def test_a_poisoned_update_is_refused_for_good_and_the_round_goes_on_without_its_site(
    coordinator: Coordinator, alpha: Site, beta: Site, gamma: Site, poison: str
) -> None:
    result = coordinator.open()
    tensors, words = _POISON[poison]
    receipt = alpha.upload(tensors)
    assert (receipt.accepted, receipt.again) == (False, False)
    assert words in receipt.reason
    assert coordinator.files() == []
    assert coordinator.stage("alpha") is Stage.FAILED
    assert coordinator.call is not None
    assert coordinator.call.round.answers["alpha"].reason == receipt.reason
    (event,) = coordinator.journal.events("refused")
    assert (event["site"], event["reason"]) == ("alpha", receipt.reason)
    assert beta.upload().accepted
    assert gamma.upload().accepted
    assert _digits(result) == 23


def test_a_large_broadcast_allows_for_larger_updates(coordinator: Coordinator, alpha: Site) -> None:
    coordinator.open(weight=1e3)
    assert alpha.upload([np.full(SIZE, 1e5, np.float32), np.int32(1)], weight=1e3).accepted


# Broadcasts, and updates out of time. ---------------------------------------------------------------------------------


@pytest.mark.parametrize("next_round", [False, True], ids=["nothing", "the next round"])
def test_an_update_that_arrives_after_its_round_was_closed_is_refused_and_leaves_no_file(
    coordinator: Coordinator, alpha: Site, beta: Site, gamma: Site, next_round: bool
) -> None:
    result = coordinator.open()
    alpha.upload()
    beta.upload()
    blob = blob_of(update_of("gamma"))
    upload = gamma.begin_upload(blob)
    upload.send(blob[:300])
    eventually(lambda: len(coordinator.files()) == 3)
    coordinator.pass_deadline()
    assert _digits(result) == 12
    if next_round:
        coordinator.open(2)
    upload.send(blob[300:])
    receipt = upload.end()
    assert (receipt.accepted, receipt.again) == (False, False)
    assert "closed" in receipt.reason
    assert not [name for name in coordinator.files() if "gamma" in name]

    receipt = gamma.upload()
    assert (receipt.accepted, receipt.reason) == (False, "round 1 is closed")
    assert not [name for name in coordinator.files() if "gamma" in name]
    if next_round:
        assert gamma.upload(number=2).accepted


def test_a_broadcast_of_no_round_under_way_is_not_served(coordinator: Coordinator, alpha: Site) -> None:
    coordinator.open()
    request = pb.DownloadRequest(envelope=alpha.envelope, sha256=bytes(32))
    assert refusal(lambda: list(alpha.stub.Download(request)))[0] is grpc.StatusCode.NOT_FOUND


def test_a_task_names_the_broadcast_that_is_served(coordinator: Coordinator, alpha: Site) -> None:
    coordinator.open(weight=0.25)
    stream = alpha.attend()
    stream.next()
    task = stream.next()
    request = pb.DownloadRequest(envelope=alpha.envelope, task=task.name, sha256=task.broadcast.sha256)
    blob = b"".join(chunk.data for chunk in alpha.stub.Download(request))
    assert (len(blob), sha256(blob)) == (task.broadcast.size, task.broadcast.sha256)
    np.testing.assert_array_equal(decode(blob)[0], np.full(SIZE, 0.25, np.float32))
    assert decode(task.scalars) == [np.float32(0.5)]


def test_a_broadcast_is_served_from_the_byte_on_that_is_asked_for(coordinator: Coordinator, alpha: Site) -> None:
    coordinator.open(weight=0.25)
    whole = broadcast_of(0.25)
    for offset in (0, 1, 63, 64, len(whole) - 1, len(whole)):
        request = pb.DownloadRequest(envelope=alpha.envelope, sha256=sha256(whole), offset=offset)
        assert b"".join(chunk.data for chunk in alpha.stub.Download(request)) == whole[offset:]


class FullDisk(Audit):
    """An audit log that can take nothing more."""

    def record(self, event: str, **details: Any) -> None:
        raise RunFolderError("run/audit.log: cannot be written (No space left on device); free space")


@pytest.mark.parametrize("call", ["attend", "download", "upload"])
def test_a_call_whose_audit_entry_meets_a_full_disk_says_so_and_ends_the_round(
    coordinator: Coordinator,
    alpha: Site,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    call: str,
) -> None:
    round_ = coordinator.open(weight=0.25)
    monkeypatch.setattr(coordinator.federation, "_audit", FullDisk())
    request = pb.DownloadRequest(envelope=alpha.envelope, sha256=sha256(broadcast_of(0.25)))
    calls: dict[str, Callable[[], Any]] = {
        "attend": lambda: alpha.attend().refusal(),
        "download": lambda: refusal(lambda: list(alpha.stub.Download(request))),
        "upload": lambda: refusal(lambda: alpha.upload(weight=0.25)),
    }
    code, words = calls[call]()
    assert (code, "No space left" in words) == (grpc.StatusCode.UNAVAILABLE, True)
    assert isinstance(round_.exception(PATIENCE), RunFolderError)
    gc.collect()  # a task whose error nobody heard says so when it goes
    assert "Traceback" not in caplog.text


def test_an_update_of_a_round_to_come_is_refused(coordinator: Coordinator, alpha: Site) -> None:
    coordinator.open()
    assert alpha.upload(number=2).reason == "round 2 is not under way"


def test_an_update_that_comes_before_the_first_round_since_a_start_is_told_to_come_again(
    coordinator: Coordinator, alpha: Site
) -> None:
    code, words = refusal(alpha.upload)
    assert code is grpc.StatusCode.UNAVAILABLE
    assert "come again" in words
    coordinator.open()
    assert alpha.upload().accepted


@pytest.mark.parametrize("site", ["alpha", "gamma"])
def test_after_the_end_a_site_hears_whether_its_update_was_taken(
    started: Callable[..., Coordinator],
    connect: Callable[..., Site],
    loop: asyncio.AbstractEventLoop,
    identities: dict[str, Identity],
    site: str,
) -> None:
    coordinator = started()
    result = coordinator.open()
    for each in ("alpha", "beta"):
        connect(coordinator, each).upload()
    coordinator.pass_deadline()
    assert _digits(result) == 12
    coordinator.stop()

    async def serve() -> tuple[Any, int]:
        server = grpc.aio.server(options=SERVER_OPTIONS)
        port = server.add_secure_port("127.0.0.1:0", server_credentials(identities["coordinator"]))
        service = FinishedService(STUDY, coordinator.published, coordinator.journal_file)
        rpc.add_FederationServicer_to_server(service, server)  # type: ignore[no-untyped-call]
        await server.start()
        return server, port

    server, port = asyncio.run_coroutine_threadsafe(serve(), loop).result(PATIENCE)
    coordinator.address = Address("127.0.0.1", port)
    late = connect(coordinator, site)
    receipt = late.upload()
    assert (receipt.accepted, receipt.again) == (site == "alpha", False)
    stream = late.attend()
    assert [type(stream.next()) for _ in range(2)] == [pb.Welcome, pb.Finished]
    stream.close()
    other = late.begin_upload(blob_of([np.full(SIZE, 9, np.float32), np.int32(1)]))
    assert other.next().reason == "round 1 is closed"
    asyncio.run_coroutine_threadsafe(server.stop(0), loop).result(PATIENCE)


# What becomes of updates. -------------------------------------------------------------------------------------------


def _digits(result: Future[Any]) -> int:
    """The numbers that were added, in their order."""
    found = result.result(PATIENCE)
    (number,) = set(found["state"]["weights"].tolist())
    assert found["metrics"]["count"] == len(str(int(number)))
    return int(number)


def test_updates_are_summed_in_name_order_whatever_the_order_of_arrival(
    coordinator: Coordinator, alpha: Site, beta: Site, gamma: Site
) -> None:
    for number, order in enumerate(itertools.permutations([alpha, beta, gamma]), start=1):
        result = coordinator.open(number)
        for site in order:
            assert site.upload(number=number).accepted
        assert _digits(result) == 123, [site.name for site in order]


def test_agents_and_federation_finish_rounds_together(
    coordinator: Coordinator, run: Callable[..., Future[str]]
) -> None:
    ends = [run(coordinator, site, Worker(site)) for site in SITES]
    assert [_digits(coordinator.open(number)) for number in (1, 2)] == [123, 123]
    coordinator.finish()
    assert [end.result(PATIENCE) for end in ends] == ["over"] * 3


def test_a_site_that_was_left_behind_gives_up_the_old_round_for_the_new_one(
    coordinator: Coordinator, alpha: Site, beta: Site, run: Callable[..., Future[str]]
) -> None:
    worker = Worker("gamma", hold=True)
    run(coordinator, "gamma", worker)
    first = coordinator.open(1)
    eventually(lambda: worker.begun == [1])
    alpha.upload()
    beta.upload()
    coordinator.pass_deadline()
    assert _digits(first) == 12
    second = coordinator.open(2)
    eventually(lambda: worker.begun == [1, 2])
    worker.go.set()
    alpha.upload(number=2)
    beta.upload(number=2)
    assert _digits(second) == 123


def test_below_the_quorum_the_deadline_begins_another_attempt(
    coordinator: Coordinator, alpha: Site, beta: Site
) -> None:
    result = coordinator.open()
    alpha.upload()
    coordinator.pass_deadline()
    eventually(lambda: coordinator.federation.notice)
    assert "1 of the quorum of 2 answered" in coordinator.federation.notice
    (event,) = coordinator.journal.events("retried")
    assert (event["attempt"], event["missing"]) == (2, ["beta", "gamma"])
    beta.upload()
    coordinator.pass_deadline()
    assert _digits(result) == 12


def test_a_journal_that_cannot_be_written_ends_the_round_and_acknowledges_nothing(
    coordinator: Coordinator, alpha: Site
) -> None:
    result = coordinator.open()
    with contextlib.closing(sqlite3.connect(coordinator.journal_file)) as database:
        database.execute(
            "CREATE TRIGGER full BEFORE INSERT ON events BEGIN SELECT RAISE(FAIL, 'database or disk is full'); END"
        )
    code, words = refusal(alpha.upload)
    assert code is grpc.StatusCode.UNAVAILABLE
    assert "the journal cannot be written (database or disk is full)" in words
    with pytest.raises(RunFolderError, match="the journal cannot be written"):
        result.result(PATIENCE)
    assert coordinator.stage("alpha") is not Stage.DONE


# Restarts. ----------------------------------------------------------------------------------------------------------


def _flip(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-7] + bytes([content[-7] ^ 1]) + content[-6:])


@pytest.mark.parametrize("restarts", [1, 2])
def test_acknowledged_updates_are_taken_up_after_a_restart(
    started: Callable[..., Coordinator], connect: Callable[..., Site], restarts: int
) -> None:
    coordinator = started()
    coordinator.open()
    assert connect(coordinator, "alpha").upload().accepted
    (file,) = coordinator.files()
    for _ in range(restarts):
        coordinator.stop()
        coordinator = started()
        result = coordinator.open()
    assert coordinator.files() == [file]
    assert coordinator.stage("alpha") is Stage.DONE
    assert connect(coordinator, "alpha").begin_upload(_WHOLE).next().accepted
    for site in ("gamma", "beta"):
        assert connect(coordinator, site).upload().accepted
    assert _digits(result) == 123


@pytest.mark.parametrize(
    "damage",
    [_flip, lambda path: path.write_bytes(_WHOLE[:300]), lambda path: path.write_bytes(b""), Path.unlink],
    ids=["altered", "truncated", "empty", "gone"],
)
def test_a_damaged_update_is_asked_again_after_a_restart(
    started: Callable[..., Coordinator], connect: Callable[..., Site], damage: Callable[[Path], Any]
) -> None:
    first = started()
    first.open()
    for site in ("alpha", "beta"):
        assert connect(first, site).upload().accepted
    (file,) = first.updates.glob("*-alpha-*")
    first.stop()
    damage(file)

    second = started()
    result = second.open()
    assert (second.stage("alpha"), second.stage("beta")) == (Stage.WAITING, Stage.DONE)
    assert not file.exists()
    alpha = connect(second, "alpha")
    stream = alpha.attend()
    assert [type(stream.next()) for _ in range(2)] == [pb.Welcome, pb.Task]
    assert alpha.upload().accepted
    assert connect(second, "gamma").upload().accepted
    assert _digits(result) == 123


def test_updates_of_another_state_of_the_model_are_not_taken_up_after_a_restart(
    started: Callable[..., Coordinator], connect: Callable[..., Site]
) -> None:
    first = started()
    first.open(weight=1.0)
    assert connect(first, "alpha").upload(weight=1.0).accepted
    first.stop()
    second = started()
    second.open(weight=2.0)
    assert second.stage("alpha") is Stage.WAITING
    alpha = connect(second, "alpha")
    assert "other weights" in alpha.upload(weight=1.0).reason
    assert alpha.upload(weight=2.0).accepted


def test_agents_find_a_restarted_coordinator_by_themselves_and_the_round_goes_on(
    started: Callable[..., Coordinator], run: Callable[..., Future[str]]
) -> None:
    first = started()
    first.open()
    workers = {site: Worker(site, hold=site != "beta") for site in SITES}
    ends = [run(first, site, worker) for site, worker in workers.items()]
    eventually(lambda: first.stage("beta") is Stage.DONE and workers["alpha"].begun and workers["gamma"].begun)
    first.stop()
    second = started(first.address.port)
    result = second.open()
    for worker in workers.values():
        worker.go.set()
    assert _digits(result) == 123
    assert workers["beta"].begun == [1]  # its update was here before
    second.finish()
    assert [end.result(PATIENCE) for end in ends] == ["over"] * 3


def test_a_stored_update_is_what_the_site_sent(coordinator: Coordinator, alpha: Site) -> None:
    coordinator.open()
    alpha.upload()
    (file,) = coordinator.files()
    (event,) = coordinator.journal.events("received")
    assert event["file"] == file
    tensors = read_tensors(coordinator.updates / file, PLAN.train.sent, bytes.fromhex(event["sha256"]))
    np.testing.assert_array_equal(tensors[0], update_of("alpha")[0])
