"""What is image and what is background, and from stored numbers to a range that all scanners share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from common.imaging.scaling import INTENSITIES
from common.imaging.scaling import measured as measure

__all__ = ["INTENSITIES", "box_of", "foreground_of", "normalize"]

Values = npt.NDArray[np.float32]


def normalize(
    values: Values,
    intensity: str,
    *,
    stored: np.dtype[Any],
    measured: Values | None = None,
    foreground: npt.NDArray[np.bool_] | None = None,
    window: Sequence[float] | None = None,
) -> Values:
    """Bring an image to the range that the study asks for, all channels together.

    Parameters
    ----------
    values : shape (spatial..., channel)
    intensity : one of `INTENSITIES`
        `zscore`: minus the mean, divided by the standard deviation. `foreground_zscore`: the same of the foreground,
        and 0 outside it. `percentile`: 0.5th to 99.5th percentile become 0 to 1, the rest is clipped; where the two are
        equal (a few bright spots on black), minimum and maximum take their place. `window`: the window's values become
        0 to 1, the rest is clipped. `none`: what was stored as uint8 is divided by 255, uint16 by 65535, others as they
        are. What has no spread to measure becomes 0 under the first three.
    stored : the type of the file's numbers; for `none`.
    measured : the part of the image that is measured for `zscore` and `percentile`; left out, all of it.
    foreground : shape (spatial...), for `foreground_zscore`; left out, everything is.
    window : (lowest, highest), for `window`.

    Returns
    -------
    float32, shape as `values`; a new array, or `values` where nothing changes.

    Raises
    ------
    ValueError : an unknown name, or no window.
    """
    part = values if measured is None else measured
    if intensity != "foreground_zscore" or foreground is None:
        return measure(lambda: (part,), intensity, stored, window)(values)
    inside = values[foreground]
    result = np.zeros_like(values)
    result[foreground] = measure(lambda: (inside,), intensity, stored)(inside)
    return result


def foreground_of(images: Sequence[npt.NDArray[Any]]) -> npt.NDArray[np.bool_]:
    """The voxels of a case that are not its background.

    A voxel is dark where every channel of every image has that channel's background value: 0 or the minimum, whichever
    more voxels of the image's border have. Background is what is dark and connected to the border through dark voxels
    (faces, not corners): dark holes inside the body belong to it, as in nnU-Net (Isensee et al. 2021,
    doi:10.1038/s41592-020-01008-z), whose images have background 0. Air that is noisy, as in most MR as acquired, is no
    background: it cannot be told from tissue by value alone.

    Parameters
    ----------
    images : of shapes (z, y, x, channel) with the same spatial axes; z = 1 in 2D.

    Returns
    -------
    bool, shape (z, y, x)
        All true where everything is background (a constant image).
    """
    dark = np.ones(images[0].shape[:-1], bool)
    for image in images:
        for channel in range(image.shape[-1]):
            values = image[..., channel]
            dark &= values == _background_value(values)
    pieces, _ = ndimage.label(dark)
    outside = np.unique(_border(pieces))
    foreground: npt.NDArray[np.bool_] = ~np.isin(pieces, outside[outside > 0])
    return foreground if foreground.any() else np.ones_like(foreground)


def box_of(mask: npt.NDArray[np.bool_], margin: int = 0) -> list[tuple[int, int]] | None:
    """The smallest box around what is true, as (first, end) of each axis, widened by a margin; None around nothing."""
    box = []
    for axis, length in enumerate(mask.shape):
        others = tuple(other for other in range(mask.ndim) if other != axis)
        hits = np.flatnonzero(mask.any(axis=others))
        if not hits.size:
            return None
        box.append((max(int(hits[0]) - margin, 0), min(int(hits[-1]) + 1 + margin, length)))
    return box


def _background_value(values: npt.NDArray[Any]) -> Any:
    lowest = values.min()
    border = _border(values)
    return 0 if np.count_nonzero(border == 0) > np.count_nonzero(border == lowest) else lowest


def _border(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The values of the outermost voxels; an axis of one voxel has no border."""
    faces = [
        array.take(index, axis).ravel() for axis in range(array.ndim) if array.shape[axis] > 1 for index in (0, -1)
    ]
    return np.concatenate(faces) if faces else array.ravel()
