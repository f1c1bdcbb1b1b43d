"""What is measured of converted files, and the limits it is held against: alike for a study and for a site's own model.

A figure that does not exist is NaN until it is written down, and null from then on.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from common.imaging.sliding_window import Predict

LARGEST_DIFFERENCE = 1e-3
"""How far a float32 file's probabilities may be anywhere from TensorFlow's."""
_TOLERANCE = 2.0
_SMALLEST_TOLERANCE = 1e-3


def tolerance_of(difference: float) -> float:
    """How far from the golden answer a file may be elsewhere that is `difference` from it here, both as means.

    Twice as far, because other machines round otherwise.
    """
    return max(_TOLERANCE * difference, _SMALLEST_TOLERANCE)


def median_seconds(models: Mapping[str, Predict], tile: npt.NDArray[np.float32], runs: int) -> dict[str, float]:
    """The median time of each model on a tile (*tile, channel), by name.

    The models take turns, so that other load hits all alike; a first call of each, which sets up, does not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in models}
    batch = tile[np.newaxis]
    for run in range(runs + 1):
        for name, model in models.items():
            began = time.perf_counter()
            model(batch)
            if run:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in seconds.items()}


def json_ready(value: object) -> Any:
    """Plain JSON values: NumPy numbers unpacked, and null for a figure that does not exist."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Mapping):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
