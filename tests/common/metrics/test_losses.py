"""What training minimizes, and how labels are read; expected values by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tensorflow as tf

from common.imaging.distance import encode_distance
from common.metrics.losses import dice_cross_entropy, predicted_classes, true_classes

HEADS = {"softmax": 2, "sigmoid": 1, "distance": 2}


def loss_and_gradient(logits: np.ndarray, labels: np.ndarray, head: str) -> tuple[float, np.ndarray]:
    variable = tf.constant(logits, tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(variable)
        loss = dice_cross_entropy(variable, tf.constant(labels, tf.uint8), head=head)
    return float(loss), tape.gradient(loss, variable).numpy()


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("labels", [[[0, 1, 1, 0]], [[0, 0, 0, 0]], [[255, 255, 255, 255]]])
@pytest.mark.parametrize("logit", [0.0, 80.0, -80.0])
def test_gradients_are_finite_whatever_is_there(head: str, labels: list[list[int]], logit: float) -> None:
    loss, gradient = loss_and_gradient(np.full((1, 4, HEADS[head]), logit), np.array(labels), head)
    assert math.isfinite(loss)
    assert loss >= 0
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("head", HEADS)
def test_ignored_voxels_change_neither_loss_nor_gradient(head: str) -> None:
    rng = np.random.default_rng(0)
    labels = np.array([[0, 1, 100, 254]]) if head == "distance" else np.array([[0, 1, 1, 0]])
    logits = rng.normal(size=(1, 4, HEADS[head]))
    loss, gradient = loss_and_gradient(logits, labels, head)
    more = np.concatenate([logits, rng.normal(size=(1, 3, HEADS[head]))], axis=1)
    padded = np.concatenate([labels, np.full((1, 3), 255)], axis=1)
    with_ignored, gradients = loss_and_gradient(more, padded, head)
    assert with_ignored == pytest.approx(loss, rel=1e-6)
    np.testing.assert_allclose(gradients[:, :4], gradient, rtol=1e-5, atol=1e-7)
    assert not gradients[:, 4:].any()


def test_the_sigmoid_loss_of_one_wrong_voxel() -> None:
    """Logits of 0 at one voxel of foreground and one of background: entropy ln 2 at both, Dice (2 * 0.5 + 1) / 3."""
    loss, _ = loss_and_gradient(np.zeros((1, 2, 1)), np.array([[1, 0]]), "sigmoid")
    assert loss == pytest.approx(math.log(2) + 1 - 2 / 3)


def test_the_distance_term_is_0_for_exact_maps_and_pulls_towards_them() -> None:
    labels = encode_distance(np.array([[0, 3, 3, 3, 3, 3, 0, 0], [0, 3, 3, 3, 3, 3, 0, 0], [0, 3, 3, 3, 3, 3, 0, 0]]))
    distance = np.clip((labels.astype(np.float64) - 1) / 253, 1e-6, 1 - 1e-6)
    foreground = np.where(labels > 0, 20.0, -20.0)
    exact = np.stack([foreground, np.log(distance / (1 - distance))], axis=-1)[np.newaxis]
    loss, gradient = loss_and_gradient(exact, labels[np.newaxis], "distance")
    assert loss == pytest.approx(0, abs=1e-3)
    assert np.abs(gradient).max() < 1e-3
    shallow = exact.copy()
    shallow[..., 1] = -2.0
    loss, gradient = loss_and_gradient(shallow, labels[np.newaxis], "distance")
    deep = labels[np.newaxis] > 200
    assert loss > 0.1
    assert (gradient[..., 1][deep] < 0).all()  # deeper inside
    assert (gradient[..., 1][labels[np.newaxis] == 0] > 0).all()  # and less outside
    assert np.abs(gradient[..., 0]).max() < 1e-3


def test_distances_are_class_1_and_ignored_stays() -> None:
    labels = tf.constant([0, 1, 2, 254, 255], tf.uint8)
    assert true_classes(labels, head="distance").numpy().tolist() == [0, 1, 1, 1, 255]
    assert true_classes(labels, head="softmax").numpy().tolist() == [0, 1, 2, 254, 255]


def test_the_foreground_output_alone_decides_the_class() -> None:
    logits = tf.constant([[[0.1, -5.0], [-0.1, 5.0]]])
    assert predicted_classes(logits, head="distance").numpy().tolist() == [[1, 0]]
