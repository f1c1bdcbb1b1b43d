"""The residual U-Net: its blocks add what they compute to what they got (Zhang et al. 2018, arXiv:1711.10684).

Gradients reach the first layers past the convolutions, which helps deep networks and small batches.
"""

from __future__ import annotations

import tensorflow as tf

from common.models.layers import HALF_VARIANCE, Normalization, activated_convolution, normalized_convolution
from common.models.network import Architecture, Weights
from common.models.unet import u_shaped


def residual_unet(*, filters: int, depth: int, outputs: int, normalization: Normalization) -> Architecture:
    """A U-Net (`common.models.unet`) of residual blocks; images and logits as there.

    A block is relu(shortcut + branch): the branch of two convolutions of size 3, the shortcut of one of size 1, because
    every block of a U-Net changes the number of channels.
    """

    def block(weights: Weights, name: str, images: tf.Tensor, channels: int) -> tf.Tensor:
        branch = activated_convolution(weights, f"{name}/a", images, channels, normalization)
        branch = normalized_convolution(weights, f"{name}/b", branch, channels, normalization, deviation=HALF_VARIANCE)
        shortcut = normalized_convolution(
            weights, f"{name}/shortcut", images, channels, normalization, size=1, deviation=HALF_VARIANCE
        )
        return tf.nn.relu(shortcut + branch)

    return u_shaped(
        filters=filters, depth=depth, outputs=outputs, normalization=normalization, block=block, bottom=block
    )
