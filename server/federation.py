"""The connected sites and the calls made to them: gives tasks, takes answers, sums updates in site-name order.

Runs in one asyncio loop; TensorFlow and the disk work in threads. It implements `tff.framework.AsyncContext`, so that
the TFF program in `server.program` runs on it as it would on TFF's own runtime.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tensorflow_federated as tff

from common.errors import RunFolderError, TrainingError, WardroundError, WireError
from common.learning.graph import Graph, flatten, leaf_types, to_numpy, unflatten
from common.learning.plan import NO_GRAPPLER, RoundPlan, StudyPlan
from common.learning.runtime import release_memory
from common.study import Study
from common.wire.tensors import Array, Stored, TensorFile, encode_chunks, encoded_size, read_tensors
from server.journal import Journal
from server.rounds import Kind, Round, Stage

TAKEN_OVER = object()
"""What a connection's outbox holds when the same site has opened another."""


@dataclass(frozen=True)
class SiteData:
    """A handle on data that stays at its site: which site, and the round whose draw of patches is meant."""

    site: str
    round: int


@dataclass(frozen=True)
class Broadcast:
    """What a round sends down: the large tensors as one blob, known by its digest, and the scalars beside it."""

    tensors: Sequence[Array] = field(repr=False)
    scalars: bytes = field(repr=False)
    digest: bytes
    size: int

    @staticmethod
    def of(values: Sequence[Array]) -> Broadcast:
        """Splits scalars off, so that two rounds on the same weights share a blob and sites download it once."""
        tensors = [value for value in values if value.ndim]
        scalars = [value for value in values if not value.ndim]
        digest, size = hashlib.sha256(), 0
        for chunk in encode_chunks(tensors):
            digest.update(chunk)
            size += len(chunk)
        return Broadcast(tensors, b"".join(encode_chunks(scalars)), digest.digest(), size)


@dataclass
class Connection:
    """A site's open control stream."""

    site: str
    peer: str
    outbox: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    since: float = field(default_factory=time.monotonic)
    training_cases: int = 0
    validation_cases: int = 0


@dataclass
class Call:
    """A round under way: its state, what it broadcasts, what it expects back."""

    round: Round
    plan: RoundPlan
    broadcast: Broadcast
    deadline: float
    started: float = field(default_factory=time.monotonic)
    failure: WardroundError | None = None
    bytes_down: dict[str, int] = field(default_factory=dict)
    _event: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def update_size(self) -> int:
        """Bytes of an update's blob."""
        return encoded_size(self.plan.sent)

    def announce(self) -> None:
        """Wakes everyone who waits for the round to change."""
        self._event.set()
        self._event = asyncio.Event()

    async def change(self) -> None:
        """Waits for the next `announce`; test the condition before, with no await in between."""
        await self._event.wait()


class Federation(tff.framework.AsyncContext):  # type: ignore[misc]
    """The cohort of a study as something TFF computations run on.

    Parameters
    ----------
    plan : the compiled study.
    updates : folder for the updates of the round under way.
    journal : where decisions are recorded before they take effect.
    changed : called when anything that status shows has changed.
    round_closed : awaited with each call once it is closed.
    """

    def __init__(
        self,
        plan: StudyPlan,
        updates: Path,
        journal: Journal,
        *,
        changed: Callable[[], None] = lambda: None,
        round_closed: Callable[[Call], None] = lambda call: None,
    ) -> None:
        self.plan = plan
        self.study: Study = plan.study
        self.connections: dict[str, Connection] = {}
        self.call: Call | None = None
        self.begun = False
        self.finished: str | None = None
        self.notice = ""
        self._gone = asyncio.Event()
        self._updates = updates
        self._journal = journal
        self._changed = changed
        self._round_closed = round_closed
        self._graphs: dict[int, Graph] = {}
        self._computations: list[tff.Computation] = []  # keeps ids alive
        self._calls: dict[int, tuple[Kind, RoundPlan]] = {id(plan.train.process.next): (Kind.TRAIN, plan.train)}
        self._local: dict[int, Callable[[], Sequence[Any]]] = {id(plan.train.process.initialize): plan.train.initialize}
        if plan.evaluate is not None:
            self._calls[id(plan.evaluate.process.next)] = (Kind.EVALUATE, plan.evaluate)

    # --- TFF's side -------------------------------------------------------------------------------------------------

    async def invoke(self, comp: tff.Computation, arg: Any) -> Any:
        """Runs a computation: rounds with the cohort, anything else in this process."""
        if id(comp) in self._calls:
            kind, plan = self._calls[id(comp)]
            state, handles = arg
            return await self._run_round(kind, plan, flatten(state, plan.state_type), handles)
        result_type = comp.type_signature.result
        if id(comp) in self._local:
            leaves = await asyncio.to_thread(self._local[id(comp)])
        else:
            graph = self._graph(comp)
            arguments = flatten(arg, graph.parameter) if graph.parameter is not None else []
            leaves = await asyncio.to_thread(graph, *arguments)
        return unflatten(leaves, result_type)

    def _graph(self, comp: tff.Computation) -> Graph:
        if id(comp) not in self._graphs:
            self._computations.append(comp)
            lowered = comp
            if comp.type_signature.parameter is None and isinstance(comp.type_signature.result, tff.FederatedType):
                lowered = tff.backends.mapreduce.get_state_initialization_computation(comp, NO_GRAPPLER)
            self._graphs[id(comp)] = Graph(lowered)
        return self._graphs[id(comp)]

    async def _run_round(self, kind: Kind, plan: RoundPlan, state: list[Any], handles: Sequence[SiteData]) -> Any:
        number = handles[0].round
        sites = sorted(handle.site for handle in handles)
        values = to_numpy(await asyncio.to_thread(plan.prepare, *state))
        broadcast = await asyncio.to_thread(Broadcast.of, values)
        quorum = min(self.study.cohort.quorum, len(sites))
        deadline = time.monotonic() + self.study.cohort.deadline_seconds
        call = Call(Round(kind, number, sites, quorum), plan, broadcast, deadline)
        await asyncio.to_thread(self._restore, call)
        self._journal.opened(kind.value, number, sites, broadcast.digest)
        self.call = call
        self.begun = True
        for site in sites:
            self.give_task(site)
        closing, summing = asyncio.create_task(self._until_closed(call)), asyncio.create_task(self._sum(call))
        try:
            await asyncio.gather(closing, summing)
        finally:
            closing.cancel()
            summing.cancel()
        report = summing.result()
        leaves = await asyncio.to_thread(_update, plan, state, report)
        del report
        self._round_closed(call)
        for site in call.round.included:
            stored = call.round.answers[site].update
            if stored is not None:
                stored.path.unlink(missing_ok=True)
        self.call = None
        self._changed()
        state_leaves = len(leaf_types(plan.state_type))
        # The state stays in TensorFlow's memory, where the next round wants it; metrics are for everyone.
        return unflatten([*leaves[:state_leaves], *to_numpy(leaves[state_leaves:])], plan.result_type)

    def _restore(self, call: Call) -> None:
        """Takes up what sites sent for this very round before the coordinator was last stopped; removes the rest."""
        round_ = call.round
        known = self._journal.acknowledged(round_.kind.value, round_.number, call.broadcast.digest)
        kept = set()
        for site, event in known.items():
            path = self._updates / event["file"]
            digest = bytes.fromhex(event["sha256"])
            try:
                read_tensors(path, call.plan.sent, digest)
            except WireError:
                continue  # gone or damaged; the site is asked again, and sends the same bits
            round_.received(site, Stored(path, digest, event["bytes"]))
            kept.add(path)
        for path in self._updates.iterdir():
            if path not in kept:
                path.unlink(missing_ok=True)  # a late upload that was refused removes its own

    async def _until_closed(self, call: Call) -> None:
        while not call.round.complete:
            if call.failure is not None:
                raise call.failure
            try:
                async with asyncio.timeout(max(0.0, call.deadline - time.monotonic())):
                    await call.change()
            except TimeoutError:
                if call.round.deadline():
                    break
                call.deadline = time.monotonic() + self.study.cohort.deadline_seconds
                self.notice = (
                    f"round {call.round.number}: {len(call.round.included)} of the quorum of {call.round.quorum} "
                    f"answered before the deadline; attempt {call.round.attempt} waits for "
                    + ", ".join(self._excuse(call.round, site) for site in call.round.missing)
                )
                self._journal.retried(call.round.kind.value, call.round.number, call.round.attempt, call.round.missing)
                for site in call.round.missing:
                    if call.round.answers[site].stage is Stage.WAITING:  # others are still at it
                        self.give_task(site)
                self._changed()
        call.round.close()
        self.notice = ""
        if call.round.missing:
            self.notice = f"round {call.round.number} went on without " + ", ".join(
                self._excuse(call.round, site) for site in call.round.missing
            )
        self._journal.closed(call.round.kind.value, call.round.number, call.round.attempt, call.round.included)
        call.announce()

    def _excuse(self, round_: Round, site: str) -> str:
        answer = round_.answers[site]
        if answer.reason:
            return f"{site} ({answer.reason})"
        return f"{site} (not connected)" if site not in self.connections else f"{site} ({answer.stage.value})"

    async def _sum(self, call: Call) -> list[Any]:
        """The report over all included updates, accumulated in name order as far as they are in."""
        plan = call.plan
        total = await asyncio.to_thread(plan.zero)
        for site in call.round.sites:
            while call.round.answers[site].update is None and not call.round.closed:
                await call.change()
            stored = call.round.answers[site].update
            if stored is not None:
                await asyncio.to_thread(_accumulate, plan, total, stored)
        while not call.round.closed:
            await call.change()
        return await asyncio.to_thread(plan.report, *total)

    # --- the sites' side --------------------------------------------------------------------------------------------

    def connect(self, connection: Connection) -> None:
        """A site's stream opened; a stream it had before is taken over."""
        previous = self.connections.get(connection.site)
        if previous is not None:
            previous.outbox.put_nowait(TAKEN_OVER)
        self.connections[connection.site] = connection
        if self.finished is not None:
            connection.outbox.put_nowait(self.finished)
        self.give_task(connection.site)
        self._changed()

    def disconnect(self, connection: Connection) -> None:
        """A site's stream ended."""
        if self.connections.get(connection.site) is connection:
            del self.connections[connection.site]
            self._gone.set()
            if self.call is not None:
                self.call.round.disconnected(connection.site)
                self.call.announce()
            self._changed()

    def give_task(self, site: str) -> None:
        """Sends the round's task to the site if it is there and has not answered."""
        connection, call = self.connections.get(site), self.call
        if connection is None or call is None or not call.round.wants(site):
            return
        call.round.connected(site)
        connection.outbox.put_nowait(call)

    def progressed(self, site: str, stage: Stage, batch: int, batches: int) -> None:
        """A site said how far it is."""
        if self.call is not None:
            self.call.round.progressed(site, stage, batch, batches)
            self._changed()

    def failed(self, site: str, reason: str) -> None:
        """A site cannot do its task."""
        if self.call is not None:
            self.call.round.failed(site, reason)
            self.call.announce()
            self._changed()

    def received(self, call: Call, site: str, stored: Stored, **figures: Any) -> None:
        """A site's update is on disk and verified; from here on it is included."""
        try:
            self._journal.received(call.round.kind.value, call.round.number, call.round.attempt, site, stored)
        except RunFolderError as error:
            call.failure = error  # ends the coordinator, with its exit code
            call.announce()
            raise
        call.round.received(site, stored, **figures)
        call.announce()
        self._changed()

    def update_path(self, call: Call, site: str) -> Path:
        """A new file for an update of the site: no upload ever replaces another."""
        return self._updates / f"{call.round.number:06d}-{call.round.kind.value}-{site}-{uuid.uuid4().hex[:8]}.tensors"

    def finish(self, reason: str) -> None:
        """The study is over: tells every site, and those that come later."""
        self.finished = reason
        for connection in self.connections.values():
            connection.outbox.put_nowait(reason)
        self._changed()

    async def drained(self, seconds: float = 5.0) -> None:
        """Waits until the sites that were told of the end have hung up, at most `seconds`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.connections:
                    self._gone.clear()
                    await self._gone.wait()


def _update(plan: RoundPlan, state: list[Any], report: list[Any]) -> list[Any]:
    leaves = plan.update(state, report)
    release_memory()
    return leaves


def _accumulate(plan: RoundPlan, total: list[Any], stored: Stored) -> None:
    try:
        plan.accumulate(total, TensorFile(stored.path, plan.sent))
    except WireError as error:
        raise TrainingError(
            f"{stored.path}: a received update is damaged on this disk ({error}); check the disk and start "
            "the coordinator "
            "again with the same command"
        ) from error
    release_memory()
