"""The Xception encoder as DeepLabv3+ changed it (Chollet 2017, arXiv:1610.02357; Chen et al. 2018, arXiv:1802.02611).

Convolutions of stride 2 stand in the place of pooling, every depthwise convolution is normalized and activated, and the
last stage is dilated instead of halved, so that 1/16 of the resolution is kept. Weights are named encoder/...
"""

from __future__ import annotations

import tensorflow as tf

from common.models.layers import (
    BRANCH_DEVIATION,
    HALF_VARIANCE,
    RELU_GAIN,
    Normalization,
    activated_convolution,
    normalized_convolution,
    separable_convolution,
)
from common.models.network import Weights
from common.models.widths import scaled_channels

_MIDDLE_BLOCKS = 8


def xception(weights: Weights, images: tf.Tensor, *, filters: int, normalization: Normalization) -> list[tf.Tensor]:
    """The encoder's features at 1/2, 1/4, 1/8 and 1/16 of the resolution, of images (batch, y, x, channel).

    Layers have the paper's number of channels times filters / 16 (so the stem has 32 of 16).
    """

    def wide(channels: int) -> int:
        return scaled_channels(channels, filters)

    images = activated_convolution(weights, "encoder/stem0", images, wide(32), normalization, stride=2)
    images = activated_convolution(weights, "encoder/stem1", images, wide(64), normalization)
    features = [images]
    for index, channels in enumerate((128, 256, 728)):
        widths = [wide(channels)] * 3
        images = _block(weights, f"encoder/entry{index}", images, widths, normalization, stride=2)
        features.append(tf.nn.relu(images))
    for index in range(_MIDDLE_BLOCKS):
        images = _block(weights, f"encoder/middle{index}", images, [wide(728)] * 3, normalization)
    images = _block(weights, "encoder/exit", images, [wide(728), wide(1024), wide(1024)], normalization)
    images = tf.nn.relu(images)
    for index, channels in enumerate((1536, 1536, 2048)):
        images = tf.nn.relu(
            separable_convolution(weights, f"encoder/last{index}", images, wide(channels), normalization, dilation=2)
        )
    features[-1] = images
    return features


def _block(
    weights: Weights,
    name: str,
    images: tf.Tensor,
    widths: list[int],
    normalization: Normalization,
    *,
    stride: int = 1,
) -> tf.Tensor:
    """Three separable convolutions, the last with the stride, added to what came in; ends without an activation."""
    adds = stride == 1 and images.shape[-1] == widths[-1]
    branch = images
    for index, channels in enumerate(widths):
        last = index == len(widths) - 1
        branch = separable_convolution(
            weights,
            f"{name}/{index}",
            tf.nn.relu(branch),
            channels,
            normalization,
            stride=stride if last else 1,
            deviation=RELU_GAIN if not last else RELU_GAIN * BRANCH_DEVIATION if adds else HALF_VARIANCE,
        )
    if adds:
        return images + branch
    shortcut = normalized_convolution(
        weights,
        f"{name}/shortcut",
        images,
        widths[-1],
        normalization,
        size=1,
        stride=stride,
        deviation=HALF_VARIANCE,
    )
    return shortcut + branch
