"""A picture of a segmentation: the outline of every class or object in colour over the image, and a legend below."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.imaging.geometry import Orientation

Pixels = npt.NDArray[np.uint8]

LONGEST = 2048
"""Pixels of a plane's longer side, at most."""
SHORTEST = 1024
"""Planes whose longer side has fewer pixels are enlarged by a whole number, so that outlines stay thin."""

_LOW, _HIGH = 0.5, 99.5
_MOST_STRETCHED = 8.0
_GAP = 4
# Told apart on grey by people who do not tell red from green: Okabe and Ito, "Color Universal Design", 2008. What comes
# after the sixth has them paler, then darker.
_SIX = np.array(
    [(230, 159, 0), (86, 180, 233), (240, 228, 66), (0, 158, 115), (213, 94, 0), (204, 121, 167)], np.float32
)
_COLOURS = np.concatenate([_SIX, _SIX * 0.45 + 255 * 0.55, _SIX * 0.55]).astype(np.uint8)
# From little to much; lighter all the way, so that it reads without colours too. The outline is not among them.
_HEAT = np.array([(70, 0, 110), (190, 30, 80), (240, 110, 30), (255, 225, 90)], np.float32)
_MOST_HEAT = 0.85
_OUTLINE_ON_HEAT = _COLOURS[1]


@dataclass(frozen=True, eq=False)
class Plane:
    """A slice to be drawn.

    Attributes
    ----------
    image : shape (y, x, channel), grey or RGB; of others the first channel is drawn.
    labels : shape (y, x), integers; 0 is not outlined.
    spacing : (y, x) of the pixels.
    heat : shape (y, x), float from 0 to 1, drawn in colour over the image, which is grey then; None for none.
    """

    image: npt.NDArray[Any]
    labels: npt.NDArray[Any]
    spacing: tuple[float, float]
    heat: npt.NDArray[np.float32] | None = None


def write(path: Path, planes: Sequence[Plane], legend: Sequence[str] = ()) -> None:
    """Write a PNG of planes beside each other, of one scale; grey goes from the 0.5th to the 99.5th percentile.

    Parameters
    ----------
    legend : what the labels 1, 2, ... are; a strip below the planes has the colour and the name of each. None for none.
    """
    import imagecodecs

    finest = min(min(plane.spacing) for plane in planes)
    # A pixel size that is wrong by orders of magnitude must not make a picture of one line.
    stretches = [[min(step / finest, _MOST_STRETCHED) for step in plane.spacing] for plane in planes]
    longest = max(
        size * stretch
        for plane, of in zip(planes, stretches, strict=True)
        for size, stretch in zip(plane.labels.shape, of, strict=True)
    )
    scale = min(LONGEST / longest, max(SHORTEST // longest, 1))
    values = [_three_channels(plane.image) for plane in planes]
    low, high = _range(values)
    drawn = [
        _draw(
            plane, value, [max(round(n * s * scale), 1) for n, s in zip(plane.labels.shape, of, strict=True)], low, high
        )
        for plane, value, of in zip(planes, values, stretches, strict=True)
    ]
    height = max(picture.shape[0] for picture in drawn)
    width = sum(picture.shape[1] for picture in drawn) + _GAP * (len(drawn) - 1)
    canvas: Pixels = np.zeros((height, width, 3), np.uint8)
    left = 0
    for picture in drawn:
        top = (height - picture.shape[0]) // 2
        canvas[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
        left += picture.shape[1] + _GAP
    if legend:
        canvas = _above_legend(canvas, legend)
    path.write_bytes(bytes(imagecodecs.png_encode(canvas)))


def planes_of_volume(
    image: npt.NDArray[Any],
    labels: npt.NDArray[Any],
    spacing: tuple[float, float, float],
    orientation: Orientation,
    is_patient: bool,
    heat: Sequence[npt.NDArray[np.float32]] | None = None,
) -> list[Plane]:
    """The three slices of a volume, one across each axis, on which most is segmented; the middle ones where nothing is.

    Parameters
    ----------
    image, labels : shapes (z, y, x, channel) and (z, y, x), as stored.
    spacing : of these axes.
    orientation : how they are turned to RAS.
    is_patient : whether anterior or superior is drawn up and the patient's right on the left, as radiologists look at
        it; otherwise planes are drawn as they are turned.
    heat : for each axis of the turned volume that of its slice at `largest_slices`, turned; None for none.
    """
    image, labels = orientation.apply(image), orientation.apply(labels)
    steps = [spacing[axis] for axis in orientation.axes]
    planes = []
    for axis, at in enumerate(largest_slices(labels)):
        others = tuple(other for other in range(3) if other != axis)
        plane, drawn = np.take(image, at, axis), np.take(labels, at, axis)
        warm = None if heat is None else heat[axis]
        if is_patient:  # RAS counts from left to right and upwards
            turn = slice(None, None, -1)
            # The sagittal slice is seen with anterior on the left.
            plane, drawn = plane[turn, turn], drawn[turn, turn]
            warm = None if warm is None else warm[turn, turn]
        planes.append(Plane(plane, drawn, (steps[others[0]], steps[others[1]]), warm))
    return planes


def largest_slices(labels: npt.NDArray[Any]) -> tuple[int, int, int]:
    """For each axis of labels (z, y, x) where the slice across it lies that has most above 0; the middle for none."""
    places = []
    for axis in range(3):
        counts = np.count_nonzero(labels, axis=tuple(other for other in range(3) if other != axis))
        places.append(int(counts.argmax()) if counts.any() else labels.shape[axis] // 2)
    return places[0], places[1], places[2]


def _draw(plane: Plane, values: npt.NDArray[np.float32], shape: Sequence[int], low: float, high: float) -> Pixels:
    rows, columns = (_nearest(new, old) for new, old in zip(shape, plane.labels.shape, strict=True))
    chosen = np.ix_(rows, columns)
    scaled = np.clip((values[chosen] - low) / max(high - low, 1e-30), 0, 1) * np.float32(255)
    picture: Pixels = scaled.astype(np.uint8)
    labels = plane.labels[chosen]
    border = _borders(labels)
    if plane.heat is not None:
        picture = _heated(picture, plane.heat[chosen])
        picture[border] = _OUTLINE_ON_HEAT
    else:
        picture[border] = _COLOURS[(labels[border] - 1) % len(_COLOURS)]
    return picture


def _above_legend(picture: Pixels, names: Sequence[str]) -> Pixels:
    """The picture with a strip below it: a square of each name's colour, and the name."""
    from PIL import Image, ImageDraw, ImageFont

    size = int(np.clip(picture.shape[1] // 50, 16, 32))
    font = ImageFont.load_default(size)
    lengths = [round(font.getlength(name)) for name in names]
    width = max(picture.shape[1], min(max(lengths) + 3 * size, LONGEST))
    places, row, left = [], 0, size // 2
    for length in lengths:
        if left > size // 2 and left + length + 2 * size > width:
            row, left = row + 1, size // 2
        places.append((row, left))
        left += length + 3 * size
    line = size * 3 // 2
    strip = Image.new("RGB", (width, (row + 1) * line + size // 2))
    pen = ImageDraw.Draw(strip)
    for index, (name, (row, left)) in enumerate(zip(names, places, strict=True)):
        top = row * line + size // 2
        red, green, blue = (int(value) for value in _COLOURS[index % len(_COLOURS)])
        pen.rectangle((left, top, left + size - 1, top + size - 1), fill=(red, green, blue))
        pen.text((left + size * 3 // 2, top + size // 2), name, font=font, anchor="lm", fill=(255, 255, 255))
    wide = np.pad(picture, ((0, 0), (0, width - picture.shape[1]), (0, 0)))
    return np.concatenate([wide, np.asarray(strip, np.uint8)])


def _heated(picture: Pixels, heat: npt.NDArray[np.float32]) -> Pixels:
    """Grey where there is no heat, more of the heat's colour the more there is."""
    grey = np.repeat(picture.mean(axis=2, keepdims=True, dtype=np.float32), 3, axis=2)
    heat = np.clip(heat, 0, 1)
    levels = np.linspace(0, 1, len(_HEAT))
    colour = np.stack([np.interp(heat, levels, _HEAT[:, channel]) for channel in range(3)], axis=2)
    share = _MOST_HEAT * heat[..., np.newaxis]
    mixed: Pixels = (grey * (1 - share) + colour * share).astype(np.uint8)
    return mixed


def _three_channels(image: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    values = image.astype(np.float32)
    return values if values.shape[2] == 3 else np.repeat(values[..., :1], 3, axis=2)


def _range(values: Sequence[npt.NDArray[np.float32]]) -> tuple[float, float]:
    flat = np.concatenate([value.ravel() for value in values])
    low, high = (float(value) for value in np.percentile(flat, (_LOW, _HIGH)))
    return (low, high) if low < high else (float(flat.min()), float(flat.max()))


def _nearest(new: int, old: int) -> npt.NDArray[np.intp]:
    return np.minimum(((np.arange(new) + 0.5) * old / new).astype(np.intp), old - 1)


def _borders(labels: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """The pixels of an object that touch another value; the edge of the picture is none."""
    edge: npt.NDArray[np.bool_] = np.zeros(labels.shape, bool)
    vertical, horizontal = labels[1:] != labels[:-1], labels[:, 1:] != labels[:, :-1]
    edge[1:] |= vertical
    edge[:-1] |= vertical
    edge[:, 1:] |= horizontal
    edge[:, :-1] |= horizontal
    edge &= labels != 0
    return edge
