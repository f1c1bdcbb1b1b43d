"""What was spent of a study's privacy budget and whom that protects, as status, reports and model cards state it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.privacy.accounting import UNITS
from common.study import Study


def privacy_report(study: Study, spent: Mapping[str, float], cohort: float) -> dict[str, Any] | None:
    """Plain data; None where the study has no privacy.

    Parameters
    ----------
    spent : epsilon by site, with `privacy.unit: patient`.
    cohort : epsilon of the sums, with `privacy.unit: site`.

    Returns
    -------
    dict of "unit"; "protects": the unit in words; "epsilon": the most that any unit has spent; "budget", "delta",
    "noise_multiplier", "clip_norm"; and with unit "patient" "sites": epsilon by site. Patients of a site are protected
    by that site's epsilon.
    """
    privacy = study.privacy
    if privacy.unit == "none":
        return None
    report: dict[str, Any] = {
        "unit": privacy.unit,
        "protects": UNITS[privacy.unit],
        "epsilon": round(max(spent.values(), default=0.0) if privacy.unit == "patient" else cohort, 6),
        "budget": privacy.epsilon,
        "delta": privacy.delta,
        "noise_multiplier": privacy.noise_multiplier,
        "clip_norm": privacy.clip_norm,
    }
    if privacy.unit == "patient":
        report["sites"] = {site: round(value, 6) for site, value in sorted(spent.items())}
    return report


def privacy_words(report: Mapping[str, Any]) -> str:
    """A line: "epsilon 3.50 of 8 spent at delta 1e-05, which protects each patient of each site"."""
    return (
        f"epsilon {report['epsilon']:.2f} of {report['budget']:g} spent at delta {report['delta']:g}, which protects "
        f"{report['protects']}"
    )
