"""Intensities are measured alike of a whole image and of parts of it, to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from common.imaging.intensity import INTENSITIES, normalize
from common.imaging.scaling import Scaling, is_measurable, measured

WINDOW = (-40.5, 300.25)


def stored_images() -> dict[str, npt.NDArray[Any]]:
    rng = np.random.default_rng(0)
    smooth = rng.normal(size=(211, 93, 1)).cumsum(axis=0)
    spots = np.zeros((120, 130, 1), np.uint8)
    spots[3:5, 4:7] = 250  # fewer than half a percent
    return {
        "bytes": rng.integers(0, 256, (200, 151, 3), np.uint8),
        "16 bits": (smooth * 900 + 20000).clip(0, 65535).astype(np.uint16),
        "dark 16 bits": rng.poisson(3, (300, 77, 1)).astype(np.uint16),
        "Hounsfield units": (smooth * 200).clip(-1024, 3000).astype(np.int16),
        "signed bytes": rng.integers(-128, 128, (64, 65, 1)).astype(np.int8),
        "floats": (smooth * 1e-3).astype(np.float32),
        "few spots": spots,
        "constant": np.full((40, 50, 1), 7, np.uint8),
        "one voxel": np.full((1, 1, 1), 7, np.int16),
    }


IMAGES = stored_images()


def by_definition(values: npt.NDArray[np.float32], intensity: str, stored: np.dtype[Any]) -> npt.NDArray[np.float32]:
    """What each intensity is, of the whole image, in NumPy's own functions."""
    if intensity in ("zscore", "foreground_zscore"):
        if values.max() == values.min():
            return np.zeros_like(values)
        return (values - values.mean(dtype=np.float64)) / values.std(dtype=np.float64)
    if intensity == "none":
        return values / np.float32(np.iinfo(stored).max) if stored in (np.uint8, np.uint16) else values
    low, high = WINDOW
    if intensity == "percentile":
        low, high = (float(value) for value in np.percentile(values, (0.5, 99.5)))
        if low == high:
            low, high = float(values.min()), float(values.max())
        if low == high:
            return np.zeros_like(values)
    return np.clip((values - low) / (high - low), 0.0, 1.0)


def same_bits(found: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> bool:
    return found.dtype == expected.dtype == np.float32 and np.array_equal(
        found.view(np.uint32), expected.view(np.uint32)
    )


@pytest.mark.parametrize("intensity", INTENSITIES)
@pytest.mark.parametrize("name", IMAGES)
def test_a_whole_image_is_normalized_by_definition(name: str, intensity: str) -> None:
    stored = IMAGES[name]
    values = stored.astype(np.float32)
    found = normalize(values, intensity, stored=stored.dtype, window=WINDOW)
    assert same_bits(found, by_definition(values, intensity, stored.dtype))


IN_PARTS = [
    (name, intensity)
    for name, stored in IMAGES.items()
    for intensity in INTENSITIES
    if is_measurable(intensity, stored.dtype, is_luminance=False)
]


@pytest.mark.parametrize("rows", [1, 17, 1000])
@pytest.mark.parametrize(("name", "intensity"), IN_PARTS)
def test_parts_measure_what_the_whole_does(name: str, intensity: str, rows: int) -> None:
    stored = IMAGES[name]
    parts = [stored[first : first + rows] for first in range(0, len(stored), rows)]
    scaling = measured(lambda: iter(parts), intensity, stored.dtype, WINDOW)
    values = stored.astype(np.float32)
    assert same_bits(scaling(values), normalize(values, intensity, stored=stored.dtype, window=WINDOW))


def test_the_foreground_is_measured_alone_and_the_rest_is_zero() -> None:
    values = IMAGES["16 bits"].astype(np.float32)
    foreground = values[..., 0] > 20000
    found = normalize(values, "foreground_zscore", stored=np.dtype(np.uint16), foreground=foreground)
    assert not found[~foreground].any()
    assert same_bits(found[foreground], by_definition(values[foreground], "zscore", np.dtype(np.uint16)))


def test_a_part_decides_the_range_of_the_whole() -> None:
    values = IMAGES["floats"].astype(np.float32)
    part = values[20:60]
    found = normalize(values, "zscore", stored=np.dtype(np.float32), measured=part)
    assert same_bits(found, (values - part.mean(dtype=np.float64)) / part.std(dtype=np.float64))


def test_what_cannot_be_measured_is_refused() -> None:
    floats = IMAGES["floats"]
    with pytest.raises(ValueError, match="all of the image at once"):
        measured(lambda: iter([floats, floats]), "percentile", floats.dtype)
    with pytest.raises(ValueError, match="expected a window"):
        measured(lambda: iter([floats]), "window", floats.dtype)
    for intensity in ("bright", ""):
        with pytest.raises(ValueError, match="intensity: expected one of"):
            normalize(floats, intensity, stored=floats.dtype)
    assert Scaling(0.0, 1.0, clips=False)(floats) is floats
