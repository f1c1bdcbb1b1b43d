"""Statistics of batch normalization across sites: measured while training, aggregated, and frozen towards the end.

Sites send, beside the update of their weights, the moments E[x] and E[x^2] of every normalized channel over the batches
that they trained on. Their mean, weighted as the updates are, gives mean and variance over all sites, the variance
between the sites' means included, which a mean of the sites' variances leaves out. Moments are aggregated on their own:
whatever clips or noises updates must not touch them.

In the last third of the rounds sites normalize by the broadcast statistics, which stay as they are, so that training
ends on the very function that is evaluated and published.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff


def adapting_rounds(rounds: int) -> int:
    """Of so many rounds, how many adapt the statistics: all but the last third, rounded down."""
    return rounds - rounds // 3


def statistics_of(moments: Sequence[Any]) -> tuple[tf.Tensor, ...]:
    """Means and variances, (mean, variance, mean, variance, ...), of moments (E[x], E[x^2], ...)."""
    pairs = zip(moments[::2], moments[1::2], strict=True)
    return tuple(value for mean, square in pairs for value in (mean, tf.maximum(square - mean * mean, 0.0)))


class SideBySideFactory(tff.aggregators.WeightedAggregationFactory):  # type: ignore[misc]
    """Aggregates pairs (update, moments) by a factory of its own for each; both use the same weights."""

    def __init__(
        self,
        update: tff.aggregators.WeightedAggregationFactory,
        moments: tff.aggregators.WeightedAggregationFactory,
    ) -> None:
        self._factories = (update, moments)

    def create(self, value_type: tff.Type, weight_type: tff.Type) -> tff.templates.AggregationProcess:
        """The process for values that are a pair of the structures of floats that the factories take."""
        update, moments = (
            factory.create(part, weight_type) for factory, part in zip(self._factories, value_type, strict=True)
        )

        @tff.federated_computation
        def initialize() -> Any:
            return tff.federated_zip(collections.OrderedDict(update=update.initialize(), moments=moments.initialize()))

        @tff.federated_computation(
            initialize.type_signature.result,
            tff.FederatedType(value_type, tff.CLIENTS),
            tff.FederatedType(weight_type, tff.CLIENTS),
        )
        def aggregate(state: Any, value: Any, weight: Any) -> Any:
            first = update.next(state["update"], value[0], weight)
            second = moments.next(state["moments"], value[1], weight)
            return tff.templates.MeasuredProcessOutput(
                tff.federated_zip(collections.OrderedDict(update=first.state, moments=second.state)),
                tff.federated_zip((first.result, second.result)),
                tff.federated_zip(collections.OrderedDict(update=first.measurements, moments=second.measurements)),
            )

        return tff.templates.AggregationProcess(initialize, aggregate)


def build_finalizer(
    optimizer: tff.learning.optimizers.Optimizer, weights_type: tff.Type, *, adapting: int
) -> tff.learning.templates.FinalizerProcess:
    """Applies the mean update by the optimizer, to the trained weights alone, and sets the statistics.

    Statistics follow from the mean moments in the first `adapting` rounds, and stay as they are in later ones
    and where no site had data. The state is the optimizer's and the number of rounds done.
    """
    apply = tff.learning.templates.build_apply_optimizer_finalizer(optimizer, weights_type)

    @tff.tensorflow.computation(weights_type.non_trainable, weights_type.non_trainable, np.int32)
    @tf.function(autograph=False)
    def adapted(statistics: Any, moments: Any, done: tf.Tensor) -> Any:
        known = tf.reduce_any(tf.stack([tf.reduce_any(square > 0) for square in tuple(moments)[1::2]]))
        set_now = known & (done < adapting)
        return tuple(
            tf.where(set_now, new, old) for new, old in zip(statistics_of(tuple(moments)), statistics, strict=True)
        )

    @tff.tensorflow.computation(np.int32)
    def following(done: tf.Tensor) -> tf.Tensor:
        return done + 1

    @tff.federated_computation
    def initialize() -> Any:
        return tff.federated_zip((apply.initialize(), tff.federated_value(np.int32(0), tff.SERVER)))

    @tff.federated_computation(
        initialize.type_signature.result,
        tff.FederatedType(weights_type, tff.SERVER),
        tff.FederatedType((weights_type.trainable, weights_type.non_trainable), tff.SERVER),
    )
    def finalize(state: Any, weights: Any, mean: Any) -> Any:
        applied = apply.next(state[0], weights, mean[0])
        statistics = tff.federated_map(adapted, (weights.non_trainable, mean[1], state[1]))
        return tff.templates.MeasuredProcessOutput(
            tff.federated_zip((applied.state, tff.federated_map(following, state[1]))),
            tff.federated_zip(tff.learning.models.ModelWeights(applied.result.trainable, statistics)),
            applied.measurements,
        )

    return tff.learning.templates.FinalizerProcess(initialize, finalize)
