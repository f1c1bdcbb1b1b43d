"""Networks as tests need them: trained, or as if they were."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from common.models.layers import LOGIT_SCALE
from common.models.network import Network


def weights_as_of_a_trained_network(network: Network) -> list[npt.NDArray[np.float32]]:
    """Biases are not 0, and what the last layer says is not undecided."""
    rng = np.random.default_rng(3)
    initial = [weight.numpy() for weight in network.initial_weights(3)]
    found = [w + np.float32(0.1) * rng.random(w.shape, np.float32) if w.ndim == 1 else w for w in initial]
    last = max(index for index, w in enumerate(found) if w.ndim > 1)
    found[last] /= np.float32(LOGIT_SCALE)
    return found
