"""The layers that networks are built of, in 2D and 3D, chosen so that they export to LiteRT.

Normalization is the hard part of federated segmentation: batch statistics differ between hospitals and may not leave
them, and group normalization halves the speed of training on CPUs and stays in floating point when quantized. The
default is scaled weight standardization (Brock et al. 2021, arXiv:2101.08692): the kernel is standardized, not the
activations, so that a published model holds a plain convolution with constant weights.
"""

from __future__ import annotations

import math
from typing import Literal

import tensorflow as tf

from common.models.network import Weights, he_normal, ones, transposed_he_normal, zeros

Normalization = Literal["weight", "group", "none"]

# The standard deviation of relu(x) for x ~ N(0, 1) is sqrt((1 - 1/pi) / 2); its inverse keeps the variance of
# activations at 1 through standardized convolutions.
RELU_GAIN = math.sqrt(2.0 / (1.0 - 1.0 / math.pi))
GROUPS = 8


def _dimensions(images: tf.Tensor) -> int:
    return int(images.shape.rank) - 2


def standardized(kernel: tf.Tensor, gain: tf.Tensor) -> tf.Tensor:
    """Kernel with mean 0 for every output channel (the last axis) and deviation gain * `RELU_GAIN` / sqrt(fan-in).

    The constant belongs to the activation that follows, relu(x) * RELU_GAIN; in the kernel it costs nothing when
    exported.
    """
    axes = list(range(kernel.shape.rank - 1))
    fan_in = math.prod(kernel.shape[:-1])
    mean, variance = tf.nn.moments(kernel, axes, keepdims=True)
    return (kernel - mean) * (tf.math.rsqrt(variance * fan_in + 1e-4) * (RELU_GAIN * gain))


def convolution(
    weights: Weights,
    name: str,
    images: tf.Tensor,
    filters: int,
    *,
    size: int = 3,
    stride: int = 1,
    standardize: bool = False,
    bias: bool = True,
) -> tf.Tensor:
    """Convolution with zero padding, to `filters` channels; 2D or 3D as its input is."""
    dimensions = _dimensions(images)
    kernel = weights.get(f"{name}/kernel", [size] * dimensions + [images.shape[-1], filters], he_normal)
    if standardize:
        kernel = standardized(kernel, weights.get(f"{name}/gain", [filters], ones))
    convolve = tf.nn.conv2d if dimensions == 2 else tf.nn.conv3d
    result = convolve(images, kernel, strides=[1] + [stride] * dimensions + [1], padding="SAME")
    return tf.nn.bias_add(result, weights.get(f"{name}/bias", [filters], zeros)) if bias else result


def activated_convolution(
    weights: Weights, name: str, images: tf.Tensor, filters: int, normalization: Normalization, *, stride: int = 1
) -> tf.Tensor:
    """Convolution of size 3, the normalization named, ReLU."""
    if normalization == "group":
        result = convolution(weights, name, images, filters, stride=stride, bias=False)
        return tf.nn.relu(group_normalization(weights, f"{name}/norm", result))
    standardize = normalization == "weight"
    return tf.nn.relu(convolution(weights, name, images, filters, stride=stride, standardize=standardize))


def group_normalization(weights: Weights, name: str, images: tf.Tensor) -> tf.Tensor:
    """Normalization over space within groups of channels (Wu & He 2018, arXiv:1803.08494), 8 groups or fewer."""
    channels = images.shape[-1]
    groups = math.gcd(GROUPS, channels)
    shape = tf.shape(images)
    grouped = tf.reshape(images, tf.concat([shape[:1], [-1, groups, channels // groups]], axis=0))
    mean, variance = tf.nn.moments(grouped, [1, 3], keepdims=True)
    normalized = tf.reshape((grouped - mean) * tf.math.rsqrt(variance + 1e-5), shape)
    return normalized * weights.get(f"{name}/gain", [channels], ones) + weights.get(f"{name}/bias", [channels], zeros)


def halve(weights: Weights, name: str, images: tf.Tensor, normalization: Normalization) -> tf.Tensor:
    """Half the resolution: maximum pooling in 2D, a convolution of stride 2 in 3D (3D pooling does not export)."""
    if _dimensions(images) == 2:
        return tf.nn.max_pool2d(images, 2, 2, "VALID")
    return activated_convolution(weights, name, images, images.shape[-1], normalization, stride=2)


def double(weights: Weights, name: str, images: tf.Tensor, filters: int) -> tf.Tensor:
    """Twice the resolution: a transposed convolution of size and stride 2."""
    dimensions = _dimensions(images)
    kernel = weights.get(f"{name}/kernel", [2] * dimensions + [filters, images.shape[-1]], transposed_he_normal)
    shape = tf.shape(images)
    target = tf.concat([shape[:1], shape[1:-1] * 2, [filters]], axis=0)
    static = [2 * size if size is not None else None for size in images.shape[1:-1]]
    if images.shape[0] is not None and None not in static:
        target = [images.shape[0], *static, filters]
    transpose = tf.nn.conv2d_transpose if dimensions == 2 else tf.nn.conv3d_transpose
    result = transpose(images, kernel, target, strides=[1] + [2] * dimensions + [1], padding="SAME")
    result.set_shape([images.shape[0], *static, filters])
    return tf.nn.bias_add(result, weights.get(f"{name}/bias", [filters], zeros))
