"""Images as another microscope or a worse day would have given them: one way of spoiling at a time.

Strengths are relative to the stored image's own range from minimum to maximum, which each function gets as 0 to 1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from common.imaging.volume import Volume

Image = npt.NDArray[np.float32]


def _noisy(values: Image, rng: np.random.Generator) -> Image:
    return values + rng.normal(0, 0.05, values.shape).astype(np.float32)


def _darkened(values: Image, rng: np.random.Generator) -> Image:
    del rng
    return np.asarray(values**1.5, dtype=np.float32)


def _blurred(values: Image, rng: np.random.Generator) -> Image:
    del rng
    return np.asarray(ndimage.gaussian_filter(values, (1.5, 1.5, 0), mode="nearest"), dtype=np.float32)


def _unevenly_lit(values: Image, rng: np.random.Generator) -> Image:
    y, x = np.meshgrid(*(np.linspace(-1, 1, size) for size in values.shape[:2]), indexing="ij")
    angle = rng.uniform(0, 2 * math.pi)
    slope = (math.cos(angle) * x + math.sin(angle) * y) / (abs(math.cos(angle)) + abs(math.sin(angle)))
    return np.asarray(values * (1 + 0.5 * slope)[..., np.newaxis], dtype=np.float32)


SPOILERS: Mapping[str, Callable[[Image, np.random.Generator], Image]] = {
    "noise": _noisy,
    "gamma": _darkened,
    "blur": _blurred,
    "illumination": _unevenly_lit,
}


def spoilt(volume: Volume, how: str, number: int) -> Volume:
    """The stored image, (1, y, x, channel), spoilt; `number` alone decides the randomness."""
    values = volume.array[0].astype(np.float32)
    lowest, extent = values.min(), max(float(np.ptp(values)), 1e-6)
    changed = SPOILERS[how]((values - lowest) / extent, np.random.default_rng([number, list(SPOILERS).index(how)]))
    return dataclasses.replace(volume, array=(changed * extent + lowest)[np.newaxis])
