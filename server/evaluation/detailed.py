"""All metrics of a published version on a holdout, by site and class; docs/metrics.md defines them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from common.export.figures import json_ready
from common.metrics.calibration import CalibrationCounts
from common.metrics.instances import IOU_PERCENTS, SIZE_NAMES, InstanceCounts
from common.metrics.overlap import OverlapCounts
from common.metrics.surface import Surfaces
from server.evaluation.result import LARGE_SITE_CASES, HoldoutResult, mean, mean_of_rows

FIGURES = ("dice", "iou", "precision", "recall", "hd95", "surface_dice")
"""The metrics of a case and class."""


@dataclass(frozen=True, eq=False)
class CaseDetail:
    """What is measured of one case; `instances` is None where the study's labels are classes."""

    overlap: OverlapCounts
    surfaces: Surfaces
    calibration: CalibrationCounts
    instances: InstanceCounts | None

    def figure(self, name: str) -> npt.NDArray[np.float64]:
        """One of `FIGURES`, of every foreground class."""
        if name == "hd95":
            return self.surfaces.hd95
        of_classes = self.surfaces.overlap.dice() if name == "surface_dice" else getattr(self.overlap, name)()
        return np.asarray(of_classes, np.float64)


@dataclass(frozen=True, eq=False)
class Part:
    """Some of a holdout's cases, taken together.

    Attributes
    ----------
    cases : how many.
    figures : each of `FIGURES`
        The mean over the cases of the mean over their classes.
    of_classes : by class, each of `FIGURES`
        The mean over the cases where it can be measured.
    calibration_error : of all voxels of the cases.
    instances : all their objects counted together, or None where the study's labels are classes.
    precision_of_cases : float64, shape (len(IOU_PERCENTS),)
        The mean over the cases of their instance average precision, where the objects of all are not taken together.
    """

    cases: int
    figures: Mapping[str, float]
    of_classes: Mapping[str, Mapping[str, float]]
    calibration_error: float
    instances: InstanceCounts | None
    precision_of_cases: npt.NDArray[np.float64]

    @classmethod
    def of(cls, classes: Sequence[str], details: Sequence[CaseDetail]) -> Part:
        """The cases `details`."""
        values = {
            name: np.array([detail.figure(name) for detail in details]).reshape(len(details), len(classes))
            for name in FIGURES
        }
        counted = [detail.instances for detail in details if detail.instances is not None]
        precisions = np.array([counts.average_precision() for counts in counted]).reshape(-1, len(IOU_PERCENTS))
        return cls(
            cases=len(details),
            figures={name: mean(mean_of_rows(array)) for name, array in values.items()},
            of_classes={
                label: {name: mean(array[:, column]) for name, array in values.items()}
                for column, label in enumerate(classes)
            },
            calibration_error=sum((detail.calibration for detail in details), CalibrationCounts.zero()).error(),
            instances=sum(counted, InstanceCounts.zero()) if counted else None,
            precision_of_cases=mean_of_rows(precisions.T),
        )

    def scalars(self) -> dict[str, Any]:
        """Plain nested numbers, None where there is nothing to measure."""
        result: dict[str, Any] = {
            "cases": self.cases,
            **json_ready(self.figures),
            "ece": json_ready(self.calibration_error),
            "class": {name: json_ready(figures) for name, figures in self.of_classes.items()},
        }
        if self.instances is not None:
            counts = self.instances
            result["instances"] = {
                "objects": counts.objects,
                "found": counts.found,
                "ap": _by_threshold(counts.average_precision()),
                "ap_of_cases": _by_threshold(self.precision_of_cases),
                "f1_of_sizes": json_ready(dict(zip(SIZE_NAMES, counts.f1_of_sizes(), strict=True))),
                "objects_of_sizes": dict(
                    zip(SIZE_NAMES, map(int, counts.tp_of_sizes + counts.fn_of_sizes), strict=True)
                ),
            }
        return result


@dataclass(frozen=True, eq=False)
class DetailedResult:
    """All metrics of every case of a holdout.

    Attributes
    ----------
    classes : the foreground classes' names.
    cases : the cases' names, in order.
    sites : of each case, the site its image came from, or None where its name does not say.
    details : of each case.
    tolerance : of surface Dice, in the unit of the images' spacing.
    """

    classes: tuple[str, ...]
    cases: tuple[str, ...]
    sites: tuple[str | None, ...]
    details: tuple[CaseDetail, ...]
    tolerance: float

    @property
    def overlap(self) -> HoldoutResult:
        """Dice and IoU alone, as of a round."""
        return HoldoutResult.of(self.classes, self.cases, self.sites, [detail.overlap for detail in self.details])

    @cached_property
    def all_cases(self) -> Part:
        """The whole holdout."""
        return Part.of(self.classes, self.details)

    @cached_property
    def of_sites(self) -> dict[str, Part]:
        """The cases of every site that has some, by its name."""
        return {site: self._of_site(site) for site in sorted({site for site in self.sites if site is not None})}

    @cached_property
    def others(self) -> Part | None:
        """The cases whose name ends in no site of the study, if there are any."""
        return self._of_site(None) if None in self.sites else None

    @property
    def large_sites(self) -> dict[str, Part]:
        """The sites with at least `LARGE_SITE_CASES` cases."""
        return {site: part for site, part in self.of_sites.items() if part.cases >= LARGE_SITE_CASES}

    def means_of_large_sites(self) -> dict[str, Any]:
        """The means over `large_sites`, every site counting alike: `FIGURES`, "ece", and "ap" by threshold."""
        parts = list(self.large_sites.values())
        figures = {name: mean([part.figures[name] for part in parts]) for name in FIGURES}
        figures["ece"] = mean([part.calibration_error for part in parts])
        result: dict[str, Any] = {"sites": len(parts), **json_ready(figures)}
        counted = [part.instances.average_precision() for part in parts if part.instances is not None]
        if counted:
            result["ap"] = _by_threshold(mean_of_rows(np.array(counted).T))
        return result

    def scalars(self) -> dict[str, Any]:
        """All of it but the single cases, as nested plain numbers; None where there is nothing to measure.

        The keys of `HoldoutResult.scalars` mean the same here.
        """
        result = {**self.all_cases.scalars(), "surface_tolerance": self.tolerance}
        if self.of_sites:
            result["dice_of_sites"] = json_ready(mean([part.figures["dice"] for part in self.of_sites.values()]))
            result["site"] = {site: part.scalars() for site, part in self.of_sites.items()}
        if self.large_sites:
            result["large_sites"] = self.means_of_large_sites()
            result["dice_of_large_sites"] = result["large_sites"]["dice"]
        if self.of_sites and self.others is not None:
            result["other"] = self.others.scalars()
        return result

    def rows(self) -> list[dict[str, str | float]]:
        """A row a case and class, for a CSV; "" where there is nothing to measure.

        "ece" and what is about objects are of the case: "objects" in the label, "found" in the prediction, "ap_50" to
        "ap_90" at each threshold.
        """
        return [
            {"case": case, "site": site or "", "class": name, **_row(detail, column)}
            for case, site, detail in zip(self.cases, self.sites, self.details, strict=True)
            for column, name in enumerate(self.classes)
        ]

    def _of_site(self, site: str | None) -> Part:
        chosen = [detail for detail, origin in zip(self.details, self.sites, strict=True) if origin == site]
        return Part.of(self.classes, chosen)


def _row(detail: CaseDetail, column: int) -> dict[str, str | float]:
    figures = {name: float(detail.figure(name)[column]) for name in FIGURES}
    figures["ece"] = detail.calibration.error()
    if (counts := detail.instances) is not None:
        figures |= {"objects": counts.objects, "found": counts.found}
        precisions = counts.average_precision()
        figures |= {f"ap_{percent}": float(ap) for percent, ap in zip(IOU_PERCENTS, precisions, strict=True)}
    return {name: "" if math.isnan(value) else value for name, value in figures.items()}


def _by_threshold(values: npt.NDArray[np.float64]) -> dict[str, float | None]:
    return {f"{percent / 100:.2f}": json_ready(value) for percent, value in zip(IOU_PERCENTS, values, strict=True)}
