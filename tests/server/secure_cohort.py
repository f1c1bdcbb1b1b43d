"""Five sites and a coordinator that sum securely, over gRPC and TLS, without training: for tests of the wiring."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import tensorflow_federated as tff

from client.agent import Agent
from client.datasets import Cancelled
from client.secure_task import Masked, SecureTask, Step
from common.secure_aggregation.masking import InputSpec
from common.secure_aggregation.session import SitePolicy
from common.security.audit import AuditLog
from common.security.certificates import Identity, ensure_simulation_identities, load_identity
from common.security.secure_signatures import EnrolledSites
from common.security.signing import load_signer
from common.study import parse_study
from common.wire import federation_pb2 as pb
from common.wire import federation_pb2_grpc as rpc
from common.wire.channel import SERVER_OPTIONS, Address, server_credentials
from common.wire.tensors import Array, TensorSpec
from server.federation import Call, Federation, SiteData
from server.journal import Journal
from server.secure_rounds import SecureSums
from server.service import FederationService

PATIENCE = 60.0  # seconds until a test gives up; nothing here takes one
SITES = ("alpha", "beta", "delta", "epsilon", "gamma")
SIZE = 200
STUDY = parse_study(
    """
study: sums
seed: 1
task: {dimensions: 2, channels: 1, classes: [background, cell]}
model: {filters: 4, depth: 2}
preprocessing: {patch: [16, 16]}
training: {rounds: 9}
cohort: {sites: [alpha, beta, gamma, delta, epsilon], quorum: 4, deadline: 5m}
secure_aggregation: {protocol: bonawitz}
"""
)
STATE = tff.to_type([("weights", (np.float32, [SIZE])), ("rate", np.float32)])


class Sums:
    """A round of a plan whose result is the sum of what the sites gave; nothing is compiled."""

    process = SimpleNamespace(initialize=object(), next=object())
    state_type = STATE
    result_type = tff.to_type([("state", STATE), ("metrics", [("count", np.int64)])])
    broadcast = (TensorSpec("float32", (SIZE,)), TensorSpec("float32", ()))
    secure = (InputSpec((SIZE,), 32), InputSpec((), 8))
    sent = (TensorSpec("uint32", (SIZE,)), TensorSpec("uint8", ()))

    def initialize(self) -> list[Any]:
        return [np.zeros(SIZE, np.float32), np.float32(0.5)]

    def prepare(self, weights: Any, rate: Any) -> list[Any]:
        return [weights, rate]

    def securely_updated(self, state: Sequence[Any], sums: Sequence[Any]) -> list[Any]:
        return [sums[0], state[1], sums[1]]


PLAN: Any = SimpleNamespace(study=STUDY, train=Sums(), evaluate=None, digest=b"\x07" * 32)


def update_of(site: str) -> list[Array]:
    """What the site's work gives: numbers that nobody meets by chance, and a count."""
    random = np.random.default_rng(list(site.encode()))
    return [random.integers(0, 2**32, SIZE, dtype=np.uint32), np.array(SITES.index(site) + 40, np.uint8)]


def sum_of(sites: Sequence[str]) -> tuple[list[int], int]:
    """What the coordinator may learn of these sites."""
    return (
        np.sum([update_of(site)[0] for site in sites], axis=0, dtype=np.int64).tolist(),
        sum(int(update_of(site)[1]) for site in sites),
    )


def eventually(condition: Callable[[], Any]) -> Any:
    """Waits until the condition holds, and returns what it returned."""
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
    return found


class Identities:
    """Of a coordinator and of the sites."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        ensure_simulation_identities(folder, "sums", list(SITES), ["127.0.0.1"])

    @property
    def coordinator(self) -> Identity:
        return load_identity(self.folder / "coordinator")

    def of(self, site: str) -> Path:
        return self.folder / "sites" / site


class _Service(FederationService):
    """Keeps all that arrives."""

    heard: list[bytes]
    said: list[pb.SiteMessage]

    async def _kept(self, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for message in requests:
            self.heard.append(message.SerializeToString())
            if isinstance(message, pb.SiteMessage):
                self.said.append(message)
            yield message

    async def Attend(self, requests: Any, context: Any) -> Any:
        async for message in super().Attend(self._kept(requests), context):
            yield message

    async def Upload(self, requests: Any, context: Any) -> Any:
        async for message in super().Upload(self._kept(requests), context):
            yield message


class Coordinator:
    """A federation and its service on a real port, in a loop of its own thread."""

    def __init__(self, folder: Path, identities: Identities, port: int = 0, plan: Any = PLAN) -> None:
        self.folder, self.plan = folder, plan
        self.updates = folder / "updates"
        self.updates.mkdir(parents=True, exist_ok=True)
        self.heard: list[bytes] = []
        self.said: list[pb.SiteMessage] = []
        self.closed: list[Call] = []
        self._stopping = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._rounds: list[Future[Any]] = []
        self._do(self._start(identities.coordinator, port))

    async def _start(self, identity: Identity, port: int) -> None:
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        port = self._server.add_secure_port(f"127.0.0.1:{port}", server_credentials(identity))
        self.address = Address("127.0.0.1", port)
        self.journal = Journal(self.folder / "journal.sqlite")
        self.audit = AuditLog(self.folder, "coordinator")
        self.federation = Federation(
            self.plan,
            self.updates,
            self.journal,
            audit=self.audit,
            round_closed=self.closed.append,
            secure=SecureSums(EnrolledSites(identity.authority), identity.run),
        )
        service = _Service(self.federation, self.folder / "published")
        service.heard, service.said = self.heard, self.said
        rpc.add_FederationServicer_to_server(service, self._server)  # type: ignore[no-untyped-call]
        await self._server.start()

    def open(self, number: int = 1) -> Future[Any]:
        """Begins a round; the future holds its result."""
        state = [np.zeros(SIZE, np.float32), np.float32(0.5)]
        result = self.invoke(self.plan.train.process.next, state, number)
        eventually(lambda: result.done() or (self.call is not None and self.call.round.number == number))
        return result

    def invoke(self, computation: Any, state: Any, number: int) -> Future[Any]:
        """Begins a round of a process on a state of it."""
        argument = (state, [SiteData(site, number) for site in SITES])
        result = asyncio.run_coroutine_threadsafe(self.federation.invoke(computation, argument), self._loop)
        self._rounds.append(result)
        return result

    @property
    def call(self) -> Call | None:
        return self.federation.call

    def pass_deadline(self) -> None:
        """As if the round's time were over."""

        async def expire() -> None:
            call = self.federation.call
            if call is not None and call.secure is not None:
                call.deadline = 0.0
                call.secure.wake()

        self._do(expire())

    def flood(self, site: str, messages: int) -> int:
        """So many messages of a site arrive at once, faster than they are read; returns how many wait to be read."""

        async def arrive() -> int:
            call = self.federation.call
            assert call is not None and call.secure is not None
            before = call.secure._heard.qsize()
            for _ in range(messages):
                call.secure.said(site, call.round.attempt, b"anything")
            return call.secure._heard.qsize() - before

        waiting: int = self._do(arrive())
        return waiting

    def cut(self, site: str) -> None:
        """The site's control stream ends, as when its line breaks."""

        def end() -> None:
            connection = self.federation.connections.get(site)
            if connection is not None:
                connection.outbox.put_nowait(None)

        self._loop.call_soon_threadsafe(end)

    def finish(self) -> None:
        """The study is over."""
        self._loop.call_soon_threadsafe(self.federation.finish, "over")

    @property
    def stopped(self) -> bool:
        """Whether it has ended, or is about to."""
        return self._stopping

    def stop(self) -> None:
        """Ends as a process does, in the middle of whatever is under way."""
        if self._loop.is_closed():
            return
        self._stopping = True
        for result in self._rounds:
            result.cancel()
        self._do(self._server.stop(grace=0))
        self.journal.close()
        self.audit.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(PATIENCE)


class Worker:
    """Has the site's numbers at once."""

    training_cases = 3
    validation_cases = 1
    digest = PLAN.digest

    def __init__(self, site: str) -> None:
        self._update = update_of(site)
        self.begun = 0

    def expected(self, kind: str) -> Sequence[TensorSpec]:
        return PLAN.train.broadcast

    def work(self, kind: str, round_number: int, broadcast: Sequence[Any], on_batch: Any) -> Sequence[Any]:
        self.begun += 1
        on_batch(1, 2)
        return self._update

    def cases(self, kind: str) -> int:
        return self.training_cases


class Hooked(SecureTask):
    """Calls `hook(site, stage, step)` before each step is answered; what it raises ends the step.

    Stages are counted per attempt: 0 advertise, 1 share, 2 mask, 3 confirm, 4 unmask.
    """

    hook: Callable[[int, Step], Step | None]
    stage = -1
    _last: Step | None = None

    def answer(self, step: Step, update: Callable[[], Sequence[Array]]) -> bytes | Masked:
        if step != self._last:  # else it is asked again
            self.stage = 0 if step.session else self.stage + 1
        self._last = step
        changed = self.hook(self.stage, step)
        return super().answer(changed or step, update)


class RunningSite:
    """An agent in a thread.

    `drop_at`: the stage before whose answer it ends, as a process that is killed does; None: never.
    """

    def __init__(
        self,
        name: str,
        coordinator: Coordinator,
        identities: Identities,
        folder: Path,
        *,
        drop_at: int | None = None,
        policy: SitePolicy | None = None,
        worker: Any = None,
        hook: Callable[[int, Step], Step | None] | None = None,
    ) -> None:
        self.name = name
        self.dropped = threading.Event()
        identity = load_identity(identities.of(name))
        own = folder / name
        own.mkdir(parents=True, exist_ok=True)
        self.audit = AuditLog(own, f"site {name}")
        plan = coordinator.plan
        rounds = {"train": plan.train, "evaluate": plan.evaluate}
        self.secure = Hooked(
            plan.study,
            name,
            plan.digest,
            identity.run,
            {kind: one.secure for kind, one in rounds.items() if one is not None},
            signer=load_signer(identities.of(name)),
            folder=own,
            policy=lambda: policy or SitePolicy(3, 4),
            audit=self.audit,
        )

        def hooked(stage: int, step: Step) -> Step | None:
            if stage == drop_at:
                self.agent.stop()
                self.dropped.set()
                raise Cancelled
            return hook(stage, step) if hook is not None else None

        self.secure.hook = hooked
        self.worker = worker or Worker(name)
        self.reports: list[dict[str, Any]] = []
        self.agent = Agent(
            plan.study.name,
            name,
            self.worker,
            coordinator.address,
            identity,
            own,
            self.reports.append,
            audit=self.audit,
            secure=self.secure if plan.study.secure_aggregation.required else None,
        )
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self.agent.run()

    def stop(self) -> None:
        self.agent.stop()
        self._thread.join(PATIENCE)
        self.audit.close()

    def notices(self) -> str:
        """What its operator was told."""
        return "\n".join(str(report.get("notice", "")) for report in list(self.reports))
