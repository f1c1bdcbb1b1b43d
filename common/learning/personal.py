"""Personal normalization: what normalizes a site's activations stays its own (FedBN, Li et al. 2021, arXiv:2102.07623).

Hospitals differ in scanners and stains, which shows most in the statistics of activations. With FedBN a site keeps the
gains, biases and statistics of its normalization layers, and shares everything else. The plan is the same: around its
`work` a site puts its own values in the place of the broadcast ones, takes its new ones out of what would be sent, and
sends zeros there. So the global model's normalization layers stay as they began, and the global model alone is of use
only together with the values of a site: its own, or those found when it is fine-tuned on a new site's data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.learning.batch_statistics import statistics_of
from common.learning.graph import to_numpy
from common.learning.plan import RoundPlan
from common.models.network import Network
from common.wire.tensors import Array, TensorSpec

Own = list[Array]


@dataclass(frozen=True)
class PersonalLayers:
    """Where the normalization layers of a network are in what a round broadcasts and what a site sends.

    A site's own values are those of its layers' trained weights, then all statistics, in the network's order.

    Attributes
    ----------
    trained, statistics : their places among the network's weights, with which a broadcast begins.
    specs : their types.
    updates, moments : places among what is sent: of the updates of all trained weights and of the statistics' moments.
        Both come multiplied by the update's weight, which follows the updates.
    """

    trained: tuple[int, ...]
    statistics: range
    specs: tuple[TensorSpec, ...]
    updates: range
    moments: range

    @staticmethod
    def of(network: Network, plan: RoundPlan) -> PersonalLayers:
        """The layers of the network that the training round `plan` trains.

        Raises
        ------
        ValueError : what the round sends or broadcasts is ordered otherwise.
        """
        trained, measured = len(network.trainable), len(network.statistics)
        # Metrics, the update of each weight, the update's weight, the moments of each statistic, their weight.
        start = len(plan.sent) - trained - measured - 2
        updates = range(start, start + trained)
        moments = range(updates.stop + 1, updates.stop + 1 + measured)
        expected = [spec.shape for spec in network.specs]
        found = [plan.sent[place].shape for place in (*updates, *moments)] if start >= 0 else []
        if found != expected or [spec.shape for spec in plan.broadcast[: len(expected)]] != expected:
            raise ValueError(f"expected a round that broadcasts and sends the shapes {expected}, found {found}")
        return PersonalLayers(
            trained=tuple(place for place in network.normalization if place < trained),
            statistics=range(trained, trained + measured),
            specs=tuple(TensorSpec("float32", network.specs[place].shape) for place in network.normalization),
            updates=updates,
            moments=moments,
        )

    def taken(self, weights: Sequence[Array]) -> Own:
        """The own values of a site that begins from `weights`, such as a broadcast."""
        return [np.asarray(weights[place]) for place in (*self.trained, *self.statistics)]

    def spliced(self, weights: Sequence[Array], own: Own) -> list[Array]:
        """`weights` (a model's, or a broadcast that begins with one) with a site's own values in their places."""
        result = list(weights)
        for place, value in zip((*self.trained, *self.statistics), own, strict=True):
            result[place] = value
        return result

    def kept(self, sent: Sequence[Array], own: Own) -> tuple[list[Array], Own]:
        """What leaves the site, zeros where its own values are meant, and those values after the round.

        Parameters
        ----------
        sent : what `work` gave for a broadcast that was `spliced` with `own`.
        """
        private = [*(self.updates[place] for place in self.trained), *self.moments]
        result = [np.zeros_like(value) if place in private else value for place, value in enumerate(sent)]
        weight = np.asarray(sent[self.updates.stop], np.float32)
        if not weight > 0:  # nothing was trained on
            return result, own
        steps, moments = (
            [np.asarray(sent[place]) / weight for place in places]
            for places in (private[: len(self.trained)], self.moments)
        )
        weights, statistics = own[: len(self.trained)], own[len(self.trained) :]
        if any(values.any() for values in moments):  # frozen rounds measure nothing
            statistics = to_numpy(statistics_of(moments))
        return result, [*(value - step for value, step in zip(weights, steps, strict=True)), *statistics]
