"""A small picture of a case with the outline of its label, for the eyes of those who may see the case."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
from scipy import ndimage

from common.errors import DataError
from common.imaging.case import Case
from common.imaging.facts import format_of
from common.imaging.geometry import to_ras
from common.imaging.source_checks import Refused, read
from common.imaging.volume import Volume

Pixels = npt.NDArray[np.uint8]

_LOW, _HIGH = 0.5, 99.5
_MOST_STRETCHED = 4.0
# Told apart on grey by people who do not tell red from green: Okabe and Ito, "Color Universal Design", 2008.
_COLOURS = np.array(
    [(230, 159, 0), (86, 180, 233), (240, 228, 66), (0, 158, 115), (213, 94, 0), (204, 121, 167)], np.uint8
)


def thumbnail(
    case: Case,
    dimensions: int | None = None,
    *,
    modality: str | None = None,
    size: int = 192,
    label_map: Mapping[int, int] | None = None,
) -> bytes:
    """A PNG of the slice on which the label is largest, or the middle one, with the label's outline in colour.

    Parameters
    ----------
    case : one of its images is drawn, and its label where that can be read and is on the same grid.
    dimensions : 2 or 3, or None for either.
    modality : of the image; None for the first by name.
    size : pixels of the longer side, at most. Pixels that are not square are stretched to their true proportions.
    label_map : stored value -> class: classes of 0 are not outlined.

    Returns
    -------
    bytes
        An 8-bit RGB PNG. Volumes with an orientation are shown with anterior up and the patient's left on the right,
        planes as they are stored; the grey range goes from the 0.5th to the 99.5th percentile of the slice.

    Raises
    ------
    DataError : the image cannot be read.
    """
    if not case.images:
        raise DataError(f"case {case.name}: has no image to show. Add one.")
    source = case.images[min(case.images) if modality is None else modality]
    try:
        volume = read(source, dimensions)
    except Refused as refused:
        raise DataError(f"{refused.message}. {refused.advice or refused.code.advice}") from refused
    label = _label_of(case, volume, label_map or {})
    is_oriented = format_of(source) != "TIFF" and volume.shape[0] > 1
    turned = to_ras(volume) if is_oriented else volume
    mask = (to_ras(label) if is_oriented else label) if label is not None else None
    index = turned.shape[0] // 2
    if mask is not None and mask.array.any():
        index = int(np.argmax(np.count_nonzero(mask.array, axis=(1, 2, 3))))
    plane = turned.array[index]
    classes = mask.array[index, ..., 0] if mask is not None and mask.shape == turned.shape else None
    if is_oriented:
        # RAS counts from left to right and from posterior to anterior; pictures are seen from the feet, anterior up.
        plane = plane[::-1, ::-1]
        classes = classes[::-1, ::-1] if classes is not None else None
    return bytes(imagecodecs.png_encode(_draw(plane, classes, turned.spacing[1:], size)))


def _label_of(case: Case, volume: Volume, label_map: Mapping[int, int]) -> Volume | None:
    """The label in classes, for the picture; whatever is wrong with it was said by the checks."""
    if case.label is None:
        return None
    try:
        label = read(case.label, 2 if volume.shape[0] == 1 else 3, is_label=True, grid=volume)
    except Refused:
        return None
    if label.shape != volume.shape:
        return None
    array = label.array
    for value, index in label_map.items():
        if index == 0:
            array = np.where(array == value, 0, array)
    return replace(label, array=array)


def _draw(plane: npt.NDArray[Any], classes: npt.NDArray[Any] | None, spacing: tuple[float, ...], size: int) -> Pixels:
    """A plane (y, x, channel) as RGB (y, x, 3) of at most `size` pixels a side."""
    # A pixel size that is wrong by orders of magnitude must not make a picture of one line.
    stretch = np.clip(spacing[0] / spacing[1], 1 / _MOST_STRETCHED, _MOST_STRETCHED)
    height, width = plane.shape[0] * stretch, float(plane.shape[1])
    scale = size / max(height, width)
    shape = max(round(height * scale), 1), max(round(width * scale), 1)
    picture = _resized(_grey_range(_three_channels(plane)), shape)
    if classes is not None:
        rows, columns = (_nearest(n, of) for n, of in zip(shape, classes.shape, strict=True))
        drawn = classes[np.ix_(rows, columns)]
        border = _borders(drawn)
        picture[border] = _COLOURS[(drawn[border] - 1) % len(_COLOURS)]
    return np.ascontiguousarray(picture)


def _three_channels(plane: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    values = plane.astype(np.float32)
    return values if values.shape[2] == 3 else np.repeat(values[..., :1], 3, axis=2)


def _grey_range(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    low, high = np.percentile(values, (_LOW, _HIGH))
    if low == high:
        low, high = values.min(), values.max()
    scaled: npt.NDArray[np.float32] = np.clip((values - low) / max(float(high - low), 1e-30), 0, 1) * np.float32(255)
    return scaled


def _resized(values: npt.NDArray[np.float32], shape: tuple[int, int]) -> Pixels:
    """Smoothed where it gets smaller, then the nearest pixel."""
    factors = [max(old / new, 1.0) for old, new in zip(values.shape[:2], shape, strict=True)]
    smooth = ndimage.uniform_filter(values, [*(int(factor) for factor in factors), 1]) if max(factors) >= 2 else values
    rows, columns = (_nearest(n, of) for n, of in zip(shape, values.shape[:2], strict=True))
    picture: Pixels = smooth[np.ix_(rows, columns)].astype(np.uint8)
    return picture


def _nearest(new: int, old: int) -> npt.NDArray[np.intp]:
    return np.minimum(((np.arange(new) + 0.5) * old / new).astype(np.intp), old - 1)


def _borders(classes: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """The pixels of an object that touch another value; the edge of the picture is none."""
    border: npt.NDArray[np.bool_] = classes != 0
    edge = np.zeros(classes.shape, bool)
    vertical, horizontal = classes[1:] != classes[:-1], classes[:, 1:] != classes[:, :-1]
    edge[1:] |= vertical
    edge[:-1] |= vertical
    edge[:, 1:] |= horizontal
    edge[:, :-1] |= horizontal
    border &= edge
    return border
