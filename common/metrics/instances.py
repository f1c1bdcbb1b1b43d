"""How well single objects were found: average precision by IoU, and F1 by the objects' size.

All of it comes of one contingency table, the number of voxels that each object of the truth shares with each object of
the prediction. A pair matches where its IoU is *above* the threshold. Above one half that makes pairs: were an object
to match two others, which do not overlap, each would hold more than half of it. So nothing has to be assigned. At an
IoU of exactly the threshold there is no match; of exactly one half, an object may have two equal halves for partners.

Sources: average precision as TP / (TP + FP + FN), the 2018 Data Science Bowl, Caicedo et al. 2019,
doi:10.1038/s41592-019-0612-7, and StarDist, Schmidt et al. 2018, arXiv:1806.03535 (which counts equality as a match).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

IOU_PERCENTS = tuple(range(50, 95, 5))
"""The thresholds in percent: whole numbers, so that an IoU of exactly 3/5 is not above 0.6 by rounding."""
SIZE_EDGES = (10, 20, 40)
SIZE_NAMES = ("<10", "10-20", "20-40", ">=40")
"""Bins of the equivalent diameter in voxels; an edge belongs to the bin above it."""

_Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class InstanceCounts:
    """Matched, surplus and missed objects; a value that adds.

    Attributes
    ----------
    tp, fp, fn : int64, shape (len(IOU_PERCENTS),)
        Pairs that match at each threshold, objects of the prediction without a match, objects of the truth without one.
    tp_of_sizes, fp_of_sizes, fn_of_sizes : int64, shape (len(SIZE_NAMES),)
        The same at an IoU of 0.5, by size: pairs and missed objects by that of the true object, surplus objects by
        their own.
    """

    tp: _Counts
    fp: _Counts
    fn: _Counts
    tp_of_sizes: _Counts
    fp_of_sizes: _Counts
    fn_of_sizes: _Counts

    @classmethod
    def zero(cls) -> InstanceCounts:
        """Counts of no image, to start a sum with."""
        thresholds, sizes = ((np.zeros(len(bins), np.int64),) * 3 for bins in (IOU_PERCENTS, SIZE_NAMES))
        return cls(*thresholds, *sizes)

    def __add__(self, other: InstanceCounts) -> InstanceCounts:
        return InstanceCounts(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    @property
    def objects(self) -> int:
        """The number of objects of the truth."""
        return int(self.tp[0] + self.fn[0])

    @property
    def found(self) -> int:
        """The number of objects of the prediction."""
        return int(self.tp[0] + self.fp[0])

    def average_precision(self) -> npt.NDArray[np.float64]:
        """TP / (TP + FP + FN) at every threshold, float64 of shape (len(IOU_PERCENTS),).

        NaN where there are objects in neither prediction nor truth; 0 where they are in one of them only.
        """
        return _ratio(self.tp, self.tp + self.fp + self.fn)

    def f1_of_sizes(self) -> npt.NDArray[np.float64]:
        """2 TP / (2 TP + FP + FN) at an IoU of 0.5 for every bin of size; NaN for a bin without objects."""
        twice = 2 * self.tp_of_sizes
        return _ratio(twice, twice + self.fp_of_sizes + self.fn_of_sizes)


class _Contingency(NamedTuple):
    """Sizes in voxels of the objects of both, and of the parts they share: object `rows[i]` of the truth and object
    `columns[i]` of the prediction share `shared[i]`. Objects are counted from 0 in the order of their labels."""

    truth: _Counts
    prediction: _Counts
    rows: _Counts
    columns: _Counts
    shared: _Counts


def match_instances(prediction: npt.NDArray[Any], truth: npt.NDArray[Any]) -> InstanceCounts:
    """Match the objects of a prediction with those of the truth.

    Parameters
    ----------
    prediction, truth : integer arrays of one shape, (y, x) or (z, y, x)
        0 is background, every other value one object, whether or not it hangs together; values need not be
        consecutive. The number of axes says what size means: the diameter of the circle of the same area, or of the
        sphere of the same volume, in voxels.

    Raises
    ------
    ValueError
        The shapes differ, the arrays are not of integers, or have neither two nor three axes.
    """
    if prediction.shape != truth.shape or truth.ndim not in (2, 3):
        raise ValueError(
            f"expected two arrays of one shape, (y, x) or (z, y, x), found {prediction.shape} and {truth.shape}"
        )
    for name, array in (("prediction", prediction), ("truth", truth)):
        if array.dtype.kind not in "iu":
            raise ValueError(f"{name}: expected integers, found {array.dtype}")
    table = _contingency(prediction, truth)
    union = table.truth[table.rows] + table.prediction[table.columns] - table.shared
    tp = np.array([np.count_nonzero(100 * table.shared > percent * union) for percent in IOU_PERCENTS], np.int64)
    matched = 100 * table.shared > IOU_PERCENTS[0] * union
    true_bins, predicted_bins = _bins(table.truth, truth.ndim), _bins(table.prediction, truth.ndim)
    return InstanceCounts(
        tp,
        len(table.prediction) - tp,
        len(table.truth) - tp,
        tp_of_sizes=_histogram(true_bins[table.rows[matched]]),
        fp_of_sizes=_histogram(np.delete(predicted_bins, table.columns[matched])),
        fn_of_sizes=_histogram(np.delete(true_bins, table.rows[matched])),
    )


def equivalent_diameter(voxels: npt.ArrayLike, dimensions: int) -> npt.NDArray[np.float64]:
    """The diameter, in voxels, of the circle of this area or the sphere of this volume."""
    size = np.asarray(voxels, np.float64)
    return np.asarray(np.sqrt(4 * size / np.pi) if dimensions == 2 else np.cbrt(6 * size / np.pi))


def _contingency(prediction: npt.NDArray[Any], truth: npt.NDArray[Any]) -> _Contingency:
    true_sizes, rows = _numbered(truth)
    predicted_sizes, columns = _numbered(prediction)
    both = (rows >= 0) & (columns >= 0)
    width = max(len(predicted_sizes), 1)
    pairs, shared = np.unique(rows[both] * width + columns[both], return_counts=True)
    return _Contingency(true_sizes, predicted_sizes, pairs // width, pairs % width, shared.astype(np.int64))


def _numbered(labels: npt.NDArray[Any]) -> tuple[_Counts, _Counts]:
    """The objects' sizes, and of every voxel its object's number from 0; -1 is background."""
    values, numbers, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    is_object = values != 0
    place = np.where(is_object, np.cumsum(is_object) - 1, -1)
    return sizes[is_object].astype(np.int64), place[numbers.reshape(-1)]


def _bins(sizes: _Counts, dimensions: int) -> _Counts:
    return np.asarray(np.searchsorted(SIZE_EDGES, equivalent_diameter(sizes, dimensions), side="right"), np.int64)


def _histogram(bins: _Counts) -> _Counts:
    return np.bincount(bins, minlength=len(SIZE_NAMES)).astype(np.int64)


def _ratio(part: _Counts, whole: _Counts) -> npt.NDArray[np.float64]:
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)
