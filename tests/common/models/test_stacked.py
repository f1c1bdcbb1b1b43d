"""3D convolutions written as 2D ones compute what TensorFlow's own 3D convolutions do, and leave no 3D operation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import tensorflow as tf

from common.models import build_network
from common.models.operations import NATIVE, Operations
from common.models.stacked import StackedOperations
from common.network_traits import NETWORKS
from common.study import Study

STACKED = StackedOperations()


def random(*shape: int) -> tf.Tensor:
    return tf.constant(np.random.default_rng(sum(shape)).standard_normal(shape), tf.float32)


@pytest.mark.parametrize("size", [1, 3, (3, 1, 1), (1, 3, 3), (5, 3, 3)])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2), (1, 4)])
@pytest.mark.parametrize("spatial", [(8, 6, 4), (7, 5, 6), (1, 4, 4), (2, 3, 9)])
def test_convolutions_equal_tensorflows(
    tensorflow: None, size: int | tuple[int, ...], stride: int, dilation: int, spatial: tuple[int, ...]
) -> None:
    sizes = (size,) * 3 if isinstance(size, int) else size
    images, kernel = random(1, *spatial, 3), random(*sizes, 3, 5)
    found = STACKED.convolve(images, kernel, stride=stride, dilation=dilation)
    expected = NATIVE.convolve(images, kernel, stride=stride, dilation=dilation)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("spatial", [(4, 3, 2), (1, 1, 1), (5, 2, 3)])
def test_transposed_convolutions_equal_tensorflows(tensorflow: None, spatial: tuple[int, ...]) -> None:
    images, kernel = random(1, *spatial, 4), random(2, 2, 2, 3, 4)
    found, expected = STACKED.convolve_transposed(images, kernel), NATIVE.convolve_transposed(images, kernel)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_images_of_two_dimensions_are_computed_as_ever(tensorflow: None) -> None:
    images, kernel, transposed = random(3, 6, 8, 2), random(3, 3, 2, 4), random(2, 2, 3, 2)
    np.testing.assert_array_equal(
        STACKED.convolve(images, kernel, dilation=2), NATIVE.convolve(images, kernel, dilation=2)
    )
    np.testing.assert_array_equal(
        STACKED.convolve_transposed(images, transposed), NATIVE.convolve_transposed(images, transposed)
    )


def test_several_volumes_at_once_are_refused(tensorflow: None) -> None:
    with pytest.raises(ValueError, match="expected one volume of known size"):
        STACKED.convolve(random(2, 4, 4, 4, 1), random(3, 3, 3, 1, 1))


VOLUMETRIC = [name for name, traits in NETWORKS.items() if 3 in traits.dimensions]
CASES = [("unet", normalization) for normalization in ("weight", "group", "batch", "none")]
CASES += [(name, "weight") for name in VOLUMETRIC if name != "unet"]


@pytest.mark.parametrize(("name", "normalization"), CASES)
def test_networks_answer_the_same_without_a_3d_operation(
    tensorflow: None, tiny_study: Callable[..., Study], name: str, normalization: str
) -> None:
    study = tiny_study(dimensions=3)
    network = build_network(replace(study, model=replace(study.model, depth=2, name=name, normalization=normalization)))
    # Trained biases are not 0, measured variances not 1.
    weights = [
        weight + 0.1 * tf.abs(random(*weight.shape)) if weight.shape.rank == 1 else weight
        for weight in network.initial_weights(3)
    ]
    images = random(1, 8, 12, 16, 1)
    np.testing.assert_allclose(network(weights, images, STACKED), network(weights, images), atol=1e-3)

    traced = tf.function(lambda tile: network(weights, tile, STACKED), autograph=False)
    traced = traced.get_concrete_function(tf.TensorSpec(images.shape, tf.float32))
    np.testing.assert_allclose(traced(images), network(weights, images), atol=1e-3)
    kinds = Counter(operation.type for operation in traced.graph.get_operations())
    assert not [kind for kind in kinds if "3D" in kind]
    if name == "unet":  # two a block, 5 blocks, 2 in place of pooling, and the head
        assert kinds["Conv2D"] == 13


def chained(images: tf.Tensor) -> tf.Tensor:
    """What networks have between two convolutions, and what looks like it but is not of each voxel alone."""
    filters = images.shape[-1]
    gain = 0.5 + tf.range(filters, dtype=tf.float32)
    result = tf.nn.bias_add(images, gain) * gain + tf.nn.leaky_relu(images, 0.3)
    gate = tf.sigmoid(tf.reduce_mean(result, axis=-1, keepdims=True))
    result = result * gate + tf.reduce_max(result, axis=[1, 2, 3], keepdims=True)
    places = tf.reshape(tf.range(images.shape[3], dtype=tf.float32), [-1, 1])
    return tf.nn.relu(tf.concat([2.0 - result, result * places, images], axis=-1))


@pytest.mark.parametrize("doubled", [False, True])
def test_what_lies_between_convolutions_is_kept(tensorflow: None, doubled: bool) -> None:
    images, first, last = random(1, 4, 6, 8, 2), random(3, 3, 3, 2, 3), random(3, 3, 3, 9, 2)
    kernel = random(2, 2, 2, 3, 3)

    def network(operations: Operations, images: tf.Tensor) -> tf.Tensor:
        result = operations.convolve(images, first)
        if doubled:
            result = operations.convolve_transposed(tf.nn.relu(result + 1.0), kernel)
        return operations.convolve(chained(result), last)

    traced = tf.function(lambda images: network(STACKED, images), autograph=False)
    np.testing.assert_allclose(traced(images), network(NATIVE, images), rtol=1e-4, atol=1e-2)


def test_biases_and_activations_follow_their_convolution_at_once(tensorflow: None) -> None:
    kernel, transposed, bias = random(3, 3, 3, 2, 2), random(2, 2, 2, 2, 2), random(2)

    def network(images: tf.Tensor) -> tf.Tensor:
        images = tf.nn.relu(tf.nn.bias_add(STACKED.convolve(images, kernel), bias))
        images = tf.nn.relu(tf.nn.bias_add(STACKED.convolve_transposed(images, transposed), bias))
        return STACKED.settled(tf.nn.bias_add(STACKED.convolve(images, kernel), bias))

    traced = tf.function(network, autograph=False).get_concrete_function(tf.TensorSpec([1, 4, 4, 4, 2], tf.float32))
    (output,) = traced.outputs
    used = {operation.name for operation in _ancestors(output.op)}
    makers = [
        operation.inputs[0].op.type
        for operation in traced.graph.get_operations()
        if operation.name in used and operation.type == "BiasAdd"
    ]
    assert sorted(makers) == ["Conv2D", "Conv2D", "Conv2DBackpropInput", "Conv2DBackpropInput"]


def _ancestors(operation: tf.Operation) -> list[tf.Operation]:
    found, pending = {}, [operation]
    while pending:
        current = pending.pop()
        if current.name not in found:
            found[current.name] = current
            pending += [tensor.op for tensor in current.inputs]
    return list(found.values())
