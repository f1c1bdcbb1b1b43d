"""Private training at a site: clipping against NumPy, noise by its statistics, and what is sent beside the update."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff

from common.learning.client_work import learning_rate_schedule
from common.learning.plan import RoundPlan
from common.learning.private_work import Clipping, build_private_client_work, clipped, gaussian_noise

RATE = 0.1
EXPECTED = 4.0
ELEMENT = (
    tf.TensorSpec([None, None, 2], tf.float32),
    tf.TensorSpec([None, None, 1], tf.float32),
    tf.TensorSpec([2], tf.int64),
)

Step = tuple[np.ndarray, np.ndarray, tuple[int, int]]


def _model() -> tff.learning.models.FunctionalModel:
    """y = x w + b, squared error: the gradient by w is 2 x^T (x w + b - y) / n, by hand, that by b its mean."""

    @tf.function
    def predict(weights: Any, x: tf.Tensor, training: bool) -> tf.Tensor:
        return tf.matmul(x, weights[0][0]) + weights[0][1]

    return tff.learning.models.FunctionalModel(
        initial_weights=((np.ones((2, 1), np.float32), np.zeros(1, np.float32)), ()),
        predict_on_batch_fn=predict,
        loss_fn=lambda output, label, sample_weight=None: tf.reduce_mean(tf.square(output - label)),
        input_spec=(tf.TensorSpec([None, 2], tf.float32), tf.TensorSpec([None, 1], tf.float32)),
    )


def _plan(noise: float = 0.0, norm: float = 0.5, **options: Any) -> RoundPlan:
    model = _model()

    @tff.tensorflow.computation
    def initial() -> Any:
        return tff.learning.models.ModelWeights(tuple(tf.constant(w) for w in model.initial_weights[0]), ())

    kind = initial.type_signature.result
    work = build_private_client_work(
        model,
        tff.learning.optimizers.build_sgdm(RATE),
        learning_rate_schedule(RATE, schedule="constant", rounds=9),
        Clipping(norm, noise, EXPECTED),
        **options,
    )
    process = tff.learning.templates.compose_learning_process(
        initial,
        tff.learning.templates.build_broadcast_process(kind),
        work,
        tff.aggregators.MeanFactory().create(kind.trainable, tff.TensorType(np.float32)),
        tff.learning.templates.build_apply_optimizer_finalizer(tff.learning.optimizers.build_sgdm(1.0), kind),
    )
    return RoundPlan(process)


@pytest.fixture(scope="module")
def quiet() -> RoundPlan:
    """Without noise, clipped to 0.5."""
    return _plan()


@pytest.fixture(scope="module")
def noisy() -> RoundPlan:
    return _plan(noise=2.0)


def _sent(plan: RoundPlan, steps: list[Step]) -> list[np.ndarray]:
    """The update's two parts, its weight, and what is sent beside it."""
    values = [(x.astype(np.float32), y.astype(np.float32), np.array(seed, np.int64)) for x, y, seed in steps]
    dataset = tf.data.Dataset.from_generator(lambda: iter(values), output_signature=ELEMENT)
    sent = plan.work(dataset, plan.prepare(*plan.initialize()))
    return sorted(sent, key=lambda value: value.dtype.kind == "i")


def _step(seed: int, patients: int, crops: int = 3) -> Step:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(patients, crops, 2)) * 2, rng.normal(size=(patients, crops, 1)), (seed, 7)


def _by_hand(steps: list[Step], norm: float, mu: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """w0 - w and b0 - b, a patient at a time, in float64."""
    start = np.ones((2, 1)), np.zeros(1)
    w, b = start
    for x, y, _ in steps:
        total_w, total_b = np.zeros((2, 1)), np.zeros(1)
        for patient in range(len(x)):
            off = x[patient] @ w + b - y[patient]
            by_w, by_b = 2 * x[patient].T @ off / len(off), 2 * off.mean(0)
            length = np.sqrt((by_w**2).sum() + (by_b**2).sum())
            factor = min(1.0, norm / length)
            total_w, total_b = total_w + factor * by_w, total_b + factor * by_b
        w, b = (
            w - RATE * (total_w / EXPECTED + mu * (w - start[0])),
            b - RATE * (total_b / EXPECTED + mu * (b - start[1])),
        )
    return start[0] - w, start[1] - b


@pytest.mark.parametrize("patients", [[5], [1, 3, 0, 6]])
def test_every_patients_gradient_is_clipped_by_itself_and_divided_by_the_number_expected(
    quiet: RoundPlan, patients: list[int]
) -> None:
    steps = [_step(10 + place, count) for place, count in enumerate(patients)]
    for found, expected in zip(_sent(quiet, steps)[:2], _by_hand(steps, 0.5), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_patient_whose_gradient_is_shorter_is_left_as_it_is() -> None:
    steps = [_step(3, 4)]
    for found, expected in zip(_sent(_plan(norm=1000.0), steps)[:2], _by_hand(steps, 1000.0), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_one_patient_moves_the_weights_by_no_more_than_the_norm_allows(quiet: RoundPlan) -> None:
    x, y, seed = _step(4, 6)
    without = _sent(quiet, [(x[:-1], y[:-1], seed)])
    y[-1] = 1e6  # however strange that patient is
    difference = np.concatenate([(a - b).ravel() for a, b in zip(_sent(quiet, [(x, y, seed)]), without, strict=True)])
    assert np.linalg.norm(difference) <= RATE * 0.5 / EXPECTED * (1 + 1e-5)


def test_a_patient_whose_gradient_is_not_finite_adds_nothing(quiet: RoundPlan) -> None:
    x, y, seed = _step(5, 3)
    y[1] = np.inf
    others = np.delete(x, 1, 0), np.delete(y, 1, 0), seed
    for found, expected in zip(_sent(quiet, [(x, y, seed)]), _sent(quiet, [others]), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_what_is_sent_beside_the_update_is_the_same_whatever_the_data(noisy: RoundPlan) -> None:
    few, many = _sent(noisy, [_step(6, 0), _step(7, 0)]), _sent(noisy, [_step(6, 9), _step(7, 5)])
    assert len(few) == 4  # two weights' updates, the weight, the number of steps: no loss, no count of patients
    assert few[2] == many[2] == 1.0
    assert few[3] == many[3] == 2


def test_an_empty_step_is_noise_alone(noisy: RoundPlan, quiet: RoundPlan) -> None:
    empty = _step(8, 0)
    assert all(not part.any() for part in _sent(quiet, [empty])[:2])
    noise = gaussian_noise([tf.TensorSpec([2, 1]), tf.TensorSpec([1])], tf.constant(empty[2], tf.int64), 2.0 * 0.5)
    for found, drawn in zip(_sent(noisy, [empty])[:2], noise, strict=True):
        np.testing.assert_allclose(found, RATE * drawn.numpy() / EXPECTED, atol=1e-7)


def test_noise_has_the_deviation_of_multiplier_times_norm_and_is_independent() -> None:
    # 2000 weights in 50 draws: the sample deviation of 10^5 values is within 1 % by far (its own is 0.22 %).
    specs = [tf.TensorSpec([30, 50]), tf.TensorSpec([500])]
    drawn = np.stack(
        [
            np.concatenate([part.numpy().ravel() for part in gaussian_noise(specs, tf.constant([3, n], tf.int64), 1.5)])
            for n in range(50)
        ]
    )
    assert drawn.std() == pytest.approx(1.5, rel=0.01)
    assert abs(drawn.mean()) < 0.025
    assert (np.abs(drawn) > 1.96 * 1.5).mean() == pytest.approx(0.05, abs=0.005)
    correlations = np.corrcoef(drawn) - np.eye(50)  # 1225 pairs of 2000 values: the largest is about 0.08
    assert np.abs(correlations).max() < 0.13


def test_the_same_seed_gives_the_same_bits_and_another_one_others(noisy: RoundPlan) -> None:
    x, y, seed = _step(9, 4)
    first, again = _sent(noisy, [(x, y, seed)]), _sent(noisy, [(x, y, seed)])
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, two)
    for other in ((9, 8), (10, 7), (9 + 2**32, 7), (9, 7 + 2**40)):  # all 128 bits count
        assert not np.array_equal(_sent(noisy, [(x, y, other)])[0], first[0])


def test_the_proximal_term_is_added_after_the_noise(quiet: RoundPlan) -> None:
    steps = [_step(11, 3), _step(12, 5)]
    for found, expected in zip(_sent(_plan(proximal_mu=0.7), steps)[:2], _by_hand(steps, 0.5, 0.7), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_clipping_is_by_the_norm_over_all_weights_together() -> None:
    parts = clipped((tf.constant([3.0]), tf.constant([[0.0, 4.0]])), 1.0)
    np.testing.assert_allclose(np.concatenate([p.numpy().ravel() for p in parts]), [0.6, 0.0, 0.8], rtol=1e-6)
    zeros = clipped((tf.zeros(3),), 1.0)
    np.testing.assert_array_equal(zeros[0], 0)


def test_models_with_batch_statistics_are_refused() -> None:
    model = _model()
    with pytest.raises(ValueError, match="without batch statistics"):
        build_private_client_work(
            tff.learning.models.FunctionalModel(
                initial_weights=(model.initial_weights[0], (np.zeros(1, np.float32),)),
                predict_on_batch_fn=model.predict_on_batch,
                loss_fn=model.loss,
                input_spec=model.input_spec,
            ),
            tff.learning.optimizers.build_sgdm(RATE),
            learning_rate_schedule(RATE, schedule="constant", rounds=9),
            Clipping(1.0, 1.0, 1.0),
        )
