"""What the values are: changes of brightness, contrast and colour that keep every voxel where it is.

All of them are relative to the example's own values (its mean, its standard deviation, its range), so that they mean
the same for images normalized in any way. Ranges are stated in `augment`.
"""

from __future__ import annotations

import math

import tensorflow as tf

from common.imaging.augmentation.randomness import (
    between,
    draws,
    lowest_and_highest,
    mean_and_deviation,
    own_seed,
    per_channel,
    per_example,
    spatial_axes,
)


def noise(images: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Gaussian noise of its own in every voxel and channel."""
    (amount,) = draws(seed, images, 1)
    _, deviation = mean_and_deviation(images)
    strength = per_example(between(amount, 0.0, 0.3), images) * deviation
    return images + strength * _normal(images, own_seed(seed, 1))


def _normal(like: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Standard normal numbers in the shape of `like`, at half the cost of TensorFlow's own.

    By the method of Box and Muller (1958, doi:10.1214/aoms/1177706645), whose two numbers a pair go to different
    voxels of the same example. TensorFlow works logarithm and cosine out one by one, these operations several at once.
    """
    count = tf.reduce_prod(tf.shape(like)[1:])
    radius, turn = tf.unstack(tf.random.stateless_uniform((2, tf.shape(like)[0], (count + 1) // 2), seed))
    radius = tf.sqrt(-2.0 * tf.math.log(1.0 - radius))  # 1 minus a number below 1 is never 0
    angle = turn * (2.0 * math.pi)
    pairs = tf.concat([radius * tf.cos(angle), radius * tf.sin(angle)], axis=1)
    return tf.reshape(pairs[:, :count], tf.shape(like))


def brightness(images: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """One number added to the whole example."""
    (shift,) = draws(seed, images, 1)
    _, deviation = mean_and_deviation(images)
    return images + per_example(between(shift, -0.3, 0.3), images) * deviation


def contrast(images: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """A gain about the example's mean and a shift, slightly different for each channel."""
    gain, shift = draws(seed, images, 2)
    gains = per_example(between(gain, 0.75, 1.25), images)
    shifts = per_example(between(shift, -0.2, 0.2), images)
    if images.shape[-1] != 1:
        shape = (2, tf.shape(images)[0], *[1] * (images.shape.rank - 2), tf.shape(images)[-1])
        by_channel = tf.random.stateless_uniform(shape, own_seed(seed, 1), -0.05, 0.05)
        gains += by_channel[0]
        shifts += by_channel[1]
    mean, deviation = mean_and_deviation(images)
    return images * gains + (mean * (1.0 - gains) + shifts * deviation)


def contrast_stretch(images: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """A part of the range becomes the whole range; what lies outside the part is clipped to its ends."""
    low, high = (per_example(draw, images) for draw in draws(seed, images, 2))
    lowest, highest = lowest_and_highest(images)
    extent = highest - lowest
    start = lowest + between(low, 0.0, 0.1) * extent
    end = lowest + between(high, 0.7, 1.0) * extent
    stretched = lowest + (images - start) * tf.math.divide_no_nan(extent, end - start)
    return tf.clip_by_value(stretched, lowest, highest)


def gamma(images: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """A power over the example's range; its minimum and maximum stay."""
    lowest, highest = lowest_and_highest(images)
    extent = highest - lowest
    return lowest + extent * _power((images - lowest) * tf.math.divide_no_nan(1.0, extent), seed)


def gamma_inverted(images: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """`gamma` of the negative, which bends the curve at its bright end; minimum and maximum stay."""
    lowest, highest = lowest_and_highest(images)
    extent = highest - lowest
    return highest - extent * _power((highest - images) * tf.math.divide_no_nan(1.0, extent), seed)


def _power(relative: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Values from 0 to 1 to a power of each example's own."""
    (power,) = draws(seed, relative, 1)
    # exp(g log t) is several times faster than pow here; log 0 is -inf, which exp takes back to 0.
    return tf.exp(per_example(between(power, 0.7, 1.5), relative) * tf.math.log(relative))


def color_jitter(images: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """A gain about each channel's mean and a shift, independent between channels: another stain, another scanner.

    Only where there are three channels or more; with fewer there is no colour, and nothing changes.
    """
    channels = images.shape[-1]
    if channels < 3:
        return images
    gain, shift = tf.unstack(tf.random.stateless_uniform((2, tf.shape(images)[0], channels), seed))
    gains = per_channel(between(gain, 0.8, 1.2), images)
    shifts = per_channel(between(shift, -0.2, 0.2), images)
    mean, variance = tf.nn.moments(images, axes=spatial_axes(images), keepdims=True)
    return images * gains + (mean * (1.0 - gains) + shifts * tf.sqrt(variance))
