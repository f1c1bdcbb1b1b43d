"""What a site does with the broadcast weights: local training from them, FedAvg or FedProx, as a TFF client work.

FedAvg is McMahan et al. 2017 (arXiv:1602.05629), FedProx Li et al. 2020 (arXiv:1812.06127). TFF 0.87's own proximal
client work adds the gradient of the proximal term with the wrong sign, and its FedAvg has no learning-rate schedule
that a `MapReduceForm` can carry; hence this one, which equals TFF's FedAvg where both apply.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

Tensors = tuple[tf.Tensor, ...]


@dataclass(frozen=True)
class Normalization:
    """How a model with batch statistics trains, its non-trainable weights being pairs of mean and variance.

    Attributes
    ----------
    train : maps trainable weights, statistics, images and whether statistics are frozen (bool scalar) to logits and the
        batch's moments, a pair E[x], E[x^2] for each pair of statistics.
    adapting_rounds : how many rounds, from the first, normalize by batches; in later ones statistics are frozen.
    """

    train: Callable[[Tensors, Tensors, tf.Tensor, tf.Tensor], tuple[tf.Tensor, Tensors]]
    adapting_rounds: int


def build_client_work(
    model: tff.learning.models.FunctionalModel,
    optimizer: tff.learning.optimizers.Optimizer,
    learning_rate: Callable[[tf.Tensor], tf.Tensor],
    *,
    proximal_mu: float = 0.0,
    clip_norm: float | None = None,
    weighting: str = "examples",
    normalization: Normalization | None = None,
    sum_metrics: Callable[[Any], Any] | None = None,
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
    normalization : of models with batch statistics. Their update is a pair: `w0 - w`, and the moments averaged over the
        patches trained on, zeros once statistics are frozen.
    sum_metrics : maps the clients' metrics, placed there, to the server's finalized ones; None: a sum in the clear.

    The state is the number of rounds done. An update with a value that is not finite is sent as zeros with weight 0.
    """
    data_type = tff.SequenceType(tff.types.tensorflow_to_type(model.input_spec))
    specs, measured_specs = (
        tuple(tf.TensorSpec(weight.shape, weight.dtype) for weight in part) for part in model.initial_weights
    )
    weights_type = tff.types.tensorflow_to_type(tff.learning.models.ModelWeights(specs, measured_specs))

    # Autograph turns the loop over batches into a graph's loop; it need not read the rest, which takes it seconds.
    @tf.autograph.experimental.do_not_convert
    def begin(start: Any, rate: tf.Tensor) -> Any:
        state = optimizer.set_hparams(optimizer.initialize(specs), collections.OrderedDict(learning_rate=rate))
        moments = tuple(tf.zeros(spec.shape) for spec in measured_specs)
        return start, state, model.initialize_metrics_state(), moments, tf.constant(0, tf.int64)

    @tf.autograph.experimental.do_not_convert
    def forward(weights: Any, statistics: Any, images: tf.Tensor, conditions: Any) -> tuple[tf.Tensor, Tensors]:
        if normalization is None:
            return model.predict_on_batch((weights, statistics), images, training=True), ()
        return normalization.train(weights, statistics, images, conditions["frozen"])

    @tf.autograph.experimental.do_not_convert
    def step(broadcast: Any, conditions: Any, images: tf.Tensor, labels: tf.Tensor, progress: Any) -> Any:
        weights, state, metrics, moments, examples = progress
        start = tuple(broadcast.trainable)
        with tf.GradientTape() as tape:
            tape.watch(weights)
            logits, measured = forward(weights, tuple(broadcast.non_trainable), images, conditions)
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
        moments = tuple(total + tf.cast(batch, tf.float32) * m for total, m in zip(moments, measured, strict=True))
        return weights, state, metrics, moments, examples + tf.cast(batch, tf.int64)

    @tf.autograph.experimental.do_not_convert
    def finish(broadcast: Any, conditions: Any, progress: Any) -> Any:
        weights, _, metrics, moments, examples = progress
        update = tuple(w0 - w for w0, w in zip(broadcast.trainable, weights, strict=True))
        if normalization is not None:
            moments = tuple(tf.math.divide_no_nan(total, tf.cast(examples, tf.float32)) for total in moments)
            moments = tuple(tf.where(conditions["frozen"], tf.zeros_like(mean), mean) for mean in moments)
            update = (update, moments)
        values = tf.nest.flatten(update)
        finite = tf.reduce_all(tf.stack([tf.reduce_all(tf.math.is_finite(value)) for value in values]))
        update = tf.nest.map_structure(lambda value: tf.where(finite, value, tf.zeros_like(value)), update)
        weight = tf.cast(examples, tf.float32) if weighting == "examples" else tf.cast(examples > 0, tf.float32)
        return (
            tff.learning.templates.ClientResult(update=update, update_weight=tf.where(finite, weight, 0.0)),
            tf.nest.map_structure(lambda value: tf.where(finite, value, tf.zeros_like(value)), metrics),
        )

    @tff.tensorflow.computation(np.int32)
    def conditions_of(round_index: tf.Tensor) -> Any:
        conditions = collections.OrderedDict(rate=learning_rate(round_index))
        if normalization is not None:
            conditions["frozen"] = round_index >= normalization.adapting_rounds
        return conditions

    @tff.tensorflow.computation(weights_type, data_type, conditions_of.type_signature.result)
    @tf.function
    def client_update(broadcast: Any, dataset: tf.data.Dataset, conditions: Any) -> Any:
        progress = begin(tuple(broadcast.trainable), conditions["rate"])
        for images, labels in iter(dataset):
            progress = step(broadcast, conditions, images, labels, progress)
        return finish(broadcast, conditions, progress)

    summed = sum_metrics or tff.learning.metrics.sum_then_finalize(model.finalize_metrics)
    return work_of_rounds(client_update, conditions_of, weights_type, data_type, summed)


def work_of_rounds(
    client_update: tff.Computation,
    conditions_of: tff.Computation,
    weights_type: tff.Type,
    data_type: tff.Type,
    summed: Callable[[Any], Any],
) -> tff.learning.templates.ClientWorkProcess:
    """The client work whose state is the number of rounds done, and that does the same in each but for its conditions.

    Parameters
    ----------
    client_update : maps weights, data and conditions to the client's result and metrics.
    conditions_of : maps the round (int32 scalar, the first is 0) to the conditions that all clients hear.
    summed : maps the clients' metrics, placed there, to the server's.
    """

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
        conditions = tff.federated_broadcast(tff.federated_map(conditions_of, state))
        result, metrics = tff.federated_map(client_update, (weights, data, conditions))
        return tff.templates.MeasuredProcessOutput(
            tff.federated_map(following, state),
            result,
            tff.federated_zip(collections.OrderedDict(train=summed(metrics))),
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
