"""A round whose updates nobody sees: the coordinator's side of secure aggregation, from the first site to the sum.

Sites train first and say when they are ready. Once all are, or at the round's deadline with the quorum, those that are
ready are asked for a sum (`common.secure_aggregation.coordinator`, stages R0 to R4). A stage is over when every site
that is left has answered, or at the deadline; one that begins late has a part of the deadline's time nevertheless. An
attempt that loses too many sites before unmasking is made again with those that are ready then, with fresh keys. Once
the sites were asked to unmask they do so for no other sum of the round: where that fails, the round is skipped.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import mmap
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from common.errors import ProtocolError, RoundSkippedError, RunFolderError, WardroundError, WireError
from common.secure_aggregation.coordinator import Aggregate, Coordinator
from common.secure_aggregation.keys import Verifier
from common.secure_aggregation.masking import payload_bytes
from common.secure_aggregation.messages import (
    Advertisement,
    Confirmation,
    EncryptedShares,
    MaskedInput,
    Message,
    UnmaskShares,
)
from common.secure_aggregation.refusals import TooFewSitesError, UnmaskingBegunError
from common.secure_aggregation.session import Session, Stage
from common.secure_aggregation.study_session import StudySums
from common.watching.logs import about
from common.wire.partial import disk_hit
from common.wire.tensors import Array, Stored, read_tensors, write_tensors
from server.calls import Call, Host, SecureAsk, check_budgets
from server.journal import Journal
from server.replay import RoundHistory, Summed
from server.rounds import Kind
from server.rounds import Stage as SiteStage

_log = logging.getLogger("wardround.coordinator")
_MOST_UNREAD: Final = 8
"""Messages of one site that wait to be read: one a stage, and as many again for lines that broke."""
_LATE_PART: Final = 0.2
"""Of the deadline's time: what a stage has that begins after it, or shortly before."""


@dataclass(frozen=True)
class SecureSums:
    """What the coordinator needs for secure sums: who checks signatures, and what tells this run apart, 32 bytes."""

    verify: Verifier
    run: bytes


@dataclass
class _Heard:
    """What a site said, or where its masked input lies; the answer is awaited for the latter."""

    site: str
    content: bytes = b""
    masked: Stored | None = None
    answer: asyncio.Future[str] | None = field(default=None, repr=False)


class SecureRound:
    """One call of the cohort whose answers are summed securely.

    Parameters
    ----------
    host, journal : of the run.
    call : the round; its plan says what is summed.
    sums : see there.
    plan_digest : of the study's plan.
    updates : the folder in which masked inputs arrive, and sums are kept.
    """

    def __init__(
        self, host: Host, journal: Journal, call: Call, sums: SecureSums, plan_digest: bytes, updates: Path
    ) -> None:
        self._host, self._journal, self._call, self._verify = host, journal, call, sums.verify
        self._sums, self._updates = StudySums(host.study, plan_digest, sums.run), updates
        self._heard: asyncio.Queue[_Heard | None] = asyncio.Queue()
        self._unread: Counter[str] = Counter()  # messages in the queue, by site
        self._flooding: set[str] = set()
        self._ready: set[str] = set()
        self._lost: set[str] = set()
        self._coordinator: Coordinator | None = None
        self._session: Session | None = None
        self._asked: dict[str, SecureAsk] = {}  # the last step that went to each site of the attempt
        self._processes: dict[str, bytes] = {}  # of the sites of the attempt: another one knows nothing of it
        self._masked: dict[str, Stored] = {}
        self._masked_size = 0
        self._over = False

    # --- what the federation and the intake say ------------------------------------------------------------------

    def said(self, site: str, attempt: int, content: bytes) -> None:
        """A site sent a step: without content, that its update is ready. More than can be honest is not kept."""
        if content and attempt != self._call.round.attempt:
            return
        if self._unread[site] >= _MOST_UNREAD:
            if site not in self._flooding:
                self._flooding.add(site)
                _log.warning("%s sends more steps than there are; they are not used", site, extra=about(site=site))
            return
        self._unread[site] += 1
        self._heard.put_nowait(_Heard(site, content))

    def connected(self, site: str) -> None:
        """A site's line is new: what it was asked last is asked again, unless it is another process by now."""
        connection = self._host.connections.get(site)
        if connection is None or site not in self._asked:
            return
        if connection.process and connection.process == self._processes.get(site):
            if not self._call.round.wants(site):  # its masked input is here: it is given no task, and needs its name
                connection.outbox.put_nowait(self._call)
            connection.outbox.put_nowait(self._asked[site])
        else:
            self._lose(site)

    def gone(self, site: str) -> None:
        """A site's line broke. It may come back within an attempt; for the next one it is asked anew."""
        self._ready.discard(site)
        self.wake()

    def failed(self, site: str) -> None:
        """A site said that it cannot go on, or was shut out."""
        self._ready.discard(site)
        self._lose(site)

    def wake(self) -> None:
        """Something changed that whoever waits should look at."""
        self._heard.put_nowait(None)

    @property
    def ready(self) -> frozenset[str]:
        """The sites whose work is done and that wait for a sum."""
        return frozenset(self._ready)

    @property
    def waiting_for(self) -> tuple[str, ...]:
        """The sites that have not answered in the stage under way; () where none is."""
        return self._coordinator.waiting_for if self._coordinator is not None else ()

    def refusal(self, site: str, attempt: int, size: int) -> str:
        """Why a masked input of a site is not even looked at; "" where it is wanted."""
        coordinator = self._coordinator
        if coordinator is None or attempt != self._call.round.attempt or coordinator.stage is not Stage.MASK:
            return f"attempt {attempt} of round {self._call.round.number} takes no masked input now"
        if site not in coordinator.waiting_for or site in self._lost:
            return f"no masked input of {site} is waited for in attempt {attempt}"
        if size != self._masked_size + len(site.encode()):
            expected = self._masked_size + len(site.encode())
            return f"a masked input of {site} has {expected} bytes, this one has {size}"
        return ""

    def has(self, site: str, digest: bytes) -> bool:
        """Whether this very masked input is in the sum already."""
        return site in self._masked and self._masked[site].digest == digest

    async def receive(self, site: str, stored: Stored) -> str:
        """A masked input is whole: adds it to the sum and removes it. Returns why it is refused, or ""."""
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._heard.put_nowait(_Heard(site, masked=stored, answer=answer))
        if self._over:
            self._let_go()
        try:
            return await answer
        finally:
            with contextlib.suppress(OSError):  # it goes with its round
                stored.path.unlink(missing_ok=True)

    # --- the round -----------------------------------------------------------------------------------------------

    async def run(self, known: RoundHistory | None) -> Sequence[Array]:
        """The sums, int64, of the attempt that succeeds.

        Parameters
        ----------
        known : what the journal says of the round, of a coordinator that was stopped in it.

        Raises
        ------
        RoundSkippedError : the sum was lost while it was unmasked, now or before the coordinator was stopped.
        """
        try:
            return await self._run(known)
        finally:
            self._over = True
            self._let_go()

    def _let_go(self) -> None:
        """Whoever brought a masked input that nobody adds any more hears so."""
        while not self._heard.empty():
            heard = self._heard.get_nowait()
            if heard is not None and heard.answer is not None and not heard.answer.done():
                heard.answer.set_result("it came too late")

    async def _run(self, known: RoundHistory | None) -> Sequence[Array]:
        if known is not None and known.summed is not None:
            return await self._restored(known.summed)
        if known is not None and (known.unmasking or known.skipped):
            self._skip(known.skipped or "the coordinator was stopped while the sites unmasked their sum")
        if known is not None and known.asked >= self._call.round.attempt:
            self._call.round.attempt = known.asked + 1  # keys are fresh, and so is the attempt's number
        while True:
            sites = await self._until_ready()
            try:
                return await self._attempt(sites)
            except TooFewSitesError as error:
                self._again(error)
            finally:
                self._end_attempt()

    async def _restored(self, summed: Summed) -> Sequence[Array]:
        path = self._updates / summed.file
        try:
            sums = await asyncio.to_thread(read_tensors, path, None, bytes.fromhex(summed.sha256))
        except WireError as error:
            self._skip(f"its sum is damaged on this disk ({error})")
        self._call.round.attempt = summed.attempt
        for site in summed.survivors:
            self._call.round.received(site, Stored(path, bytes.fromhex(summed.sha256), summed.sent))
        self._call.sum_digest = bytes.fromhex(summed.sha256)
        return sums

    async def _until_ready(self) -> list[str]:
        """Waits for those that work: all, or at the deadline the quorum; below it another attempt begins."""
        round_, study = self._call.round, self._host.study
        while True:
            self._check()
            if round_.kind is Kind.TRAIN:
                check_budgets(round_)
            self._skip_if_unmasked()
            ready = [site for site in round_.asked if site in self._ready]
            done = all(site in self._ready or round_.answers[site].stage is SiteStage.FAILED for site in round_.asked)
            if done and len(ready) >= round_.needed:
                return ready
            try:
                async with asyncio.timeout(max(0.0, self._call.deadline - time.monotonic())):
                    heard = await self._next()
            except TimeoutError:
                if len(ready) >= round_.needed:
                    return ready
                missing = [site for site in round_.asked if site not in self._ready]
                round_.deadline()
                self._call.deadline = time.monotonic() + study.cohort.deadline_seconds
                self._host.retried(self._call, missing, f"{len(ready)} of the quorum of {round_.needed} are ready")
                continue
            self._take_ready(heard)

    async def _next(self) -> _Heard | None:
        heard = await self._heard.get()
        if heard is not None and heard.answer is None:
            self._unread[heard.site] -= 1
        return heard

    def _skip_if_unmasked(self) -> None:
        """Skips a round that so many sites have unmasked before that no sum of it can be made any more."""
        round_ = self._call.round
        begun = [site for site in round_.asked if round_.answers[site].reason.endswith(UnmaskingBegunError.__name__)]
        if begun and len(round_.asked) - len(begun) < round_.needed:
            self._skip(f"{', '.join(begun)} have unmasked it before, in a sum that this run knows nothing of")

    def _take_ready(self, heard: _Heard | None) -> None:
        if heard is None:
            return
        if heard.answer is not None:
            _answer(heard.answer, "no sum is under way")
        elif not heard.content and heard.site in self._call.round.asked and heard.site in self._host.connections:
            self._ready.add(heard.site)
            self._call.round.ready(heard.site)
            self._call.announce()

    def _again(self, error: TooFewSitesError) -> None:
        """The attempt lost too many sites before unmasking: another, with those that are ready for it."""
        round_ = self._call.round
        session = self._session
        assert session is not None
        dropped = {site for sites in error.dropped.values() for site in sites} | self._lost
        self._ready -= dropped - self._lost  # those that are lost may have come back, and said so
        dropped -= self._ready
        round_.begin_again()
        if time.monotonic() >= self._call.deadline:
            self._call.deadline = time.monotonic() + self._host.study.cohort.deadline_seconds
        _log.warning("round %d: %s", round_.number, error, extra=about(round=round_.number))
        for site in dropped:
            if round_.answers[site].stage is not SiteStage.FAILED:
                round_.disconnected(site)
        self._host.retried(self._call, sorted(dropped), "too many sites were lost while their sum was made")

    async def _attempt(self, sites: Sequence[str]) -> Sequence[Array]:
        call, round_ = self._call, self._call.round
        kind, number = round_.kind.value, round_.number
        session = self._sums.session(kind, number, round_.attempt, sites, broadcast=call.broadcast.weights)
        self._host.record("secure-sum-asked", call, sites=list(sites), threshold=session.threshold)
        self._journal.asked(kind, number, round_.attempt, sites)
        disk_hit("secure.asked", self._updates)
        coordinator = await asyncio.to_thread(Coordinator, session, call.plan.secure, self._verify)
        self._begin_attempt(session, coordinator)
        self._ask(sites, dict.fromkeys(sites, b""), session.encode())

        await self._stage(Advertisement, coordinator.receive_advertisement)
        roster = coordinator.close_advertising()
        self._hold_quorum(roster.sites)
        self._ask(roster.sites, dict.fromkeys(roster.sites, roster.encode()))

        await self._stage(EncryptedShares, coordinator.receive_shares)
        delivered = coordinator.close_sharing()
        self._hold_quorum(tuple(delivered))
        self._ask(tuple(delivered), {site: message.encode() for site, message in delivered.items()})

        await self._stage(MaskedInput, coordinator.receive_masked_input)
        survivors = coordinator.close_masking()
        names = survivors.survivors
        self._hold_quorum(names)
        self._ask(names, dict.fromkeys(names, survivors.encode()))

        await self._stage(Confirmation, coordinator.receive_confirmation)
        request = coordinator.close_confirming()
        self._host.record("secure-unmasking", call, survivors=list(names), dropped=list(request.dropped))
        self._journal.unmasking(kind, number, round_.attempt, names)
        disk_hit("secure.unmasking", self._updates)
        try:
            confirmed = tuple(site for site, _ in request.confirmations)
            self._ask(confirmed, dict.fromkeys(confirmed, request.encode()))
            await self._stage(UnmaskShares, coordinator.receive_unmask_shares)
            aggregate = await asyncio.to_thread(coordinator.finish)
        except ProtocolError as error:
            self._skip(str(error))
        return await asyncio.to_thread(self._keep, aggregate)

    def _hold_quorum(self, sites: Sequence[str]) -> None:
        """Raises TooFewSitesError where the sum would be of fewer sites than the study's quorum."""
        coordinator, needed = self._coordinator, self._call.round.needed
        assert coordinator is not None and self._session is not None
        if len(sites) < needed:
            raise TooFewSitesError(
                f"{self._session.name}: expected the quorum of {needed} sites, found {len(sites)}; the attempt "
                "is given up",
                coordinator.dropped,
            )

    def _keep(self, aggregate: Aggregate) -> Sequence[Array]:
        """Makes the sum durable, so that a coordinator that is killed goes on with it: nobody gives it twice."""
        round_ = self._call.round
        disk_hit("secure.unmasked", self._updates)
        kind, number = round_.kind.value, round_.number
        partial = write_tensors(self._updates / f"{number:06d}-{kind}-.sum-{round_.attempt}.tensors", aggregate.tensors)
        self._host.record(
            "secure-sum-made", self._call, survivors=list(aggregate.survivors), sha256=partial.digest.hex()
        )
        self._journal.summed(
            kind, number, round_.attempt, partial, aggregate.survivors, max(one.size for one in self._masked.values())
        )
        disk_hit("secure.summed", self._updates)
        self._call.sum_digest = partial.digest
        return aggregate.tensors

    def _skip(self, reason: str) -> Any:
        round_ = self._call.round
        words = f"round {round_.number} ({round_.kind.value}) is skipped: {reason}"
        _log.warning("%s", words, extra=about(round=round_.number))
        self._host.record("round-skipped", self._call, reason=reason)
        self._journal.skipped(round_.kind.value, round_.number, round_.attempt, reason)
        self._host.say(words)
        raise RoundSkippedError(words)

    # --- one attempt ---------------------------------------------------------------------------------------------

    def _begin_attempt(self, session: Session, coordinator: Coordinator) -> None:
        self._session, self._coordinator = session, coordinator
        self._lost.clear()
        self._masked.clear()
        empty = MaskedInput(session.digest, "x", b"")
        self._masked_size = len(empty.encode()) - 1 + payload_bytes(self._call.plan.secure, len(session.sites))
        self._processes = {
            site: connection.process
            for site in session.sites
            if (connection := self._host.connections.get(site)) is not None
        }

    def _end_attempt(self) -> None:
        self._coordinator = None
        self._asked.clear()
        self._processes.clear()

    def _ask(self, sites: Sequence[str], contents: Mapping[str, bytes], proposal: bytes = b"") -> None:
        """The next step goes out to these sites, and to no other of the attempt any more."""
        round_ = self._call.round
        self._asked = {site: SecureAsk(self._call, round_.attempt, contents[site], proposal) for site in sites}
        for site, ask in self._asked.items():
            connection = self._host.connections.get(site)
            if connection is not None and site not in self._lost:
                connection.outbox.put_nowait(ask)

    async def _stage(self, kind: type[Message], take: Callable[[Any], None]) -> None:
        """Waits for the messages of a stage: all of those that can still come, or at the deadline those that came."""
        coordinator = self._coordinator
        assert coordinator is not None
        late = time.monotonic() + _LATE_PART * self._host.study.cohort.deadline_seconds
        while set(coordinator.waiting_for) - self._lost:
            self._check()
            try:
                async with asyncio.timeout(max(0.0, max(self._call.deadline, late) - time.monotonic())):
                    heard = await self._next()
            except TimeoutError:
                return
            if heard is not None and heard.masked is not None and heard.answer is not None:
                await self._take_masked(heard.site, heard.masked, heard.answer)
            elif heard is not None and heard.content and kind is not MaskedInput:
                self._take(kind, take, heard)
            else:
                self._take_ready(heard)

    async def _take_masked(self, site: str, stored: Stored, answer: asyncio.Future[str]) -> None:
        try:
            refusal = await asyncio.to_thread(self._add, site, stored)
        except RunFolderError as error:
            if not answer.done():
                answer.set_exception(error)
            raise
        _answer(answer, refusal)
        self._call.announce()

    def _take(self, kind: type[Message], take: Callable[[Any], None], heard: _Heard) -> None:
        coordinator = self._coordinator
        assert coordinator is not None
        try:
            message: Any = kind.decode(heard.content)
            if getattr(message, "sender", None) != heard.site and getattr(message, "site", None) != heard.site:
                raise ProtocolError(f"{kind.__name__}: is not of {heard.site!r}, who sent it; it was not used")
            take(message)
        except ProtocolError as error:
            if heard.site in coordinator.waiting_for:
                self._refuse(heard.site, error)
            return  # else it was said twice, as after a broken line

    def _add(self, site: str, stored: Stored) -> str:
        """In a thread: adds a masked input; it is in memory as far as the sum reads it."""
        coordinator, round_ = self._coordinator, self._call.round
        assert coordinator is not None
        try:
            if self.refusal(site, round_.attempt, stored.size):
                return "it came too late"
            self._host.record(
                "masked-input-received", self._call, site=site, bytes=stored.size, sha256=stored.digest.hex()
            )
            with stored.path.open("rb") as file:  # the map goes with the message
                message = MaskedInput.decode(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
            if message.site != site:
                raise ProtocolError(f"masked input: is of {message.site!r}, was sent by {site!r}")
            coordinator.receive_masked_input(message)
        except ProtocolError as error:
            _log.warning("round %d: %s", round_.number, error, extra=about(site=site, round=round_.number))
            return str(error)
        except (OSError, ValueError) as error:
            raise RunFolderError(f"{stored.path}: a masked input cannot be read ({error}); check the disk") from error
        self._masked[site] = stored
        round_.received(site, stored, arrived=time.monotonic())
        return ""

    def _refuse(self, site: str, error: WardroundError) -> None:
        """What a site sent is not as it should be: the attempt goes on without it."""
        number = self._call.round.number
        where = about(site=site, round=number)
        _log.warning("round %d: what %s sent is refused: %s", number, site, error, extra=where)
        self._host.record("secure-step-refused", self._call, site=site, reason=type(error).__name__)
        self._call.round.failed(site, f"what it sent was refused: {type(error).__name__}")
        self._ready.discard(site)
        self._lose(site)

    def _lose(self, site: str) -> None:
        if self._coordinator is not None:
            self._lost.add(site)
        self.wake()

    def _check(self) -> None:
        if self._call.failure is not None:
            raise self._call.failure


def _answer(waiting: asyncio.Future[str], refusal: str) -> None:
    if not waiting.done():  # whoever waited may be gone
        waiting.set_result(refusal)
