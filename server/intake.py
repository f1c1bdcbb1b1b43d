"""Taking a site's update: which is wanted, where to go on after a break, and what never enters a sum. No gRPC here.

An update is known by kind, round, site and digest. Offered again, by a site that has not heard the receipt or by one
that was killed, it is answered from what is known and counts once. Its bytes are appended to a file that outlives this
process, until they are whole; then they are verified, put in place, and journaled, in this order.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from common.disk import cannot_write
from common.errors import RunFolderError, WireError
from common.failpoints import hit
from common.wire.partial import PartialBlob, disk_hit
from common.wire.tensors import Stored, TensorFile
from server.federation import Call, Federation
from server.plausible import implausible, most_weight, no_shares, norm
from server.rounds import Kind
from server.secure_rounds import SecureRound

UPLOAD_SUFFIX: Final = ".upload"
"""Ending of updates that are not whole, or not verified."""
WHOLE_SUFFIX: Final = ".tensors"


class Superseded(Exception):
    """A newer upload of the same site goes on with this one."""


class NotYet(Exception):
    """No round has begun since the coordinator started; the site will be given its task again."""


@dataclass(frozen=True)
class Offer:
    """What a site says of an update before it sends it.

    Attributes
    ----------
    site, kind, number, attempt : whose it is, of which attempt of which round.
    sha256, size : of its blob.
    broadcast : SHA-256 of the weights that it was computed from.
    epsilon : what the site has spent of its privacy budget; None where it says nothing of it.
    figures : `cases`, and the seconds of `download` and `work`, as the site counted them.
    """

    site: str
    kind: Kind
    number: int
    attempt: int
    sha256: bytes
    size: int
    broadcast: bytes
    cases: int
    download: float
    work: float
    epsilon: float | None = None


@dataclass(frozen=True)
class Verdict:
    """What became of an offer: taken where `refusal` is empty; `again`: it arrived damaged and may be sent again."""

    refusal: str = ""
    again: bool = False


class Intake:
    """Takes the updates of a federation's sites, one a site at a time."""

    def __init__(self, federation: Federation) -> None:
        self._federation = federation
        self._writers: dict[str, _Writer] = {}
        self._norm = (b"", 0.0)  # of the broadcast with this digest

    async def take(self, offer: Offer, pieces: AsyncIterator[bytes], ask: Callable[[int], Awaitable[None]]) -> Verdict:
        """Answers an offer, after reading it from `pieces` where it is wanted.

        `ask(position)` is awaited before the first piece: they begin at that byte. A newer offer of the same site ends
        the reading of this one, whose line is dead more likely than not. What has arrived stays for the next.

        Raises
        ------
        Superseded, NotYet : see there.
        RunFolderError : it cannot be stored or journaled; the round under way has ended with this error too.
        """
        taken = False
        try:
            verdict = await self._take(offer, pieces, ask)
            taken = not verdict.refusal
            return verdict
        finally:
            if offer.epsilon is not None and not taken:  # spent all the same
                self._federation.spent_by(offer.site, offer.kind, offer.number, offer.epsilon)

    async def _take(self, offer: Offer, pieces: AsyncIterator[bytes], ask: Callable[[int], Awaitable[None]]) -> Verdict:
        while True:
            answer = self._answer(offer)
            if answer is not None:
                return answer
            older = self._writers.get(offer.site)
            if older is None:
                break
            older.stop()
            await asyncio.wait([older.task])
        call = self._federation.call
        assert call is not None  # else it had been answered
        writer = _Writer()
        writer.task = asyncio.ensure_future(self._read_and_store(call, offer, pieces, ask, writer))
        self._writers[offer.site] = writer
        writer.task.add_done_callback(lambda task: self._ended(offer.site, writer))
        try:
            return await asyncio.shield(writer.task)
        except asyncio.CancelledError:
            if writer.task.cancelled() and writer.stopped:
                raise Superseded from None
            writer.stop()  # the line broke
            raise

    def _ended(self, site: str, writer: _Writer) -> None:
        if self._writers.get(site) is writer:
            del self._writers[site]
        if not writer.task.cancelled():
            writer.task.exception()  # whoever waited for it may be gone

    def _answer(self, offer: Offer) -> Verdict | None:
        """What can be said of an offer without its bytes; None: they are wanted."""
        federation, call = self._federation, self._federation.call
        if call is None or (call.round.kind, call.round.number) != (offer.kind, offer.number):
            if federation.was_received(offer.kind.value, offer.number, offer.site, offer.sha256, offer.broadcast):
                return Verdict()
            if call is None and not federation.begun and federation.finished is None:
                raise NotYet
            if call is not None and offer.number > call.round.number:
                return self._late(offer, f"round {offer.number} is not under way")
            return self._late(offer, f"round {offer.number} is closed")
        if call.secure is not None:
            if call.secure.has(offer.site, offer.sha256):
                return Verdict()
            refusal = call.secure.refusal(offer.site, offer.attempt, offer.size)
            return self._late(offer, refusal) if refusal else None
        answered = call.round.answers.get(offer.site)
        if answered is not None and answered.update is not None:
            if answered.update.digest == offer.sha256:
                return Verdict()
            return self._late(offer, "another update of this site and round is here already")
        if not call.round.wants(offer.site):
            return self._late(offer, f"round {offer.number} is closed")
        if offer.broadcast != call.broadcast.digest:
            return self._late(offer, f"it was computed from other weights than those of round {offer.number}")
        if offer.size != call.update_size:
            return self._refused(call, offer, f"an update has {call.update_size} bytes, this one has {offer.size}")
        return None

    def _late(self, offer: Offer, reason: str) -> Verdict:
        """Refuses an update that nobody waits for."""
        self._federation.late(offer.site, offer.kind, offer.number, offer.attempt, reason, offer.sha256)
        return Verdict(reason)

    def _refused(self, call: Call, offer: Offer, reason: str) -> Verdict:
        """Refuses an update that is worth nothing: its site has failed in this attempt."""
        self._federation.refused(call, offer.site, reason, offer.sha256)
        return Verdict(reason)

    async def _read_and_store(
        self,
        call: Call,
        offer: Offer,
        pieces: AsyncIterator[bytes],
        ask: Callable[[int], Awaitable[None]],
        writer: _Writer,
    ) -> Verdict:
        loop = asyncio.get_running_loop()
        started = loop.time()
        target = self._federation.update_path(call, offer.site, offer.sha256)
        try:
            with await _opened(target.with_suffix(UPLOAD_SUFFIX), offer) as blob:
                if not blob.whole:
                    await ask(blob.position)
                    closed = await self._read(call, offer, pieces, blob)
                    if closed is not None:
                        writer.finishing = True
                        await asyncio.to_thread(blob.drop)
                        return closed
                writer.finishing = True
                if call.secure is not None:
                    return await self._mask_received(call, call.secure, offer, blob, target)
                refusal = await asyncio.to_thread(self._implausible, call, offer, blob)
                if refusal:
                    await asyncio.to_thread(blob.drop)
                    return self._refused(call, offer, refusal)
                stored = await asyncio.to_thread(_put_in_place, blob, target)
        except WireError as error:
            return Verdict(str(error), again=True)
        except RunFolderError as error:
            if self._federation.call is not call:  # the next round began by removing what was half here
                return self._late(offer, f"round {offer.number} is closed")
            self._federation.fail(error)
            raise
        late = self._answer(offer)
        if late is not None:
            if late.refusal:  # else it is the file of the one that was taken
                with contextlib.suppress(OSError):  # it goes with its round
                    stored.path.unlink(missing_ok=True)
            return late
        seconds = loop.time() - started
        self._federation.received(
            call,
            offer.site,
            stored,
            cases=offer.cases,
            download=offer.download,
            work=offer.work,
            upload=seconds,
            epsilon=offer.epsilon,
        )
        hit("update.journaled")
        return Verdict()

    async def _mask_received(
        self, call: Call, secure: SecureRound, offer: Offer, blob: PartialBlob, target: Path
    ) -> Verdict:
        """A masked input is summed at once, and kept by nobody; a coordinator that is stopped asks for another."""
        stored = await asyncio.to_thread(blob.commit, target, durable=False)
        refusal = await secure.receive(offer.site, stored)
        return self._late(offer, refusal) if refusal else Verdict()

    async def _read(self, call: Call, offer: Offer, pieces: AsyncIterator[bytes], blob: PartialBlob) -> Verdict | None:
        """Appends the pieces until the blob is whole; a verdict if the round closes meanwhile."""
        half = offer.size // 2

        def append(piece: bytes) -> None:
            before = blob.position
            blob.write(piece)
            if before <= half < blob.position:
                disk_hit("update.partial", blob.path)

        writing: asyncio.Future[None] | None = None
        received = blob.position
        try:
            async for piece in pieces:
                if writing is not None:
                    await asyncio.shield(writing)  # one piece is written while the next is received
                if self._federation.call is not call or not call.round.wants(offer.site):
                    return self._answer(offer)
                writing = asyncio.ensure_future(asyncio.to_thread(append, piece))
                received += len(piece)
                self._federation.touched(offer.site)
                if received >= offer.size:
                    break
            if writing is not None:
                await asyncio.shield(writing)
            return None
        finally:
            if writing is not None:
                await asyncio.wait([writing])  # the file is not closed under a write

    def _implausible(self, call: Call, offer: Offer, blob: PartialBlob) -> str:
        """Why the whole blob can never be summed; "" if it can. Raises WireError where it is damaged."""
        blob.verify()
        try:
            tensors = TensorFile(blob.path, call.plan.sent)
        except WireError as error:
            return f"update: {str(error).removeprefix(f'{blob.path}: ')}"
        if call.round.kind is Kind.EVALUATE:
            return no_shares(tensors)
        broadcast = call.broadcast
        if not broadcast.tensors:  # the round is over, and has let them go
            return ""
        if self._norm[0] != broadcast.digest:
            self._norm = (broadcast.digest, norm(broadcast.tensors))
        return implausible(tensors, self._norm[1], most_weight(self._federation.study, offer.cases))


class _Writer:
    """Who writes a site's update at the moment."""

    task: asyncio.Task[Verdict]

    def __init__(self) -> None:
        self.finishing = False  # all is here: verifying and journaling are not interrupted
        self.stopped = False

    def stop(self) -> None:
        """Ends the reading, once."""
        if not self.finishing and not self.stopped:
            self.stopped = True
            self.task.cancel()


async def _opened(path: Path, offer: Offer) -> PartialBlob:
    """See `_open`. Cancelled, it ends first: it must not remove what a newer upload has begun meanwhile."""
    opening = asyncio.ensure_future(asyncio.to_thread(_open, path, offer))
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        await asyncio.wait([opening])
        if opening.exception() is None:
            opening.result().close()
        raise


def _open(path: Path, offer: Offer) -> PartialBlob:
    """The partial file of an offer; a site has no other of this round."""
    try:
        for other in path.parent.glob(f"{path.name.rsplit('-', 1)[0]}-*{UPLOAD_SUFFIX}"):
            if other != path and len(other.stem) == len(path.stem):  # not of a site whose name begins so
                other.unlink(missing_ok=True)
        whole = path.with_suffix(WHOLE_SUFFIX)
        if whole.exists() and not path.exists():  # put in place, and not journaled before the coordinator was killed
            whole.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    return PartialBlob(path, offer.sha256, offer.size)


def _put_in_place(blob: PartialBlob, target: Path) -> Stored:
    stored = blob.commit(target)
    disk_hit("update.stored", target)
    return stored
