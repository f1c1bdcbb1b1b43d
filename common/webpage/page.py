"""A live page: sections that are drawn on the server, and sent anew to open pages when they have changed.

However many pages are open, one task looks, and only while one is open. What an audience sees is drawn once for all of
it.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Collection, Hashable, Mapping, Sequence
from typing import Any, Final, Generic, TypeVar

from aiohttp import web
from aiohttp.typedefs import Middleware

from common.version import VERSION
from common.webpage.assets import Assets
from common.webpage.guard import guarded_app
from common.webpage.live import Readers, event
from common.webpage.rendering import environment

_log = logging.getLogger("wardround.page")
_LOOK_SECONDS: Final = 0.8
_PROGRESS_SECONDS: Final = 2.5  # between two looks at what may wait: each costs those who train on the same machine
_LOOK_ANEW_SECONDS: Final = 5.0  # what follows from the clock alone changes too

State = TypeVar("State")
Audience = TypeVar("Audience", bound=Hashable)


class LivePage(abc.ABC, Generic[State, Audience]):
    """A page of one kind; what it shows comes from `look`.

    Parameters
    ----------
    package : whose `templates/` and `static/` it is made of.
    template : of the whole page; it includes ``sections/<name>.html`` for each of `sections`.
    hosts : the names that the page answers to, without port.
    """

    def __init__(self, package: str, template: str, sections: Sequence[str], hosts: Collection[str]) -> None:
        self.assets = Assets([package])
        self.templates = environment(package)
        self.templates.globals |= {"asset": self.assets.url, "assets": self.assets}
        self._template = template
        self._sections = sections
        self._hosts = hosts
        self._state: State | None = None
        self._stamp: tuple[Any, Any] = (None, None)
        self._looked = -math.inf
        self._looking = asyncio.Lock()
        self._readers = Readers()
        self._told: dict[Audience, dict[str, str]] = {}
        self._drawings: dict[Audience, dict[str, tuple[Any, str]]] = {}  # content and HTML of each section, as of late
        self._seen: State | None = None  # what open pages were told of; None where none is open

    # What a page is. ------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def stamp(self) -> tuple[Any, Any]:
        """What changes whenever there may be something new; cheap. Called in a thread.

        Returns
        -------
        Of what open pages are told at once, such as a round's end, and of what may wait for some seconds, such as the
        progress of batches.
        """

    @abc.abstractmethod
    def look(self) -> State:
        """What there is to see. Called in a thread, never twice at once."""

    @abc.abstractmethod
    def content(self, state: State, audience: Audience) -> Mapping[str, Any]:
        """What the templates need, as `page`; "title" and "heading" are of every page."""

    def figures_version(self) -> str:
        """Tells states of the page's charts apart; "" where it has none."""
        return ""

    def news(self, before: State, state: State, audience: Audience) -> str:
        """What to say aloud of the change; "" where it is nothing."""
        return ""

    def routes(self) -> list[web.RouteDef]:
        """What the page answers beside itself."""
        return []

    # Answers. -------------------------------------------------------------------------------------------------------

    def app(self, *guards: Middleware) -> web.Application:
        """The application, behind these guards. The routes of `GET /` and `/events` are the subclass's own."""
        app = guarded_app(self._hosts, *guards)
        app.add_routes([web.get("/static/{name}", self.assets.handle), *self.routes()])
        app.cleanup_ctx.append(self._watching)
        app.on_shutdown.append(self._readers.close)
        return app

    async def answer_page(self, audience: Audience, **more: Any) -> web.Response:
        """The whole page."""
        page = self.content(await self.current(), audience)
        return self.html(
            self._template,
            page=page,
            title=page["title"],
            heading=page["heading"],
            sections=self._sections,
            wardround=VERSION,
            figures=self.figures_version(),
            **more,
        )

    async def answer_events(
        self, request: web.Request, audience: Audience, still_allowed: Callable[[], bool] = lambda: True
    ) -> web.StreamResponse:
        """All sections as they are, then those that change, until the page is closed or not allowed any more."""
        with self._readers.reading(audience) as reader:
            state = await self.current()
            self._seen = state if self._seen is None else self._seen
            drawn = self._drawn(self.content(state, audience), audience)
            if len(self._readers.of(audience)) == 1:  # what those before it were told says nothing of this one
                self._told[audience] = drawn
            for part, html in drawn.items():
                reader.tell(part, _message(part, html))
            return await self._readers.stream(request, reader, still_allowed)

    def html(self, template: str, **values: Any) -> web.Response:
        """A template as an answer."""
        return web.Response(text=self.templates.get_template(template).render(**values), content_type="text/html")

    # Looking. -------------------------------------------------------------------------------------------------------

    async def current(self, *, anew: bool = False, patient: bool = False) -> State:
        """What there is to see now; what follows from the clock alone may be some seconds old, unless asked anew.

        To the patient, what may wait is some seconds old as well.
        """
        async with self._looking:
            stamp = await asyncio.to_thread(self.stamp)
            if self._state is None or anew or self._is_due(stamp, patient=patient):
                self._state, self._stamp = await asyncio.to_thread(self.look), stamp
                self._looked = time.monotonic()
            return self._state

    def _is_due(self, stamp: tuple[Any, Any], *, patient: bool) -> bool:
        if stamp[0] != self._stamp[0]:
            return True
        return stamp[1] != self._stamp[1] and not (patient and time.monotonic() < self._looked + _PROGRESS_SECONDS)

    async def _watching(self, app: web.Application) -> AsyncIterator[None]:
        task = asyncio.create_task(self._watch())
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async def _watch(self) -> None:
        anew = 0.0
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            if not len(self._readers):
                self._told, self._drawings, self._seen = {}, {}, None
                anew = time.monotonic() + _LOOK_ANEW_SECONDS
                continue
            try:
                state = await self.current(anew=time.monotonic() >= anew, patient=True)
                if state is self._seen:
                    continue
                anew = time.monotonic() + _LOOK_ANEW_SECONDS
                for audience in self._readers.audiences:
                    self._tell(self._seen, state, audience)
                self._seen = state
            except Exception:  # whatever one look stumbles over, the next one may not
                _log.exception("the page could not be brought up to date")

    def _tell(self, before: State | None, state: State, audience: Audience) -> None:
        """Tells the pages of an audience what has changed for them."""
        drawn, told = self._drawn(self.content(state, audience), audience), self._told.get(audience, {})
        for part, html in drawn.items():
            if told.get(part) != html:
                self._readers.tell(audience, part, _message(part, html))
        if before is not None and (words := self.news(before, state, audience)):
            self._readers.tell(audience, "said", event("said", {"words": words}))
        self._told[audience] = drawn

    def _drawn(self, page: Mapping[str, Any], audience: Audience) -> dict[str, str]:
        """The HTML of each section, and what else an open page is told, by its name.

        A section's template uses its own content, and what is always the same for an audience: where that content is as
        it was, so is the HTML.
        """
        before, drawn = self._drawings.get(audience, {}), {}
        for name in self._sections:
            if name in before and before[name][0] == page[name]:
                drawn[name] = before[name]
            else:
                drawn[name] = page[name], self.templates.get_template(f"sections/{name}.html").render(page=page)
        self._drawings[audience] = drawn
        html = {name: text for name, (_, text) in drawn.items()}
        return html | {"title": str(page["title"]), "figures": self.figures_version()}


def _message(part: str, content: str) -> bytes:
    if part == "title":
        return event("title", {"title": content})
    if part == "figures":
        return event("figures", {"version": content})
    return event("part", {"part": part, "html": content})
