"""Serves a page until it is told to stop: on loopback as it is, elsewhere by TLS 1.3 alone."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import ssl
import sys
from collections.abc import Callable
from pathlib import Path

from aiohttp import web

from common.errors import IdentityError, NetworkError
from common.wire.addresses import Address


def tls_context(certificate: Path, key: Path, clients_of: Path | None = None) -> ssl.SSLContext:
    """What a page is served by beyond loopback.

    Parameters
    ----------
    clients_of : certificate of an authority; who comes with a certificate of it has it verified, and may come without.

    Raises
    ------
    IdentityError : a file is missing or unreadable, or they do not belong together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_cert_chain(certificate, key)
        if clients_of is not None:
            context.load_verify_locations(clients_of)
            context.verify_mode = ssl.CERT_OPTIONAL
    except (OSError, ssl.SSLError) as error:
        raise IdentityError(
            f"{certificate}: cannot be served with ({error.strerror or error}); give a certificate and its key"
        ) from error
    return context


async def serve(
    app: web.Application,
    address: Address,
    context: ssl.SSLContext | None,
    started: Callable[[str], None],
    *,
    with_stdin: bool = False,
) -> None:
    """Serves until SIGTERM or SIGINT.

    Parameters
    ----------
    started : called with the page's URL once it answers.
    with_stdin : also ends when standard input does: with the process that holds its other end.

    Raises
    ------
    NetworkError : the address cannot be listened at.
    """
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    if with_stdin:
        loop.add_reader(sys.stdin.fileno(), lambda: None if os.read(sys.stdin.fileno(), 1) else stopped.set())
    # No access log: it would be a list of who looked at what.
    runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1.0)
    await runner.setup()
    try:
        site = web.TCPSite(runner, address.host, address.port, ssl_context=context)
        try:
            await site.start()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                todo = "is in use; stop what listens there, or choose another port"
            else:
                todo = f"cannot be listened at ({error.strerror or error}); choose an address of this machine"
            raise NetworkError(f"{address}: {todo}") from error
        port = runner.addresses[0][1]
        started(f"{'http' if context is None else 'https'}://{Address(address.host, port)}/")
        await stopped.wait()
    finally:
        if with_stdin:
            loop.remove_reader(sys.stdin.fileno())
        with contextlib.suppress(asyncio.CancelledError):
            await runner.cleanup()
