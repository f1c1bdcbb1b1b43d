"""Training in bfloat16: the same network to bfloat16's precision, chosen by what the CPU has."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from common.metrics.losses import dice_cross_entropy
from common.models import BFLOAT16, NATIVE, build_network, operations_for
from common.models.bfloat16 import Bfloat16Operations, has_fast_bfloat16
from common.models.operations import Operations
from common.study import Study

CPU_WITH_AMX = "processor\t: 0\nflags\t\t: fpu sse2 avx512_bf16 amx_bf16 amx_tile\nbugs\t\t: none\n"


@pytest.mark.parametrize(("dimensions", "name"), [(2, "unet"), (3, "dilated_unet")])
def test_gradients_agree_with_those_of_float32(
    tensorflow: None, tiny_study: Callable[..., Study], dimensions: int, name: str
) -> None:
    study = tiny_study(dimensions=dimensions, head="sigmoid")
    study = dataclasses.replace(study, model=dataclasses.replace(study.model, name=name))
    network = build_network(study)
    weights = network.initial_weights(1)
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=(2, *[8] * dimensions)).astype(np.uint8)
    images = (labels[..., np.newaxis] + rng.normal(size=(*labels.shape, 1))).astype(np.float32)

    def step(operations: Operations) -> tuple[tf.Tensor, np.ndarray]:
        with tf.GradientTape() as tape:
            tape.watch(weights)
            logits = network(weights, images, operations)
            loss = dice_cross_entropy(logits, labels, head="sigmoid")
        gradients = tape.gradient(loss, weights)
        assert logits.dtype == tf.float32
        assert all(gradient.dtype == tf.float32 for gradient in gradients)
        return logits, np.concatenate([gradient.numpy().ravel() for gradient in gradients])

    exact_logits, exact = step(NATIVE)
    logits, gradients = step(BFLOAT16)
    # Rounding to 8 bits is wrong by up to 1/512; it adds up over the layers, but not into another direction.
    difference = float(tf.reduce_max(tf.abs(logits - exact_logits)))
    assert 0 < difference < 0.05 * float(tf.reduce_max(tf.abs(exact_logits)))
    assert gradients @ exact / (np.linalg.norm(gradients) * np.linalg.norm(exact)) > 0.99
    assert np.linalg.norm(gradients) == pytest.approx(np.linalg.norm(exact), rel=0.05)


def test_kernel_gradients_of_small_volumes_are_those_of_float32(tensorflow: None) -> None:
    """TensorFlow's own are what lies in memory; how small a volume must be for that depends on the axis."""
    rng = np.random.default_rng(0)
    for shape, stride in (((2, 2, 2), 1), ((2, 4, 4), 1), ((4, 4, 1), 2), ((3, 3, 3), 1), ((4, 4, 4), 2)):
        images = tf.constant(rng.normal(size=(2, *shape, 4)).astype(np.float32))
        kernel = tf.constant(rng.normal(size=(3, 3, 3, 4, 8)).astype(np.float32))
        gradients = []
        for operations in (NATIVE, BFLOAT16):
            with tf.GradientTape() as tape:
                tape.watch(kernel)
                loss = tf.reduce_sum(operations.convolve(images, kernel, stride=stride) ** 2)
            gradients.append(tape.gradient(loss, kernel).numpy())
        np.testing.assert_allclose(gradients[1], gradients[0], atol=0.02 * np.abs(gradients[0]).max())


def test_every_convolution_is_computed_in_bfloat16(tensorflow: None, tiny_study: Callable[..., Study]) -> None:
    network = build_network(tiny_study(dimensions=3))
    graph = tf.function(lambda images: network(network.initial_weights(1), images, BFLOAT16), autograph=False)
    operations = graph.get_concrete_function(tf.TensorSpec([1, 16, 16, 16, 1])).graph.get_operations()
    types = {(operation.type, operation.outputs[0].dtype) for operation in operations if "Conv" in operation.type}
    assert types == {("Conv3D", tf.bfloat16), ("Conv3DBackpropInputV2", tf.bfloat16)}


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the flags are those of x86 processors")
def test_a_cpu_with_matrix_instructions_for_bfloat16_is_recognized(tmp_path: Path) -> None:
    (tmp_path / "amx").write_text(CPU_WITH_AMX)
    (tmp_path / "without").write_text(CPU_WITH_AMX.replace(" amx_bf16", ""))
    assert has_fast_bfloat16(tmp_path / "amx")
    assert not has_fast_bfloat16(tmp_path / "without")
    assert not has_fast_bfloat16(tmp_path / "no such file")


def test_only_auto_lets_the_cpu_decide(tiny_study: Callable[..., Study], monkeypatch: pytest.MonkeyPatch) -> None:
    study = tiny_study()
    auto = dataclasses.replace(study, training=dataclasses.replace(study.training, precision="auto"))
    for fast in (True, False):
        monkeypatch.setattr("common.models.fast_bfloat16", lambda fast=fast: fast)
        assert operations_for(study) is NATIVE
        assert isinstance(operations_for(auto), Bfloat16Operations) is fast
