"""How far apart the borders of two segmentations lie: HD95, and surface Dice at a tolerance, in physical units.

The borders, their areas and the distances between them are those of DeepMind's `surface-distance`: a border runs
between voxels, through the corners that some but not all of the adjoining voxels' centres surround, and each corner
counts by the area (in 2D: the length) of the border there. So anisotropic voxels are measured right. An image ends in
background: an object that its edge cuts has a border there.

Sources: HD95, Huttenlocher et al. 1993, doi:10.1109/34.232073, weighted by area; surface Dice, Nikolov et al. 2021,
doi:10.2196/26151.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

_PERCENT = 95
_ROUNDING = 1e-6  # Spacings come out of float32 headers: a border 1.0000001 mm away is within 1 mm.


@dataclass(frozen=True, eq=False)
class SurfaceOverlap:
    """The area of both borders, and how much of it lies within the tolerance of the other one; a value that adds.

    Attributes
    ----------
    within, area : float64, shape (classes - 1,)
        Of prediction and truth together, in the square of the spacing's unit (in 2D: the length, in the unit). Entry i
        is about class i + 1.
    """

    within: npt.NDArray[np.float64]
    area: npt.NDArray[np.float64]

    @classmethod
    def zero(cls, classes: int) -> SurfaceOverlap:
        """The overlap of no image, to start a sum with; `classes` includes the background."""
        return cls(np.zeros(classes - 1), np.zeros(classes - 1))

    def __add__(self, other: SurfaceOverlap) -> SurfaceOverlap:
        if self.area.shape != other.area.shape:
            raise ValueError(f"surfaces of {len(self.area)} and {len(other.area)} foreground classes do not add")
        return SurfaceOverlap(self.within + other.within, self.area + other.area)

    def dice(self) -> npt.NDArray[np.float64]:
        """The share of both borders that lies within the tolerance, 0 to 1, shape (classes - 1,).

        NaN where a class is in neither prediction nor truth, 0 where it is in one of them only.
        """
        return np.divide(self.within, self.area, out=np.full(self.area.shape, np.nan), where=self.area > 0)


class Surfaces(NamedTuple):
    """What the borders of one image's classes say.

    Attributes
    ----------
    overlap : of the borders, at the tolerance.
    hd95 : float64, shape (classes - 1,)
        The distance, in the spacing's unit, within which 95 % of each border lies of the other one: the larger of both
        directions. NaN where a class is in neither prediction nor truth. Where it is in one of them only there is no
        distance, and the length of the image's diagonal, which no distance exceeds, stands for it: so a miss is never
        better than a bad hit, and means stay finite.
    """

    overlap: SurfaceOverlap
    hd95: npt.NDArray[np.float64]


def measure_surfaces(
    prediction: npt.NDArray[Any],
    truth: npt.NDArray[Any],
    classes: int,
    *,
    spacing: Sequence[float],
    tolerance: float,
) -> Surfaces:
    """Compare the borders of every foreground class.

    Parameters
    ----------
    prediction, truth : integer arrays of one shape, (y, x) or (z, y, x)
        Class indices, 0 is background.
    classes : int
        The number of classes with the background.
    spacing : the distance between voxels along each axis, in the arrays' order; millimetres, or micrometres.
    tolerance : float
        How far apart borders still agree, in the spacing's unit, at least 0.

    Raises
    ------
    ValueError
        The shapes differ or have other axes than the spacing, or the spacing or tolerance is out of its range.
    """
    if prediction.shape != truth.shape or prediction.ndim not in (2, 3) or len(spacing) != prediction.ndim:
        raise ValueError(
            f"expected two arrays of one shape, (y, x) or (z, y, x), and a spacing for each axis, found "
            f"{prediction.shape}, {truth.shape} and {tuple(spacing)}"
        )
    if not all(np.isfinite(step) and step > 0 for step in spacing) or not (np.isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"expected a positive spacing and a tolerance of at least 0, found {spacing} and {tolerance}")
    diagonal = float(np.linalg.norm(np.multiply(prediction.shape, spacing)))
    within, area, hd95 = np.zeros(classes - 1), np.zeros(classes - 1), np.full(classes - 1, np.nan)
    for index in range(classes - 1):
        found, there = prediction == index + 1, truth == index + 1
        if not found.any() and not there.any():
            continue
        within[index], area[index], hd95[index] = _compare(found, there, spacing, tolerance * (1 + _ROUNDING))
        if not (found.any() and there.any()):
            hd95[index] = diagonal
    return Surfaces(SurfaceOverlap(within, area), hd95)


def _compare(
    found: npt.NDArray[np.bool_], there: npt.NDArray[np.bool_], spacing: Sequence[float], tolerance: float
) -> tuple[float, float, float]:
    """Area within the tolerance, area, and HD95 (infinite where one mask is empty)."""
    import surface_distance  # type: ignore[import-untyped]

    distances = surface_distance.compute_surface_distances(there, found, tuple(spacing))
    within = area = 0.0
    for name, way in (("gt", "distances_gt_to_pred"), ("pred", "distances_pred_to_gt")):
        areas = distances[f"surfel_areas_{name}"]
        area += float(areas.sum())
        within += float(areas[distances[way] <= tolerance].sum())
    return within, area, float(surface_distance.compute_robust_hausdorff(distances, _PERCENT))
