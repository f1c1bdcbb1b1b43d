"""Convolutions of every kind compute their definition."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import tensorflow as tf

from common.models.operations import NATIVE


def by_definition(images: np.ndarray, kernel: np.ndarray, dilation: int) -> np.ndarray:
    """The sum over the kernel's places of the shifted images times the kernel's matrix there; zeros outside."""
    spatial = images.shape[1:-1]
    reach = [dilation * (size // 2) for size in kernel.shape[:-2]]
    padded = np.pad(images, [(0, 0), *((r, r) for r in reach), (0, 0)])
    result = np.zeros((*images.shape[:-1], kernel.shape[-1]))
    for place in itertools.product(*(range(size) for size in kernel.shape[:-2])):
        window = tuple(
            slice(dilation * index, dilation * index + size) for index, size in zip(place, spatial, strict=True)
        )
        result += padded[(slice(None), *window)] @ kernel[place]
    return result


@pytest.mark.parametrize(("shape", "dilation"), [((7, 9), 1), ((7, 9), 4), ((4, 6, 5), 1), ((4, 6, 5), 2)])
@pytest.mark.parametrize("known", [True, False])
def test_convolution_dilated_or_not(tensorflow: None, shape: tuple[int, ...], dilation: int, known: bool) -> None:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(2, *shape, 3)).astype(np.float32)
    kernel = rng.normal(size=(*[3] * len(shape), 3, 4)).astype(np.float32)
    signature = tf.TensorSpec(images.shape if known else [None] * (len(shape) + 1) + [3], tf.float32)

    @tf.function(autograph=False, input_signature=[signature, tf.TensorSpec(kernel.shape, tf.float32)])
    def convolve(images: tf.Tensor, kernel: tf.Tensor) -> tuple[tf.Tensor, list[tf.Tensor]]:
        with tf.GradientTape() as tape:
            tape.watch([images, kernel])
            result = NATIVE.convolve(images, kernel, dilation=dilation)
            assert result.shape == (*images.shape[:-1], 4) or not known
        return result, tape.gradient(result, [images, kernel])

    result, (_, gradient) = convolve(images, kernel)
    np.testing.assert_allclose(result, by_definition(images, kernel, dilation), atol=1e-4)
    # The convolution is linear in the kernel, so the gradient of its sum times the kernel is its sum.
    np.testing.assert_allclose(np.sum(gradient * kernel), np.sum(result), rtol=1e-3)


def test_depthwise_convolution_is_one_convolution_a_channel(tensorflow: None) -> None:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(2, 8, 6, 3)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, 3, 1)).astype(np.float32)
    result = NATIVE.convolve_depthwise(images, kernel, dilation=2).numpy()
    for channel in range(3):
        alone = by_definition(images[..., channel : channel + 1], kernel[:, :, channel : channel + 1], 2)
        np.testing.assert_allclose(result[..., channel : channel + 1], alone, atol=1e-5)
    assert NATIVE.convolve_depthwise(images, kernel, stride=2).shape == (2, 4, 3, 3)
