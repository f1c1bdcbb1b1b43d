"""What every augmentation shares: numbers drawn for each example, and changes that only some examples get."""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

Change = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
"""From images (b, spatial..., channel) and a seed to changed images of the same shape and type."""


def own_seed(seed: tf.Tensor, number: int) -> tf.Tensor:
    """A seed that is independent of `seed` and of those of other numbers; int32, shape (2,), as `seed`."""
    return tf.random.experimental.stateless_fold_in(seed, number)


def draws(seed: tf.Tensor, images: tf.Tensor, count: int) -> list[tf.Tensor]:
    """`count` independent numbers in [0, 1) for each example: float32 tensors of shape (b,)."""
    drawn: list[tf.Tensor] = tf.unstack(tf.random.stateless_uniform((count, tf.shape(images)[0]), seed), num=count)
    return drawn


def between(draw: tf.Tensor, low: float, high: float) -> tf.Tensor:
    """From [0, 1) to [low, high)."""
    return low + (high - low) * draw


def per_example(values: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
    """From (b,) to (b, 1, ..., 1) of the rank of `like`."""
    return tf.reshape(values, (-1, *[1] * (like.shape.rank - 1)))


def per_channel(values: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
    """From (b, channel) to (b, 1, ..., 1, channel) of the rank of `like`."""
    return tf.reshape(values, (-1, *[1] * (like.shape.rank - 2), like.shape[-1]))


def length(images: tf.Tensor, axis: int) -> tf.Tensor:
    """The size along an axis, a float32 scalar.

    Not a constant to TensorFlow's optimizer, even where the size is known: it would regroup products with it, and
    multiply by its reciprocal instead of dividing, in one graph and not in another, and the last bits of the result
    would depend on where it runs. For the same reason nothing is divided by a written number but powers of two.
    """
    size = tf.cast(tf.shape(images)[axis], tf.float32)
    return tf.raw_ops.PlaceholderWithDefault(input=size, shape=[])


def along_axis(values: tf.Tensor, axis: int, like: tf.Tensor) -> tf.Tensor:
    """From (b, n) or (n,) to the rank of `like`, n at `axis`; (n,) counts for every example."""
    size = tf.shape(values)[-1]
    return tf.reshape(values, [-1, *(size if other == axis else 1 for other in range(1, like.shape.rank))])


def inner_axes(images: tf.Tensor) -> list[int]:
    """All axes but the batch's."""
    return list(range(1, images.shape.rank))


def spatial_axes(images: tf.Tensor) -> list[int]:
    """All axes but the batch's and the channels'."""
    return list(range(1, images.shape.rank - 1))


def mean_and_deviation(images: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Of each example over all its voxels and channels, shape (b, 1, ..., 1)."""
    mean, variance = tf.nn.moments(images, axes=inner_axes(images), keepdims=True)
    return mean, tf.sqrt(variance)


def lowest_and_highest(images: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Each example's minimum and maximum, shape (b, 1, ..., 1)."""
    axes = inner_axes(images)
    return tf.reduce_min(images, axis=axes, keepdims=True), tf.reduce_max(images, axis=axes, keepdims=True)


def seeds_and_chances(seed: tf.Tensor, images: tf.Tensor, count: int) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
    """For each of `count` variations a seed, int32 (2,), and a number in [0, 1) for each example, float32 (b,).

    Drawn for all at once, also for those that are not used: a small operation costs as much as a thousand voxels.
    """
    seeds = tf.random.stateless_uniform((count, 2), seed, minval=None, maxval=None, dtype=tf.int32)
    chances = tf.random.stateless_uniform((count, tf.shape(images)[0]), own_seed(seed, count))
    return tf.unstack(seeds, num=count), tf.unstack(chances, num=count)


def change_some(images: tf.Tensor, seed: tf.Tensor, chosen: tf.Tensor, change: Change) -> tf.Tensor:
    """Apply a change to the examples for which `chosen`, bool (b,), holds; the others keep their bits."""
    index = tf.where(chosen)
    return tf.tensor_scatter_nd_update(images, index, change(tf.gather_nd(images, index), seed))
