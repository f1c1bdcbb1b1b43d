"""What the values are: changes of brightness, contrast and colour that keep every voxel where it is.

All of them are relative to the example's own values (its mean, its standard deviation, its range), so that they mean
the same for images normalized in any way. Ranges are stated in `augment`. Each takes an image (spatial..., channel) and
numbers in [0, 1), of which it uses the first few.
"""

from __future__ import annotations

import math

import tensorflow as tf

from common.imaging.augmentation.randomness import (
    as_lines,
    between,
    lowest_and_highest,
    mean_and_deviation,
    spatial_axes,
)


def noise(image: tf.Tensor, numbers: tf.Tensor) -> tf.Tensor:
    """Gaussian noise of its own in every voxel and channel."""
    lines = as_lines(image)
    _, deviation = mean_and_deviation(lines)
    noisy = lines + between(numbers[0], 0.0, 0.3) * deviation * _normal(tf.shape(lines), numbers[1:3])
    return tf.reshape(noisy, tf.shape(image))


def _normal(shape: tf.Tensor, numbers: tf.Tensor) -> tf.Tensor:
    """Standard normal numbers of shape (lines, places), from two numbers of 24 random bits.

    By the method of Box and Muller (1958, doi:10.1214/aoms/1177706645), of a radius of 20 bits and an angle of 12. The
    bits are a hash of the place: twice the finalizer of MurmurHash3, in which each bit that goes in changes every bit
    that comes out with a chance of nearly one half. TensorFlow's generators take, compiled, several times as long.
    """
    line, place = tf.range(shape[0])[:, tf.newaxis], tf.range(shape[1])[tf.newaxis, :]
    first, second = tf.unstack(tf.cast(numbers * 2.0**24, tf.uint32), num=2)
    bits = _hashed(_hashed(tf.cast(line * shape[1] + place, tf.uint32) + first) + second)
    radius = (_as_float(tf.bitwise.right_shift(bits, _uint(12))) + 0.5) * 2.0**-20  # within (0, 1)
    half = (_as_float(tf.bitwise.bitwise_and(bits, _uint(2**12 - 1))) - (2.0**11 - 0.5)) * (math.pi * 2.0**-12)
    # The cosine of an angle is 1 - 2 sin^2 of its half, of which a short series is enough: it is at most pi / 2.
    squared = tf.square(half)
    sine = half * (1.0 + squared * (-1 / 6 + squared * (1 / 120 + squared * (-1 / 5040 + squared * (1 / 362880)))))
    return tf.sqrt(-2.0 * tf.math.log(radius)) * (1.0 - 2.0 * tf.square(sine))


def _hashed(bits: tf.Tensor) -> tf.Tensor:
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = tf.bitwise.bitwise_xor(bits, tf.bitwise.right_shift(bits, _uint(shift))) * _uint(factor)
    return tf.bitwise.bitwise_xor(bits, tf.bitwise.right_shift(bits, _uint(16)))


def _uint(value: int) -> tf.Tensor:
    return tf.constant(value, tf.uint32)


def _as_float(bits: tf.Tensor) -> tf.Tensor:
    """Of at most 31 bits; signed numbers are converted several at once, unsigned ones are not."""
    return tf.cast(tf.bitcast(bits, tf.int32), tf.float32)


def brightness(image: tf.Tensor, numbers: tf.Tensor) -> tf.Tensor:
    """One number added to the whole example."""
    lines = as_lines(image)
    _, deviation = mean_and_deviation(lines)
    return tf.reshape(lines + between(numbers[0], -0.3, 0.3) * deviation, tf.shape(image))


def contrast(image: tf.Tensor, numbers: tf.Tensor) -> tf.Tensor:
    """A gain about the example's mean and a shift, slightly different for each channel."""
    channels = image.shape[-1]
    gains, shifts = between(numbers[0], 0.75, 1.25), between(numbers[1], -0.2, 0.2)
    if channels != 1:
        gains += between(numbers[2 : 2 + channels], -0.05, 0.05)
        shifts += between(numbers[2 + channels : 2 + 2 * channels], -0.05, 0.05)
    mean, deviation = mean_and_deviation(image)
    return image * gains + (mean * (1.0 - gains) + shifts * deviation)


def contrast_stretch(image: tf.Tensor, numbers: tf.Tensor) -> tf.Tensor:
    """A part of the range becomes the whole range; what lies outside the part is clipped to its ends."""
    lines = as_lines(image)
    lowest, highest = lowest_and_highest(lines)
    extent = highest - lowest
    start = lowest + between(numbers[0], 0.0, 0.1) * extent
    end = lowest + between(numbers[1], 0.7, 1.0) * extent
    stretched = lowest + (lines - start) * tf.math.divide_no_nan(extent, end - start)
    return tf.reshape(tf.clip_by_value(stretched, lowest, highest), tf.shape(image))


def gamma(image: tf.Tensor, numbers: tf.Tensor) -> tf.Tensor:
    """A power over the example's range; its minimum and maximum stay."""
    lines = as_lines(image)
    lowest, highest = lowest_and_highest(lines)
    extent = highest - lowest
    curved = lowest + extent * _power((lines - lowest) * tf.math.divide_no_nan(1.0, extent), numbers[0])
    return tf.reshape(curved, tf.shape(image))


def gamma_inverted(image: tf.Tensor, numbers: tf.Tensor) -> tf.Tensor:
    """`gamma` of the negative, which bends the curve at its bright end; minimum and maximum stay."""
    return -gamma(-image, numbers)


def _power(relative: tf.Tensor, number: tf.Tensor) -> tf.Tensor:
    """Values from 0 to 1 to a power."""
    # exp(g log t) is several times faster than pow here; log 0 is -inf, which exp takes back to 0.
    return tf.exp(between(number, 0.7, 1.5) * tf.math.log(relative))


def color_jitter(image: tf.Tensor, numbers: tf.Tensor) -> tf.Tensor:
    """A gain about each channel's mean and a shift, independent between channels: another stain, another scanner.

    Only where there are three channels or more; with fewer there is no colour, and nothing changes.
    """
    channels = image.shape[-1]
    if channels < 3:
        return image
    gains = between(numbers[:channels], 0.8, 1.2)
    shifts = between(numbers[channels : 2 * channels], -0.2, 0.2)
    mean, deviation = mean_and_deviation(image, spatial_axes(image))
    return image * gains + (mean * (1.0 - gains) + shifts * deviation)
