"""The page of a run as a web application: reads the run's folder, and tells open pages what has changed."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Collection, Mapping
from typing import Any

from aiohttp import web

from common.disk import file_stamp
from common.security.audit_files import HEAD
from common.webpage.assets import Body
from common.webpage.page import LivePage
from server.dashboard.access import VIEWER, Access
from server.dashboard.figures import figures
from server.dashboard.history import History
from server.dashboard.pictures import Pictures, picture
from server.dashboard.sections import SECTIONS, content
from server.dashboard.viewer import Viewer
from server.following import news
from server.run_folder import RunFolder
from server.watching.samples import FOLDER
from server.watching.snapshot import RunSnapshot, SnapshotReader


class Dashboard(LivePage[RunSnapshot, tuple[str, str]]):
    """One run's page, for any number of viewers.

    Parameters
    ----------
    run : its folder, which is only read.
    access : who may see what.
    hosts : the names that the page answers to.
    """

    def __init__(self, run: RunFolder, access: Access, hosts: Collection[str]) -> None:
        super().__init__("server.dashboard", "dashboard.html", SECTIONS, hosts)
        self._run = run
        self._access = access
        self._reader = SnapshotReader(run.path)
        self._history = History()
        self._pictures = Pictures()
        self._figures = "", Body(b"{}")
        self._process = secrets.token_hex(4)

    def served(self) -> web.Application:
        """The application."""
        return self.app(self._access.middleware)

    def routes(self) -> list[web.RouteDef]:
        """As the base."""
        return [
            web.get("/", self._page),
            web.get("/events", self._events),
            web.get("/figures.json", self._figures_json),
            web.get("/rounds.csv", self._rounds_csv),
            web.get(r"/samples/{round:\d{1,7}}/{case:\d{1,3}}/{place:\d{1,3}}/{kind:[a-z]{1,20}}.png", self._picture),
            web.get("/login", self._login_page),
            web.post("/login", self._login),
            web.post("/logout", self._logout),
        ]

    # What there is to see. ------------------------------------------------------------------------------------------

    def stamp(self) -> tuple[Any, Any]:
        """As the base: of the files that are read. What a round adds elsewhere than in `rounds.csv` may come later.

        The status changes with every batch of a site.
        """
        run = self._run
        at_once = (run.study, run.rounds, run.report, run.published)
        later = (run.status, run.sites, run.path / HEAD, run.path / FOLDER)
        return [run.is_locked(), *map(file_stamp, at_once)], [file_stamp(path) for path in later]

    def look(self) -> RunSnapshot:
        """As the base; draws the charts where a round was added."""
        snapshot = self._reader.read()
        self._history.take(snapshot)
        self._pictures = Pictures.of(self._run.path)
        version = f"{self._process}-{self._history.version}"
        if version != self._figures[0]:
            budget = (snapshot.privacy or {}).get("budget")
            drawn = json.dumps(figures(self._history, budget=budget), separators=(",", ":"))
            self._figures = version, Body(drawn.encode())
        return snapshot

    def content(self, state: RunSnapshot, audience: tuple[str, str]) -> Mapping[str, Any]:
        """As the base."""
        return content(state, self._history, Viewer.of(audience), self._pictures)

    def figures_version(self) -> str:
        """As the base."""
        return self._figures[0]

    def news(self, before: RunSnapshot, state: RunSnapshot, audience: tuple[str, str]) -> str:
        """As the base: rounds that ended, changes of state, notices."""
        viewer = Viewer.of(audience)
        return ". ".join(news(viewer.shown(before.status), viewer.shown(state.status)))

    # Answers. -------------------------------------------------------------------------------------------------------

    async def _page(self, request: web.Request) -> web.Response:
        viewer: Viewer = request[VIEWER]
        return await self.answer_page(viewer.audience, viewer=viewer)

    async def _events(self, request: web.Request) -> web.StreamResponse:
        audience = request[VIEWER].audience
        return await self.answer_events(
            request, audience, lambda: getattr(self._access.viewer(request), "audience", None) == audience
        )

    async def _figures_json(self, request: web.Request) -> web.Response:
        await self.current(patient=True)  # a round is looked at without delay, and no other changes the charts
        version, body = self._figures
        return body.response(request, {"ETag": f'"{version}"'}, "application/json")

    async def _rounds_csv(self, request: web.Request) -> web.StreamResponse:
        if not request[VIEWER].sees_all:
            raise web.HTTPForbidden
        try:
            body = await asyncio.to_thread(self._run.rounds.read_bytes)
        except OSError as error:
            raise web.HTTPNotFound from error
        headers = {"Content-Disposition": 'attachment; filename="rounds.csv"'}
        return web.Response(body=body, content_type="text/csv", charset="utf-8", headers=headers)

    async def _picture(self, request: web.Request) -> web.StreamResponse:
        if not request[VIEWER].sees_all:
            raise web.HTTPForbidden
        round_number, case, place = (int(request.match_info[name]) for name in ("round", "case", "place"))
        kind = request.match_info["kind"]
        try:
            path = await asyncio.to_thread(picture, self._run.path, round_number, case, place, kind)
            if path is None:
                raise web.HTTPNotFound
            body = await asyncio.to_thread(path.read_bytes)
        except OSError as error:
            raise web.HTTPNotFound from error
        return web.Response(body=body, content_type="image/png")

    async def _login_page(self, request: web.Request) -> web.Response:
        return self.html("login.html", wrong="")

    async def _login(self, request: web.Request) -> web.Response:
        try:
            text = (await request.post()).get("token")
        except ValueError as error:  # no form
            raise web.HTTPBadRequest from error
        answer = self._access.log_in(request, text) if isinstance(text, str) else None
        if answer is None:
            answer = self.html(
                "login.html", wrong="This token is not good: it is mistyped, has expired, or was revoked."
            )
            answer.set_status(403)
        return answer

    async def _logout(self, request: web.Request) -> web.Response:
        return self._access.log_out(request)
