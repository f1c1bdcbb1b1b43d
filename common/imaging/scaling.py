"""How an image's numbers become network input, measured in one pass over parts of it, then applied to any part.

The one place where intensities are measured and applied: `common.imaging.intensity.normalize` gives the whole image as
one part, `common.inference.images` gives a large one band by band. Of integers of up to 16 bits both come to the same
bits: percentiles are read off counts with NumPy's own rule, and mean and deviation, joined in float64, agree to far
more digits than float32 keeps. Percentiles of other numbers need all of them at once, so those come in one part.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

INTENSITIES = ("zscore", "foreground_zscore", "percentile", "window", "none")
_LOW, _HIGH = 0.5, 99.5
_COUNTED = (np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.int16), np.dtype(np.int8))


@dataclass(frozen=True)
class Scaling:
    """prepared = (value - shift) / scale, in float32; clipped to 0 to 1 where `clips`. A scale of 0 makes all 0."""

    shift: float
    scale: float
    clips: bool

    def __call__(self, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """A new array of the shape of `values`, or `values` where nothing changes."""
        if not self.scale:
            return np.zeros_like(values)
        if not self.shift and self.scale == 1.0 and not self.clips:
            return values
        # As NumPy computes with Python's floats: in float32.
        scaled = (values - np.float32(self.shift)) / np.float32(self.scale)
        return np.clip(scaled, 0.0, 1.0, out=scaled) if self.clips else scaled


def is_measurable(intensity: str, stored: np.dtype[Any], is_luminance: bool) -> bool:
    """Whether `measured` takes an image in several parts: not where its background must be found first, nor for
    percentiles of numbers that cannot be counted one by one."""
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
        `stored`, or float32. Several parts are for what is `is_measurable`.
    intensity : one of `INTENSITIES`; for "foreground_zscore" the blocks hold the foreground alone.
    window : (lowest, highest), for the intensity "window".
    stored : the type of the file's numbers.

    Raises
    ------
    ValueError : an unknown name, no window, or percentiles of several parts of numbers that cannot be counted.
    """
    if intensity == "none":
        return Scaling(0.0, float(np.iinfo(stored).max) if stored in (np.uint8, np.uint16) else 1.0, clips=False)
    if intensity == "window":
        if window is None:
            raise ValueError("intensity window: expected a window of two values, found none")
        return Scaling(window[0], window[1] - window[0], clips=True)
    if intensity in ("zscore", "foreground_zscore"):
        return _zscore(blocks())
    if intensity == "percentile":
        return _percentile(blocks())
    raise ValueError(f"intensity: expected one of {INTENSITIES}, found {intensity!r}")


def _zscore(blocks: Iterable[npt.NDArray[Any]]) -> Scaling:
    """Mean and deviation of all blocks: theirs, joined as Chan, Golub and LeVeque 1983 do (doi:10.2307/2683386)."""
    count, mean, variance = 0, 0.0, 0.0
    lowest, highest = np.inf, -np.inf
    for block in blocks:
        # In float64, because the sums of a large 16-bit image outgrow float32's 24 bits.
        own, spread = float(block.mean(dtype=np.float64)), float(block.var(dtype=np.float64))
        lowest, highest = min(lowest, float(block.min())), max(highest, float(block.max()))
        share = block.size / (count + block.size)  # 1 of the first, which is then taken as it is
        variance = (1 - share) * variance + share * spread + share * (1 - share) * (own - mean) ** 2
        mean += share * (own - mean)
        count += block.size
    return Scaling(mean, 0.0 if lowest == highest else variance**0.5, clips=False)


def _percentile(blocks: Iterable[npt.NDArray[Any]]) -> Scaling:
    """From the 0.5th to the 99.5th; where the two are equal (a few bright spots on black) from minimum to maximum."""
    parts = iter(blocks)
    first = next(parts)
    if first.dtype in _COUNTED:
        low, high, lowest, highest = _counted_percentiles(first, parts)
    elif next(parts, None) is None:
        low, high = (float(value) for value in np.percentile(first, (_LOW, _HIGH)))
        lowest, highest = float(first.min()), float(first.max())
    else:
        raise ValueError(f"percentiles of {first.dtype}: expected all of the image at once, found several parts")
    if low == high:
        low, high = lowest, highest
    return Scaling(low, high - low, clips=True)


def _counted_percentiles(
    first: npt.NDArray[Any], others: Iterable[npt.NDArray[Any]]
) -> tuple[float, float, float, float]:
    """The two percentiles, minimum and maximum."""
    least = int(np.iinfo(first.dtype).min)
    counts = np.zeros(int(np.iinfo(first.dtype).max) - least + 1, np.int64)
    for block in itertools.chain((first,), others):
        counts += np.bincount(block.ravel().astype(np.intp) - least, minlength=len(counts))
    values, places = np.flatnonzero(counts) + least, np.cumsum(counts)
    last = int(places[-1]) - 1

    def value_at(rank: int) -> int:
        return int(np.searchsorted(places, rank, side="right")) + least

    def percentile(share: float) -> float:
        """Between neighbouring ranks, linearly, from the nearer one: as NumPy does, to the last bit."""
        rank = share / 100 * last
        part = rank - int(rank)
        low, high = value_at(int(rank)), value_at(min(int(rank) + 1, last))
        return low + (high - low) * part if part < 0.5 else high - (high - low) * (1 - part)

    return percentile(_LOW), percentile(_HIGH), float(values[0]), float(values[-1])
