"""What a federation and its service share: a site's connection, a round under way, what goes from one to the other."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from common.errors import WardroundError
from common.learning.plan import RoundPlan
from common.wire.tensors import Array, encode_chunks, encoded_size
from server.rounds import Round

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
