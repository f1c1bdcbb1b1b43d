"""A U-Net for objects of less than 10 pixels: few halvings, and dilated convolutions in place of the others.

A halving loses where small things are; a dilated convolution sees as far without it. Its rates rise and fall again, so
that what the wide ones skip is looked at by the narrow ones after them, and no grid shows (Hamaguchi et al. 2018,
arXiv:1709.00179; Yu & Koltun 2016, arXiv:1511.07122).
"""

from __future__ import annotations

import tensorflow as tf

from common.models.layers import Normalization, activated_convolution
from common.models.network import Architecture, Weights
from common.models.unet import two_convolutions, u_shaped

RATES = (1, 2, 4, 2, 1)


def dilated_unet(*, filters: int, depth: int, outputs: int, normalization: Normalization) -> Architecture:
    """A U-Net (`common.models.unet`) of 1 or 2 halvings with a convolution for each of `RATES` on the coarsest level.

    Images and logits as there. With two halvings the coarsest level sees 4 * (1 + 2 * 10) = 84 pixels without a
    hole.
    """

    def bottom(weights: Weights, name: str, images: tf.Tensor, channels: int) -> tf.Tensor:
        for index, rate in enumerate(RATES):
            images = activated_convolution(weights, f"{name}/{index}", images, channels, normalization, dilation=rate)
        return images

    block = two_convolutions(normalization)
    return u_shaped(
        filters=filters, depth=depth, outputs=outputs, normalization=normalization, block=block, bottom=bottom
    )
