"""MobileNetV3 (Howard et al. 2019, arXiv:1905.02244): the encoders Large and Small, and Small with the LR-ASPP head.

Both encoders keep 1/16 of the resolution: the last stage is dilated instead of halved, as in the paper's segmentation.
Weights are named encoder/stem, encoder/<block>/{expand, depthwise, squeeze, excite, project} and encoder/last, so that
a file of an encoder that was trained elsewhere can be loaded (`common.models.encoder_weights`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import tensorflow as tf

from common.models.layers import (
    BRANCH_DEVIATION,
    LOGIT_SCALE,
    Activation,
    Normalization,
    activated_convolution,
    convolution,
    depthwise_convolution,
    double,
    hard_sigmoid,
    hard_swish,
    normalized_convolution,
)
from common.models.network import Architecture, Weights
from common.models.widths import nearest_multiple, scaled_multiple


@dataclass(frozen=True)
class _Block:
    """An inverted residual: widen, filter depthwise, weigh the channels, narrow."""

    size: int
    expanded: int
    channels: int
    squeezed: bool
    swish: bool
    stride: int = 1
    dilation: int = 1


_LARGE = (
    _Block(3, 16, 16, False, False),
    _Block(3, 64, 24, False, False, stride=2),
    _Block(3, 72, 24, False, False),
    _Block(5, 72, 40, True, False, stride=2),
    _Block(5, 120, 40, True, False),
    _Block(5, 120, 40, True, False),
    _Block(3, 240, 80, False, True, stride=2),
    _Block(3, 200, 80, False, True),
    _Block(3, 184, 80, False, True),
    _Block(3, 184, 80, False, True),
    _Block(3, 480, 112, True, True),
    _Block(3, 672, 112, True, True),
    _Block(5, 672, 160, True, True, dilation=2),
    _Block(5, 960, 160, True, True, dilation=2),
    _Block(5, 960, 160, True, True, dilation=2),
)
_SMALL = (
    _Block(3, 16, 16, True, False, stride=2),
    _Block(3, 72, 24, False, False, stride=2),
    _Block(3, 88, 24, False, False),
    _Block(5, 96, 40, True, True, stride=2),
    _Block(5, 240, 40, True, True),
    _Block(5, 240, 40, True, True),
    _Block(5, 120, 48, True, True),
    _Block(5, 144, 48, True, True),
    _Block(5, 288, 96, True, True, dilation=2),
    _Block(5, 576, 96, True, True, dilation=2),
    _Block(5, 576, 96, True, True, dilation=2),
)
_BLOCKS = {"large": _LARGE, "small": _SMALL}


def mobilenetv3(
    weights: Weights, images: tf.Tensor, *, size: Literal["large", "small"], filters: int, normalization: Normalization
) -> list[tf.Tensor]:
    """The encoder's features at 1/2, 1/4, 1/8 and 1/16 of the resolution, of images (batch, y, x, channel).

    `filters` are the stem's channels; other layers have the paper's number times filters / 16, in multiples of 8 (of
    4 below 16 filters).
    """

    images = activated_convolution(
        weights, "encoder/stem", images, scaled_multiple(16, filters), normalization, stride=2, activation=hard_swish
    )
    features = [images]
    for index, block in enumerate(_BLOCKS[size]):
        if block.stride == 2:
            features.append(images)
        images = _inverted_residual(
            weights,
            f"encoder/{index}",
            images,
            block,
            expanded=scaled_multiple(block.expanded, filters),
            channels=scaled_multiple(block.channels, filters),
            normalization=normalization,
        )
        features[-1] = images
    last = 6 * images.shape[-1]
    features[-1] = activated_convolution(
        weights, "encoder/last", images, last, normalization, size=1, activation=hard_swish
    )
    return features


def mobilenetv3_small(*, filters: int, outputs: int, normalization: Normalization) -> Architecture:
    """MobileNetV3-Small with the "Lite Reduced ASPP" head, for video rates: images (batch, y, x, channel) to logits.

    Sizes are multiples of 16. The head weighs 128 channels by what is in the whole image, as in the paper. From there
    the paper adds the features at 1/8 and interpolates; here every doubling is a transposed convolution to which the
    encoder's features of that resolution are added, because what is segmented may be smaller than 8 pixels.
    """

    def architecture(weights: Weights, images: tf.Tensor) -> tf.Tensor:
        features = mobilenetv3(weights, images, size="small", filters=filters, normalization=normalization)
        width = scaled_multiple(128, filters)
        coarse = activated_convolution(weights, "head/coarse", features[-1], width, normalization, size=1)
        context = tf.reduce_mean(features[-1], axis=[1, 2], keepdims=True)
        images = weights.features(coarse * tf.sigmoid(convolution(weights, "head/context", context, width)))
        for level, skip in reversed(list(enumerate(features[:-1], start=1))):
            channels = scaled_multiple(8 * 2**level, filters)
            images = double(weights, f"head/double{level}", images, channels)
            images = tf.nn.relu(images + convolution(weights, f"head/skip{level}", skip, channels))
        return double(weights, "head/double0", images, outputs, scale=LOGIT_SCALE)

    return architecture


def _inverted_residual(
    weights: Weights,
    name: str,
    images: tf.Tensor,
    block: _Block,
    *,
    expanded: int,
    channels: int,
    normalization: Normalization,
) -> tf.Tensor:
    activation: Activation = hard_swish if block.swish else tf.nn.relu
    hidden = images
    if block.expanded != 16:  # the paper's first blocks, which would not widen, leave it out
        hidden = activated_convolution(
            weights, f"{name}/expand", hidden, expanded, normalization, size=1, activation=activation
        )
    hidden = activation(
        depthwise_convolution(
            weights,
            f"{name}/depthwise",
            hidden,
            normalization,
            size=block.size,
            stride=block.stride,
            dilation=block.dilation,
        )
    )
    if block.squeezed:
        squeezed = nearest_multiple(hidden.shape[-1] / 4, 8)
        mean = tf.reduce_mean(hidden, axis=[1, 2], keepdims=True)
        mean = tf.nn.relu(convolution(weights, f"{name}/squeeze", mean, squeezed))
        hidden *= hard_sigmoid(convolution(weights, f"{name}/excite", mean, hidden.shape[-1]))
    adds = block.stride == 1 and images.shape[-1] == channels
    result = normalized_convolution(
        weights,
        f"{name}/project",
        hidden,
        channels,
        normalization,
        size=1,
        deviation=BRANCH_DEVIATION if adds else 1.0,
    )
    return images + result if adds else result
