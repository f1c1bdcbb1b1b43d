"""What was spent of a study's privacy budget and whom that protects, as status, reports and model cards state it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from common.privacy.accounting import UNITS
from common.study import Study

_BOUNDS: Final = {"lower": "at least ", "upper": "at most ", "exact": ""}


def privacy_report(study: Study, spent: Mapping[str, float], cohort: float) -> dict[str, Any] | None:
    """Plain data; None where the study has no privacy.

    Parameters
    ----------
    spent : epsilon by site, with `privacy.unit: patient`.
    cohort : epsilon of the sums, with `privacy.unit: site`.

    Returns
    -------
    dict of "unit"; "protects": the unit in words; "epsilon": the most that any unit has spent; "bound": whether that is
    a "lower" or an "upper" bound, or "exact"; "budget", "delta", "noise_multiplier", "clip_norm"; and with unit
    "patient" "sites": epsilon by site. Patients of a site are protected by that site's epsilon. With secure aggregation
    no site says how much it has spent, which would tell of how many patients it has: "epsilon" is the budget, which no
    site passes, and there is no "sites".
    """
    privacy, hidden = study.privacy, study.secure_aggregation.required
    if privacy.unit == "none":
        return None
    report: dict[str, Any] = {
        "unit": privacy.unit,
        "protects": UNITS[privacy.unit],
        "epsilon": round(_epsilon(study, spent, cohort), 6),
        "budget": privacy.epsilon,
        "delta": privacy.delta,
        "noise_multiplier": privacy.noise_multiplier,
        "clip_norm": privacy.clip_norm,
        "bound": "exact" if privacy.unit == "site" else "upper" if hidden else "lower",
    }
    if privacy.unit == "patient" and not hidden:
        report["sites"] = {site: round(value, 6) for site, value in sorted(spent.items())}
    return report


def _epsilon(study: Study, spent: Mapping[str, float], cohort: float) -> float:
    if study.privacy.unit != "patient":
        return cohort
    return study.privacy.epsilon if study.secure_aggregation.required else max(spent.values(), default=0.0)


def privacy_words(report: Mapping[str, Any]) -> str:
    """A line: "epsilon at least 3.50 of 8 spent at delta 1e-05, which protects each patient of each site".

    "At least", where it is by the sites' word: what a site has computed and not told yet is in its own ledger alone.
    "At most", where no site may say it: none passes the budget.
    """
    return (
        f"epsilon {bound_words(report)}{report['epsilon']:.2f} of {report['budget']:g} spent at delta "
        f"{report['delta']:g}, which protects {report['protects']}"
    )


def bound_words(report: Mapping[str, Any]) -> str:
    """What goes before epsilon: "at least ", "at most ", or "" where it is exact."""
    return _BOUNDS[report.get("bound", "lower" if report.get("unit") == "patient" else "exact")]
