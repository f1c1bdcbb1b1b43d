"""Applications under test: a client in the same loop, and a server in another thread for whatever cannot wait."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer


@contextlib.asynccontextmanager
async def client_of(app: web.Application, tls: ssl.SSLContext | None = None) -> AsyncIterator[TestClient[Any, Any]]:
    """A client of the application, which follows no redirects unless asked to."""
    server = TestServer(app, scheme="https" if tls is not None else "http")
    await server.start_server(ssl=tls)
    async with TestClient(server) as client:
        yield client


@contextlib.contextmanager
def in_thread(app: web.Application, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """The application on a port of loopback, in the loop of another thread; gives its URL."""
    loop = asyncio.new_event_loop()
    server = TestServer(app, scheme="https" if tls is not None else "http")
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(server.start_server(ssl=tls), loop).result(30)
        yield str(server.make_url("")).rstrip("/")
    finally:
        asyncio.run_coroutine_threadsafe(server.close(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def events(response: Any, most: int, seconds: float = 20.0) -> list[tuple[str, str]]:
    """The next so many server-sent events, by name and data; fewer where the stream ends."""
    found: list[tuple[str, str]] = []
    name = ""
    async with asyncio.timeout(seconds):
        async for line in response.content:
            text = line.decode().rstrip("\n")
            if text.startswith("event: "):
                name = text.removeprefix("event: ")
            elif text.startswith("data: "):
                found.append((name, text.removeprefix("data: ")))
                if len(found) == most:
                    break
    return found
