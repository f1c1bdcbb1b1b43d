"""The plan of a study: its digest, its rounds, and the FedProx of a whole study."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import tensorflow as tf

from common.learning.graph import to_numpy
from common.learning.plan import StudyPlan, build_plan
from common.models import build_network
from common.models.bfloat16 import BFLOAT16
from common.study import Study, parse_study


@pytest.fixture(scope="module")
def plan(tensorflow: None, tiny_study: Callable[..., Study]) -> StudyPlan:
    return build_plan(tiny_study(depth=1))


def test_the_same_study_written_otherwise_has_the_same_digest(plan: StudyPlan) -> None:
    assert build_plan(parse_study("# a comment\n" + plan.study.to_yaml())).digest == plan.digest
    assert len(plan.digest) == 32


def test_another_seed_is_another_plan(plan: StudyPlan) -> None:
    assert build_plan(dataclasses.replace(plan.study, seed=12)).digest != plan.digest


def test_another_plan_format_is_another_plan(plan: StudyPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.learning.plan.PLAN_FORMAT", 999)
    assert build_plan(plan.study).digest != plan.digest


def test_initial_weights_follow_from_the_seed_alone(plan: StudyPlan) -> None:
    first, second = to_numpy(plan.train.initialize()), to_numpy(plan.train.initialize())
    for one, two in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, two)
    other = to_numpy(build_plan(dataclasses.replace(plan.study, seed=12)).train.initialize())
    assert not np.array_equal(first[0], other[0])


def test_the_compiled_initialization_gives_the_network_s_own_initial_weights_to_the_bit(plan: StudyPlan) -> None:
    network = build_network(plan.study)
    found = to_numpy(plan.train.initialize())
    for spec, weight in zip(network.specs, network.initial_weights(plan.study.seed), strict=True):
        assert any(np.array_equal(weight.numpy(), leaf) for leaf in found), spec.name


def test_training_and_evaluation_broadcast_the_same_weights_so_that_sites_fetch_them_once(plan: StudyPlan) -> None:
    assert plan.evaluate is not None
    large = [spec for spec in plan.train.broadcast if spec.shape]
    assert [spec for spec in plan.evaluate.broadcast if spec.shape] == large


def test_the_sum_does_not_depend_on_where_it_was_split(plan: StudyPlan) -> None:
    """merge(a, b) of two partial sums is the sum, as `accumulate` makes it."""
    train = plan.train
    rng = np.random.default_rng(0)
    updates = [
        [
            np.asarray(rng.normal(size=spec.shape), spec.dtype) if spec.shape else np.ones((), spec.dtype)
            for spec in train.sent
        ]
        for _ in range(3)
    ]
    whole = train.zero()
    for update in updates:
        train.accumulate(whole, update)
    left, right = train.zero(), train.zero()
    train.accumulate(left, updates[0])
    for update in updates[1:]:
        train.accumulate(right, update)
    merged = train.merge(*left, *right)
    for one, two in zip(to_numpy(whole), to_numpy(merged), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)


def test_validation_dice_counts_every_site_the_same_whatever_its_size(plan: StudyPlan) -> None:
    """One site's single voxel of error weighs as much as another's: Dice by site, then the mean."""
    evaluate = plan.evaluate
    assert evaluate is not None
    state = to_numpy(evaluate.initialize())
    total = evaluate.zero()
    # Two sites with Dice 1 (2*4/(2*4+0)) and 0.5 (2*1/(2*1+1+1)) of the one foreground class, and one with nothing to
    # find.
    for true_positive, false_positive, false_negative in ((4, 0, 0), (1, 1, 1), (0, 0, 0)):
        sent = _evaluation_update(true_positive, false_positive, false_negative)
        evaluate.accumulate(total, sent)
    leaves = to_numpy(evaluate.update(state, evaluate.report(*total)))
    metrics = leaves[len(state) :]
    assert float(metrics[0][0]) == pytest.approx(0.75)
    assert int(metrics[1]) == 2


def _evaluation_update(true_positive: int, false_positive: int, false_negative: int) -> list[np.ndarray]:
    volume = 2 * true_positive + false_positive + false_negative
    dice = 2 * true_positive / volume if volume else 0.0
    occurred = float(volume > 0)
    return [np.array([dice], np.float32), np.array([occurred], np.float32), np.array(int(volume > 0), np.int32)]


def test_voxels_marked_as_outside_count_in_no_metric(plan: StudyPlan) -> None:
    evaluate = plan.evaluate
    assert evaluate is not None
    weights = to_numpy(plan.train.initialize())[: len(evaluate.broadcast)]
    rng = np.random.default_rng(1)
    images = rng.normal(size=(1, 16, 16, 1)).astype(np.float32)
    labels = rng.integers(2, size=(1, 16, 16)).astype(np.uint8)
    labels[0, :, 8:] = 255
    logits = build_network(plan.study)([tf.constant(weight) for weight in weights], images).numpy()
    predicted, truth = logits[0, :, :8].argmax(-1) == 1, labels[0, :, :8] == 1
    expected = 2 * (predicted & truth).sum() / (predicted.sum() + truth.sum())
    sent = evaluate.work(tf.data.Dataset.from_tensors((images, labels)), weights)
    assert float(sent[0][0]) == pytest.approx(expected)


def test_training_does_not_let_tf_data_choose_its_threads(plan: StudyPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its choice differs from call to call, and with it the speed and the last bits."""
    given = []
    monkeypatch.setattr(plan.train, "_work", lambda dataset, *broadcast: given.append(dataset) or [])
    plan.train.work(tf.data.Dataset.range(3), [])
    assert given[0].options().autotune.enabled is False


def test_a_site_may_train_in_bfloat16_by_the_same_plan(plan: StudyPlan) -> None:
    fast = build_plan(plan.study, BFLOAT16)
    assert fast.digest == plan.digest
    rng = np.random.default_rng(2)
    labels = rng.integers(2, size=(2, 16, 16)).astype(np.uint8)
    data = tf.data.Dataset.from_tensors((labels[..., np.newaxis] + rng.normal(size=(2, 16, 16, 1)), labels))
    data = data.map(lambda images, labels: (tf.cast(images, tf.float32), labels))
    broadcast = plan.train.prepare(*plan.train.initialize())
    exact, rounded = plan.train.work(data, broadcast), fast.train.work(data, broadcast)
    one, two = (np.concatenate([value.ravel() for value in sent[3:-1]]) for sent in (exact, rounded))
    assert 0.95 < one @ two / np.linalg.norm(one) / np.linalg.norm(two) < 0.99999
    assert plan.evaluate is not None
    assert fast.evaluate is not None
    weights = broadcast[: len(plan.evaluate.broadcast)]
    for one, two in zip(plan.evaluate.work(data, weights), fast.evaluate.work(data, weights), strict=True):
        np.testing.assert_array_equal(one, two)
