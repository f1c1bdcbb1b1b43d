"""Privacy at the level of sites: each site clips its update, and the coordinator adds noise to their sum.

It computes what TFF's `DifferentiallyPrivateFactory.gaussian_fixed` does (McMahan et al. 2018, arXiv:1710.06963), but
for the source of the noise: there it comes from TensorFlow's own generator, which starts from 32 bits and which nobody
can have repeat a round. Here a seed of 128 bits enters with the state.
"""

from __future__ import annotations

import collections
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from common.learning.private_work import clipped, gaussian_noise


class NoisyMeanFactory(tff.aggregators.WeightedAggregationFactory):  # type: ignore[misc]
    """The sum of clipped updates, with Gaussian noise, divided by the number of sites in the cohort.

    Weights are ignored, and are not sent. The state's `seed`, int64 (2,), is to be drawn anew for each round; it is
    zeros afterwards. With a seed of zeros, which everybody knows, the result is NaN, which TFF's finalizer
    rejects: nothing leaves under such noise.

    Parameters
    ----------
    norm : the largest L2 norm of an update, over all weights together.
    noise_multiplier : the noise's standard deviation, in units of `norm`.
    sites : how many the cohort has, whoever of them takes part.
    sum_factory : sums the clipped updates; a secure sum may stand here.
    """

    def __init__(
        self,
        norm: float,
        noise_multiplier: float,
        sites: int,
        sum_factory: tff.aggregators.UnweightedAggregationFactory | None = None,
    ) -> None:
        self._norm, self._noise_multiplier, self._sites = norm, noise_multiplier, sites
        self._sum = tff.aggregators.SumFactory() if sum_factory is None else sum_factory

    def create(self, value_type: tff.Type, weight_type: tff.Type) -> tff.templates.AggregationProcess:
        """The process for values that are a structure of floats."""
        norm, deviation, sites = self._norm, self._noise_multiplier * self._norm, self._sites
        inner = self._sum.create(value_type)
        specs = [tf.TensorSpec(leaf.shape, leaf.dtype) for leaf in tff.structure.flatten(value_type)]

        @tff.tensorflow.computation(value_type)
        def clip(value: Any) -> Any:
            return tf.nest.pack_sequence_as(value, list(clipped(tuple(tf.nest.flatten(value)), norm)))

        @tff.tensorflow.computation(value_type, tff.TensorType(np.int64, [2]))
        def noised(total: Any, seed: tf.Tensor) -> Any:
            noise = gaussian_noise(specs, seed, deviation)
            known = tf.reduce_all(tf.equal(seed, 0))
            parts = zip(tf.nest.flatten(total), noise, strict=True)
            mean = [tf.where(known, np.float32(np.nan), (part + own) / sites) for part, own in parts]
            return tf.nest.pack_sequence_as(total, mean)

        @tff.tensorflow.computation(tff.TensorType(np.int64, [2]))
        def forgotten(seed: tf.Tensor) -> tf.Tensor:
            return tf.zeros_like(seed)

        @tff.tensorflow.computation
        def no_seed() -> tf.Tensor:
            return tf.zeros([2], tf.int64)

        @tff.federated_computation
        def initialize() -> Any:
            seed = tff.federated_eval(no_seed, tff.SERVER)
            return tff.federated_zip(collections.OrderedDict(sum=inner.initialize(), seed=seed))

        @tff.federated_computation(
            initialize.type_signature.result,
            tff.FederatedType(value_type, tff.CLIENTS),
            tff.FederatedType(weight_type, tff.CLIENTS),
        )
        def aggregate(state: Any, value: Any, weight: Any) -> Any:
            del weight
            total = inner.next(state["sum"], tff.federated_map(clip, value))
            mean = tff.federated_map(noised, (total.result, state["seed"]))
            seed = tff.federated_map(forgotten, state["seed"])
            return tff.templates.MeasuredProcessOutput(
                tff.federated_zip(collections.OrderedDict(sum=total.state, seed=seed)), mean, total.measurements
            )

        return tff.templates.AggregationProcess(initialize, aggregate)
