"""Moving the voxels of one example: flip, rotation, scale and deformation in one pass, interpolated once."""

from __future__ import annotations

import math
from collections.abc import Mapping

import tensorflow as tf

from common.imaging.augmentation import elastic
from common.imaging.augmentation.randomness import between
from common.imaging.augmentation.resampling import Places, interpolated, nearest, offsets, places, reflected

NAMES = frozenset({"flip", "rotate", "scale", "elastic"})
_ROTATION, _SCALE = 0.5, 0.3  # how likely


def move(
    image: tf.Tensor,
    label: tf.Tensor,
    numbers: Mapping[str, tf.Tensor],
    points: tf.Tensor | None,
    *,
    through_plane: bool,
    always: bool,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Flip, rotate, scale and deform an example.

    Parameters
    ----------
    image : float32, shape (spatial..., channel)
    label : uint8, shape (spatial...)
    numbers : by name, numbers in [0, 1) for those of `NAMES` that are wanted; the first is the chance.
    points : the control points of the deformation, where it is wanted.
    through_plane, always : as in `augment`.

    Returns
    -------
    image, label
        The label takes the nearest voxel. Where the example is flipped alone, both are copies to the bit.
    """
    dimensions = label.shape.rank
    angle, factor, about = tf.constant(0.0), tf.constant(1.0), tf.constant(0.0)
    bends = tf.constant(False)
    if "rotate" in numbers:
        chance, turn, axis = tf.unstack(numbers["rotate"][:3], num=3)
        limit = math.pi if dimensions == 2 else math.radians(15.0)
        angle = tf.where(always | (chance < _ROTATION), between(turn, -limit, limit), 0.0)
        if through_plane and dimensions == 3:
            about = tf.floor(axis * 3.0)  # 0, 1, 2: about z, y, x
    if "scale" in numbers:
        chance, size = tf.unstack(numbers["scale"][:2], num=2)
        # Drawn in logarithms: a factor and its inverse are equally likely.
        drawn = tf.exp(between(size, -math.log(1.25), math.log(1.25)))
        factor = tf.where(always | (chance < _SCALE), drawn, 1.0)
    if "elastic" in numbers:
        bends = always | (numbers["elastic"][0] < elastic.PROBABILITY)
    mirrored = numbers["flip"][:dimensions] < 0.5 if "flip" in numbers else tf.zeros(dimensions, tf.bool)
    transposed = None
    if "flip" in numbers and dimensions == 2 and label.shape[0] is not None and label.shape[0] == label.shape[1]:
        transposed = numbers["flip"][2] < 0.5

    def flipped() -> tuple[tf.Tensor, tf.Tensor]:
        return _flipped(image, mirrored, transposed), _flipped(label, mirrored, transposed)

    if numbers.keys() == {"flip"}:
        return flipped()
    matrix = _rotation_and_scale(angle, about, factor, dimensions)
    matrix = tf.where(mirrored, -1.0, 1.0)[:, tf.newaxis] * matrix
    if transposed is not None:
        matrix = tf.where(transposed, tf.reverse(matrix, [0]), matrix)

    def resampled() -> tuple[tf.Tensor, tf.Tensor]:
        at = _places(label, matrix, numbers, bends, points, through_plane)
        if dimensions == 2:
            return interpolated(image, at, (0, 1)), nearest(label, at)
        moved = tf.cond(
            bends | ((angle != 0.0) & (about != 0.0)),
            lambda: interpolated(image, at, (0, 1, 2)),
            lambda: interpolated(image, at, (1, 2)),
        )
        return moved, nearest(label, at)

    moved, moved_label = tf.cond((angle != 0.0) | (factor != 1.0) | bends, resampled, flipped)
    return moved, moved_label


def _flipped(values: tf.Tensor, mirrored: tf.Tensor, transposed: tf.Tensor | None) -> tf.Tensor:
    if transposed is not None:
        values = tf.where(transposed, tf.transpose(values, (1, 0, *range(2, values.shape.rank))), values)
    for axis in range(mirrored.shape[0]):
        values = tf.where(mirrored[axis], tf.reverse(values, [axis]), values)
    return values


def _rotation_and_scale(angle: tf.Tensor, about: tf.Tensor, factor: tf.Tensor, dimensions: int) -> tf.Tensor:
    """A matrix (dimensions, dimensions) that turns by an angle in radians and magnifies in the plane (y, x)."""
    y, x = dimensions - 2, dimensions - 1
    matrix = _rotation(tf.where(about == 0.0, angle, 0.0), factor, (y, x), dimensions)
    if dimensions == 3:
        for number, plane in ((1.0, (0, x)), (2.0, (0, y))):
            turn = _rotation(tf.where(about == number, angle, 0.0), tf.constant(1.0), plane, dimensions)
            matrix = tf.matmul(matrix, turn)
    return matrix


def _rotation(angle: tf.Tensor, factor: tf.Tensor, plane: tuple[int, int], dimensions: int) -> tf.Tensor:
    first, second = plane
    cos, sin, one, zero = tf.cos(angle) / factor, tf.sin(angle) / factor, tf.constant(1.0), tf.constant(0.0)
    entries = {(first, first): cos, (second, second): cos, (first, second): sin, (second, first): -sin}
    rows = [[entries.get((i, j), one if i == j else zero) for j in range(dimensions)] for i in range(dimensions)]
    return tf.stack([tf.stack(row) for row in rows])


def _places(
    label: tf.Tensor,
    matrix: tf.Tensor,
    numbers: Mapping[str, tf.Tensor],
    bends: tf.Tensor,
    points: tf.Tensor | None,
    through_plane: bool,
) -> Places:
    """Where each voxel comes from: the deformation's place in the moved example, and that place's in the example."""
    dimensions, shape = label.shape.rank, tf.shape(label)
    sizes = [tf.cast(shape[axis], tf.float32) for axis in range(dimensions)]
    straight = offsets(sizes)

    def unbent() -> list[tf.Tensor]:
        return source_of(straight, matrix, sizes)

    def bent() -> list[tf.Tensor]:
        shifts = elastic.shifts(points, numbers["elastic"][1], sizes)
        if dimensions == 3 and not through_plane:
            shifts[0] = tf.zeros_like(shifts[0])
        inside = [reflected(offset + shift, size) for offset, shift, size in zip(straight, shifts, sizes, strict=True)]
        return source_of([place - 0.5 * (size - 1.0) for place, size in zip(inside, sizes, strict=True)], matrix, sizes)

    if "elastic" not in numbers:
        return places(unbent(), shape)
    if dimensions == 3:
        return places(tf.cond(bends, bent, unbent), shape)
    return Places(*tf.cond(bends, lambda: places(bent(), shape), lambda: places(unbent(), shape)))


def source_of(offsets: list[tf.Tensor], matrix: tf.Tensor, sizes: list[tf.Tensor]) -> list[tf.Tensor]:
    """From distances from the centre along each axis to the coordinates a matrix takes them to, mirrored inside."""
    shape = [tf.cast(size, tf.int32) for size in sizes]
    return [
        reflected(
            tf.add_n([tf.broadcast_to(matrix[row, axis] * offset, shape) for axis, offset in enumerate(offsets)]), size
        )
        for row, size in enumerate(sizes)
    ]
