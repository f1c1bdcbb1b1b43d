"""Who may see a run's page: nobody without a login beyond loopback, and everybody only what the role may see.

A viewer comes with a certificate of the study (investigator, observer or site, not revoked), or logs in with a token
and is kept by a cookie. The cookie holds a random word that this process alone knows: a page that restarts asks to log
in again. Tokens and certificates that are revoked or expire end open pages within seconds.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from typing import Final

from aiohttp import web
from cryptography import x509

from common.errors import IdentityError
from common.security.profile import MEMBERS, owner_of
from common.security.revocation import RevocationFile
from common.webpage.guard import Handler
from server.dashboard.tokens import PageTokens
from server.dashboard.viewer import LOCAL, Viewer

VIEWER: Final = web.RequestKey("viewer", Viewer)
COOKIE: Final = "wardround_page"
_SESSION_SECONDS: Final = 12 * 3600.0
_MOST_SESSIONS: Final = 1000
_OPEN: Final = ("/login", "/static/")
"""What is answered without a login: nothing of the study is in it."""


@dataclass(frozen=True)
class _Session:
    token: str
    until: float


class Access:
    """Tells who makes a request.

    Parameters
    ----------
    tokens : None on loopback where no login is asked for.
    revoked : who of the study was shut out; None where no certificates are asked for.
    """

    def __init__(self, tokens: PageTokens | None, revoked: RevocationFile | None = None) -> None:
        self._tokens = tokens
        self._revoked = revoked
        self._sessions: dict[str, _Session] = {}

    def viewer(self, request: web.BaseRequest) -> Viewer | None:
        """Who makes the request; None who may see nothing."""
        if self._tokens is None:
            return LOCAL
        try:
            return self._by_certificate(request) or self._by_cookie(request)
        except IdentityError:  # a list that cannot be read lets nobody in
            return None

    def _by_certificate(self, request: web.BaseRequest) -> Viewer | None:
        transport = request.transport
        connection = transport.get_extra_info("ssl_object") if transport is not None else None
        content = connection.getpeercert(binary_form=True) if connection is not None else None
        if not content or self._revoked is None:
            return None
        certificate = x509.load_der_x509_certificate(content)
        role, name = owner_of(certificate)
        if role not in MEMBERS or self._revoked.current().refuses(certificate) is not None:
            return None
        if certificate.not_valid_after_utc.timestamp() <= time.time():  # the connection may be older
            return None
        return Viewer(role, name, "certificate")

    def _by_cookie(self, request: web.BaseRequest) -> Viewer | None:
        session = self._sessions.get(request.cookies.get(COOKIE, ""))
        now = time.time()
        if session is None or self._tokens is None or now >= session.until:
            return None
        token = self._tokens.holding(session.token, now)
        return None if token is None else Viewer(token.role, token.name, "token")

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Lets nobody past who may not see the page."""
        viewer = self.viewer(request)
        if viewer is not None:
            request[VIEWER] = viewer
        elif not request.path.startswith(_OPEN):
            if request.method == "GET" and request.path == "/":
                raise web.HTTPSeeOther("/login")
            raise web.HTTPUnauthorized
        return await handler(request)

    def log_in(self, request: web.Request, text: str) -> web.Response | None:
        """The answer to whoever brings a token, with the cookie; None where the token is none, or holds no more."""
        now = time.time()
        token = self._tokens.find(text, now) if self._tokens is not None else None
        if token is None:
            return None
        self._sessions = {word: one for word, one in self._sessions.items() if one.until > now}
        while len(self._sessions) >= _MOST_SESSIONS:
            del self._sessions[next(iter(self._sessions))]
        word, until = secrets.token_urlsafe(32), min(token.expires, now + _SESSION_SECONDS)
        self._sessions[word] = _Session(token.id, until)
        answer = web.Response(status=303, headers={"Location": "/"})
        answer.set_cookie(
            COOKIE, word, max_age=int(until - now), path="/", httponly=True, samesite="Strict", secure=request.secure
        )
        return answer

    def log_out(self, request: web.Request) -> web.Response:
        """Forgets the login."""
        self._sessions.pop(request.cookies.get(COOKIE, ""), None)
        answer = web.Response(status=303, headers={"Location": "/login"})
        answer.del_cookie(COOKIE, path="/", httponly=True, samesite="Strict", secure=request.secure)
        return answer
