"""How the image was taken: focus, resolution and uneven light."""

from __future__ import annotations

import tensorflow as tf

from common.imaging.augmentation.randomness import (
    along_axis,
    between,
    draws,
    length,
    lowest_and_highest,
    per_example,
    spatial_axes,
)

_BLUR_RADIUS = 3


def blur(images: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """A Gaussian filter in the plane (y, x), of a width of each example's own."""
    (width,) = draws(seed, images, 1)
    distance = tf.range(_BLUR_RADIUS + 1, dtype=tf.float32)[:, tf.newaxis]
    weights = tf.exp(-0.5 * tf.square(distance / between(width, 0.5, 1.0)))
    weights = tf.unstack(weights / (weights[0] + 2.0 * tf.reduce_sum(weights[1:], axis=0)), num=_BLUR_RADIUS + 1)
    rank = images.shape.rank
    for axis in (rank - 3, rank - 2):
        images = _blur_along(images, axis, [per_example(weight, images) for weight in weights])
    return images


def _blur_along(images: tf.Tensor, axis: int, weights: list[tf.Tensor]) -> tf.Tensor:
    """The symmetric filter with `weights` from the centre outwards; the border repeats its outermost value."""
    size = tf.shape(images)[axis]
    before = tf.repeat(tf.gather(images, [0], axis=axis), _BLUR_RADIUS, axis=axis)
    after = tf.repeat(tf.gather(images, [size - 1], axis=axis), _BLUR_RADIUS, axis=axis)
    padded = tf.concat([before, images, after], axis=axis)

    def shifted(by: int) -> tf.Tensor:
        begin = [_BLUR_RADIUS + by if i == axis else 0 for i in range(images.shape.rank)]
        return tf.slice(padded, begin, tf.shape(images))

    result = weights[0] * images
    for distance in range(1, _BLUR_RADIUS + 1):
        result += weights[distance] * (shifted(-distance) + shifted(distance))
    return result


def low_resolution(images: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Fewer, larger pixels in the plane (y, x), interpolated back to the grid that it was.

    A larger pixel holds the mean of what it covers, as a detector's does; the way back is linear. Both are one matrix
    an axis and example, so that every example has its own resolution.
    """
    (kept,) = draws(seed, images, 1)
    kept = between(kept, 0.5, 1.0)
    rank, shape = images.shape.rank, tf.shape(images)
    rows, columns = (_there_and_back(kept, length(images, axis)) for axis in (rank - 3, rank - 2))
    lines = tf.concat([shape[: rank - 2], [shape[rank - 2] * shape[rank - 1]]], axis=0)  # (..., y, x * channel)
    between_batch_and_rows = [1] * (rank - 4)
    rows = tf.reshape(rows, (shape[0], *between_batch_and_rows, shape[rank - 3], shape[rank - 3]))
    images = tf.reshape(tf.matmul(rows, tf.reshape(images, lines)), shape)
    # With x last, all lines of an example are one product.
    turned = tf.linalg.matrix_transpose(images)
    resampled = tf.matmul(
        tf.reshape(turned, (shape[0], tf.reduce_prod(shape[1 : rank - 2]) * shape[rank - 1], shape[rank - 2])),
        columns,
        transpose_b=True,
    )
    return tf.linalg.matrix_transpose(tf.reshape(resampled, tf.shape(turned)))


def _there_and_back(kept: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
    """Matrices (b, size, size) that resample a line to a share of its length, (b,), and back; rows add up to 1."""
    fewer = tf.maximum(tf.round(kept * size), 1.0)[:, tf.newaxis, tf.newaxis]
    fine, coarse = tf.range(size)[:, tf.newaxis], tf.range(size)[tf.newaxis, :]
    width = size / fewer
    # How much of each fine voxel (rows) each coarse one (columns) covers. Those beyond `fewer` get no weight below.
    overlap = tf.minimum(fine + 1.0, (coarse + 1.0) * width) - tf.maximum(fine, coarse * width)
    means = tf.maximum(overlap, 0.0) / width
    place = tf.clip_by_value((fine + 0.5) / width - 0.5, 0.0, fewer - 1.0)
    weights = tf.maximum(1.0 - tf.abs(place - coarse), 0.0)
    return tf.matmul(weights, means, transpose_b=True)


def illumination(images: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Light that falls off to one side, and from the centre to the border or the other way.

    A smooth positive field, the exponential of a linear and a quadratic term, multiplies what lies above the
    example's minimum, which stands for no light. Each channel's mean stays what it was.
    """
    axes = spatial_axes(images)
    slope, bend, *direction = draws(seed, images, 2 + len(axes))
    direction = [between(part, -1.0, 1.0) for part in direction]
    total = tf.add_n([tf.abs(part) for part in direction]) + 1e-6
    lowest, _ = lowest_and_highest(images)
    light = images - lowest
    lit = light
    # The field is a product with a factor an axis, which needs no exponential of every voxel.
    for axis, part in zip(axes, direction, strict=True):
        size = length(images, axis)
        # From -1 to 1; half a voxel's offset keeps an axis of one voxel at 0.
        place = (2.0 * tf.range(size) + 1.0) / size - 1.0
        tilt = (between(slope, 0.0, 0.5) * part / total)[:, tf.newaxis] * place
        fall = between(bend, -0.3 / len(axes), 0.3 / len(axes))[:, tf.newaxis] * tf.square(place)
        lit *= along_axis(tf.exp(tilt + fall), axis, images)
    before, after = (tf.reduce_mean(values, axis=axes, keepdims=True) for values in (light, lit))
    return lowest + lit * tf.math.divide_no_nan(before, after)
