"""Who looks at a page, and what a role is shown.

An investigator sees everything. A site sees how the cohort stands, and its own numbers; those of another site (cases,
batches, which follow from cases, privacy spent, which follows from patients) are not shown to it. An observer sees
the study's metrics and no site's numbers. Pictures of the holdout, the coordinator's own words and paths of its machine
are for investigators.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from common.security.profile import Role, role_of

_OF_A_SITE: Final[Mapping[str, Any]] = {
    "batch": 0,
    "batches": 0,
    "training_cases": None,
    "validation_cases": None,
    "reason": "the investigator sees why",
    "certificate_expires": None,
    "epsilon": None,
}
"""What takes the place of a site's own numbers for those who may not see them."""


@dataclass(frozen=True)
class Viewer:
    """Somebody at a page.

    Attributes
    ----------
    name : "" where nobody asked.
    by : what they showed: "loopback", "token" or "certificate".
    """

    role: Role
    name: str = ""
    by: str = "loopback"

    @property
    def audience(self) -> tuple[str, str]:
        """Whoever has the same sees the same."""
        return self.role, self.name if self.role == "site" else ""

    @staticmethod
    def of(audience: tuple[str, str]) -> Viewer:
        """One of an audience."""
        role = role_of(audience[0])
        return Viewer(role if role is not None else "observer", audience[1])

    @property
    def sees_all(self) -> bool:
        """Whether nothing is kept from them."""
        return self.role == "investigator"

    def sees_numbers_of(self, site: str) -> bool:
        """Whether they are shown a site's own numbers."""
        return self.sees_all or (self.role == "site" and self.name == site)

    def shown(self, status: Mapping[str, Any]) -> dict[str, Any]:
        """A run's status as this role is shown it."""
        if self.sees_all:
            return dict(status)
        sites = {site: self._site(site, part) for site, part in (status.get("sites") or {}).items()}
        shown = {**status, "sites": sites, "notice": "", "address": None, "run": "", "repair": "", "pid": 0}
        if status.get("error"):
            shown["error"] = "The investigator sees why."
        if status.get("published"):
            shown["published"] = str(status["published"]).rpartition("/")[2]
        if (privacy := status.get("privacy")) and "sites" in privacy:
            own = {site: spent for site, spent in (privacy.get("sites") or {}).items() if self.sees_numbers_of(site)}
            shown["privacy"] = {**privacy, "sites": own}
        return shown

    def _site(self, site: str, part: Mapping[str, Any]) -> dict[str, Any]:
        if self.sees_numbers_of(site):
            return dict(part)
        kept = {**part, **{name: value for name, value in _OF_A_SITE.items() if part.get(name)}}
        if part.get("refused_reason"):
            kept["refused_reason"] = "refused"
        return kept


LOCAL: Final = Viewer("investigator")
"""Whoever looks from the coordinator's own machine, where no login is asked for."""
