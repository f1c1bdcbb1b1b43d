"""DeepLabv3+ (Chen et al. 2018, arXiv:1802.02611): an encoder at 1/16 of the resolution, looked at by several rates.

Atrous spatial pyramid pooling (ASPP) sees each place at several distances and the image as a whole; the decoder adds
the encoder's features at 1/4 of the resolution for the borders. For large structures with much context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tensorflow as tf

from common.models.layers import (
    LOGIT_SCALE,
    Normalization,
    activated_convolution,
    convolution,
    double,
    normalized_convolution,
    separable_convolution,
)
from common.models.mobilenetv3 import mobilenetv3
from common.models.network import Architecture, Weights
from common.models.widths import scaled_channels
from common.models.xception import xception

# In the paper, for crops of 513 pixels.
_RATES = (6, 12, 18)
_CROP = 513
_ENCODERS: dict[str, Callable[[Weights, tf.Tensor, int, Normalization], list[tf.Tensor]]] = {
    "mobilenetv3": lambda weights, images, filters, normalization: mobilenetv3(
        weights, images, size="large", filters=filters, normalization=normalization
    ),
    "xception": lambda weights, images, filters, normalization: xception(
        weights, images, filters=filters, normalization=normalization
    ),
}


def deeplabv3plus(
    *, encoder: str, filters: int, patch: Sequence[int], outputs: int, normalization: Normalization
) -> Architecture:
    """DeepLabv3+ from images (batch, y, x, channel), sizes multiples of 16, to logits (batch, y, x, outputs).

    Parameters
    ----------
    encoder : "mobilenetv3" (Large) or "xception".
    filters : 16 gives every layer the published width; others scale all of them.
    patch : the patches that are trained on: the rates of ASPP are the paper's in relation to its crops.

    The paper interpolates; here images grow by transposed convolutions, which are learned, and have the resolution of
    the image before the last layer.
    """

    def wide(channels: int) -> int:
        return scaled_channels(channels, filters, least=4)

    def aspp(weights: Weights, images: tf.Tensor) -> tf.Tensor:
        width = wide(256)
        branches = [activated_convolution(weights, "aspp/point", images, width, normalization, size=1)]
        for index, rate in enumerate(aspp_rates(patch)):
            branch = separable_convolution(weights, f"aspp/rate{index}", images, width, normalization, dilation=rate)
            branches.append(tf.nn.relu(branch))
        merged = normalized_convolution(
            weights, "aspp/merge", tf.concat(branches, axis=-1), width, normalization, size=1
        )
        # In the paper the image's mean is one more branch before the merge; added after it, it is the same sum.
        mean = tf.reduce_mean(images, axis=[1, 2], keepdims=True)
        context = tf.nn.relu(convolution(weights, "aspp/mean", mean, width))
        return tf.nn.relu(merged + convolution(weights, "aspp/context", context, width))

    def architecture(weights: Weights, images: tf.Tensor) -> tf.Tensor:
        features = _ENCODERS[encoder](weights, images, filters, normalization)
        images = weights.features(aspp(weights, features[-1]))
        images = tf.nn.relu(double(weights, "decoder/double3", images, wide(128)))
        images = tf.nn.relu(double(weights, "decoder/double2", images, wide(128)))
        skip = activated_convolution(weights, "decoder/skip", features[1], wide(48), normalization, size=1)
        images = tf.concat([images, skip], axis=-1)
        for index in range(2):
            images = tf.nn.relu(separable_convolution(weights, f"decoder/{index}", images, wide(256), normalization))
        images = tf.nn.relu(double(weights, "decoder/double1", images, wide(32)))
        images = tf.nn.relu(double(weights, "decoder/double0", images, wide(16)))
        return convolution(weights, "head", images, outputs, scale=LOGIT_SCALE)

    return architecture


def aspp_rates(patch: Sequence[int]) -> tuple[int, ...]:
    """The dilations of ASPP for patches of this size: 6, 12 and 18 for the paper's, in proportion for smaller ones."""
    return tuple(max(1, round(rate * min(patch) / _CROP)) for rate in _RATES)
