"""Weights as a function of tiles, run by TensorFlow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from common.imaging.sliding_window import Predict
from common.study import Study

if TYPE_CHECKING:
    from common.models.network import Network


class ForwardPass:
    """The network's forward pass by TensorFlow, traced once for tiles of the study's size.

    Parameters
    ----------
    study : Study
    network : of `common.models.build_network(study)`.
    """

    def __init__(self, study: Study, network: Network) -> None:
        import tensorflow as tf

        from common.models import probabilities

        def forward(weights: Sequence[Any], tiles: Any) -> Any:
            return probabilities(study, network(weights, tiles))

        weights = [tf.TensorSpec(spec.shape, tf.float32) for spec in network.specs]
        tiles = tf.TensorSpec([None, *study.publishing.tile, network.channels], tf.float32)
        self._forward = tf.function(forward, autograph=False).get_concrete_function(weights, tiles)

    def with_weights(self, weights: Sequence[npt.ArrayLike]) -> Predict:
        """From tiles (b, *study.publishing.tile, channel) to probabilities (b, *tile, outputs), both float32.

        `weights` are in the order of `network.specs`. The callable may be used by several threads.
        """
        import tensorflow as tf

        values = [tf.constant(np.asarray(weight), tf.float32) for weight in weights]

        def predict(batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
            return np.asarray(self._forward(values, tf.constant(batch, tf.float32)).numpy(), dtype=np.float32)

        return predict


def predictor(study: Study, network: Network, weights: Sequence[npt.ArrayLike]) -> Predict:
    """`ForwardPass` for one set of weights."""
    return ForwardPass(study, network).with_weights(weights)
