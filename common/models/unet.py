"""The U-Net in 2D and 3D (Ronneberger et al. 2015, arXiv:1505.04597; Cicek et al. 2016, arXiv:1606.06650)."""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

from common.models.layers import LOGIT_SCALE, Normalization, activated_convolution, convolution, double, halve
from common.models.network import Architecture, Weights

Block = Callable[[Weights, str, tf.Tensor, int], tf.Tensor]
"""(weights, name, images, channels) -> images of that many channels and of the same resolution."""
Merge = Callable[[Weights, str, tf.Tensor, tf.Tensor], tf.Tensor]
"""(weights, name, skip, coarse) -> what the decoder takes from the encoder's `skip`, knowing the features below it."""


def unet(*, filters: int, depth: int, outputs: int, normalization: Normalization) -> Architecture:
    """A U-Net of `depth` halvings that begins with `filters` channels and doubles them at each halving.

    Returns an architecture from images (batch, spatial..., channel), every spatial size a multiple of 2**depth, to
    logits (batch, spatial..., outputs). With 3 channels, depth 4 and 2D it has 1.9M weights for 16 filters and 31.0M
    for 64.
    """
    block = two_convolutions(normalization)
    return u_shaped(
        filters=filters, depth=depth, outputs=outputs, normalization=normalization, block=block, bottom=block
    )


def two_convolutions(normalization: Normalization) -> Block:
    """The block of the U-Net: two convolutions of size 3, each normalized and rectified."""

    def block(weights: Weights, name: str, images: tf.Tensor, channels: int) -> tf.Tensor:
        images = activated_convolution(weights, f"{name}/a", images, channels, normalization)
        return activated_convolution(weights, f"{name}/b", images, channels, normalization)

    return block


def u_shaped(
    *,
    filters: int,
    depth: int,
    outputs: int,
    normalization: Normalization,
    block: Block,
    bottom: Block,
    merge: Merge = lambda weights, name, skip, coarse: skip,
) -> Architecture:
    """What all U-Nets share: `block` at every level on the way down and up, `bottom` on the coarsest, skips between."""

    def architecture(weights: Weights, images: tf.Tensor) -> tf.Tensor:
        skips = []
        for level in range(depth):
            images = block(weights, f"down{level}", images, filters * 2**level)
            skips.append(images)
            images = halve(weights, f"halve{level}", images, normalization)
        images = weights.features(bottom(weights, "bottom", images, filters * 2**depth))
        for level in reversed(range(depth)):
            skip = merge(weights, f"merge{level}", skips[level], images)
            images = double(weights, f"double{level}", images, filters * 2**level)
            images = block(weights, f"up{level}", tf.concat([skip, images], axis=-1), filters * 2**level)
        return convolution(weights, "head", images, outputs, scale=LOGIT_SCALE)

    return architecture
