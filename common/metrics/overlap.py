"""Dice, IoU, precision and recall from counts of voxels; counts of several images or sites can be added first.

Sources: Dice 1945, doi:10.2307/1932409; Jaccard 1912, doi:10.1111/j.1469-8137.1912.tb05611.x; both as reviewed by
Taha and Hanbury 2015, doi:10.1186/s12880-015-0068-x.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class OverlapCounts:
    """True positive, false positive and false negative voxels of every foreground class; a value that adds.

    Attributes
    ----------
    tp, fp, fn : int64, shape (classes - 1,)
        Entry i is about class i + 1; the background is left out.
    """

    tp: npt.NDArray[np.int64]
    fp: npt.NDArray[np.int64]
    fn: npt.NDArray[np.int64]

    @classmethod
    def zero(cls, classes: int) -> OverlapCounts:
        """Counts of no image, to start a sum with; `classes` includes the background."""
        return cls(*(np.zeros(classes - 1, dtype=np.int64) for _ in range(3)))

    def __add__(self, other: OverlapCounts) -> OverlapCounts:
        if self.tp.shape != other.tp.shape:
            raise ValueError(f"counts of {len(self.tp)} and {len(other.tp)} foreground classes do not add")
        return OverlapCounts(self.tp + other.tp, self.fp + other.fp, self.fn + other.fn)

    def dice(self) -> npt.NDArray[np.float64]:
        """2 tp / (2 tp + fp + fn) of every foreground class, float64 of shape (classes - 1,).

        NaN where a class is in neither prediction nor truth: there is nothing to measure, so leave it out of means
        (`numpy.nanmean`). 0 where it is in one of them only.
        """
        return _ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    def iou(self) -> npt.NDArray[np.float64]:
        """tp / (tp + fp + fn) of every foreground class; shape and empty classes as for `dice`."""
        return _ratio(self.tp, self.tp + self.fp + self.fn)

    def precision(self) -> npt.NDArray[np.float64]:
        """tp / (tp + fp): how much of what was found is there, float64 of shape (classes - 1,).

        NaN where nothing was found, whether or not something is there: what was missed lowers recall, Dice and IoU.
        """
        return _ratio(self.tp, self.tp + self.fp)

    def recall(self) -> npt.NDArray[np.float64]:
        """tp / (tp + fn): how much of what is there was found, as for `precision`; NaN where nothing is there."""
        return _ratio(self.tp, self.tp + self.fn)


def count_overlap(prediction: npt.NDArray[Any], truth: npt.NDArray[Any], classes: int) -> OverlapCounts:
    """Count agreeing and disagreeing voxels.

    Parameters
    ----------
    prediction, truth : integer arrays of one shape, any number of axes
        Class indices below `classes`, 0 is background.
    classes : int
        The number of classes with the background.

    Raises
    ------
    ValueError
        The shapes differ, a value is no class, or the arrays are not of integers.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction of shape {prediction.shape} and truth of shape {truth.shape} differ")
    for name, array in (("prediction", prediction), ("truth", truth)):
        if array.dtype.kind not in "iu":
            raise ValueError(f"{name}: expected integers, found {array.dtype}")
        if array.size and not 0 <= int(array.min()) <= int(array.max()) < classes:
            raise ValueError(f"{name}: expected 0 to {classes - 1}, found {array.min()} to {array.max()}")
    pairs = truth.reshape(-1).astype(np.int64) * classes + prediction.reshape(-1).astype(np.int64)
    confusion = np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)  # [truth, prediction]
    tp = np.diagonal(confusion)
    fp = confusion.sum(axis=0) - tp
    fn = confusion.sum(axis=1) - tp
    return OverlapCounts(*(counts[1:].astype(np.int64) for counts in (tp, fp, fn)))


def _ratio(part: npt.NDArray[np.int64], whole: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)
