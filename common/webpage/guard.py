"""What stands before every page: the host it is asked by, the headers it carries, errors that say nothing of inside.

A page on loopback is open to whatever runs in the same browser. A site that has its own name resolve to 127.0.0.1 (DNS
rebinding) would reach it as of its own origin; so a request by a name that is not the page's is refused before anything
else. Forms are taken from the page's own origin alone.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Middleware

from common.webpage.rendering import error_page

_log = logging.getLogger("wardround.page")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "[::1]"})
HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",  # not no-referrer: forms would send the origin "null"
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=(), payment=(), usb=()",
    "Server": "wardround",
}
_MOST_BODY: Final = 16 * 1024  # bytes; the longest that is sent to a page is a token


def guarded_app(hosts: Collection[str], *more: Middleware) -> web.Application:
    """An application behind these guards.

    Parameters
    ----------
    hosts : the names, without port, that requests may ask by; of IPv6 addresses with brackets.
    more : middlewares behind the guards, the first the outermost.
    """
    names = frozenset(host.lower() for host in hosts)

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            _check(request, names)
            return await handler(request)
        except web.HTTPException as answer:
            if answer.status < 400:
                raise
            return error_page(answer.status, dict(answer.headers))
        except ConnectionResetError:
            raise
        except Exception:
            _log.exception("%s %r could not be answered", request.method, request.path)
            return error_page(500, {})

    async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
        for name, value in HEADERS.items():
            response.headers[name] = value
        response.headers.setdefault("Cache-Control", "no-store")

    app = web.Application(middlewares=[guard, *more], client_max_size=_MOST_BODY)
    app.on_response_prepare.append(add_headers)
    return app


def _check(request: web.Request, names: frozenset[str]) -> None:
    if host_of(request) not in names:
        raise web.HTTPMisdirectedRequest
    if request.method not in ("GET", "HEAD", "POST"):
        raise web.HTTPMethodNotAllowed(request.method, ["GET", "HEAD", "POST"])
    if request.method == "POST":
        origin = request.headers.get("Origin")
        if origin is not None and origin != f"{request.scheme}://{request.headers['Host']}":
            raise web.HTTPForbidden
        if origin is None and request.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            raise web.HTTPForbidden


def host_of(request: web.Request) -> str:
    """The name that the request asks by, without its port; "" where it is not said."""
    host = request.headers.get("Host", "").lower()
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]
