"""What of a run's status and figures an investigator or an observer is shown: a list, so that nothing new slips in.

An observer sees the study as a whole: no count, time, reason or figure of a single site, and none from which one could
be taken by subtraction, such as the number of patches that all trained on. An investigator sees what the coordinator's
operator does, but for the holdout's cases one by one, whose names may be those of patients, and for paths.

    >>> status = {"study": "nuclei", "state": "training", "pid": 7, "sites": {"north": {"stage": "done", "cases": 9}}}
    >>> status_for("observer", status)["sites"], status_for("investigator", status)["sites"]
    ({'north': {'stage': 'done'}}, {'north': {'stage': 'done'}})
    >>> figures_for("observer", {"round": "1", "train/loss": "0.5", "train/patches": "96"})
    {'round': '1', 'train/loss': '0.5'}
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, Final

from common.security.profile import Role
from server.status import ENDED, Status

_ALL: Final = (
    *("study", "pid", "state", "running", "round", "rounds", "attempt", "kind", "quorum", "needed", "closed_with"),
    *("deadline_at", "started_at", "updated_at", "last", "best", "published", "privacy", "ended", "sites"),
)
_INVESTIGATORS: Final = (*_ALL, "plan", "notice", "error", "certificate_expires")
_SITES_ALL: Final = ("connected", "asked", "stage", "revoked")
_SITES_INVESTIGATORS: Final = (
    *(*_SITES_ALL, "batch", "batches", "reason", "refused_reason", "no_progress_seconds"),
    *("training_cases", "validation_cases", "epsilon", "certificate_expires"),
)
_FIGURES: Final = (
    *("round", "attempt", "sites", "seconds", "epsilon", "train/loss", "validation/dice", "validation/sites"),
    *("holdout/dice", "holdout/iou", "holdout/cases", "holdout/dice_of_sites", "holdout/dice_of_large_sites"),
)
_FIGURES_OF_CLASSES: Final = ("validation/class/", "holdout/class/")
_FIGURES_OF_CASES: Final = "holdout/case/"


def status_for(role: Role, status: Status) -> dict[str, Any]:
    """What a role is shown of a status, which `server.status` describes in words as it does a whole one.

    `running` is False too where the coordinator has ended its work and is about to go; `published` is the version's
    name alone.
    """
    full = role == "investigator"
    shown = {name: status[name] for name in (_INVESTIGATORS if full else _ALL) if name in status}
    shown["running"] = bool(status.get("running", True)) and status.get("state") not in ENDED
    if shown.get("published"):
        shown["published"] = PurePath(str(shown["published"])).name
    keys = _SITES_INVESTIGATORS if full else _SITES_ALL
    sites: Mapping[str, Mapping[str, Any]] = shown.get("sites") or {}
    shown["sites"] = {site: {key: part[key] for key in keys if key in part} for site, part in sites.items()}
    if not full and shown.get("privacy"):
        shown["privacy"] = {key: value for key, value in shown["privacy"].items() if key != "sites"}
    return shown


def figures_for(role: Role, row: Mapping[str, Any]) -> dict[str, str]:
    """What a role is shown of a row of `rounds.csv`."""
    if role == "investigator":
        return {name: str(value) for name, value in row.items() if not name.startswith(_FIGURES_OF_CASES)}
    return {
        name: str(value)
        for name, value in row.items()
        if name in _FIGURES or (name.startswith(_FIGURES_OF_CLASSES) and not name.endswith("/cases"))
    }
