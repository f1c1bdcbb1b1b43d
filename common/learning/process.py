"""A study as TFF learning processes: the one that trains and the one that evaluates at the sites."""

from __future__ import annotations

import collections
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from common.learning.client_work import build_client_work, learning_rate_schedule
from common.learning.model import evaluation_model, site_dice, training_model
from common.models import build_network
from common.study import ClientOptimizer, ServerOptimizer, Study

_optimizers = tff.learning.optimizers


def build_training_process(study: Study) -> tff.learning.templates.LearningProcess:
    """Weighted FedAvg or FedProx with the study's optimizers; its initial weights follow from the study's seed."""
    network = build_network(study)
    model = training_model(study, network)
    training = study.training

    @tff.tensorflow.computation
    def initial_weights() -> Any:
        return tff.learning.models.ModelWeights(network.initial_weights(study.seed), ())

    weights_type = initial_weights.type_signature.result
    work = build_client_work(
        model,
        build_optimizer(training.client_optimizer),
        learning_rate_schedule(
            training.client_optimizer.learning_rate,
            schedule=training.client_optimizer.schedule,
            rounds=training.rounds,
            warmup_rounds=training.client_optimizer.warmup_rounds,
        ),
        proximal_mu=training.proximal_mu,
        clip_norm=training.clip_norm,
        weighting=training.weighting,
    )
    aggregator = tff.aggregators.MeanFactory(no_nan_division=True).create(
        weights_type.trainable, tff.TensorType(np.float32)
    )
    return tff.learning.templates.compose_learning_process(
        initial_weights,
        tff.learning.templates.build_broadcast_process(weights_type),
        work,
        aggregator,
        tff.learning.templates.build_apply_optimizer_finalizer(
            build_optimizer(training.server_optimizer), weights_type
        ),
    )


def build_evaluation_process(study: Study) -> tff.learning.templates.LearningProcess:
    """Evaluation of the broadcast weights on the sites' validation cases; every site counts the same.

    Its result holds `dice`, float32 (foreground classes,), the mean over the sites where the class occurred, and
    `sites`, the number of sites that had validation cases with a foreground.
    """
    model = evaluation_model(study, build_network(study))
    with tf.Graph().as_default():
        counts = model.initialize_metrics_state()
    counts_type = tff.types.tensorflow_to_type(tf.nest.map_structure(tf.TensorSpec.from_tensor, counts))
    return tff.learning.algorithms.build_fed_eval(model, metrics_aggregation_process=_mean_over_sites(counts_type))


def _mean_over_sites(counts_type: tff.Type) -> tff.templates.AggregationProcess:
    @tff.tensorflow.computation(counts_type)
    def at_site(counts: Any) -> Any:
        result = site_dice(counts)
        return collections.OrderedDict(
            dice=result["dice"] * result["occurred"],
            occurred=result["occurred"],
            sites=tf.cast(tf.reduce_any(result["occurred"] > 0), tf.int32),
        )

    @tff.tensorflow.computation(at_site.type_signature.result)
    def at_server(sums: Any) -> Any:
        return collections.OrderedDict(dice=tf.math.divide_no_nan(sums["dice"], sums["occurred"]), sites=sums["sites"])

    @tff.federated_computation
    def initialize() -> Any:
        return tff.federated_value((), tff.SERVER)

    @tff.federated_computation(tff.FederatedType((), tff.SERVER), tff.FederatedType(counts_type, tff.CLIENTS))
    def aggregate(state: Any, counts: Any) -> Any:
        result = tff.federated_map(at_server, tff.federated_sum(tff.federated_map(at_site, counts)))
        # `build_fed_eval` asks for this round's metrics and those of all rounds; each evaluation here starts afresh.
        return tff.templates.MeasuredProcessOutput(
            state, tff.federated_zip((result, result)), tff.federated_value((), tff.SERVER)
        )

    return tff.templates.AggregationProcess(initialize, aggregate)


def build_optimizer(optimizer: ClientOptimizer | ServerOptimizer) -> tff.learning.optimizers.Optimizer:
    """The TFF optimizer that the study names."""
    rate = optimizer.learning_rate
    if optimizer.name == "sgd":
        return _optimizers.build_sgdm(rate)
    if optimizer.name == "momentum":
        return _optimizers.build_sgdm(rate, momentum=optimizer.momentum)
    build = {"adam": _optimizers.build_adam, "yogi": _optimizers.build_yogi}[optimizer.name]
    return build(rate, beta_1=optimizer.beta_1, beta_2=optimizer.beta_2, epsilon=optimizer.epsilon)
