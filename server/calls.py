"""What a federation and its service share: a site's connection, a round under way, what goes from one to the other."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from common.errors import BudgetSpentError, WardroundError
from common.learning.plan import RoundPlan
from common.privacy.accounting import BUDGET_SPENT
from common.secure_aggregation.study_session import broadcast_digest
from common.study import Study
from common.wire.tensors import Array, encode_chunks, encoded_size
from server.rounds import Round

if TYPE_CHECKING:
    from server.secure_rounds import SecureRound

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

    @property
    def weights(self) -> bytes:
        """What updates are computed from, as sites that sum securely agree on it."""
        return broadcast_digest(self.digest, hashlib.sha256(self.scalars).digest())

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


@dataclass(frozen=True)
class Pause:
    """What a connection's outbox holds when the coordinator stops and will be back."""

    reason: str


@dataclass
class Connection:
    """A site's open control stream.

    Attributes
    ----------
    progressed : when the site last got on with its task, by `time.monotonic()`.
    process : random bytes that tell one process of a site from another; empty where it does not say.
    """

    site: str
    peer: str
    outbox: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    since: float = field(default_factory=time.monotonic)
    progressed: float = field(default_factory=time.monotonic)
    training_cases: int = 0
    validation_cases: int = 0
    process: bytes = b""


@dataclass(frozen=True)
class SecureAsk:
    """A step of secure aggregation for a site: what it is told, or at first the session that is proposed."""

    call: Call
    attempt: int
    content: bytes
    session: bytes = b""


@dataclass
class Call:
    """A round under way: its state, what it broadcasts, what it expects back.

    Attributes
    ----------
    started, closed_at : when it began and closed (monotonic).
    secure : the sum of a study with secure aggregation; its updates are seen by nobody.
    sum_digest : SHA-256 of that sum, once it is on disk.
    """

    round: Round
    plan: RoundPlan
    broadcast: Broadcast
    deadline: float
    started: float = field(default_factory=time.monotonic)
    closed_at: float | None = None
    failure: WardroundError | None = None
    bytes_down: dict[str, int] = field(default_factory=dict)
    secure: SecureRound | None = None
    sum_digest: bytes = b""
    _event: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def update_size(self) -> int:
        """Bytes of an update's blob."""
        return encoded_size(self.plan.sent)

    def let_go(self) -> None:
        """The round is over: whoever holds the call still, such as the outbox of a site that hangs, holds no model."""
        self.broadcast = replace(self.broadcast, tensors=(), scalars=b"")

    def announce(self) -> None:
        """Wakes everyone who waits for the round to change."""
        self._event.set()
        self._event = asyncio.Event()

    async def change(self) -> None:
        """Waits for the next `announce`; test the condition before, with no await in between."""
        await self._event.wait()


class Host(Protocol):
    """What a round needs of the federation that it is a call of."""

    study: Study
    connections: dict[str, Connection]

    def record(self, event: str, call: Call | None = None, **details: Any) -> None:
        """Records what is about to happen."""

    def give_task(self, site: str) -> None:
        """Sends the round's task."""

    def say(self, words: str) -> None:
        """Something that somebody should know."""

    def retried(self, call: Call, missing: Sequence[str], why: str) -> None:
        """Another attempt begins, in which these sites are asked again."""

    def close(self, call: Call) -> None:
        """The round's cohort is final."""


def check_budgets(round_: Round) -> None:
    """Raises BudgetSpentError where so many sites have none left that the rest is below the quorum."""
    out = [site for site in round_.missing if round_.answers[site].reason == BUDGET_SPENT]
    able = len(round_.asked) - len(out)
    if out and able < round_.needed:
        raise BudgetSpentError(
            f"the privacy budget is spent at {', '.join(out)}, and round {round_.number} needs {round_.needed} of "
            f"{len(round_.asked)} sites"
        )
