"""How the image was taken: focus, resolution and uneven light.

Each takes an image (spatial..., channel) and numbers in [0, 1), of which it uses the first few.
"""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

from common.imaging.augmentation.randomness import (
    along_axis,
    between,
    length,
    lowest_and_highest,
    mean_over,
    spatial_axes,
)

_BLUR_RADIUS = 3
_LOW_RESOLUTION_TAPS = 6


def blur(image: tf.Tensor, numbers: tf.Tensor) -> tf.Tensor:
    """A Gaussian filter in the plane (y, x); the border repeats its outermost value."""
    offsets = tf.range(-_BLUR_RADIUS, _BLUR_RADIUS + 1)
    weights = tf.exp(-0.5 * tf.square(tf.cast(offsets, tf.float32) / between(numbers[0], 0.5, 1.0)))
    weights /= tf.reduce_sum(weights)

    def taps(size: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return (
            tf.clip_by_value(tf.range(size)[:, tf.newaxis] + offsets, 0, size - 1),
            tf.tile(weights[tf.newaxis], (size, 1)),
        )

    return _in_plane(image, taps)


def low_resolution(image: tf.Tensor, numbers: tf.Tensor) -> tf.Tensor:
    """Fewer, larger pixels in the plane (y, x), interpolated back to the grid that it was.

    A larger pixel holds the mean of what it covers, as a detector's does; the way back is linear.
    """
    kept = between(numbers[0], 0.5, 1.0)
    return _in_plane(image, lambda size: _there_and_back(kept, size))


def _there_and_back(kept: tf.Tensor, size: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Which voxels of a line, (size, taps), and with what weights it is resampled to a share of its length and back.

    Every row of weights adds up to 1. A large pixel is at most two and a half voxels wide (two of five), so that two
    neighbours lie within six.
    """
    extent = tf.cast(size, tf.float32)
    fewer = tf.maximum(tf.round(kept * extent), 1.0)
    width = extent / fewer
    here = tf.range(extent)[:, tf.newaxis]
    place = tf.clip_by_value((here + 0.5) / width - 0.5, 0.0, fewer - 1.0)
    lower = tf.floor(place)
    fine = tf.floor(lower * width) + tf.range(_LOW_RESOLUTION_TAPS, dtype=tf.float32)

    def covered(coarse: tf.Tensor) -> tf.Tensor:
        overlap = tf.minimum(fine + 1.0, (coarse + 1.0) * width) - tf.maximum(fine, coarse * width)
        return tf.maximum(overlap, 0.0) / width

    share = place - lower
    weights = (1.0 - share) * covered(lower) + share * covered(lower + 1.0)
    return tf.cast(tf.minimum(fine, extent - 1.0), tf.int32), weights


def _in_plane(image: tf.Tensor, taps: Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]) -> tf.Tensor:
    """Filter along y and x, slice by slice.

    `taps` says for a length which places, int32 (length, k), are added up with which weights, float32 (length, k).
    """
    shape, rank = tf.shape(image), image.shape.rank
    slices = tf.reshape(image, tf.concat([[-1], shape[rank - 3 :]], axis=0))  # (slice, y, x, channel)
    for _ in ("y", "x"):
        places, weights = (tf.unstack(part, axis=1) for part in taps(tf.shape(slices)[1]))
        parts = [
            along_axis(weight, 1, 4) * tf.gather(slices, place, axis=1)
            for place, weight in zip(places, weights, strict=True)
        ]
        # Whole lines of an example are read one after the other; the axis in turn is made that of the lines.
        slices = tf.transpose(tf.add_n(parts), (0, 2, 1, 3))
    return tf.reshape(slices, shape)


def illumination(image: tf.Tensor, numbers: tf.Tensor) -> tf.Tensor:
    """Light that falls off to one side, and from the centre to the border or the other way.

    A smooth positive field, the exponential of a linear and a quadratic term, multiplies what lies above the
    example's minimum, which stands for no light. Each channel's mean stays what it was.
    """
    axes = spatial_axes(image)
    slope, bend = between(numbers[0], 0.0, 0.5), between(numbers[1], -0.3 / len(axes), 0.3 / len(axes))
    direction = between(numbers[2 : 2 + len(axes)], -1.0, 1.0)
    direction /= tf.reduce_sum(tf.abs(direction)) + 1e-6
    lowest, _ = lowest_and_highest(image)
    light = image - lowest
    lit = light
    # The field is a product with a factor an axis, which needs no exponential of every voxel.
    for axis in axes:
        size = length(image, axis)
        # From -1 to 1; half a voxel's offset keeps an axis of one voxel at 0.
        place = (2.0 * tf.range(size) + 1.0) / size - 1.0
        lit *= along_axis(tf.exp(slope * direction[axis] * place + bend * tf.square(place)), axis, image.shape.rank)
    return lowest + lit * tf.math.divide_no_nan(mean_over(light, axes), mean_over(lit, axes))
