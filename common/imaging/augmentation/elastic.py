"""Elastic deformation: a smooth random displacement field that moves image and label together.

The field is a uniform cubic B-spline over a coarse grid of random control points, as in free-form deformation
(Rueckert et al. 1999, doi:10.1109/42.796284). A spline's weights are positive and add up to 1, so no voxel moves
farther than the farthest control point, and the field's slope is at most the largest difference between neighbouring
control points over their distance. With control points within 1 / (2 dimensions) of that distance the slopes add up to
less than 1: the field never folds over itself, and what was connected stays connected.
"""

from __future__ import annotations

import tensorflow as tf

from common.imaging.augmentation.randomness import between

PROBABILITY = 0.2
CELLS = 4
"""Cells of the control grid along each spatial axis: control points lie a quarter of the patch apart."""


def largest_shift(dimensions: int) -> float:
    """How far a voxel moves at most along an axis, as a share of the patch's size along it."""
    return 1.0 / (2 * dimensions) / CELLS


def control_points(seed: tf.Tensor, examples: tf.Tensor, dimensions: int) -> tf.Tensor:
    """Truncated normal numbers, within -2 and 2: (examples, dimensions, then CELLS + 3 along each axis)."""
    return tf.random.stateless_truncated_normal((examples, dimensions, *[CELLS + 3] * dimensions), seed)


def shifts(points: tf.Tensor, number: tf.Tensor, sizes: list[tf.Tensor]) -> list[tf.Tensor]:
    """How far each voxel of an example moves, in voxels: a field (spatial...) for each axis.

    Parameters
    ----------
    points : of one example, as `control_points` draws them.
    number : in [0, 1), decides the field's strength.
    sizes : of the example along each axis, float32 scalars.
    """
    limit = 0.5 * largest_shift(len(sizes))
    strength = between(number, 0.25 * limit, limit)
    fields = []
    for axis, size in enumerate(sizes):
        field = points[axis] * (strength * size)
        for along in sizes:
            # The axis in turn is the first; behind the others once it is done: all come round again.
            field = tf.tensordot(field, _cubic_weights(along), [[0], [1]])
        fields.append(field)
    return fields


def _cubic_weights(size: tf.Tensor) -> tf.Tensor:
    """Weights (size, CELLS + 3) of the control points at each voxel's centre; every row adds up to 1."""
    position = (tf.range(size) + 0.5) * (CELLS / size)
    # Control point i lies at i - 1, so that the border's cells have their outer points too.
    distance = tf.abs(position[:, tf.newaxis] - tf.range(-1.0, CELLS + 2.0))
    near = 2.0 / 3.0 - tf.square(distance) * (1.0 - 0.5 * distance)
    reach = tf.maximum(2.0 - distance, 0.0)
    return tf.where(distance < 1.0, near, reach * reach * (reach * (1.0 / 6.0)))
