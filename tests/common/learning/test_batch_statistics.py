"""Batch normalization across sites: what is pooled, when it freezes, and that it ends in what is evaluated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff

from common.learning.batch_statistics import adapting_rounds, statistics_of
from common.learning.graph import to_numpy
from common.learning.plan import RoundPlan
from common.learning.process import build_training_process
from common.metrics.losses import dice_cross_entropy
from common.models import build_network
from common.models.layers import batch_normalized, convolution
from common.models.network import Network, Weights
from common.study import Study

ROUNDS = 3  # the third is frozen
RATE = 0.1
PATCH = (6, 4)
Site = tuple[np.ndarray, np.ndarray]


def _architecture(weights: Weights, images: tf.Tensor) -> tf.Tensor:
    """Normalizes the images themselves, so that what is measured does not depend on what is trained."""
    identity = tf.eye(2, batch_shape=[1, 1])
    convolve = partial(weights.operations.convolve, images)
    normalized = batch_normalized(weights, "norm", convolve, identity, 2)
    return convolution(weights, "head", normalized, 2)


@pytest.fixture(scope="module")
def study(tiny_study: Callable[..., Study]) -> Study:
    plain = tiny_study(rate=RATE)
    return dataclasses.replace(
        plain,
        task=dataclasses.replace(plain.task, channels=2),
        preprocessing=dataclasses.replace(plain.preprocessing, patch=PATCH),
        training=dataclasses.replace(plain.training, rounds=ROUNDS),
    )


@pytest.fixture(scope="module")
def network(tensorflow: None) -> Network:
    return Network(_architecture, channels=2, dimensions=2, stride=1)


@pytest.fixture(scope="module")
def process(study: Study, network: Network) -> tff.learning.templates.LearningProcess:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.learning.process.build_network", lambda _: network)
        return build_training_process(study)


@pytest.fixture(scope="module")
def plan(process: tff.learning.templates.LearningProcess) -> RoundPlan:
    return RoundPlan(process)


def _sites() -> list[Site]:
    """Sites of different sizes, means and spreads; their last batches are smaller than the others."""
    sites = []
    for seed, (patches, mean, spread) in enumerate([(5, -2.0, 0.5), (3, 4.0, 2.0), (1, 0.5, 1.0)]):
        rng = np.random.default_rng(seed)
        images = rng.normal(mean, spread, size=(patches, *PATCH, 2)).astype(np.float32) * [1, 3]
        labels = rng.integers(2, size=(patches, *PATCH)).astype(np.uint8)
        sites.append((images.astype(np.float32), labels))
    return sites


def _dataset(site: Site) -> tf.data.Dataset:
    return tf.data.Dataset.from_tensor_slices(site).batch(2)


def _next_state(plan: RoundPlan, state: Sequence[Any], sites: Sequence[Site]) -> list[Any]:
    broadcast = plan.prepare(*state)
    total = plan.zero()
    for site in sites:
        plan.accumulate(total, plan.work(_dataset(site), broadcast))
    return plan.update(state, plan.report(*total))[: len(state)]


def _statistics(network: Network, state: Sequence[Any]) -> list[np.ndarray]:
    return to_numpy(state)[len(network.trainable) : len(network.specs)]


def test_pooled_statistics_are_those_of_all_sites_data_at_once(plan: RoundPlan, network: Network) -> None:
    sites = _sites()
    mean, variance = _statistics(network, _next_state(plan, plan.initialize(), sites))
    images = np.concatenate([images for images, _ in sites]).astype(np.float64)
    np.testing.assert_allclose(mean, images.mean(axis=(0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(variance, images.var(axis=(0, 1, 2)), rtol=1e-5)
    within = np.average([site.var(axis=(0, 1, 2)) for site, _ in sites], axis=0, weights=[len(s[0]) for s in sites])
    assert (variance > 1.5 * within).all(), "the variance between the sites is most of it here"


def test_the_last_third_of_the_rounds_is_frozen_and_a_short_study_has_none() -> None:
    assert [adapting_rounds(rounds) for rounds in (1, 2, 3, 24, 25)] == [1, 2, 2, 16, 17]


def test_frozen_rounds_leave_statistics_as_they_are_to_the_bit(plan: RoundPlan, network: Network) -> None:
    state = plan.initialize()
    seen = []
    for number in range(ROUNDS + 1):
        sites = [(images + number, labels) for images, labels in _sites()]
        weights, state = to_numpy(state)[0], _next_state(plan, state, sites)
        assert not np.array_equal(to_numpy(state)[0], weights), "the weights go on"
        seen.append(_statistics(network, state))
    assert not np.array_equal(seen[0][0], seen[1][0])
    for later in seen[2:]:
        np.testing.assert_array_equal(later, seen[1])


def test_a_frozen_round_sends_no_moments_and_trains_the_function_that_is_published(
    plan: RoundPlan, network: Network
) -> None:
    state = plan.initialize()
    for _ in range(2):
        state = _next_state(plan, state, _sites())
    images, labels = (part[:2] for part in _sites()[1])
    sent = plan.work(_dataset((images, labels)), plan.prepare(*state))
    weights = [tf.constant(value) for value in to_numpy(state)[: len(network.specs)]]
    trained = weights[: len(network.trainable)]
    with tf.GradientTape() as tape:
        tape.watch(trained)
        loss = dice_cross_entropy(network([*trained, *weights[len(trained) :]], images), labels, head="softmax")
    *updates, _, mean, square, patches = sent[-len(network.specs) - 2 :]
    assert patches == 2
    assert not mean.any() and not square.any()
    for update, gradient in zip(updates, tape.gradient(loss, trained), strict=True):
        np.testing.assert_allclose(update, patches * RATE * gradient.numpy(), atol=1e-5)


def test_an_adapting_round_normalizes_by_the_batch(plan: RoundPlan) -> None:
    """Shifted and scaled images are the same to it, but for the small constant beside the variance."""
    images, labels = (part[:2] for part in _sites()[1])
    broadcast = plan.prepare(*plan.initialize())
    one, two = (plan.work(_dataset((values, labels)), broadcast) for values in (images, 2 * images + 5))
    for left, right in zip(one[3:-4], two[3:-4], strict=True):
        assert np.abs(left).max() > 0
        np.testing.assert_allclose(left, right, atol=1e-3)


def test_statistics_stay_where_no_site_has_data(plan: RoundPlan, network: Network) -> None:
    state = _next_state(plan, plan.initialize(), _sites())
    nothing = (np.zeros((0, *PATCH, 2), np.float32), np.zeros((0, *PATCH), np.uint8))
    for before, after in zip(
        _statistics(network, state), _statistics(network, _next_state(plan, state, [nothing])), strict=True
    ):
        np.testing.assert_array_equal(before, after)


def test_an_update_that_is_not_finite_counts_in_no_statistics(plan: RoundPlan, network: Network) -> None:
    sites = _sites()
    broken = (np.full_like(sites[0][0], np.inf), sites[0][1])
    found = _statistics(network, _next_state(plan, plan.initialize(), [broken, sites[1]]))
    alone = _statistics(network, _next_state(plan, plan.initialize(), sites[1:2]))
    np.testing.assert_array_equal(found, alone)


def test_the_plan_equals_tffs_own_runtime_through_adapting_and_frozen_rounds(
    plan: RoundPlan, process: tff.learning.templates.LearningProcess, network: Network
) -> None:
    native = process.initialize()
    state = plan.initialize()
    for _ in range(ROUNDS):
        native = process.next(native, [_dataset(site) for site in _sites()]).state
        state = _next_state(plan, state, _sites())
    expected = process.get_model_weights(native)
    values = [*expected.trainable, *expected.non_trainable]
    for one, two in zip(values, to_numpy(state)[: len(network.specs)], strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_u_net_learns_and_by_a_batchs_own_statistics_all_its_passes_are_one_function(
    tensorflow: None, tiny_study: Callable[..., Study], dimensions: int
) -> None:
    network = build_network(tiny_study(dimensions=dimensions, normalization="batch"))
    rng = np.random.default_rng(1)
    labels = rng.integers(2, size=(2, *[16] * dimensions)).astype(np.uint8)
    images = (labels[..., np.newaxis] + 0.1 * rng.normal(size=(*labels.shape, 1))).astype(np.float32)
    weights = network.initial_weights(0)
    trained, initial = weights[: len(network.trainable)], weights[len(network.trainable) :]

    @tf.function
    def step(trained: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(trained)
            logits, _ = network.train([*trained, *initial], images, tf.constant(False))
            loss = dice_cross_entropy(logits, labels, head="softmax")
        gradients = tape.gradient(loss, trained)
        return loss, tuple(w - 0.05 * g for w, g in zip(trained, gradients, strict=True))

    losses = []
    for _ in range(6):
        loss, trained = step(trained)
        losses.append(float(loss))
    assert losses[-1] < losses[0]

    adapting, moments = network.train([*trained, *initial], images, tf.constant(False))
    weights = [*trained, *statistics_of(moments)]
    frozen, _ = network.train(weights, images, tf.constant(True))
    np.testing.assert_allclose(frozen, adapting, atol=1e-4)
    np.testing.assert_allclose(network(weights, images), adapting, atol=1e-4)
