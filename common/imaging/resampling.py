"""From one grid to another: a new spacing along the same axes, or the grid of another image.

Everything goes by the world position of voxel *centres*, not by the corners of the array. Array axes are ordered
(z, y, x).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage, sparse

from common.errors import DataError
from common.imaging.geometry import Affine, Placed, Shape, Triple, spacing_of
from common.imaging.volume import Volume

_SAME_SPACING = 0.01
_MOST_VOXELS = 2**30


@dataclass(frozen=True)
class Zoom:
    """A grid along the axes of another: voxel `i` of the new one lies at `scale * i + offset` of the old, axis by axis.

    Attributes
    ----------
    before, after : the shapes (z, y, x) of the old and the new grid.
    scale : old voxels a new voxel, along (z, y, x).
    offset : where voxel 0 of the new grid lies on the old one, along (z, y, x).
    """

    before: Shape
    after: Shape
    scale: Triple = (1.0, 1.0, 1.0)
    offset: Triple = (0.0, 0.0, 0.0)

    def __post_init__(self) -> None:
        sizes = (*self.before, *self.after)
        if len(sizes) != 6 or min(sizes) < 1 or len(self.scale) != 3 or min(self.scale) <= 0 or len(self.offset) != 3:
            raise ValueError(f"expected two shapes, a positive scale and an offset along (z, y, x), found {self}")

    @classmethod
    def to_spacing(cls, shape: Sequence[int], spacing: Sequence[float], wanted: Sequence[float]) -> Zoom:
        """From one spacing (z, y, x) to another about the centre of the field of view.

        New spacings are exact, so the fields of view differ by up to half a new voxel on either side. An axis that is
        within 1 % already is left as it is.

        Raises
        ------
        DataError : the image would have more than 2**30 voxels, as when a spacing is given in another unit.
        """
        scale = [
            1.0 if abs(new / old - 1) <= _SAME_SPACING else new / old for old, new in zip(spacing, wanted, strict=True)
        ]
        after = [max(math.floor(n / factor + 0.5), 1) for n, factor in zip(shape, scale, strict=True)]
        if math.prod(after) > _MOST_VOXELS:
            raise DataError(
                f"spacing: resampled from {_text(spacing)} to {_text(wanted)} (z, y, x), an image of {_sizes(shape)} "
                f"would become {_sizes(after)} voxels. Check that the study's spacing is in the unit of the image."
            )
        offset = [(old - 1) / 2 - factor * (new - 1) / 2 for old, new, factor in zip(shape, after, scale, strict=True)]
        return cls(_three(shape), _three(after), _three(scale), _three(offset))

    @property
    def changes(self) -> bool:
        """Whether any voxel of the new grid is not one of the old."""
        return self != Zoom(self.before, self.before)

    def back(self, box: Sequence[tuple[int, int]]) -> tuple[tuple[slice, slice, slice], Zoom | None]:
        """What leads from a part of the new grid back to the old one.

        Parameters
        ----------
        box : (first, end) along (z, y, x)
            The part of the new grid that is known.

        Returns
        -------
        where : the voxels of the old grid whose centres lie in the part's field of view; where the part reaches the new
            grid's border, up to the old one's.
        back : from the part to `where`; None where that is empty.
        """
        where = []
        for axis, (first, end) in enumerate(box):
            # The small number keeps centres that lie on the border, whatever the rounding.
            low = math.ceil(self.scale[axis] * (first - 0.5) + self.offset[axis] - 1e-6)
            high = math.floor(self.scale[axis] * (end - 0.5) + self.offset[axis] + 1e-6) + 1
            old = self.before[axis]
            where.append(slice(max(low, 0) if first else 0, min(high, old) if end < self.after[axis] else old))
        z, y, x = where
        shape = [part.stop - part.start for part in where]
        if min(shape) < 1:
            return (z, y, x), None
        axes = zip(where, box, self.scale, self.offset, strict=True)
        offset = [(part.start - start) / factor - first for part, (first, _), factor, start in axes]
        known = [end - first for first, end in box]
        return (z, y, x), Zoom(_three(known), _three(shape), _three([1 / f for f in self.scale]), _three(offset))

    def affine(self, before: Affine) -> Affine:
        """The new grid's affine, of the old one's."""
        step = np.diag([*self.scale[::-1], 1.0])
        step[:3, 3] = self.offset[::-1]
        after: Affine = before @ step
        return after

    def image(self, array: npt.NDArray[Any], order: int = 3) -> npt.NDArray[np.float32]:
        """Interpolate an image of shape (*before, channel) by splines of `order` 1 or 3.

        What is made coarser is smoothed first by a Gaussian with a standard deviation of (scale - 1) / 2 old voxels,
        as scikit-image's `resize` does, against aliasing. The result stays within each channel's range: a cubic spline
        would otherwise overshoot beside edges.
        """
        values = array.astype(np.float32, copy=False)
        if not self.changes:
            return values
        result = np.empty((*self.after, values.shape[3]), np.float32)
        for channel in range(values.shape[3]):
            result[..., channel] = self._spline(values[..., channel], order)
        return result

    def label(self, array: npt.NDArray[Any], interpolation: str = "nearest") -> npt.NDArray[Any]:
        """Interpolate class indices of shape `before`.

        "nearest": each voxel takes the class of the nearest old centre. "linear": each class is interpolated as an
        image of 0 and 1, smoothed as images are, and the largest wins (the lower index where two are equal), which
        leaves smoother borders.
        """
        if not self.changes:
            return array
        if interpolation == "nearest":
            axes = zip(self.scale, self.offset, self.before, self.after, strict=True)
            places = (_nearest(factor, start, old, new) for factor, start, old, new in axes)
            chosen: npt.NDArray[Any] = array[np.ix_(*places)]
            return chosen
        best = np.full(self.after, -1.0, np.float32)
        result = np.zeros(self.after, array.dtype)
        for value in np.unique(array):
            share = self._spline((array == value).astype(np.float32), 1)
            wins = share > best
            result[wins] = value
            best[wins] = share[wins]
        return result

    def _spline(self, values: npt.NDArray[np.float32], order: int) -> npt.NDArray[np.float32]:
        sampled = _sample(_smooth(values, self.scale), self.scale, self.offset, self.after, order)
        return np.clip(sampled, values.min(), values.max(), out=sampled)


def lay_onto(volume: Volume, target: Placed) -> tuple[Volume, float]:
    """Interpolate an image linearly at the voxels of another grid in the same world.

    What is made coarser is smoothed first, as in `Zoom.image`. Voxels outside the image's field of view get the image's
    lowest value.

    Returns
    -------
    laid : Volume, float32, on the grid of `target`.
    covered : the share of the target's voxels inside the image's field of view, 0 to 1.
    """
    # In array order (z, y, x): index of the volume = matrix @ index of the target + start.
    index = np.linalg.solve(volume.affine, target.affine)
    matrix, start = index[2::-1, 2::-1], index[2::-1, 3]
    inside = np.ones(target.shape, bool)
    grid = np.ogrid[tuple(slice(n) for n in target.shape)]
    for row, first, length in zip(matrix, start, volume.shape, strict=True):
        place = row[0] * grid[0] + row[1] * grid[1] + row[2] * grid[2] + first
        inside &= (place >= -0.5) & (place <= length - 0.5)
    result = np.empty((*target.shape, volume.channels), np.float32)
    steps = np.linalg.norm(matrix, axis=1)
    for channel in range(volume.channels):
        values = volume.array[..., channel].astype(np.float32)
        laid = ndimage.affine_transform(
            _smooth(values, steps), matrix, start, target.shape, np.float32, order=1, mode="nearest"
        )
        result[..., channel] = np.where(inside, laid, values.min())
    affine = target.affine.copy()
    return Volume(result, spacing_of(affine), affine), float(inside.mean())


def _sample(
    values: npt.NDArray[np.float32], scale: Sequence[float], offset: Sequence[float], shape: Sequence[int], order: int
) -> npt.NDArray[np.float32]:
    """Values at `scale * index + offset`, by a spline of `order` 1 or 3 through the old ones.

    A cubic spline is mirrored at the outermost centres, a line goes on flat. One axis after the other, those first that
    become shorter, as splines are separable: `ndimage.affine_transform` takes 64 neighbours a voxel, this takes 4 an
    axis that changes.
    """
    axes = [axis for axis in range(3) if (values.shape[axis], scale[axis], offset[axis]) != (shape[axis], 1.0, 0.0)]
    for axis in sorted(axes, key=lambda axis: shape[axis] / values.shape[axis]):
        length, count = values.shape[axis], shape[axis]
        # Of one voxel there is no curve, and no neighbour to mirror.
        if order == 3 and length > 1:
            values = ndimage.spline_filter1d(values, 3, axis, np.float32, mode="mirror")
        weights = _spline_weights(scale[axis] * np.arange(count) + offset[axis], length, order)
        lines = np.ascontiguousarray(np.moveaxis(values, axis, 0))
        sampled = (weights @ lines.reshape(length, -1)).reshape(count, *lines.shape[1:])
        values = np.moveaxis(sampled, 0, axis)
    return values


def _spline_weights(places: npt.NDArray[np.float64], length: int, order: int) -> sparse.csr_array:
    """What each B-spline of a row of `length` adds at each place: float32, shape (places, length)."""
    if order == 1:
        places = np.clip(places, 0, length - 1)
        first, offsets = np.floor(places).astype(np.intp), [0, 1]
        t = places - first
        parts = [1 - t, t]
    else:
        first, offsets = np.floor(places).astype(np.intp), [-1, 0, 1, 2]
        t = places - first
        parts = [(1 - t) ** 3, 4 - 6 * t**2 + 3 * t**3, 1 + 3 * t + 3 * t**2 - 3 * t**3, t**3]
        parts = [part / 6 for part in parts]
    columns = np.stack([_mirrored(first + offset, length) for offset in offsets], axis=1)
    rows = np.repeat(np.arange(len(places)), len(offsets))
    weights = np.stack(parts, axis=1).astype(np.float32)
    # Neighbours that mirroring makes one are added up.
    return sparse.coo_array((weights.ravel(), (rows, columns.ravel())), (len(places), length)).tocsr()


def _mirrored(index: npt.NDArray[np.intp], length: int) -> npt.NDArray[np.intp]:
    """The index within a row that goes on beyond its first and last voxel as its mirror image."""
    period = max(2 * (length - 1), 1)
    index = np.abs(index) % period
    return np.minimum(index, period - index) if length > 1 else np.zeros_like(index)


def _smooth(values: npt.NDArray[np.float32], scale: Sequence[float]) -> npt.NDArray[np.float32]:
    sigma = [max((factor - 1) / 2, 0.0) for factor in scale]
    if not any(sigma):
        return values
    smoothed: npt.NDArray[np.float32] = ndimage.gaussian_filter(values, sigma, mode="nearest")
    return smoothed


def _nearest(scale: float, offset: float, length: int, count: int) -> npt.NDArray[np.intp]:
    places: npt.NDArray[np.intp] = np.clip(np.floor(scale * np.arange(count) + offset + 0.5), 0, length - 1).astype(
        np.intp
    )
    return places


def _three(numbers: Sequence[Any]) -> Any:
    z, y, x = numbers
    return z, y, x


def _text(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)


def _sizes(shape: Sequence[int]) -> str:
    return " x ".join(str(n) for n in shape)
