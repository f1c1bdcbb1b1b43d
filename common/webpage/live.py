"""Live updates of open pages, as server-sent events: one watcher looks, every page is told what has changed.

A page that reads slowly holds nobody up and fills no memory: of each part it gets the newest.

Source: server-sent events are the WHATWG HTML standard, section 9.2.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

from aiohttp import web

MOST_READERS: Final = 256
_KEEP_ALIVE_SECONDS: Final = 5.0  # also how soon a page hears that it may not look any more


class Reader:
    """An open page: what it is still to be told, by part."""

    def __init__(self) -> None:
        self._pending: dict[str, bytes] = {}
        self._woken = asyncio.Event()

    def tell(self, part: str, message: bytes) -> None:
        """The newest of a part; what it was to be told of it before is dropped."""
        self._pending.pop(part, None)
        self._pending[part] = message
        self._woken.set()

    async def take(self) -> bytes:
        """All that is pending, as soon as there is something; a comment where there was nothing for long."""
        try:
            async with asyncio.timeout(_KEEP_ALIVE_SECONDS):
                await self._woken.wait()
        except TimeoutError:
            return b": still here\n\n"
        self._woken.clear()
        pending, self._pending = self._pending, {}
        return b"".join(pending.values())


class Readers:
    """The open pages, by audience: those of one audience see the same."""

    def __init__(self) -> None:
        self._by_audience: dict[Any, set[Reader]] = {}
        self._streams: set[asyncio.Task[Any]] = set()

    @property
    def audiences(self) -> list[Any]:
        """Who looks now."""
        return list(self._by_audience)

    def __len__(self) -> int:
        return sum(len(readers) for readers in self._by_audience.values())

    def of(self, audience: Any) -> set[Reader]:
        """The open pages of an audience."""
        return self._by_audience.get(audience, set())

    def tell(self, audience: Any, part: str, message: bytes) -> None:
        """Tells all pages of an audience."""
        for reader in self.of(audience):
            reader.tell(part, message)

    @contextlib.contextmanager
    def reading(self, audience: Any) -> Iterator[Reader]:
        """A page is open meanwhile. Raises HTTPServiceUnavailable where too many are."""
        if len(self) >= MOST_READERS:
            raise web.HTTPServiceUnavailable
        reader = Reader()
        self._by_audience.setdefault(audience, set()).add(reader)
        try:
            yield reader
        finally:
            readers = self._by_audience[audience]
            readers.discard(reader)
            if not readers:
                del self._by_audience[audience]

    async def stream(
        self, request: web.Request, reader: Reader, still_allowed: Any = lambda: True
    ) -> web.StreamResponse:
        """Sends a reader what it is told, until it goes, or is not allowed any more, or the server stops."""
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        )
        await response.prepare(request)
        task = asyncio.current_task()
        assert task is not None, "aiohttp makes a task of each connection"
        self._streams.add(task)
        try:
            while still_allowed():
                await response.write(await reader.take())
            await response.write(event("ended", {}))
        except ConnectionResetError:
            pass
        finally:
            self._streams.discard(task)
        return response

    async def close(self, _: web.Application) -> None:
        """Ends all streams, for a server that stops: it would wait for them."""
        for task in list(self._streams):
            task.cancel()


def event(name: str, data: Mapping[str, Any]) -> bytes:
    """A server-sent event; JSON has no line breaks of its own."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()
