"""What networks are made of: weights, standardized kernels, losses."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import tensorflow as tf

from common.metrics.losses import dice_cross_entropy, predicted_classes
from common.models import build_network
from common.models.layers import RELU_GAIN, standardized
from common.study import Study


def test_the_classic_sizes(tiny_study: Callable[..., Study]) -> None:
    """With 16 base filters and depth 4 the classic U-Net has 1.94M weights; gains are a few thousand more."""
    from dataclasses import replace

    study = tiny_study()
    for filters, expected in ((16, 1.94e6), (64, 31.0e6)):
        sized = replace(
            study, model=replace(study.model, filters=filters, depth=4), task=replace(study.task, channels=3)
        )
        assert build_network(sized).parameters == pytest.approx(expected, rel=0.01)


def test_a_weight_depends_on_the_seed_and_its_name_alone(tiny_study: Callable[..., Study]) -> None:
    from dataclasses import replace

    study = tiny_study()
    deeper = replace(study, model=replace(study.model, depth=3))
    for network in (build_network(study), build_network(deeper)):
        names = [spec.name for spec in network.specs]
        first = network.initial_weights(3)[names.index("down0/a/kernel")]
        np.testing.assert_array_equal(first, build_network(study).initial_weights(3)[0])


def test_standardized_kernels_have_mean_0_and_keep_the_variance_of_rectified_activations(tensorflow: None) -> None:
    kernel = tf.random.stateless_normal([3, 3, 8, 5], [1, 2], mean=2.0, stddev=3.0)
    result = standardized(kernel, tf.ones([5])).numpy().reshape(-1, 5)
    np.testing.assert_allclose(result.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(result.var(axis=0) * 72, RELU_GAIN**2, rtol=1e-3)
    # Var(relu(x) * g) = 1 for x ~ N(0, 1): E[relu^2] - E[relu]^2 = 1/2 - 1/(2 pi)
    assert RELU_GAIN**2 * (0.5 - 1 / (2 * np.pi)) == pytest.approx(1.0)


def test_loss_of_a_sure_and_right_answer_is_near_zero_and_of_a_wrong_one_is_large(tensorflow: None) -> None:
    labels = np.array([[[0, 1], [1, 0]]], np.uint8)
    sure = np.where(labels[..., np.newaxis] == [0, 1], 20.0, -20.0).astype(np.float32)
    assert float(dice_cross_entropy(tf.constant(sure), labels, head="softmax")) == pytest.approx(0.0, abs=1e-4)
    assert float(dice_cross_entropy(tf.constant(-sure), labels, head="softmax")) > 20
    # Sigmoid, logit 0 everywhere: cross-entropy ln 2; Dice (2 * 0.5 * 2 + 1) / (0.5 * 4 + 2 + 1) = 3 / 5.
    flat = tf.zeros([1, 2, 2, 1])
    assert float(dice_cross_entropy(flat, labels, head="sigmoid")) == pytest.approx(np.log(2) + 1 - 0.6, abs=1e-5)


def test_predicted_classes_of_both_heads(tensorflow: None) -> None:
    logits = tf.constant([[[3.0, 1.0], [-1.0, -2.0], [0.5, 0.7]]])
    assert predicted_classes(logits, head="sigmoid").numpy().tolist() == [[1, 0, 2]]
    assert predicted_classes(logits, head="softmax").numpy().tolist() == [[0, 0, 1]]
