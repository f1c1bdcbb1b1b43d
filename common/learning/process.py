"""A study as TFF learning processes: the one that trains and the one that evaluates at the sites."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from common.learning.batch_statistics import SideBySideFactory, adapting_rounds, build_finalizer
from common.learning.client_work import build_client_work, learning_rate_schedule
from common.learning.model import evaluation_model, site_dice, training_model, training_normalization
from common.learning.noisy_sum import NoisyMeanFactory
from common.learning.private_work import Clipping, build_private_client_work
from common.learning.secure_sums import (
    FixedPointSumFactory,
    SecureMeanFactory,
    largest_weight,
    share_sum,
    training_metrics_sum,
)
from common.models import build_network
from common.models.network import Network
from common.models.operations import NATIVE, Operations
from common.study import ClientOptimizer, ServerOptimizer, Study

_optimizers = tff.learning.optimizers


def build_training_process(study: Study, operations: Operations = NATIVE) -> tff.learning.templates.LearningProcess:
    """Weighted FedAvg or FedProx with the study's optimizers; its initial weights follow from the study's seed.

    Parameters
    ----------
    operations : how convolutions are computed in local training. It changes no type: sites may differ in it.
    """
    network = build_network(study)

    @tff.tensorflow.computation
    def initial_weights() -> Any:
        values = network.initial_weights(study.seed)
        trained = len(network.trainable)
        return tff.learning.models.ModelWeights(values[:trained], values[trained:])

    weights_type = initial_weights.type_signature.result
    work = _client_work(study, network, operations)
    return tff.learning.templates.compose_learning_process(
        initial_weights,
        tff.learning.templates.build_broadcast_process(weights_type),
        work,
        _aggregator(study, weights_type),
        _finalizer(study, weights_type),
    )


def _client_work(study: Study, network: Network, operations: Operations) -> tff.learning.templates.ClientWorkProcess:
    training, privacy = study.training, study.privacy
    model = training_model(study, network, operations)
    optimizer = build_optimizer(training.client_optimizer)
    rate = learning_rate_schedule(
        training.client_optimizer.learning_rate,
        schedule=training.client_optimizer.schedule,
        rounds=training.rounds,
        warmup_rounds=training.client_optimizer.warmup_rounds,
    )
    secure_sum = training_metrics_sum(study, model.finalize_metrics) if study.secure_aggregation.required else None
    if privacy.unit == "patient":
        clipping = Clipping(privacy.clip_norm, privacy.noise_multiplier, privacy.patients_per_step)
        summed = secure_sum or tff.federated_sum
        return build_private_client_work(
            model, optimizer, rate, clipping, proximal_mu=training.proximal_mu, sum_metrics=summed
        )
    return build_client_work(
        model,
        optimizer,
        rate,
        proximal_mu=training.proximal_mu,
        clip_norm=training.clip_norm,
        weighting=training.weighting,
        normalization=training_normalization(study, network, operations),
        sum_metrics=secure_sum,
    )


def _aggregator(study: Study, weights_type: tff.Type) -> tff.templates.AggregationProcess:
    """Weighted means: of the updates and, in models with batch statistics, apart from them of the moments.

    With privacy at the level of sites, the noisy mean. With secure aggregation, of sums that alone can be read.
    """
    privacy, secure = study.privacy, study.secure_aggregation
    if privacy.unit == "site":
        total = None
        if secure.required:  # no value of a clipped update is larger than its norm
            total = FixedPointSumFactory(privacy.clip_norm, len(study.cohort.sites))
        noisy = NoisyMeanFactory(privacy.clip_norm, privacy.noise_multiplier, len(study.cohort.sites), total)
        return noisy.create(weights_type.trainable, tff.TensorType(np.float32))
    if secure.required:
        secure_mean = SecureMeanFactory(secure.largest_update, largest_weight(study), len(study.cohort.sites))
        return secure_mean.create(weights_type.trainable, tff.TensorType(np.float32))
    mean = tff.aggregators.MeanFactory(no_nan_division=True)
    if not weights_type.non_trainable:
        return mean.create(weights_type.trainable, tff.TensorType(np.float32))
    pair = tff.to_type((weights_type.trainable, weights_type.non_trainable))
    return SideBySideFactory(update=mean, moments=mean).create(pair, tff.TensorType(np.float32))


def _finalizer(study: Study, weights_type: tff.Type) -> tff.learning.templates.FinalizerProcess:
    optimizer = build_optimizer(study.training.server_optimizer)
    if not weights_type.non_trainable:
        return tff.learning.templates.build_apply_optimizer_finalizer(optimizer, weights_type)
    # Personal statistics stay at the sites; the global model's stay as they began.
    adapting = 0 if study.training.personal == "normalization" else adapting_rounds(study.training.rounds)
    return build_finalizer(optimizer, weights_type, adapting=adapting)


def build_evaluation_process(study: Study) -> tff.learning.templates.LearningProcess:
    """Evaluation of the broadcast weights on the sites' validation cases; every site counts the same.

    Its result holds `dice`, float32 (foreground classes,), the mean over the sites where the class occurred, and
    `sites`, the number of sites that had validation cases with a foreground.
    """
    model = evaluation_model(study, build_network(study))
    with tf.Graph().as_default():
        counts = model.initialize_metrics_state()
    counts_type = tff.types.tensorflow_to_type(tf.nest.map_structure(tf.TensorSpec.from_tensor, counts))
    summed = share_sum if study.secure_aggregation.required else tff.federated_sum
    aggregation = _mean_over_sites(counts_type, summed)
    return tff.learning.algorithms.build_fed_eval(model, metrics_aggregation_process=aggregation)


def _mean_over_sites(counts_type: tff.Type, summed: Callable[[Any], Any]) -> tff.templates.AggregationProcess:
    """`summed` adds up structures at the sites. Where all of them must be floats, counts are too."""
    count_type = tf.float32 if summed is share_sum else tf.int32

    @tff.tensorflow.computation(counts_type)
    def at_site(counts: Any) -> Any:
        result = site_dice(counts)
        return collections.OrderedDict(
            dice=result["dice"] * result["occurred"],
            occurred=result["occurred"],
            sites=tf.cast(tf.reduce_any(result["occurred"] > 0), count_type),
        )

    @tff.tensorflow.computation(at_site.type_signature.result)
    def at_server(sums: Any) -> Any:
        sites = sums["sites"] if count_type is tf.int32 else tf.cast(tf.round(sums["sites"]), tf.int32)
        occurred = sums["occurred"] if count_type is tf.int32 else tf.round(sums["occurred"])
        return collections.OrderedDict(dice=tf.math.divide_no_nan(sums["dice"], occurred), sites=sites)

    @tff.federated_computation
    def initialize() -> Any:
        return tff.federated_value((), tff.SERVER)

    @tff.federated_computation(tff.FederatedType((), tff.SERVER), tff.FederatedType(counts_type, tff.CLIENTS))
    def aggregate(state: Any, counts: Any) -> Any:
        result = tff.federated_map(at_server, summed(tff.federated_map(at_site, counts)))
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
