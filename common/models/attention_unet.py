"""The Attention U-Net (Oktay et al. 2018, arXiv:1804.03999): a U-Net that weighs its skips before it uses them.

A gate at each skip looks at the skip and at the coarser features below it, which know more of the context, and lets
through the places that matter.
"""

from __future__ import annotations

import tensorflow as tf

from common.models.layers import Normalization, double, normalized_convolution
from common.models.network import Architecture, Weights, constant
from common.models.unet import two_convolutions, u_shaped

# Gates begin nearly open (sigmoid(2) = 0.88), so that training starts from a U-Net.
_OPEN = 2.0


def attention_unet(*, filters: int, depth: int, outputs: int, normalization: Normalization) -> Architecture:
    """A U-Net (`common.models.unet`) with additive attention gates; images and logits as there.

    A gate is sigmoid(psi(relu(theta(skip) + phi(coarse)))), one number a voxel, with half of the skip's channels
    inside. It is computed at the resolution of the coarse features; psi brings it to that of the skip by a transposed
    convolution, where the paper interpolates.
    """

    def gate(weights: Weights, name: str, skip: tf.Tensor, coarse: tf.Tensor) -> tf.Tensor:
        inner = max(1, skip.shape[-1] // 2)
        theta = normalized_convolution(
            weights, f"{name}/theta", skip, inner, normalization, size=2, stride=2, deviation=1.0
        )
        phi = normalized_convolution(weights, f"{name}/phi", coarse, inner, normalization, size=1, deviation=1.0)
        passed = tf.sigmoid(double(weights, f"{name}/psi", tf.nn.relu(theta + phi), 1, bias=constant(_OPEN)))
        return skip * passed

    block = two_convolutions(normalization)
    return u_shaped(
        filters=filters,
        depth=depth,
        outputs=outputs,
        normalization=normalization,
        block=block,
        bottom=block,
        merge=gate,
    )
