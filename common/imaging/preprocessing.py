"""From a volume as it was read to what the network takes: the wanted channels, a common range, class indices."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import DataError
from common.imaging.volume import Volume

INTENSITIES = ("zscore", "percentile", "none")
LABELS = ("classes", "instances")
CHANNELS_ADVICE = "Convert the image, or set the study's channels (grey serves for 3, RGB for 1)."
_LOW, _HIGH = 0.5, 99.5
# Luma of ITU-R BT.601, section 2.5.1.
_LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def channels_fit(found: int, wanted: int) -> bool:
    """Whether `prepare_image` can make `wanted` channels of `found`: the same number, grey to 3, or RGB to 1."""
    return found == wanted or (found, wanted) in ((1, 3), (3, 1))


def prepare_image(volume: Volume, *, dimensions: int, channels: int, intensity: str) -> npt.NDArray[np.float32]:
    """Make network input of an image.

    Parameters
    ----------
    volume : Volume
    dimensions : 2 or 3
    channels : int
        Grey is repeated for 3; RGB becomes its luminance (ITU-R BT.601) for 1.
    intensity : "zscore", "percentile" or "none"
        `zscore`: minus the mean, divided by the standard deviation, of all voxels and channels together.
        `percentile`: 0.5th to 99.5th percentile of all voxels and channels become 0 to 1, the rest is clipped; where
        the two are equal (a few bright spots on black), minimum and maximum take their place.
        `none`: uint8 divided by 255 and uint16 by 65535, other types as they are.
        A constant image becomes 0 under `zscore` and `percentile`.

    Returns
    -------
    float32 array
        Shape (y, x, channel) in 2D, (z, y, x, channel) in 3D.

    Raises
    ------
    DataError
        The image's channels do not serve for the wanted number.
    ValueError
        The volume is not of `dimensions`, or the intensity's name is unknown.
    """
    if intensity not in INTENSITIES:
        raise ValueError(f"intensity: expected one of {INTENSITIES}, found {intensity!r}")
    array = _spatial(volume, dimensions)
    values: npt.NDArray[np.float32] = array.astype(np.float32)
    if intensity == "none" and array.dtype in (np.uint8, np.uint16):
        values /= np.float32(np.iinfo(array.dtype).max)
    values = _with_channels(values, channels)
    if intensity == "zscore":
        return _zscore(values)
    if intensity == "percentile":
        return _percentile(values)
    return values


def prepare_label(volume: Volume, *, dimensions: int, classes: int, labels: str) -> npt.NDArray[np.uint8]:
    """Make class indices of a label.

    Parameters
    ----------
    volume : Volume
        As `read_label` returns it.
    dimensions : 2 or 3
    classes : int
        The number of classes with the background, 2 to 256.
    labels : "classes" or "instances"
        `classes`: the values are the indices. `instances`: every number above 0 becomes class 1, so there are exactly
        two classes.

    Returns
    -------
    uint8 array
        Shape (y, x) in 2D, (z, y, x) in 3D; values below `classes`.

    Raises
    ------
    DataError
        A value is no class.
    ValueError
        The volume is not of `dimensions`, or the other arguments are out of their range.
    """
    if labels not in LABELS:
        raise ValueError(f"labels: expected one of {LABELS}, found {labels!r}")
    if not 2 <= classes <= 256:
        raise ValueError(f"classes: expected 2 to 256 with the background, found {classes}")
    if labels == "instances" and classes != 2:
        raise ValueError(f"classes: instance labels make 2 classes, background and object, found {classes}")
    array = _spatial(volume, dimensions)[..., 0]
    if labels == "instances":
        return np.asarray(array > 0, dtype=np.uint8)
    highest, lowest = int(array.max()), int(array.min())
    if lowest < 0 or highest >= classes:
        raise DataError(
            f"label: expected class indices 0 to {classes - 1}, found values from {lowest} to {highest}. "
            "Correct the label, or the study's classes."
        )
    return np.asarray(array, dtype=np.uint8)


def _spatial(volume: Volume, dimensions: int) -> npt.NDArray[Any]:
    if dimensions == 3:
        return volume.array
    if dimensions == 2 and volume.shape[0] == 1:
        plane: npt.NDArray[Any] = volume.array[0]
        return plane
    raise ValueError(f"expected {dimensions} dimensions, found a volume of shape {volume.shape} (z, y, x)")


def _with_channels(values: npt.NDArray[np.float32], wanted: int) -> npt.NDArray[np.float32]:
    found = values.shape[-1]
    if not channels_fit(found, wanted):
        raise DataError(f"image: expected {wanted} channels, found {found}. {CHANNELS_ADVICE}")
    if found == wanted:
        return values
    if wanted == 3:
        return np.repeat(values, 3, axis=-1)
    luminance: npt.NDArray[np.float32] = values @ _LUMINANCE
    return luminance[..., np.newaxis]


def _zscore(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    if values.max() == values.min():
        return np.zeros_like(values)
    # In float64, because the sums of a large 16-bit image outgrow float32's 24 bits.
    mean = values.mean(dtype=np.float64)
    std = values.std(dtype=np.float64)
    return np.asarray((values - mean) / std, dtype=np.float32)


def _percentile(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    low, high = (float(value) for value in np.percentile(values, (_LOW, _HIGH)))
    if low == high:
        low, high = float(values.min()), float(values.max())
    if low == high:
        return np.zeros_like(values)
    return np.asarray(np.clip((values - low) / (high - low), 0.0, 1.0), dtype=np.float32)
