"""Local training: the proximal term, against a hand-written loop; FedAvg, against TFF's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff

from common.learning.client_work import build_client_work, learning_rate_schedule

RATE = 0.1


def _linear_model() -> tff.learning.models.FunctionalModel:
    """y = x w, squared error: the gradient is 2 x^T (x w - y) / n, by hand."""

    @tf.function
    def predict(weights: Any, x: tf.Tensor, training: bool) -> tf.Tensor:
        return tf.matmul(x, weights[0][0])

    return tff.learning.models.FunctionalModel(
        initial_weights=((np.ones((2, 1), np.float32),), ()),
        predict_on_batch_fn=predict,
        loss_fn=lambda output, label, sample_weight=None: tf.reduce_mean(tf.square(output - label)),
        input_spec=(tf.TensorSpec([None, 2], tf.float32), tf.TensorSpec([None, 1], tf.float32)),
    )


def _batches(seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=(4, 2)).astype(np.float32), rng.normal(size=(4, 1)).astype(np.float32)) for _ in range(5)]


def _dataset(batches: list[tuple[np.ndarray, np.ndarray]]) -> tf.data.Dataset:
    images, labels = (np.concatenate(part) for part in zip(*batches, strict=True))
    return tf.data.Dataset.from_tensor_slices((images, labels)).batch(4)


def _process(model: tff.learning.models.FunctionalModel, **options: Any) -> tff.learning.templates.LearningProcess:
    @tff.tensorflow.computation
    def initial() -> Any:
        return tff.learning.models.ModelWeights(tuple(tf.constant(w) for w in model.initial_weights[0]), ())

    kind = initial.type_signature.result
    optimizer = tff.learning.optimizers.build_sgdm(RATE)
    work = build_client_work(model, optimizer, learning_rate_schedule(RATE, schedule="constant", rounds=9), **options)
    return tff.learning.templates.compose_learning_process(
        initial,
        tff.learning.templates.build_broadcast_process(kind),
        work,
        tff.aggregators.MeanFactory().create(kind.trainable, tff.TensorType(np.float32)),
        tff.learning.templates.build_apply_optimizer_finalizer(tff.learning.optimizers.build_sgdm(1.0), kind),
    )


def _update(mu: float, batches: list[tuple[np.ndarray, np.ndarray]], **options: Any) -> np.ndarray:
    """w0 - w after one site's work, which sends it times its weight."""
    from common.learning.plan import RoundPlan

    plan = RoundPlan(_process(_linear_model(), proximal_mu=mu, **options))
    update, weight = plan.work(_dataset(batches), plan.prepare(*plan.initialize()))[:2]
    return update / weight


def test_the_proximal_gradient_is_g_plus_mu_times_w_minus_w0() -> None:
    batches, mu = _batches(0), 0.7
    start = np.ones((2, 1))
    w = start.copy()
    for x, y in batches:
        gradient = 2 * x.T @ (x @ w - y) / len(x)
        w = w - RATE * (gradient + mu * (w - start))
    np.testing.assert_allclose(_update(mu, batches), start - w, atol=1e-6)


def test_movement_from_the_global_model_shrinks_as_mu_grows() -> None:
    batches = _batches(1)
    movement = [float(np.linalg.norm(_update(mu, batches))) for mu in (0.0, 0.1, 1.0, 5.0)]
    assert movement == sorted(movement, reverse=True)
    assert movement[-1] < 0.8 * movement[0]


def test_fedavg_equals_tffs_own_fedavg() -> None:
    model, sites = _linear_model(), [_batches(2), _batches(3)[:3]]
    stock = tff.learning.algorithms.build_weighted_fed_avg(
        model,
        client_optimizer_fn=tff.learning.optimizers.build_sgdm(RATE),
        server_optimizer_fn=tff.learning.optimizers.build_sgdm(1.0),
    )
    ours = _process(model)
    results = []
    for process in (stock, ours):
        state = process.initialize()
        for _ in range(2):
            state = process.next(state, [_dataset(batches) for batches in sites]).state
        results.append(process.get_model_weights(state).trainable[0])
    np.testing.assert_allclose(results[1], results[0], atol=1e-6)


def test_an_update_that_is_not_finite_is_sent_as_zeros_without_weight() -> None:
    from common.learning.plan import RoundPlan

    plan = RoundPlan(_process(_linear_model()))
    batches = _batches(4)
    batches[2][1][0] = np.inf
    update, weight = plan.work(_dataset(batches), plan.prepare(*plan.initialize()))[:2]
    np.testing.assert_array_equal(update, 0)
    assert weight == 0


def test_gradients_are_clipped_to_the_global_norm() -> None:
    batches = _batches(5)[:1]
    free = _update(0.0, batches)
    clipped = _update(0.0, batches, clip_norm=0.01)
    assert np.linalg.norm(free) > RATE * 0.01
    assert np.linalg.norm(clipped) == pytest.approx(RATE * 0.01, rel=1e-4)


def test_sites_count_the_same_where_the_study_says_equal() -> None:
    from common.learning.plan import RoundPlan

    plan = RoundPlan(_process(_linear_model(), weighting="equal"))
    weight = plan.work(_dataset(_batches(6)), plan.prepare(*plan.initialize()))[1]
    assert weight == 1.0


def test_cosine_rate_falls_from_the_full_rate_and_never_reaches_zero_and_warm_up_rises() -> None:
    cosine = learning_rate_schedule(0.4, schedule="cosine", rounds=4)
    # 0.4 * (1 + cos(pi * i / 4)) / 2 for i = 0..3
    np.testing.assert_allclose(
        [float(cosine(tf.constant(i))) for i in range(4)], [0.4, 0.341421, 0.2, 0.058579], atol=1e-5
    )
    warm = learning_rate_schedule(0.3, schedule="constant", rounds=5, warmup_rounds=2)
    np.testing.assert_allclose([float(warm(tf.constant(i))) for i in range(4)], [0.1, 0.2, 0.3, 0.3], atol=1e-6)
