"""What a site does with the broadcast weights: local training from them, FedAvg or FedProx, as a TFF client work.

FedAvg is McMahan et al. 2017 (arXiv:1602.05629), FedProx Li et al. 2020 (arXiv:1812.06127). TFF 0.87's own proximal
client work adds the gradient of the proximal term with the wrong sign, and its FedAvg has no learning-rate schedule
that a `MapReduceForm` can carry; hence this one, which equals TFF's FedAvg where both apply.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

OptimizerFactory = Callable[[float], tff.learning.optimizers.Optimizer]


def build_client_work(
    model: tff.learning.models.FunctionalModel,
    optimizer: tff.learning.optimizers.Optimizer,
    learning_rate: Callable[[tf.Tensor], tf.Tensor],
    *,
    proximal_mu: float = 0.0,
    clip_norm: float | None = None,
    weighting: str = "examples",
) -> tff.learning.templates.ClientWorkProcess:
    """A client work whose update is `w0 - w` after local training, as TFF's finalizers expect.

    Parameters
    ----------
    model : what is trained.
    optimizer : the local optimizer; its state begins anew each round.
    learning_rate : maps the round (int32 scalar, the first is 0) to the local learning rate.
    proximal_mu : mu of FedProx: each step's gradient is g + mu * (w - w0). 0 is FedAvg.
    clip_norm : the largest global norm of a step's gradient; None does not clip.
    weighting : "examples" weights an update by its patches, "equal" counts every site the same.

    The state is the number of rounds done. An update with a value that is not finite is sent as zeros with weight 0.
    """
    data_type = tff.SequenceType(tff.types.tensorflow_to_type(model.input_spec))
    specs = tuple(tf.TensorSpec(weight.shape, weight.dtype) for weight in model.initial_weights[0])
    weights_type = tff.types.tensorflow_to_type(tff.learning.models.ModelWeights(specs, ()))

    # Autograph turns the loop over batches into a graph's loop; it need not read the rest, which takes it seconds.
    @tf.autograph.experimental.do_not_convert
    def begin(start: Any, rate: tf.Tensor) -> Any:
        state = optimizer.set_hparams(optimizer.initialize(specs), collections.OrderedDict(learning_rate=rate))
        return start, state, model.initialize_metrics_state(), tf.constant(0, tf.int64)

    @tf.autograph.experimental.do_not_convert
    def step(
        start: Any, images: tf.Tensor, labels: tf.Tensor, weights: Any, state: Any, metrics: Any, examples: Any
    ) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(weights)
            logits = model.predict_on_batch((weights, ()), images, training=True)
            loss = model.loss(logits, labels)
        gradients = tape.gradient(loss, weights)
        if clip_norm is not None:
            gradients = tuple(tf.clip_by_global_norm(gradients, clip_norm)[0])
        if proximal_mu:
            gradients = tuple(g + proximal_mu * (w - w0) for g, w, w0 in zip(gradients, weights, start, strict=True))
        state, weights = optimizer.next(state, weights, gradients)
        batch = tf.shape(images)[0]
        output = tff.learning.models.BatchOutput(loss=loss, predictions=logits, num_examples=batch)
        metrics = model.update_metrics_state(metrics, labels=labels, batch_output=output)
        return weights, state, metrics, examples + tf.cast(batch, tf.int64)

    @tf.autograph.experimental.do_not_convert
    def finish(start: Any, weights: Any, metrics: Any, examples: tf.Tensor) -> Any:
        update = tuple(w0 - w for w0, w in zip(start, weights, strict=True))
        finite = tf.reduce_all(tf.stack([tf.reduce_all(tf.math.is_finite(delta)) for delta in update]))
        update = tuple(tf.where(finite, delta, tf.zeros_like(delta)) for delta in update)
        weight = tf.cast(examples, tf.float32) if weighting == "examples" else tf.cast(examples > 0, tf.float32)
        return (
            tff.learning.templates.ClientResult(update=update, update_weight=tf.where(finite, weight, 0.0)),
            tf.nest.map_structure(lambda value: tf.where(finite, value, tf.zeros_like(value)), metrics),
        )

    @tff.tensorflow.computation(weights_type, data_type, np.float32)
    @tf.function
    def client_update(broadcast: Any, dataset: tf.data.Dataset, rate: tf.Tensor) -> Any:
        start = tuple(broadcast.trainable)
        weights, state, metrics, examples = begin(start, rate)
        for images, labels in iter(dataset):
            weights, state, metrics, examples = step(start, images, labels, weights, state, metrics, examples)
        return finish(start, weights, metrics, examples)

    @tff.tensorflow.computation(np.int32)
    def rate_of(round_index: tf.Tensor) -> tf.Tensor:
        return learning_rate(round_index)

    @tff.tensorflow.computation(np.int32)
    def following(round_index: tf.Tensor) -> tf.Tensor:
        return round_index + 1

    @tff.federated_computation
    def initialize() -> Any:
        return tff.federated_value(np.int32(0), tff.SERVER)

    @tff.federated_computation(
        tff.FederatedType(np.int32, tff.SERVER),
        tff.FederatedType(weights_type, tff.CLIENTS),
        tff.FederatedType(data_type, tff.CLIENTS),
    )
    def following_round(state: Any, weights: Any, data: Any) -> Any:
        rate = tff.federated_broadcast(tff.federated_map(rate_of, state))
        result, metrics = tff.federated_map(client_update, (weights, data, rate))
        train = tff.learning.metrics.sum_then_finalize(model.finalize_metrics)(metrics)
        return tff.templates.MeasuredProcessOutput(
            tff.federated_map(following, state),
            result,
            tff.federated_zip(collections.OrderedDict(train=train)),
        )

    return tff.learning.templates.ClientWorkProcess(initialize, following_round)


def learning_rate_schedule(
    rate: float, *, schedule: str, rounds: int, warmup_rounds: int = 0
) -> Callable[[tf.Tensor], tf.Tensor]:
    """The local learning rate by round: linear over the warm-up, then constant or half a cosine that ends near zero.

    With "cosine" the last round trains at rate * (1 + cos(pi * (n - 1) / n)) / 2 for n rounds after the warm-up, so
    that no round is wasted on a rate of zero (Loshchilov & Hutter 2017, arXiv:1608.03983).
    """

    def at(round_index: tf.Tensor) -> tf.Tensor:
        index = tf.cast(round_index, tf.float32)
        factor = tf.ones([])
        if schedule == "cosine":
            decay = max(rounds - warmup_rounds, 1)
            progress = tf.clip_by_value((index - warmup_rounds) / decay, 0.0, 1.0)
            factor = (1.0 + tf.cos(math.pi * progress)) / 2.0
        if warmup_rounds:
            factor = tf.where(index < warmup_rounds, (index + 1.0) / (warmup_rounds + 1.0), factor)
        return rate * factor

    return at
