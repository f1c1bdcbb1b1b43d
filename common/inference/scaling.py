"""How an image's numbers become network input, measured in one pass over blocks of it, then applied to any part.

The same as `common.imaging.intensity.normalize` of the whole image, to rounding, without a float32 copy of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from common.imaging.intensity import INTENSITIES

_LOW, _HIGH = 0.5, 99.5
_COUNTED = (np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.int16), np.dtype(np.int8))


@dataclass(frozen=True)
class Scaling:
    """prepared = (value - shift) / scale, in float32; clipped to 0 to 1 where `clips`. A scale of 0 makes all 0."""

    shift: float
    scale: float
    clips: bool

    def __call__(self, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        if not self.scale:
            return np.zeros_like(values)
        if not self.shift and self.scale == 1.0 and not self.clips:
            return values
        # As NumPy computes with Python's floats: in float32.
        scaled = (values - np.float32(self.shift)) / np.float32(self.scale)
        return np.clip(scaled, 0.0, 1.0, out=scaled) if self.clips else scaled


def is_measurable(intensity: str, stored: np.dtype[Any], is_luminance: bool) -> bool:
    """Whether `measured` takes an image: not where its background must be found first, nor for percentiles of numbers
    that cannot be counted one by one."""
    if intensity not in INTENSITIES:
        raise ValueError(f"intensity: expected one of {INTENSITIES}, found {intensity!r}")
    if intensity == "percentile":
        return stored in _COUNTED and not is_luminance
    return intensity != "foreground_zscore"


def measured(
    blocks: Callable[[], Iterable[npt.NDArray[Any]]],
    intensity: str,
    stored: np.dtype[Any],
    window: Sequence[float] | None = None,
) -> Scaling:
    """Measure an image.

    Parameters
    ----------
    blocks : called for every pass over the image; gives its voxels, all channels, in parts of any shape: of the type
        `stored`, or float32.
    intensity, window : as of `normalize`; see `is_measurable`.
    stored : the type of the file's numbers.
    """
    if intensity == "none":
        return Scaling(0.0, float(np.iinfo(stored).max) if stored in (np.uint8, np.uint16) else 1.0, clips=False)
    if intensity == "window":
        if window is None:
            raise ValueError("intensity window: expected a window of two values, found none")
        return Scaling(window[0], window[1] - window[0], clips=True)
    if intensity == "zscore":
        return _zscore(blocks())
    return _percentile(blocks(), stored)


def _zscore(blocks: Iterable[npt.NDArray[Any]]) -> Scaling:
    """Mean and deviation of all blocks: theirs, joined as Chan, Golub and LeVeque 1983 do (doi:10.2307/2683386)."""
    count, mean, squares = 0, 0.0, 0.0
    lowest, highest = np.inf, -np.inf
    for block in blocks:
        own = float(block.mean(dtype=np.float64))
        deviation = float(block.var(dtype=np.float64)) * block.size
        lowest, highest = min(lowest, float(block.min())), max(highest, float(block.max()))
        total = count + block.size
        squares += deviation + (own - mean) ** 2 * count * block.size / total
        mean += (own - mean) * block.size / total
        count = total
    return Scaling(mean, 0.0 if lowest == highest else (squares / count) ** 0.5, clips=False)


def _percentile(blocks: Iterable[npt.NDArray[Any]], stored: np.dtype[Any]) -> Scaling:
    first = int(np.iinfo(stored).min)
    counts = np.zeros(int(np.iinfo(stored).max) - first + 1, np.int64)
    for block in blocks:
        counts += np.bincount(block.ravel().astype(np.intp) - first, minlength=len(counts))
    values, places = np.flatnonzero(counts) + first, np.cumsum(counts)
    last = int(places[-1]) - 1

    def value_at(rank: int) -> int:
        return int(np.searchsorted(places, rank, side="right")) + first

    def percentile(share: float) -> float:
        """Between neighbouring ranks, linearly, as NumPy does."""
        rank = share / 100 * last
        low = value_at(int(rank))
        return low + (value_at(min(int(rank) + 1, last)) - low) * (rank - int(rank))

    low, high = percentile(_LOW), percentile(_HIGH)
    if low == high:
        low, high = float(values[0]), float(values[-1])
    return Scaling(low, high - low, clips=True)
