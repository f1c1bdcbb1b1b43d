"""Is a network right as often as it is sure? Expected calibration error, from counts that add.

Source: Guo et al. 2017, arXiv:1706.04599: the confidence is that of the predicted class alone, in 15 bins of equal
width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

BINS = 15
"""Bin i holds the confidences above i / BINS up to (i + 1) / BINS; 0 is in the first."""
_ROUNDING = 1e-4  # Averaged tiles' float32 probabilities may add up to a little more than 1.


@dataclass(frozen=True, eq=False)
class CalibrationCounts:
    """Voxels by the confidence of their predicted class; a value that adds.

    Attributes
    ----------
    voxels, correct : int64, shape (BINS,)
        How many voxels have a confidence in each bin, and how many of them were predicted right.
    confidence : float64, shape (BINS,)
        The sum of their confidences.
    """

    voxels: npt.NDArray[np.int64]
    correct: npt.NDArray[np.int64]
    confidence: npt.NDArray[np.float64]

    @classmethod
    def zero(cls) -> CalibrationCounts:
        """Counts of no image, to start a sum with."""
        return cls(np.zeros(BINS, np.int64), np.zeros(BINS, np.int64), np.zeros(BINS))

    def __add__(self, other: CalibrationCounts) -> CalibrationCounts:
        return CalibrationCounts(
            self.voxels + other.voxels, self.correct + other.correct, self.confidence + other.confidence
        )

    def error(self) -> float:
        """The mean over voxels of their bin's |share of correct ones - mean confidence|, 0 to 1; NaN of no voxel."""
        total = int(self.voxels.sum())
        return float(np.abs(self.correct - self.confidence).sum()) / total if total else float("nan")


def count_calibration(confidence: npt.NDArray[Any], correct: npt.NDArray[np.bool_]) -> CalibrationCounts:
    """Sort voxels into bins.

    Parameters
    ----------
    confidence : floating point, any shape, 0 to 1
        The probability of the class that was predicted.
    correct : bool, the same shape
        Whether that class is the true one.

    Raises
    ------
    ValueError
        The shapes differ, or a confidence is no probability.
    """
    if confidence.shape != correct.shape:
        raise ValueError(f"confidence of shape {confidence.shape} and correct of shape {correct.shape} differ")
    values = confidence.reshape(-1).astype(np.float64)
    if values.size and not (values.min() >= -_ROUNDING and values.max() <= 1 + _ROUNDING):
        raise ValueError(f"confidence: expected 0 to 1, found {values.min()} to {values.max()}")
    values = np.clip(values, 0, 1)
    bins = np.clip(np.ceil(values * BINS).astype(np.int64) - 1, 0, BINS - 1)
    right = bins[correct.reshape(-1)]
    return CalibrationCounts(
        np.bincount(bins, minlength=BINS).astype(np.int64),
        np.bincount(right, minlength=BINS).astype(np.int64),
        np.bincount(bins, weights=values, minlength=BINS).astype(np.float64),
    )


def predicted_confidence(
    probabilities: npt.NDArray[np.float32], head: Literal["softmax", "sigmoid", "distance"]
) -> npt.NDArray[np.float32]:
    """The probability of the class that is predicted for every voxel, float32 of shape (spatial...).

    Parameters
    ----------
    probabilities : float32, shape (spatial..., outputs)
    head : what the outputs are
        softmax: the classes. sigmoid: the foreground classes, of which the likeliest is predicted above 0.5, else the
        background, with 1 minus its probability. distance: the foreground, likewise, and its distance, which is none.
    """
    if head == "softmax":
        return np.asarray(probabilities.max(axis=-1), np.float32)
    foreground = probabilities[..., 0] if head == "distance" else probabilities.max(axis=-1)
    return np.asarray(np.where(foreground > 0.5, foreground, 1 - foreground), np.float32)
