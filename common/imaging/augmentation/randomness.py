"""What the augmentations of one example share: numbers drawn for it, and its axes, sizes and statistics.

Sums and extremes are taken line by line first: the compiler takes a reduction of everything one number at a time.
"""

from __future__ import annotations

import tensorflow as tf


def own_seed(seed: tf.Tensor, number: int) -> tf.Tensor:
    """A seed that is independent of `seed` and of those of other numbers; int32, shape (2,), as `seed`."""
    return tf.random.experimental.stateless_fold_in(seed, number)


def between(draw: tf.Tensor, low: float, high: float) -> tf.Tensor:
    """From [0, 1) to [low, high)."""
    return low + (high - low) * draw


def length(values: tf.Tensor, axis: int) -> tf.Tensor:
    """The size along an axis, a float32 scalar."""
    return tf.cast(tf.shape(values)[axis], tf.float32)


def along_axis(values: tf.Tensor, axis: int, rank: int) -> tf.Tensor:
    """From (n,) to a tensor of a rank with n at `axis` and 1 elsewhere."""
    return tf.reshape(values, [-1 if other == axis else 1 for other in range(rank)])


def spatial_axes(image: tf.Tensor) -> list[int]:
    """All axes of (spatial..., channel) but the channels'."""
    return list(range(image.shape.rank - 1))


def as_lines(image: tf.Tensor) -> tf.Tensor:
    """(first axis, all the rest): what treats all values alike runs faster without the short axis of the channels."""
    return tf.reshape(image, (tf.shape(image)[0], tf.reduce_prod(tf.shape(image)[1:])))


def mean_over(values: tf.Tensor, axes: list[int]) -> tf.Tensor:
    """The mean over axes, the first among them, which stay with size 1."""
    return tf.reduce_mean(tf.reduce_mean(values, axis=0, keepdims=True), axis=axes, keepdims=True)


def mean_and_deviation(values: tf.Tensor, axes: list[int] | None = None) -> tf.Tensor:
    """Mean and standard deviation over axes, the first among them (None: all), which stay with size 1."""
    over = list(range(values.shape.rank)) if axes is None else axes
    mean = mean_over(values, over)
    return mean, tf.sqrt(mean_over(tf.square(values - mean), over))


def lowest_and_highest(values: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The minimum and the maximum, shape (1, ..., 1)."""
    axes = list(range(values.shape.rank))
    low, high = tf.reduce_min(values, axis=0, keepdims=True), tf.reduce_max(values, axis=0, keepdims=True)
    # Each of both, or the compiler would join the two reductions.
    return (
        tf.reduce_min(tf.minimum(low, high), axis=axes, keepdims=True),
        tf.reduce_max(tf.maximum(low, high), axis=axes, keepdims=True),
    )
