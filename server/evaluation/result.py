"""Dice and IoU of every case of a holdout, and their means: what every round measures."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from common.metrics.overlap import OverlapCounts

LARGE_SITE_CASES = 10  # From this many cases on, a site's mean says something of the site.


@dataclass(frozen=True, eq=False)
class HoldoutResult:
    """Overlap of every case of a holdout; means leave out what is not measurable.

    Attributes
    ----------
    classes : the foreground classes' names.
    cases : the cases' names, in order.
    sites : of each case, the site its image came from, or None where its name does not say.
    dice, iou : float64, shape (cases, foreground classes)
        NaN where a class is in neither prediction nor label.
    """

    classes: tuple[str, ...]
    cases: tuple[str, ...]
    sites: tuple[str | None, ...]
    dice: npt.NDArray[np.float64]
    iou: npt.NDArray[np.float64]

    @classmethod
    def of(
        cls,
        classes: tuple[str, ...],
        cases: tuple[str, ...],
        sites: tuple[str | None, ...],
        counts: Sequence[OverlapCounts],
    ) -> HoldoutResult:
        """The result of each case's counts."""
        dice, iou = (np.stack(values) for values in ([c.dice() for c in counts], [c.iou() for c in counts]))
        return cls(classes, cases, sites, dice, iou)

    @property
    def dice_of_cases(self) -> npt.NDArray[np.float64]:
        """Each case's mean Dice over the classes that are in it, shape (cases,); NaN where none is."""
        return mean_of_rows(self.dice)

    @property
    def iou_of_cases(self) -> npt.NDArray[np.float64]:
        """As `dice_of_cases`, of IoU."""
        return mean_of_rows(self.iou)

    @property
    def mean_dice(self) -> float:
        """Mean over cases of `dice_of_cases`; NaN if nothing was measurable, as in all means here."""
        return mean(self.dice_of_cases)

    @property
    def mean_iou(self) -> float:
        """As `mean_dice`, of IoU."""
        return mean(self.iou_of_cases)

    @property
    def cases_of_sites(self) -> dict[str, int]:
        """The number of cases of every site that has some, by site name; cases of no known site are in none."""
        return {site: self.sites.count(site) for site in sorted({site for site in self.sites if site is not None})}

    @property
    def dice_of_sites(self) -> dict[str, float]:
        """Mean Dice over the cases of every site that has some."""
        return self._by_site(self.dice_of_cases)

    @property
    def iou_of_sites(self) -> dict[str, float]:
        """As `dice_of_sites`, of IoU."""
        return self._by_site(mean_of_rows(self.iou))

    @property
    def dice_of_classes(self) -> dict[str, float]:
        """Mean Dice over the cases that have the class, of every foreground class."""
        return {name: mean(self.dice[:, index]) for index, name in enumerate(self.classes)}

    @property
    def iou_of_classes(self) -> dict[str, float]:
        """As `dice_of_classes`, of IoU."""
        return {name: mean(self.iou[:, index]) for index, name in enumerate(self.classes)}

    @property
    def mean_dice_of_sites(self) -> float:
        """Mean over the sites' means: every site counts alike."""
        return mean(list(self.dice_of_sites.values()))

    @property
    def mean_dice_of_large_sites(self) -> float:
        """Mean over the means of the sites with at least `LARGE_SITE_CASES` cases; NaN if there are none."""
        cases = self.cases_of_sites
        return mean([dice for site, dice in self.dice_of_sites.items() if cases[site] >= LARGE_SITE_CASES])

    @property
    def dice_of_others(self) -> float:
        """Mean Dice over the cases whose name ends in no site of the study; NaN if there are none."""
        return self._mean_of_site(self.dice_of_cases, None)

    def rows(self) -> list[dict[str, str | float]]:
        """A row a case and class, for a CSV: case, site ("" if unknown), class, dice, iou."""
        return [
            {
                "case": case,
                "site": self.sites[row] or "",
                "class": name,
                "dice": float(self.dice[row, column]),
                "iou": float(self.iou[row, column]),
            }
            for row, case in enumerate(self.cases)
            for column, name in enumerate(self.classes)
        ]

    def scalars(self, *, each_case: bool = False) -> OrderedDict[str, Any]:
        """The means as nested plain floats, for release managers; which keys it has depends on the holdout alone.

        "cases" counts all cases; "other", beside "site", is of the cases whose name ends in no site of the study. With
        `each_case`, also the Dice and IoU of each case, the mean over its classes.
        """
        result: OrderedDict[str, Any] = OrderedDict(
            dice=self.mean_dice, iou=self.mean_iou, cases=float(len(self.cases))
        )
        cases, dice_of_sites, iou_of_sites = self.cases_of_sites, self.dice_of_sites, self.iou_of_sites
        if cases:
            result["dice_of_sites"] = self.mean_dice_of_sites
        if any(count >= LARGE_SITE_CASES for count in cases.values()):
            result["dice_of_large_sites"] = self.mean_dice_of_large_sites
        dice_of_classes, iou_of_classes = self.dice_of_classes, self.iou_of_classes
        result["class"] = OrderedDict(
            (name, OrderedDict(dice=dice_of_classes[name], iou=iou_of_classes[name])) for name in self.classes
        )
        if cases:
            result["site"] = OrderedDict(
                (site, OrderedDict(dice=dice_of_sites[site], iou=iou_of_sites[site], cases=float(count)))
                for site, count in cases.items()
            )
        if cases and None in self.sites:
            result["other"] = OrderedDict(
                dice=self.dice_of_others,
                iou=self._mean_of_site(self.iou_of_cases, None),
                cases=float(self.sites.count(None)),
            )
        if each_case:
            result["case"] = OrderedDict(
                (name, OrderedDict(dice=float(dice), iou=float(iou)))
                for name, dice, iou in zip(self.cases, self.dice_of_cases, self.iou_of_cases, strict=True)
            )
        return result

    def _by_site(self, values: npt.NDArray[np.float64]) -> dict[str, float]:
        return {site: self._mean_of_site(values, site) for site in self.cases_of_sites}

    def _mean_of_site(self, values: npt.NDArray[np.float64], site: str | None) -> float:
        return mean([value for value, origin in zip(values, self.sites, strict=True) if origin == site])


def mean(values: npt.NDArray[np.float64] | Sequence[float]) -> float:
    """The mean of what is not NaN; NaN of nothing (where `numpy.nanmean` warns)."""
    measured = [float(value) for value in values if not math.isnan(value)]
    return math.fsum(measured) / len(measured) if measured else math.nan


def mean_of_rows(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """`mean` of every row, shape (rows,)."""
    return np.array([mean(row) for row in values], dtype=np.float64)
