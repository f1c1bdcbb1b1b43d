"""The U-Net in 2D and 3D (Ronneberger et al. 2015, arXiv:1505.04597; Cicek et al. 2016, arXiv:1606.06650)."""

from __future__ import annotations

import tensorflow as tf

from common.models.layers import Normalization, activated_convolution, convolution, double, halve
from common.models.network import Architecture, Weights


def unet(*, filters: int, depth: int, outputs: int, normalization: Normalization) -> Architecture:
    """A U-Net of `depth` halvings that begins with `filters` channels and doubles them at each halving.

    Returns an architecture from images (batch, spatial..., channel), every spatial size a multiple of 2**depth, to
    logits (batch, spatial..., outputs). With 3 channels, depth 4 and 2D it has 1.9M weights for 16 filters and 31.0M
    for 64.
    """

    def block(weights: Weights, name: str, images: tf.Tensor, channels: int) -> tf.Tensor:
        images = activated_convolution(weights, f"{name}/a", images, channels, normalization)
        return activated_convolution(weights, f"{name}/b", images, channels, normalization)

    def architecture(weights: Weights, images: tf.Tensor) -> tf.Tensor:
        skips = []
        for level in range(depth):
            images = block(weights, f"down{level}", images, filters * 2**level)
            skips.append(images)
            images = halve(weights, f"halve{level}", images, normalization)
        images = block(weights, "bottom", images, filters * 2**depth)
        for level in reversed(range(depth)):
            images = double(weights, f"double{level}", images, filters * 2**level)
            images = block(weights, f"up{level}", tf.concat([skips[level], images], axis=-1), filters * 2**level)
        return convolution(weights, "head", images, outputs, size=1)

    return architecture
