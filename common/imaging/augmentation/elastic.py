"""Elastic deformation: a smooth random displacement field that moves image and label together.

The field is a uniform cubic B-spline over a coarse grid of random control points, as in free-form deformation
(Rueckert et al. 1999, doi:10.1109/42.796284). A spline's weights are positive and add up to 1, so no voxel moves
farther than the farthest control point, and the field's slope is at most the largest difference between neighbouring
control points over their distance. With control points within 1 / (2 dimensions) of that distance the slopes add up to
less than 1: the field never folds over itself, and what was connected stays connected.
"""

from __future__ import annotations

import tensorflow as tf

from common.imaging.augmentation.randomness import (
    along_axis,
    between,
    draws,
    length,
    own_seed,
    per_example,
)

PROBABILITY = 0.2
CELLS = 4
"""Cells of the control grid along each spatial axis: control points lie a quarter of the patch apart."""


def largest_shift(dimensions: int) -> float:
    """How far a voxel moves at most along an axis, as a share of the patch's size along it."""
    return 1.0 / (2 * dimensions) / CELLS


def deform(
    images: tf.Tensor, labels: tf.Tensor, seed: tf.Tensor, through_plane: bool, probability: float = PROBABILITY
) -> tuple[tf.Tensor, tf.Tensor]:
    """Deform each example with a probability; shapes and types as in `augment`.

    Images are interpolated linearly, labels take the nearest voxel. What moves in from outside is the mirror image.
    """
    (chance,) = draws(seed, images, 1)
    chosen = tf.where(chance < probability)
    some, some_labels = tf.gather_nd(images, chosen), tf.gather_nd(labels, chosen)
    coordinates = _reflected(_source_coordinates(some, own_seed(seed, 1), through_plane), some)
    return (
        tf.tensor_scatter_nd_update(images, chosen, _interpolated(some, coordinates)),
        tf.tensor_scatter_nd_update(labels, chosen, _nearest(some_labels, coordinates)),
    )


def _source_coordinates(images: tf.Tensor, seed: tf.Tensor, through_plane: bool) -> list[tf.Tensor]:
    """Where each output voxel comes from: (b, spatial...) for each spatial axis, in voxels."""
    dimensions = images.shape.rank - 2
    shape = tf.shape(images)
    points = tf.random.stateless_truncated_normal((dimensions, shape[0], *[CELLS + 3] * dimensions), own_seed(seed, 1))
    (strength,) = draws(seed, images, 1)
    # A truncated normal number is within -2 and 2.
    limit = 0.5 * largest_shift(dimensions)
    strength = between(strength, 0.25 * limit, limit)
    sizes = [length(images, axis) for axis in range(1, dimensions + 1)]
    coordinates = []
    for axis, size in enumerate(sizes, start=1):
        here = along_axis(tf.range(size), axis, images)[..., 0]
        if axis == 1 and dimensions == 3 and not through_plane:
            coordinates.append(tf.broadcast_to(here, shape[:-1]))
            continue
        shift = _spline(points[axis - 1], sizes)
        coordinates.append(here + shift * (per_example(strength, shift) * size))
    return coordinates


def _spline(points: tf.Tensor, sizes: list[tf.Tensor]) -> tf.Tensor:
    """From control points (b, k, ...) to the smooth field (b, *sizes), one axis after the other."""
    field = points
    for size in sizes:
        # The axis in turn is the first after the batch; behind the others, once it is done: all come round again.
        field = tf.tensordot(field, _cubic_weights(size), [[1], [1]])
    return field


def _cubic_weights(size: tf.Tensor) -> tf.Tensor:
    """Weights (size, CELLS + 3) of the control points at each voxel's centre; every row adds up to 1."""
    position = (tf.range(size) + 0.5) * (CELLS / size)
    # Control point i lies at i - 1, so that the border's cells have their outer points too.
    distance = tf.abs(position[:, tf.newaxis] - tf.range(-1.0, CELLS + 2.0))
    near = 2.0 / 3.0 - tf.square(distance) * (1.0 - 0.5 * distance)
    reach = tf.maximum(2.0 - distance, 0.0)
    return tf.where(distance < 1.0, near, reach * reach * (reach * (1.0 / 6.0)))


def _reflected(coordinates: list[tf.Tensor], images: tf.Tensor) -> list[tf.Tensor]:
    """Coordinates outside mirrored at the border voxel's outer edge, as `ImageProjectiveTransformV3` does.

    Of differences alone: TensorFlow regroups sums of three terms in one graph and not in another (see `length`).
    """
    inside = []
    for axis, coordinate in enumerate(coordinates, start=1):
        size = length(images, axis)
        mirrored = tf.maximum(coordinate, -1.0 - coordinate)
        mirrored = tf.minimum(mirrored, (2.0 * size - 1.0) - mirrored)
        inside.append(tf.clip_by_value(mirrored, 0.0, size - 1.0))
    return inside


def _interpolated(images: tf.Tensor, coordinates: list[tf.Tensor]) -> tf.Tensor:
    """Linear interpolation of (b, spatial..., channel) at coordinates inside."""
    if images.shape.rank == 4:
        return _in_plane(images, per_example(tf.range(tf.shape(images)[0]), coordinates[0]), *coordinates)
    shape = tf.shape(images)
    slices = tf.reshape(images, tf.concat([[shape[0] * shape[1]], shape[2:]], axis=0))
    z, y, x = coordinates
    lower = tf.floor(z)
    above = tf.minimum(lower + 1.0, tf.cast(shape[1] - 1, tf.float32))
    first = per_example(tf.range(shape[0]) * shape[1], z)
    below, over = (_in_plane(slices, first + tf.cast(index, tf.int32), y, x) for index in (lower, above))
    share = (z - lower)[..., tf.newaxis]
    return (1.0 - share) * below + share * over


def _in_plane(images: tf.Tensor, number: tf.Tensor, y: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """Linear interpolation of (n, y, x, channel) at y and x of the images whose numbers are given, all of one shape.

    By the kernel that crops boxes: a box of one pixel reads all channels at one place.
    """
    place = [tf.math.divide_no_nan(along, length(images, axis) - 1.0) for axis, along in enumerate((y, x), start=1)]
    values = tf.raw_ops.CropAndResize(
        image=images,
        boxes=tf.reshape(tf.stack(place * 2, axis=-1), (-1, 4)),
        box_ind=tf.reshape(tf.broadcast_to(number, tf.shape(y)), (-1,)),
        crop_size=[1, 1],
    )
    return tf.reshape(values, tf.concat([tf.shape(y), tf.shape(images)[-1:]], axis=0))


def _nearest(labels: tf.Tensor, coordinates: list[tf.Tensor]) -> tf.Tensor:
    index = _flat([tf.round(coordinate) for coordinate in coordinates], labels)
    return tf.gather(tf.reshape(labels, (-1,)), index)


def _flat(index: list[tf.Tensor], like: tf.Tensor) -> tf.Tensor:
    """Row numbers into `like`'s voxels, int32 (b, spatial...), from whole numbers along each axis."""
    shape = tf.shape(like)
    flat = per_example(tf.range(shape[0]), index[0])
    for axis, along in enumerate(index, start=1):
        flat = flat * shape[axis] + tf.cast(along, tf.int32)
    return flat
