"""Patient-level DP-SGD at a site, as a TFF client work (Abadi et al. 2016, arXiv:1607.00133).

A step sees a batch of patients, of whom each was drawn by chance alone. Each patient's gradient, of the loss over that
patient's patches, is clipped to a norm; they are summed, Gaussian noise is added, and the sum is divided by the number
of patients that was *expected*, which says nothing about who was drawn. All that follows (the optimizer, FedProx's
pull, the update, the aggregation) sees no data but through these noisy sums.

What is sent besides is the same whatever the data are: a weight of 1 and the number of steps. There is no training
loss in it, and no count of patients.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from common.learning.client_work import Tensors, work_of_rounds


@dataclass(frozen=True)
class Clipping:
    """How a step's gradient is made private.

    Attributes
    ----------
    norm : the largest L2 norm, over all weights together, of one patient's gradient.
    noise_multiplier : the noise's standard deviation divided by `norm`.
    expected_patients : what the noisy sum is divided by.
    """

    norm: float
    noise_multiplier: float
    expected_patients: float


def build_private_client_work(
    model: tff.learning.models.FunctionalModel,
    optimizer: tff.learning.optimizers.Optimizer,
    learning_rate: Callable[[tf.Tensor], tf.Tensor],
    clipping: Clipping,
    *,
    proximal_mu: float = 0.0,
    sum_metrics: Callable[[Any], Any] = tff.federated_sum,
) -> tff.learning.templates.ClientWorkProcess:
    """A client work whose update is `w0 - w` after local training, with weight 1.

    An element of the data is a step: images (patients, patches, ...), labels (patients, patches, ...) and the seed of
    its noise, int64 (2,), which the site draws for this step alone. No patients is a step of noise alone. A patient
    whose gradient is not finite adds nothing.

    The parameters are those of `common.learning.client_work.build_client_work`. The model has no batch statistics.

    Raises
    ------
    ValueError : the model has batch statistics.
    """
    if model.initial_weights[1]:
        raise ValueError("expected a model without batch statistics: nothing clips and noises them")
    batch_type = tuple(tf.TensorSpec([None, *spec.shape], spec.dtype) for spec in model.input_spec)
    data_type = tff.SequenceType(tff.types.tensorflow_to_type((*batch_type, tf.TensorSpec([2], tf.int64))))
    specs = tuple(tf.TensorSpec(weight.shape, weight.dtype) for weight in model.initial_weights[0])
    weights_type = tff.types.tensorflow_to_type(tff.learning.models.ModelWeights(specs, ()))

    @tf.autograph.experimental.do_not_convert
    def begin(start: Tensors, rate: tf.Tensor) -> Any:
        state = optimizer.set_hparams(optimizer.initialize(specs), collections.OrderedDict(learning_rate=rate))
        return start, state, tf.constant(0, tf.int64)

    @tf.autograph.experimental.do_not_convert
    def step(start: Tensors, images: tf.Tensor, labels: tf.Tensor, seed: tf.Tensor, progress: Any) -> Any:
        weights, state, steps = progress
        total = sum_of_clipped(model, weights, images, labels, clipping.norm)
        noise = gaussian_noise(specs, seed, clipping.noise_multiplier * clipping.norm)
        gradients = tuple((part + own) / clipping.expected_patients for part, own in zip(total, noise, strict=True))
        if proximal_mu:  # of weights alone, which are private already
            gradients = tuple(g + proximal_mu * (w - w0) for g, w, w0 in zip(gradients, weights, start, strict=True))
        state, weights = optimizer.next(state, weights, gradients)
        return tuple(weights), state, steps + 1

    @tf.autograph.experimental.do_not_convert
    def finish(start: Tensors, progress: Any) -> Any:
        weights, _, steps = progress
        update = tuple(w0 - w for w0, w in zip(start, weights, strict=True))
        finite = tf.reduce_all(tf.stack([tf.reduce_all(tf.math.is_finite(value)) for value in update]))
        update = tuple(tf.where(finite, value, tf.zeros_like(value)) for value in update)
        return (
            tff.learning.templates.ClientResult(update=update, update_weight=tf.where(finite, 1.0, 0.0)),
            collections.OrderedDict(steps=steps),
        )

    @tff.tensorflow.computation(np.int32)
    def rate_of(round_index: tf.Tensor) -> tf.Tensor:
        return learning_rate(round_index)

    @tff.tensorflow.computation(weights_type, data_type, np.float32)
    @tf.function
    def client_update(broadcast: Any, dataset: tf.data.Dataset, rate: tf.Tensor) -> Any:
        start = tuple(broadcast.trainable)
        progress = begin(start, rate)
        for images, labels, seed in iter(dataset):
            progress = step(start, images, labels, seed, progress)
        return finish(start, progress)

    return work_of_rounds(client_update, rate_of, weights_type, data_type, sum_metrics)


def sum_of_clipped(model: Any, weights: Tensors, images: tf.Tensor, labels: tf.Tensor, norm: float) -> Tensors:
    """The sum over patients of the gradients of their losses, each clipped to the L2 norm over all weights.

    Patients come one after the other, so that the memory is that of one, whatever their number. One whose gradient is
    not finite, or has a norm that float32 cannot hold, adds nothing: what is not a number cannot be clipped.
    """
    patients = tf.shape(images)[0]

    def add(index: tf.Tensor, *total: tf.Tensor) -> tuple[tf.Tensor, ...]:
        with tf.GradientTape() as tape:
            tape.watch(weights)
            loss = model.loss(model.predict_on_batch((weights, ()), images[index], training=True), labels[index])
        gradient = tape.gradient(loss, weights, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        own = clipped(gradient, norm)
        return (index + 1, *(part + added for part, added in zip(total, own, strict=True)))

    zeros = tuple(tf.zeros_like(weight) for weight in weights)
    _, *total = tf.while_loop(lambda index, *_: index < patients, add, (tf.constant(0), *zeros), parallel_iterations=1)
    return tuple(total)


def clipped(values: Tensors, norm: float) -> Tensors:
    """The values, scaled down to the L2 norm over all of them where theirs is larger; zeros where it is not finite."""
    square = tf.add_n([tf.reduce_sum(tf.square(value)) for value in values])
    finite = tf.math.is_finite(square)
    factor = tf.minimum(1.0, tf.math.divide_no_nan(norm, tf.sqrt(square)))
    factor = tf.where(square > 0.0, factor, 1.0)
    return tuple(tf.where(finite, value * factor, tf.zeros_like(value)) for value in values)


def gaussian_noise(specs: Any, seed: tf.Tensor, deviation: float) -> Tensors:
    """Independent Gaussian noise of these shapes, which follows from the seed, int64 (2,), alone."""
    sizes = [spec.shape.num_elements() for spec in specs]
    flat = tf.random.stateless_normal([sum(sizes)], seed, stddev=deviation, alg="philox")
    return tuple(tf.reshape(part, spec.shape) for part, spec in zip(tf.split(flat, sizes), specs, strict=True))
