"""The hospital's page as a web application."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from aiohttp import web

from client.site_page.reading import SiteReader, SiteReading, newest
from client.site_status import FAILED, FINISHED, STOPPED, status_text
from common.security.authorities import Authority
from common.webpage.guard import LOOPBACK
from common.webpage.page import LivePage

SECTIONS: Final = ("now", "left", "privacy", "approvals", "never")
_EVERYONE: Final = "operator"
_CHIPS: Final[Mapping[str, str]] = {STOPPED: "warning", FAILED: "error", FINISHED: "good"}


class SitePage(LivePage[SiteReading, str]):
    """The page of a work folder.

    Parameters
    ----------
    work : the site's work folder, which is only read.
    authority : whose signatures in the audit log are believed; None: any are.
    """

    def __init__(self, work: Path, authority: Authority | None) -> None:
        super().__init__("client.site_page", "site.html", SECTIONS, LOOPBACK)
        self._work = work
        self._reader = SiteReader(work, authority)

    def routes(self) -> list[web.RouteDef]:
        """As the base."""
        return [web.get("/", self._page), web.get("/events", self._events)]

    def stamp(self) -> tuple[Any, Any]:
        """As the base."""
        return self._reader.stamp()

    def look(self) -> SiteReading:
        """As the base."""
        return self._reader.read()

    def content(self, state: SiteReading, audience: str) -> Mapping[str, Any]:
        """As the base."""
        status = state.status
        site, word = str(status.get("site", self._work.name)), str(status.get("state", "not started"))
        return {
            "title": f"{word} · {site}",
            "heading": f"Site {site}",
            "now": _now(status, state, word),
            "left": {
                "studies": [{**study, "sent": newest(study["sent"]), "all": len(study["sent"])}
                            for study in state.left.get("studies", ())],
                "log": state.log,
                "trouble": state.troubles.get("left", ""),
            },
            "privacy": status.get("privacy") or {},
            "approvals": {"rows": state.approvals, "trouble": state.troubles.get("approvals", "")},
            "never": list(state.left.get("never_leaves", ())),
        }  # fmt: skip

    def news(self, before: SiteReading, state: SiteReading, audience: str) -> str:
        """As the base: a change of state, or of round."""
        keys = ("state", "round", "notice")
        if [before.status.get(key) for key in keys] == [state.status.get(key) for key in keys] or not state.status:
            return ""
        return status_text(dict(state.status)).splitlines()[0]

    async def _page(self, request: web.Request) -> web.Response:
        return await self.answer_page(_EVERYONE, work=str(self._work))

    async def _events(self, request: web.Request) -> web.StreamResponse:
        return await self.answer_events(request, _EVERYONE)


def _now(status: Mapping[str, Any], state: SiteReading, word: str) -> dict[str, Any]:
    started: list[Mapping[str, Any]] = list(state.left.get("studies", ()))
    cases = [started[-1].get(name) for name in ("training_cases", "validation_cases")] if started else [None, None]
    expires = status.get("certificate_expires")
    return {
        "trouble": state.troubles.get("status", ""),
        "study": status.get("study", ""),
        "state": word,
        "chip": _CHIPS.get(word, "busy" if status.get("running") else "warning"),
        "last_state": status.get("last_state", ""),
        "round": status.get("round"),
        "batch": status.get("batch"),
        "batches": status.get("batches"),
        "notice": status.get("notice", ""),
        "next": status.get("next_step", "") if status.get("next_step") != status.get("notice") else "",
        "training_cases": cases[0],
        "validation_cases": cases[1],
        "expires": expires,
        # A failure is said by the notice already.
        "alerts": [one for one in status.get("alerts") or () if one["code"] != "site-failed"],
    }
