"""The connected sites and the calls made to them: gives tasks, takes answers, sums updates in site-name order.

Runs in one asyncio loop; TensorFlow and the disk work in threads. It implements `tff.framework.AsyncContext`, so that
the TFF program in `server.program` runs on it as it would on TFF's own runtime.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tensorflow_federated as tff

from common.errors import BudgetSpentError, RoundSkippedError, RunFolderError, WardroundError
from common.learning.graph import Graph, flatten, leaf_types, to_numpy, unflatten
from common.learning.plan import NO_GRAPPLER, RoundPlan, StudyPlan
from common.learning.runtime import release_memory
from common.privacy.report import privacy_report
from common.security.audit import NO_AUDIT, Audit
from common.study import Study
from common.watching.logs import about
from common.wire.partial import disk_hit
from common.wire.tensors import Stored
from server.calls import TAKEN_OVER, Broadcast, Call, Connection, Pause, SiteData
from server.journal import Journal
from server.noise import Noise
from server.plain_rounds import PlainRound
from server.replay import RoundHistory, RoundKey, RunHistory
from server.rounds import Kind, Round, Stage
from server.run_folder import storing
from server.secure_rounds import SecureRound, SecureSums
from server.updates import remove_finished, update_name

__all__ = ["TAKEN_OVER", "Broadcast", "Call", "Connection", "Federation", "Pause", "SiteData"]

_log = logging.getLogger("wardround.coordinator")

LEASE_SECONDS = 60.0
"""After so long without progress a site at work is shown as such. It stays in its round until the deadline."""

_REFUSALS_KEPT = 20  # of a site while a round is under way: more tell nothing new, and would fill the journal


class Federation(tff.framework.AsyncContext):  # type: ignore[misc]
    """The cohort of a study as something TFF computations run on.

    Parameters
    ----------
    plan : the compiled study.
    updates : folder for the updates of rounds whose state is not saved yet.
    journal : where decisions are recorded before they take effect, and what this run goes on from.
    changed : called when anything that status shows has changed.
    round_closed : called, in a thread, with each call once it is closed.
    audit : where events are recorded before they take effect, each before the journal has it.
    noise : of the sums, where the study has privacy at the level of sites.
    secure : of a study with secure aggregation.

    Attributes
    ----------
    spent : by site, the epsilon that it has said last that it has spent.
    history : what the journal said when the coordinator was started.
    rejected : why sites were sent away that came with another study or version; until they come with the right one.
    barred : says why a site may not take part, or "": it is not waited for.
    """

    def __init__(
        self,
        plan: StudyPlan,
        updates: Path,
        journal: Journal,
        *,
        changed: Callable[[], None] = lambda: None,
        round_closed: Callable[[Call], None] = lambda call: None,
        audit: Audit = NO_AUDIT,
        noise: Noise | None = None,
        secure: SecureSums | None = None,
    ) -> None:
        self.plan = plan
        self.study: Study = plan.study
        self.connections: dict[str, Connection] = {}
        self.call: Call | None = None
        self.begun = False
        self.finished: str | None = None
        self.paused: Pause | None = None
        self._said = ""
        self.rejected: dict[str, str] = {}
        self.barred: Callable[[str], str] = lambda site: ""
        self.history: RunHistory = journal.history()
        self.spent: dict[str, float] = self.history.spent
        self._noise = noise
        self._secure = secure
        self._refusals: dict[str, set[tuple[Kind, int, str]]] = {}
        self._taken = {
            (key, site): received.sha256
            for key, round_ in self.history.rounds.items()
            for site, received in round_.received.items()
        }
        self._first_answered: dict[str, int] = {}  # since this process began: the earliest round of each site
        self._gone = asyncio.Event()
        self._updates = updates
        self._journal = journal
        self._changed = changed
        self._round_closed = round_closed
        self._audit = audit
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
        if kind is Kind.TRAIN and self._noise is not None:
            await asyncio.to_thread(self._noise.check, number)
        values = to_numpy(await asyncio.to_thread(plan.prepare, *state))
        broadcast = await asyncio.to_thread(Broadcast.of, values)
        quorum = min(self.study.cohort.quorum, len(sites))
        deadline = time.monotonic() + self.study.cohort.deadline_seconds
        call = Call(Round(kind, number, sites, quorum), plan, broadcast, deadline)
        plain, secure = PlainRound(self, call, self._updates), None
        if plan.secure:
            assert self._secure is not None, "a study with secure aggregation has its keys"
            secure = call.secure = SecureRound(self, self._journal, call, self._secure, self.plan.digest, self._updates)
        self._refusals.clear()
        known = self.history.find(kind.value, number, broadcast.digest.hex())
        if known is not None:
            await asyncio.to_thread(plain.restore, known, self._first_answered)
        self.record("round-opened", call, sites=sites, broadcast=broadcast.digest.hex(), bytes=broadcast.size)
        self._journal.opened(kind.value, number, sites, broadcast.digest)
        disk_hit("round.opened", self._updates)
        self.call = call
        self.begun = True
        for site in sites:
            self.give_task(site)
        try:
            report = await (plain.run() if secure is None else self._summed_securely(call, secure, known))
            if kind is Kind.TRAIN and self._noise is not None:
                state = await asyncio.to_thread(self._noise.seeded, state, call)
        except (BudgetSpentError, RoundSkippedError):  # the study ends, or goes on, in good order
            await asyncio.to_thread(self._round_closed, call)
            self._let_go(call)
            raise
        disk_hit("round.summed", self._updates)
        leaves = await asyncio.to_thread(_update, plan, state, report)
        disk_hit("round.updated", self._updates)
        del report
        await asyncio.to_thread(self._round_closed, call)
        self._let_go(call)
        state_leaves = len(leaf_types(plan.state_type))
        # The state stays in TensorFlow's memory, where the next round wants it; metrics are for everyone.
        return unflatten([*leaves[:state_leaves], *to_numpy(leaves[state_leaves:])], plan.result_type)

    async def _summed_securely(self, call: Call, secure: SecureRound, known: RoundHistory | None) -> list[Any]:
        """The sums of what the plan's work gave, of which no part is known."""
        try:
            sums = await secure.run(known)
        except RoundSkippedError:
            for answer in call.round.answers.values():
                answer.update, answer.reason = None, answer.reason or "the round was skipped"
            call.round.close()
            raise
        self.close(call)
        return list(sums)

    def _let_go(self, call: Call) -> None:
        self.call = None
        call.let_go()
        self._changed()

    def saved(self, number: int) -> None:
        """The state of this round is on disk: removes the updates of it and of those before."""
        if self._noise is not None:
            self._noise.saved(number)
        with storing(self._updates):
            remove_finished(self._updates, number)
        disk_hit("updates.removed", self._updates)

    def retried(self, call: Call, missing: Sequence[str], why: str) -> None:
        """Another attempt of a round begins, in which these sites are asked again; those that are at it go on."""
        round_ = call.round
        excuses = ", ".join(self._excuse(round_, site) for site in missing)
        self._said = f"round {round_.number}: {why}; attempt {round_.attempt} waits for {excuses}"
        self.record("round-retried", call, missing=list(missing))
        self._journal.retried(round_.kind.value, round_.number, round_.attempt, missing)
        for site in missing:
            if round_.answers[site].stage is Stage.WAITING:
                self.give_task(site)
        self._changed()

    def close(self, call: Call) -> None:
        """The cohort is final, and journaled."""
        call.round.close()
        call.closed_at = time.monotonic()
        self._said = ""
        if call.round.missing:
            self._said = f"round {call.round.number} went on without " + ", ".join(
                self._excuse(call.round, site) for site in call.round.missing
            )
        disk_hit("round.closing", self._updates)
        if call.round.fixed is None:
            self.record("round-closed", call, cohort=call.round.included)
            self._journal.closed(call.round.kind.value, call.round.number, call.round.attempt, call.round.included)
        self._audit.sign_head()
        disk_hit("round.closed", self._updates)
        call.announce()

    def say(self, words: str) -> None:
        """What is shown as `notice` from here on."""
        self._said = words
        self._changed()

    @property
    def privacy(self) -> dict[str, Any] | None:
        """What is spent of the study's privacy budget; None where it has none."""
        return privacy_report(self.study, self.spent, self._noise.epsilon if self._noise is not None else 0.0)

    @property
    def notice(self) -> str:
        """What somebody should know of the round under way, or of the last one; "" if there is nothing."""
        round_ = self.call.round if self.call is not None else None
        if round_ is None or round_.closed or round_.fixed is None or not round_.missing:
            return self._said
        first = round_.missing[0]
        return (
            f"round {round_.number} was closed with {', '.join(round_.asked)} before; it waits for "
            f"{', '.join(self._excuse(round_, site) for site in round_.missing)}, of whom it has no update any more, "
            f"for as long as it takes. If {first} never comes back: stop the coordinator, then `wardround repair "
            f"--run {self._updates.parent} --give-up {first} {round_.number}`, which changes the result"
        )

    def _excuse(self, round_: Round, site: str) -> str:
        answer = round_.answers[site]
        if answer.reason:
            return f"{site} ({answer.reason})"
        if site in self.connections:
            return f"{site} ({answer.stage.value})"
        rejected = self.rejected.get(site)
        return f"{site} (sent away, for it came with {rejected})" if rejected else f"{site} (not connected)"

    # --- the sites' side --------------------------------------------------------------------------------------------

    def connect(self, connection: Connection) -> None:
        """A site's stream opened; a stream it had before is taken over."""
        self.record("site-connected", site=connection.site)
        previous = self.connections.get(connection.site)
        if previous is not None:
            previous.outbox.put_nowait(TAKEN_OVER)
        self.connections[connection.site] = connection
        self.rejected.pop(connection.site, None)
        if self.finished is not None:
            connection.outbox.put_nowait(self.finished)
        if self.paused is not None:
            _hang_up(connection, self.paused)
            return
        self.give_task(connection.site)
        if self.call is not None and self.call.secure is not None:
            self.call.secure.connected(connection.site)
        self._changed()

    def reject(self, site: str, reason: str) -> None:
        """A site was sent away, for it came with another study or version; where it attends too, that is the site."""
        if site not in self.connections and self.rejected.get(site) != reason:
            self.record("site-refused", site=site)  # what it said of itself may be anything
            self.rejected[site] = reason
            self._changed()

    def disconnect(self, connection: Connection) -> None:
        """A site's stream ended."""
        if self.connections.get(connection.site) is connection:
            del self.connections[connection.site]
            self._gone.set()
            if self.call is not None:
                self.call.round.disconnected(connection.site)
                if self.call.secure is not None:
                    self.call.secure.gone(connection.site)
                self.call.announce()
            self._changed()
            with contextlib.suppress(RunFolderError):  # the round has ended with it
                self.record("site-left", site=connection.site)

    def give_task(self, site: str) -> None:
        """Sends the round's task to the site if it is there and has not answered."""
        if reason := self.barred(site):
            self.failed(site, reason)
            return
        connection, call = self.connections.get(site), self.call
        if connection is None or call is None or not call.round.wants(site) or call.round.answers[site].refused:
            return
        self.record("task-handed-out", call, site=site, broadcast=call.broadcast.digest.hex())
        call.round.connected(site)
        connection.progressed = time.monotonic()
        connection.outbox.put_nowait(call)

    def progressed(self, site: str, stage: Stage, batch: int, batches: int) -> None:
        """A site said how far it is; to say the same again is no progress, but of a site that says no count."""
        if self.call is not None:
            answer = self.call.round.answers.get(site)
            if answer is not None and (not batches or (answer.stage, answer.batch) != (stage, batch)):
                self.touched(site)
            self.call.round.progressed(site, stage, batch, batches)
            self._changed()

    def touched(self, site: str) -> None:
        """Something of the site's work got on, such as bytes that came or went."""
        if site in self.connections:
            self.connections[site].progressed = time.monotonic()

    def idle_seconds(self, site: str) -> float | None:
        """How long a site that is at work shows no progress; None within `LEASE_SECONDS`, and where it has no work."""
        connection, call = self.connections.get(site), self.call
        if connection is None or call is None or not call.round.wants(site):
            return None
        if call.round.answers[site].stage in (Stage.WAITING, Stage.READY, Stage.FAILED):
            return None
        seconds = time.monotonic() - connection.progressed
        return seconds if seconds >= LEASE_SECONDS else None

    def failed(self, site: str, reason: str) -> None:
        """A site cannot do its task."""
        if self.call is not None:
            self.call.round.failed(site, reason)
            if self.call.secure is not None:
                self.call.secure.failed(site)
            self.call.announce()
            self._changed()

    def secure_step(self, site: str, attempt: int, content: bytes) -> None:
        """A site's step of secure aggregation; without content, its update is ready."""
        if self.call is not None and self.call.secure is not None:
            self.touched(site)
            self.call.secure.said(site, attempt, content)

    def received(
        self,
        call: Call,
        site: str,
        stored: Stored,
        *,
        cases: int = 0,
        download: float = 0.0,
        work: float = 0.0,
        upload: float = 0.0,
        epsilon: float | None = None,
    ) -> None:
        """A site's update is on disk and verified; from here on it is included. Times are in seconds.

        Raises
        ------
        RunFolderError : it cannot be journaled; the coordinator ends.
        """
        round_ = call.round
        figures = {"download": download, "work": work, "upload": upload}
        try:
            self.record("update-received", call, site=site, bytes=stored.size, sha256=stored.digest.hex(), cases=cases)
            self._journal.received(
                round_.kind.value,
                round_.number,
                round_.attempt,
                site,
                stored,
                cases=cases,
                epsilon=epsilon,
                **figures,
            )
        except RunFolderError as error:
            self.fail(error)
            raise
        round_.received(site, stored, cases=cases, epsilon=epsilon, arrived=time.monotonic(), **figures)
        if epsilon is not None:
            self.spent[site] = max(epsilon, self.spent.get(site, 0.0))
        self._first_answered.setdefault(site, round_.number)
        key = RoundKey(round_.kind.value, round_.number, call.broadcast.digest.hex())
        self._taken[key, site] = stored.digest.hex()
        call.announce()
        self._changed()

    def spent_by(self, site: str, kind: Kind, number: int, epsilon: float) -> None:
        """A site says what it has spent of its privacy budget, with an update that may be taken or not.

        Raises
        ------
        RunFolderError : it cannot be journaled; the coordinator ends.
        """
        if epsilon <= self.spent.get(site, 0.0) or not self._is_news(site, kind, number, f"spent {epsilon:.6f}"):
            return
        try:
            self._journal.spent(kind.value, number, site, epsilon)
        except RunFolderError as error:
            self.fail(error)
            raise
        self.spent[site] = epsilon
        self._changed()

    def was_received(self, kind: str, number: int, site: str, digest: bytes, broadcast: bytes) -> bool:
        """Whether this very update was taken for this round of this broadcast, in this process or one before it."""
        return self._taken.get((RoundKey(kind, number, broadcast.hex()), site)) == digest.hex()

    def refused(self, call: Call, site: str, reason: str, digest: bytes = b"") -> None:
        """What a site sent is worth nothing: the site has failed in this attempt, and is asked again in the next.

        Raises
        ------
        RunFolderError : it cannot be journaled; the coordinator ends.
        """
        round_ = call.round
        if not round_.wants(site):
            return
        where = about(site=site, round=round_.number)
        _log.warning("the update of %s in round %d is refused: %s", site, round_.number, reason, extra=where)
        if self._is_news(site, round_.kind, round_.number, f"{round_.attempt} {digest.hex()}"):
            try:
                self.record("update-refused", call, site=site, reason=reason, sha256=digest.hex())
                self._journal.refused(round_.kind.value, round_.number, round_.attempt, site, reason, digest)
            except RunFolderError as error:
                self.fail(error)
                raise
        round_.refused(site, reason)
        call.announce()
        self._changed()

    def late(self, site: str, kind: Kind, number: int, attempt: int, reason: str, digest: bytes = b"") -> None:
        """An update came that nobody waits for. That is journaled, and changes nothing."""
        if not self._is_news(site, kind, number, f"late {digest.hex()}"):
            return
        where = about(site=site, round=number)
        _log.info("the update of %s for round %d is refused: %s", site, number, reason, extra=where)
        offer: dict[str, Any] = {"kind": kind.value, "round": number, "attempt": attempt, "sha256": digest.hex()}
        try:
            self.record("update-refused", site=site, reason=reason, **offer)
            self._journal.late(kind.value, number, attempt, site, reason, digest)
        except RunFolderError as error:
            self.fail(error)

    def left(self, site: str, reason: str) -> None:
        """A site said that its operator stops it. It comes back, or not, as any other."""

    def _is_news(self, site: str, kind: Kind, number: int, what: str) -> bool:
        """Whether a refusal is none that the journal has, and no flood of them."""
        known = self._refusals.setdefault(site, set())
        if (kind, number, what) in known or len(known) >= _REFUSALS_KEPT:
            return False
        known.add((kind, number, what))
        return True

    def record(self, event: str, call: Call | None = None, **details: Any) -> None:
        """Records what is about to happen, in a round or outside any.

        Raises
        ------
        RunFolderError : it cannot be written; the coordinator ends.
        """
        if call is not None:
            details |= {"kind": call.round.kind.value, "round": call.round.number, "attempt": call.round.attempt}
        _log.debug("%s", event, extra=about(event=event, **details))
        try:
            self._audit.record(event, **details)
        except RunFolderError as error:
            self.fail(error)
            raise

    def fail(self, error: WardroundError) -> None:
        """The coordinator cannot go on, as its disk takes nothing more: the round under way ends with this error."""
        if self.call is not None:
            self.call.failure = error
            if self.call.secure is not None:
                self.call.secure.wake()
            self.call.announce()

    def update_path(self, call: Call, site: str, digest: bytes) -> Path:
        """Where an update of the site with this SHA-256 lies once it is whole."""
        return self._updates / update_name(call.round.kind, call.round.number, site, digest)

    def pause(self, reason: str) -> None:
        """The coordinator stops and will be back: tells every site, and those that still come, and hangs up."""
        self.paused = Pause(reason)
        for connection in self.connections.values():
            _hang_up(connection, self.paused)

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
    leaves = plan.securely_updated(state, report) if plan.secure else plan.update(state, report)
    release_memory()
    return leaves


def _hang_up(connection: Connection, pause: Pause) -> None:
    connection.outbox.put_nowait(pause)
    connection.outbox.put_nowait(None)
