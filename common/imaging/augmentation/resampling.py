"""The values of an image and its label at places between voxels.

In three steps, each of which the compiler works out before the next where a condition stands between them (it would
else do the first again for every value that the last reads): coordinates, row numbers, values.
"""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from common.imaging.augmentation.randomness import along_axis


class Places(NamedTuple):
    """Where each output voxel comes from.

    Attributes
    ----------
    corner : row numbers into the voxels of the neighbour that comes first along every axis, int32 (spatial...).
    nearest : row numbers of the nearest voxel, int32 (spatial...).
    shares : for each axis how far the place is on the way to the next neighbour, from 0 to 1, float32 (spatial...).
    """

    corner: tf.Tensor
    nearest: tf.Tensor
    shares: tuple[tf.Tensor, ...]


def offsets(sizes: list[tf.Tensor]) -> list[tf.Tensor]:
    """The voxels' distances from the centre along each axis, of sizes that are float32: (n, 1...), (1, n, 1...) ..."""
    return [along_axis(tf.range(size) - 0.5 * (size - 1.0), axis, len(sizes)) for axis, size in enumerate(sizes)]


def reflected(offset: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
    """From distances from the centre along an axis to coordinates inside, mirrored as often as it takes.

    The mirrors stand at the border voxels' outer edges. Whole and half numbers stay exact.
    """
    place = offset + 0.5 * size  # from 0 to the size, between the outer edges
    place -= tf.floor(place * (0.5 / size)) * (2.0 * size)
    place = tf.minimum(place, 2.0 * size - place)
    return tf.clip_by_value(place - 0.5, 0.0, size - 1.0)


def places(coordinates: list[tf.Tensor], shape: tf.Tensor) -> Places:
    """Of coordinates inside, (spatial...) for each axis, in voxels."""
    corner = nearest = tf.zeros((), tf.int32)
    shares = []
    for axis, coordinate in enumerate(coordinates):
        size = shape[axis]
        # At the last voxel the share is 1 of the one before, so that there always is a next.
        first = tf.maximum(tf.minimum(tf.floor(coordinate), tf.cast(size - 2, tf.float32)), 0.0)
        corner = corner * size + tf.cast(first, tf.int32)
        nearest = nearest * size + tf.cast(tf.floor(coordinate + 0.5), tf.int32)
        shares.append(coordinate - first)
    return Places(corner, nearest, tuple(shares))


def interpolated(image: tf.Tensor, at: Places, axes: tuple[int, ...]) -> tf.Tensor:
    """An image (spatial..., channel), linearly along `axes`; along the others the places are whole numbers."""
    shape, dimensions = tf.shape(image), image.shape.rank - 1
    voxels = tf.reshape(image, (-1, image.shape[-1]))
    strides = [tf.reduce_prod(shape[axis + 1 : dimensions]) for axis in range(dimensions)]
    steps = [tf.where(shape[axis] > 1, strides[axis], 0) for axis in range(dimensions)]
    corner = at.corner
    for axis in set(range(dimensions)) - set(axes):
        corner += tf.cast(tf.floor(at.shares[axis] + 0.5), tf.int32) * steps[axis]

    def value(index: tf.Tensor, rest: tuple[int, ...]) -> tf.Tensor:
        if not rest:
            return tf.gather(voxels, index)
        axis, *others = rest
        share = at.shares[axis][..., tf.newaxis]
        return (1.0 - share) * value(index, tuple(others)) + share * value(index + steps[axis], tuple(others))

    return value(corner, axes)


def nearest(label: tf.Tensor, at: Places) -> tf.Tensor:
    """A label (spatial...) at the nearest voxels."""
    return tf.gather(tf.reshape(label, (-1,)), at.nearest)
