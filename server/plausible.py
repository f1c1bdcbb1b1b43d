"""Which updates are never summed, whoever sends them: those that would spoil the model for all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from common.study import Study
from common.wire.tensors import Array

ABSURD: Final = 1000.0
"""How many times the broadcast's norm an update's may be, for each unit of its weight."""
_BLOCK: Final = 1024 * 1024


def norm(tensors: Sequence[Array]) -> float:
    """L2 norm of all floating-point tensors that have axes; not finite where a value is not, or is beyond 1e150."""
    return math.sqrt(sum(_square(tensor) for tensor in tensors if tensor.ndim and tensor.dtype.kind == "f"))


def most_weight(study: Study, cases: int) -> float:
    """The most that an update of a training round may weigh, of a site that says it has so many training cases."""
    training = study.training
    if training.weighting == "equal":
        return 1.0
    return float(np.float32(training.local_epochs * (training.patches_per_epoch or cases)))  # as a site rounds it


def implausible(update: Sequence[Array], broadcast_norm: float, most: float = math.inf) -> str:
    """Why an update can never be summed, in words for the site's operator; "" if it can.

    Values that are not finite would make the whole model so. A norm of more than `ABSURD` times the broadcast's (or
    than `ABSURD`, where that is smaller than 1) comes of a defect. Tensors that enter a weighted mean are multiplied by
    their weight, a scalar that follows them: the bound is for each unit of it, and the weight from 0 to `most`. Reads
    one tensor at a time.
    """
    squares, limit, seen = 0.0, ABSURD * max(1.0, broadcast_norm), False
    for index in range(len(update)):
        tensor = update[index]
        if tensor.dtype.kind != "f":
            continue
        square = _square(tensor)
        if not math.isfinite(square) and not _finite(tensor):
            return f"update: tensor {index} holds values that are not finite (NaN or infinite)"
        if tensor.ndim:
            squares, seen = squares + square, True
        elif seen:
            weight = float(tensor)
            if not 0.0 <= weight <= most:
                return f"update: its weight of {weight:.6g} is impossible; from 0 to {most:.6g} is taken"
            if math.sqrt(squares) > limit * weight:
                return _absurd(math.sqrt(squares) / weight if weight else math.inf, limit)
            squares = 0.0
    return _absurd(math.sqrt(squares), limit) if math.sqrt(squares) > limit else ""


def no_shares(metrics: Sequence[Array]) -> str:
    """Why an evaluation can never be summed; "" if it can. Each value is a Dice, or a yes (1) or no (0)."""
    for index in range(len(metrics)):
        tensor = metrics[index]
        if not bool(((tensor >= 0) & (tensor <= 1)).all()):  # nor is NaN
            return f"update: tensor {index} holds values that are not from 0 to 1, as those of an evaluation are"
    return ""


def _absurd(found: float, limit: float) -> str:
    return f"update: its norm of {found:.3g} is absurd; at most {limit:.3g} is taken"


def _square(tensor: Array) -> float:
    flat = tensor.reshape(-1)
    total = 0.0
    for begin in range(0, flat.size, _BLOCK):
        block = flat[begin : begin + _BLOCK]
        with np.errstate(over="ignore", invalid="ignore"):
            square = float(np.dot(block, block)) if block.dtype != np.float16 else math.inf
            if not math.isfinite(square):  # too large for this type, or not finite
                wide = block.astype(np.float64)
                square = float(np.dot(wide, wide))
        total += square
    return total


def _finite(tensor: Array) -> bool:
    flat = tensor.reshape(-1)
    return all(bool(np.isfinite(flat[begin : begin + _BLOCK]).all()) for begin in range(0, flat.size, _BLOCK))
