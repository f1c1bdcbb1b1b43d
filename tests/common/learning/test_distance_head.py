"""The head "distance" in training: what augmentation leaves of its labels, and rounds of a whole study."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import tensorflow as tf

from common.imaging.augmentation import augment
from common.imaging.distance import encode_distance
from common.learning.graph import to_numpy
from common.learning.plan import StudyPlan, build_plan
from common.metrics.losses import dice_cross_entropy
from common.models import build_network, probabilities
from common.study import AUGMENTATIONS, Study


@pytest.fixture(scope="module")
def study(tiny_study: Callable[..., Study]) -> Study:
    tiny = tiny_study(client="adam", rate=0.003)
    return dataclasses.replace(
        tiny,
        task=dataclasses.replace(tiny.task, labels="instances"),
        model=dataclasses.replace(tiny.model, head="distance"),
    )


@pytest.fixture(scope="module")
def plan(tensorflow: None, study: Study) -> StudyPlan:
    return build_plan(study)


def touching_squares() -> tuple[np.ndarray, np.ndarray]:
    """A batch of two: images (2, 16, 16, 1), bright objects; encoded labels (2, 16, 16)."""
    numbers = np.zeros((16, 16), np.int32)
    numbers[3:12, 1:8], numbers[3:12, 8:15] = 1, 2
    label = encode_distance(numbers)
    image = (numbers > 0).astype(np.float32)[..., np.newaxis]
    return np.stack([image, image]), np.stack([label, label])


def test_augmentation_moves_encoded_labels_and_mixes_none(tensorflow: None) -> None:
    images, labels = touching_squares()
    known = set(np.unique(labels).tolist())
    for index in range(4):
        _, moved = augment(tf.constant(images), tf.constant(labels), tf.constant([3, index]), AUGMENTATIONS)
        assert moved.dtype == tf.uint8
        assert set(np.unique(moved.numpy()).tolist()) <= known


def test_rounds_of_a_study_lower_the_loss_and_learn_both_maps(plan: StudyPlan, study: Study) -> None:
    train = plan.train
    images, labels = touching_squares()
    data = tf.data.Dataset.from_tensors((images, labels)).repeat(40)
    state = to_numpy(train.initialize())
    losses = []
    for _ in range(3):
        total = train.zero()
        train.accumulate(total, train.work(data, to_numpy(train.prepare(*state))))
        leaves = to_numpy(train.update(state, train.report(*total)))
        state, metrics = leaves[: len(state)], leaves[len(state) :]
        losses.append(float(metrics[0]))
    assert losses[2] < losses[1] < losses[0]
    network = build_network(study)
    weights = [tf.constant(weight) for weight in state[: len(network.specs)]]
    maps = probabilities(study, network(weights, tf.constant(images))).numpy()
    assert maps.shape == (2, 16, 16, 2)
    inside = labels > 0
    assert maps[..., 0][inside].mean() > maps[..., 0][~inside].mean() + 0.2
    deep, edge = labels > 180, inside & (labels < 90)
    assert maps[..., 1][deep].mean() > maps[..., 1][edge].mean() + 0.1 > maps[..., 1][~inside].mean()


def test_the_plan_trains_on_the_loss_of_both_maps(plan: StudyPlan, study: Study) -> None:
    images, labels = touching_squares()
    weights = to_numpy(plan.train.initialize())
    broadcast = to_numpy(plan.train.prepare(*weights))
    logits = build_network(study)([tf.constant(leaf) for leaf in broadcast if leaf.ndim], tf.constant(images))
    expected = float(dice_cross_entropy(logits, tf.constant(labels), head="distance"))
    sent = to_numpy(plan.train.work(tf.data.Dataset.from_tensors((images, labels)), broadcast))
    sums = [float(leaf) for leaf in sent if not leaf.ndim]
    assert any(found == pytest.approx(expected, rel=1e-4) for found in sums), (expected, sums)


def test_validation_counts_encoded_labels_as_foreground(plan: StudyPlan, study: Study) -> None:
    evaluate = plan.evaluate
    assert evaluate is not None
    images, labels = touching_squares()
    labels[:, :, :4] = 255
    weights = to_numpy(plan.train.initialize())[: len(evaluate.broadcast)]
    logits = build_network(study)([tf.constant(weight) for weight in weights], images).numpy()
    counted = labels != 255
    predicted, truth = (logits[..., 0] > 0) & counted, (labels > 0) & counted
    expected = 2 * (predicted & truth).sum() / (predicted.sum() + truth.sum())
    sent = evaluate.work(tf.data.Dataset.from_tensors((images, labels)), weights)
    assert float(sent[0][0]) == pytest.approx(expected)
