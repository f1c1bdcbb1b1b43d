"""One thing that somebody should know without having asked, at the coordinator or at a site."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Severity = Literal["critical", "warning", "info"]
SEVERITIES: Final[tuple[Severity, ...]] = ("critical", "warning", "info")
"""The most severe first: the study stands still or its result is at risk; it will be, or a site is; good to know."""


@dataclass(frozen=True)
class Alert:
    """One thing to know.

    Attributes
    ----------
    code : the kind, a stable name: see docs/watching.md.
    severity : see `SEVERITIES`.
    what : one sentence of fixed words, names of sites, and figures: it may be sent to anywhere.
    where : the site, or "coordinator".
    todo : what to do about it.
    round : the round that it is about; None where it is about none.
    detail : what an error or a site said; for the eyes of those who may see the run, and never sent.
    """

    code: str
    severity: Severity
    what: str
    where: str
    todo: str
    round: int | None = None
    detail: str = ""

    @property
    def key(self) -> str:
        """Tells alerts apart."""
        return f"{self.code}:{self.where}"

    def text(self) -> str:
        """The alert in a line."""
        said = f" ({self.detail})" if self.detail else ""
        return f"{self.severity}: {self.what.removesuffix('.')}{said}. {self.todo}"
