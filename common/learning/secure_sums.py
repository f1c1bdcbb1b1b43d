"""Sums for secure aggregation: what sites send becomes whole numbers in known ranges, of which only totals are read.

Updates are clipped to a fixed range and rounded to as many bits as leave their sum 32 (`FixedPointSumFactory`), scalars
by TFF's `SecureSumFactory`. The compiled round then holds the numbers apart from everything that travels in the clear
(`RoundPlan.secure`), and `common.secure_aggregation` sums them. Of a study nothing stays in the clear: updates, their
weights and the metrics all pass through here.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from common.secure_aggregation.study_session import update_bits
from common.study import Study

LARGEST_LOSS = 100.0
"""What a batch's training loss counts at most; cross-entropy and Dice together rarely pass 10."""


def largest_weight(study: Study) -> float:
    """The most that a site's update weighs."""
    return 1.0 if study.training.weighting == "equal" else float(study.secure_aggregation.largest_weight)


class FixedPointSumFactory(tff.aggregators.UnweightedAggregationFactory):  # type: ignore[misc]
    """The sum of structures of floats, each value clipped and rounded to 2^bits steps, so that sums have 32 bits.

    Numbers of 32 bits are masked and sent as they lie in memory. TFF's `SecureSumFactory` rounds to 32 bits, whose sums
    have up to 38. A value is rounded by at most `largest` / (2^bits - 1).

    Parameters
    ----------
    largest : values are clipped to plus or minus this much.
    sites : how many are summed at most; bits are `update_bits(sites)`.
    """

    def __init__(self, largest: float, sites: int) -> None:
        self._largest, self._bits = float(largest), update_bits(sites)

    def create(self, value_type: tff.Type) -> tff.templates.AggregationProcess:
        """The process for values that are a structure of floats."""
        largest, bits = self._largest, self._bits
        step = 2.0 * largest / (2**bits - 1)

        @tff.tensorflow.computation(value_type)
        def quantized(value: Any) -> Any:
            def whole(part: tf.Tensor) -> tf.Tensor:
                bounded = tf.clip_by_value(tf.cast(part, tf.float64), -largest, largest)
                return tf.cast(tf.round((bounded + largest) / step), tf.int64)

            return tf.nest.map_structure(whole, value), tf.constant(1, tf.int64)

        summed_type = quantized.type_signature.result

        @tff.tensorflow.computation(summed_type[0], summed_type[1])
        def restored(total: Any, count: tf.Tensor) -> Any:
            offset = largest * tf.cast(count, tf.float64)
            return tf.nest.map_structure(
                lambda part: tf.cast(tf.cast(part, tf.float64) * step - offset, tf.float32), total
            )

        @tff.federated_computation
        def initialize() -> Any:
            return tff.federated_value((), tff.SERVER)

        @tff.federated_computation(initialize.type_signature.result, tff.FederatedType(value_type, tff.CLIENTS))
        def aggregate(state: Any, value: Any) -> Any:
            pair = tff.federated_map(quantized, value)
            total = tff.federated_secure_sum_bitwidth(pair[0], bits)
            count = tff.federated_secure_sum_bitwidth(pair[1], 1)
            found = tff.federated_map(restored, (total, count))
            return tff.templates.MeasuredProcessOutput(state, found, tff.federated_value((), tff.SERVER))

        return tff.templates.AggregationProcess(initialize, aggregate)


class SecureMeanFactory(tff.aggregators.WeightedAggregationFactory):  # type: ignore[misc]
    """The weighted mean of updates, of which nobody sees but the sums of products and of weights.

    Rounding costs each site at most `largest_update` * `most_weight` / 2^bits of a product (`FixedPointSumFactory`).
    The mean over no weight is zeros.

    Parameters
    ----------
    largest_update : values are clipped to plus or minus this much.
    most_weight : weights are clipped to it, before they are multiplied.
    sites : how many are summed at most.
    """

    def __init__(self, largest_update: float, most_weight: float, sites: int) -> None:
        self._weight = most_weight
        self._products = FixedPointSumFactory(largest_update * most_weight, sites)
        self._weights = tff.aggregators.SecureSumFactory(most_weight, 0.0)
        self._largest = largest_update

    def create(self, value_type: tff.Type, weight_type: tff.Type) -> tff.templates.AggregationProcess:
        """The process for values that are a structure of floats, and float weights."""
        most, largest = self._weight, self._largest
        products, weights = self._products.create(value_type), self._weights.create(weight_type)

        @tff.tensorflow.computation(value_type, weight_type)
        def weighted(value: Any, weight: Any) -> Any:
            bounded = tf.clip_by_value(weight, 0.0, most)
            parts = [tf.clip_by_value(part, -largest, largest) * bounded for part in tf.nest.flatten(value)]
            return tf.nest.pack_sequence_as(value, parts), bounded

        @tff.tensorflow.computation(value_type, weight_type)
        def divided(total: Any, weight: Any) -> Any:
            return tf.nest.map_structure(lambda part: tf.math.divide_no_nan(part, weight), total)

        @tff.federated_computation
        def initialize() -> Any:
            return tff.federated_zip((products.initialize(), weights.initialize()))

        @tff.federated_computation(
            initialize.type_signature.result,
            tff.FederatedType(value_type, tff.CLIENTS),
            tff.FederatedType(weight_type, tff.CLIENTS),
        )
        def aggregate(state: Any, value: Any, weight: Any) -> Any:
            pair = tff.federated_map(weighted, (value, weight))
            total = products.next(state[0], pair[0])
            weight_total = weights.next(state[1], pair[1])
            mean = tff.federated_map(divided, (total.result, weight_total.result))
            return tff.templates.MeasuredProcessOutput(
                tff.federated_zip((total.state, weight_total.state)), mean, total.measurements
            )

        return tff.templates.AggregationProcess(initialize, aggregate)


def secure_metrics_sum(
    bounds: Mapping[str, float], finalize: Callable[[Any], Any] | None = None
) -> Callable[[Any], Any]:
    """Maps metrics at the sites, a structure of named tensors from 0 to their bound, to their finalized sums.

    Whole numbers come out whole: exactly so up to 2^24 times their type's step.

    Parameters
    ----------
    bounds : the largest value of each metric at one site; what is beyond is clipped to it.
    finalize : maps the sums, as Python structure, to metrics; None: the sums themselves.
    """
    total = tff.aggregators.SecureSumFactory(1.0, 0.0)

    def summed(metrics: Any) -> Any:
        metrics_type = metrics.type_signature.member

        @tff.tensorflow.computation(metrics_type)
        def scaled(values: Any) -> Any:
            return collections.OrderedDict(
                (name, tf.clip_by_value(tf.cast(value, tf.float32) / bounds[name], 0.0, 1.0))
                for name, value in values.items()
            )

        process = total.create(scaled.type_signature.result)

        @tff.tensorflow.computation(scaled.type_signature.result)
        def restored(sums: Any) -> Any:
            values = collections.OrderedDict(
                (name, _like(metrics_type[name].dtype, value * bounds[name])) for name, value in sums.items()
            )
            return values if finalize is None else finalize(values)

        found = process.next(process.initialize(), tff.federated_map(scaled, metrics)).result
        return tff.federated_map(restored, found)

    return summed


def _like(dtype: Any, value: tf.Tensor) -> tf.Tensor:
    kind = tf.as_dtype(dtype)
    return tf.cast(tf.round(value) if kind.is_integer else value, kind)


def training_metrics_sum(study: Study, finalize: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The metrics of a training round (`common.learning.model.training_model`)."""
    if study.privacy.unit == "patient":
        return secure_metrics_sum({"steps": float(study.privacy.steps_per_round)})
    most = float(study.secure_aggregation.largest_weight)
    if study.privacy.unit != "none":
        return secure_metrics_sum({"steps": most}, finalize)
    return secure_metrics_sum({"loss_sum": most * LARGEST_LOSS, "batches": most, "patches": most}, finalize)


def share_sum(values: Any) -> Any:
    """The sum of structures of float32 tensors from 0 to 1, placed at the sites."""
    shares = tff.aggregators.SecureSumFactory(np.float32(1.0), np.float32(0.0))
    process = shares.create(values.type_signature.member)
    return process.next(process.initialize(), values).result
