"""The layers that networks are built of, in 2D and 3D, chosen so that they export to LiteRT.

Normalization is the hard part of federated segmentation: batch statistics differ between hospitals, and group
normalization halves the speed of training on CPUs and stays in floating point when quantized. The default is scaled
weight standardization (Brock et al. 2021, arXiv:2101.08692): the kernel is standardized, not the activations, so that a
published model holds a plain convolution with constant weights.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Literal

import tensorflow as tf

from common.models.network import (
    Initializer,
    Weights,
    constant,
    depthwise_he_normal,
    he_normal,
    ones,
    transposed_he_normal,
    zeros,
)
from common.models.operations import dimensions_of

Normalization = Literal["weight", "group", "batch", "none"]
Activation = Callable[[tf.Tensor], tf.Tensor]

# The standard deviation of relu(x) for x ~ N(0, 1) is sqrt((1 - 1/pi) / 2); its inverse keeps the variance of
# activations at 1 through standardized convolutions.
RELU_GAIN = math.sqrt(2.0 / (1.0 - 1.0 / math.pi))
# Of two summands that together are to have the variance of one: a branch and a shortcut with weights of its own.
HALF_VARIANCE = RELU_GAIN / math.sqrt(2.0)
# Of branches that are added to what came in as it is, one after the other: ten of them triple the variance at most.
BRANCH_DEVIATION = 0.3
# Of the last layer's kernel at the start: answers that are undecided. With He's full deviation the network would first
# have to unlearn confident ones, and begins with three times the loss.
LOGIT_SCALE = 0.1
GROUPS = 8
BATCH_EPSILON = 1e-3


def convolution(
    weights: Weights,
    name: str,
    images: tf.Tensor,
    filters: int,
    *,
    size: int = 1,
    bias: Initializer = zeros,
    scale: float = 1.0,
) -> tf.Tensor:
    """Convolution as it is, with zero padding and a bias, to `filters` channels; 2D or 3D as its input is.

    `scale` is of the kernel it begins with: `LOGIT_SCALE` in a network's last layer.
    """
    shape = [size] * dimensions_of(images) + [images.shape[-1], filters]
    kernel = weights.get(f"{name}/kernel", shape, functools.partial(he_normal, scale=scale))
    result = weights.operations.convolve(images, kernel)
    return tf.nn.bias_add(result, weights.get(f"{name}/bias", [filters], bias))


def activated_convolution(
    weights: Weights,
    name: str,
    images: tf.Tensor,
    filters: int,
    normalization: Normalization,
    *,
    size: int = 3,
    stride: int = 1,
    dilation: int = 1,
    activation: Activation = tf.nn.relu,
) -> tf.Tensor:
    """Convolution, the normalization named, and an activation."""
    return activation(
        normalized_convolution(
            weights, name, images, filters, normalization, size=size, stride=stride, dilation=dilation
        )
    )


def normalized_convolution(
    weights: Weights,
    name: str,
    images: tf.Tensor,
    filters: int,
    normalization: Normalization,
    *,
    size: int = 3,
    stride: int = 1,
    dilation: int = 1,
    deviation: float = RELU_GAIN,
) -> tf.Tensor:
    """Convolution with zero padding and the normalization named, to `filters` channels.

    Where no activations are normalized, `deviation` is the standard deviation that the result begins with, given inputs
    of variance 1: `RELU_GAIN` before an activation, 1 without one.
    """
    relative = deviation / RELU_GAIN
    shape = [size] * dimensions_of(images) + [images.shape[-1], filters]
    scale = relative if normalization == "none" else 1.0
    kernel = weights.get(f"{name}/kernel", shape, functools.partial(he_normal, scale=scale))

    def convolve(kernel: tf.Tensor) -> tf.Tensor:
        return weights.operations.convolve(images, kernel, stride=stride, dilation=dilation)

    if normalization == "weight":
        kernel = standardized(kernel, weights.get(f"{name}/gain", [filters], constant(relative)))
    return _normalized(weights, name, convolve, kernel, filters, normalization)


def depthwise_convolution(
    weights: Weights,
    name: str,
    images: tf.Tensor,
    normalization: Normalization,
    *,
    size: int = 3,
    stride: int = 1,
    dilation: int = 1,
) -> tf.Tensor:
    """Convolution of each channel by itself, in 2D, and the normalization named; an activation is to follow.

    With weight standardization the kernel keeps its mean, because nine numbers without it could only find edges. Means
    of rectified inputs pass then too, so the gain is that of inputs whose mean square, not variance, is given (sqrt 2).
    """
    channels = images.shape[-1]
    kernel = weights.get(f"{name}/kernel", [size, size, channels, 1], depthwise_he_normal)

    def convolve(kernel: tf.Tensor) -> tf.Tensor:
        return weights.operations.convolve_depthwise(images, kernel, stride=stride, dilation=dilation)

    if normalization == "weight":
        gain = weights.get(f"{name}/gain", [channels], ones)[:, tf.newaxis]
        square = tf.reduce_sum(tf.square(kernel), axis=[0, 1], keepdims=True)
        kernel *= tf.math.rsqrt(square + 1e-4) * (math.sqrt(2.0) * gain)
    return _normalized(weights, name, convolve, kernel, channels, normalization)


def separable_convolution(
    weights: Weights,
    name: str,
    images: tf.Tensor,
    filters: int,
    normalization: Normalization,
    *,
    stride: int = 1,
    dilation: int = 1,
    deviation: float = RELU_GAIN,
) -> tf.Tensor:
    """A depthwise convolution of size 3, normalized and rectified, and one of size 1, normalized.

    `deviation` is as for `normalized_convolution`.
    """
    images = tf.nn.relu(
        depthwise_convolution(weights, f"{name}/depthwise", images, normalization, stride=stride, dilation=dilation)
    )
    return normalized_convolution(
        weights, f"{name}/pointwise", images, filters, normalization, size=1, deviation=deviation
    )


def standardized(kernel: tf.Tensor, gain: tf.Tensor) -> tf.Tensor:
    """Kernel with mean 0 for every output channel (the last axis) and deviation gain * `RELU_GAIN` / sqrt(fan-in).

    The constant belongs to the activation that follows, relu(x) * RELU_GAIN; in the kernel it costs nothing when
    exported.
    """
    axes = list(range(kernel.shape.rank - 1))
    fan_in = math.prod(kernel.shape[:-1])
    mean, variance = tf.nn.moments(kernel, axes, keepdims=True)
    return (kernel - mean) * (tf.math.rsqrt(variance * fan_in + 1e-4) * (RELU_GAIN * gain))


def group_normalization(weights: Weights, name: str, images: tf.Tensor) -> tf.Tensor:
    """Normalization over space within groups of channels (Wu & He 2018, arXiv:1803.08494), 8 groups or fewer."""
    channels = images.shape[-1]
    groups = math.gcd(GROUPS, channels)
    parts = [groups, channels // groups]
    shape = tf.shape(images)
    grouped = tf.reshape(images, tf.concat([shape[:1], [-1, *parts]], axis=0))
    mean, variance = tf.nn.moments(grouped, [1, 3], keepdims=True)
    # In this form, too, gain and bias are multiplied and added: over five axes LiteRT's converter would write them out
    # for every voxel.
    gain = tf.reshape(weights.get(f"{name}/gain", [channels], ones), parts)
    bias = tf.reshape(weights.get(f"{name}/bias", [channels], zeros), parts)
    return tf.reshape((grouped - mean) * (tf.math.rsqrt(variance + 1e-5) * gain) + bias, shape)


def halve(weights: Weights, name: str, images: tf.Tensor, normalization: Normalization) -> tf.Tensor:
    """Half the resolution: maximum pooling in 2D, a convolution of stride 2 in 3D (3D pooling does not export)."""
    if dimensions_of(images) == 2:
        return tf.nn.max_pool2d(images, 2, 2, "VALID")
    return activated_convolution(weights, name, images, images.shape[-1], normalization, stride=2)


def double(
    weights: Weights,
    name: str,
    images: tf.Tensor,
    filters: int,
    *,
    bias: Initializer = zeros,
    scale: float = 1.0,
) -> tf.Tensor:
    """Twice the resolution: a transposed convolution of size and stride 2; `scale` as for `convolution`."""
    shape = [2] * dimensions_of(images) + [filters, images.shape[-1]]
    kernel = weights.get(f"{name}/kernel", shape, functools.partial(transposed_he_normal, scale=scale))
    result = weights.operations.convolve_transposed(images, kernel)
    return tf.nn.bias_add(result, weights.get(f"{name}/bias", [filters], bias))


def hard_sigmoid(images: tf.Tensor) -> tf.Tensor:
    """A sigmoid of straight lines, relu6(x + 3) / 6 (Howard et al. 2019, arXiv:1905.02244)."""
    return tf.nn.relu6(images + 3.0) * (1.0 / 6.0)


def hard_swish(images: tf.Tensor) -> tf.Tensor:
    """x * hard_sigmoid(x), from the same paper; one operation in LiteRT."""
    return images * hard_sigmoid(images)


def _normalized(
    weights: Weights,
    name: str,
    convolve: Callable[[tf.Tensor], tf.Tensor],
    kernel: tf.Tensor,
    filters: int,
    normalization: Normalization,
) -> tf.Tensor:
    """The convolution by `kernel` and what is done to its result: a bias, or the normalization of activations."""
    if normalization == "group":
        return group_normalization(weights, f"{name}/norm", convolve(kernel))
    if normalization == "batch":
        return batch_normalized(weights, f"{name}/norm", convolve, kernel, filters)
    return tf.nn.bias_add(convolve(kernel), weights.get(f"{name}/bias", [filters], zeros))


def batch_normalized(
    weights: Weights,
    name: str,
    convolve: Callable[[tf.Tensor], tf.Tensor],
    kernel: tf.Tensor,
    filters: int,
) -> tf.Tensor:
    """Batch normalization (Ioffe & Szegedy 2015, arXiv:1502.03167) of what `convolve` makes of a kernel.

    Outside training the layer is folded into the kernel, so that a published model holds a plain convolution with
    constant weights, in 3D too, where LiteRT's converter would not fold it.
    """
    gain, bias = weights.get(f"{name}/gain", [filters], ones), weights.get(f"{name}/bias", [filters], zeros)
    mean, variance = weights.get_statistics(name, filters)
    scale = gain * tf.math.rsqrt(variance + BATCH_EPSILON)
    offset = bias - mean * scale
    if weights.frozen is None:
        # Kernels of depthwise convolutions are (y, x, channel, 1), all others end with their output channels.
        factor = scale if kernel.shape[-1] == filters else scale[:, tf.newaxis]
        return tf.nn.bias_add(convolve(kernel * factor), offset)
    images = convolve(kernel)

    def by_statistics() -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        return images * scale + offset, mean, variance

    def by_batch() -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        # One operation: written out as moments and arithmetic it takes twice as long.
        normalized, batch_mean, unbiased, *_ = tf.raw_ops.FusedBatchNormV3(
            x=images,
            scale=gain,
            offset=bias,
            mean=tf.zeros([0]),
            variance=tf.zeros([0]),
            epsilon=BATCH_EPSILON,
            data_format="NHWC" if dimensions_of(images) == 2 else "NDHWC",
            is_training=True,
        )
        values = tf.cast(tf.size(images) // filters, tf.float32)
        return normalized, batch_mean, unbiased * ((values - 1.0) / values)

    result, batch_mean, batch_variance = tf.cond(weights.frozen, by_statistics, by_batch)
    weights.measure(batch_mean, batch_variance)
    return result
