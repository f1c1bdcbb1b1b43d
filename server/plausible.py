"""Which updates are never summed, whoever sends them: those that would spoil the model for all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from common.wire.tensors import Array

ABSURD: Final = 1000.0
"""How many times the broadcast's norm an update's may be, for each unit of its weight."""
_BLOCK: Final = 1024 * 1024


def norm(tensors: Sequence[Array]) -> float:
    """L2 norm of all floating-point tensors that have axes; not finite where a value is not, or is beyond 1e150."""
    return math.sqrt(sum(_square(tensor) for tensor in tensors if tensor.ndim and tensor.dtype.kind == "f"))


def implausible(update: Sequence[Array], broadcast_norm: float) -> str:
    """Why an update can never be summed, in words for the site's operator; "" if it can.

    Values that are not finite would make the whole model so. A norm of more than `ABSURD` times the broadcast's (or
    than `ABSURD`, where that is smaller than 1) comes of a defect. Updates of weights are multiplied by the update's
    weight, a scalar that follows them, so the bound is for each unit of it. Reads one tensor at a time.
    """
    squares, weight, seen = 0.0, 1.0, False
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
            weight = max(weight, abs(float(tensor)))
    found, limit = math.sqrt(squares), ABSURD * max(1.0, broadcast_norm)
    if found / weight > limit:
        return f"update: its norm of {found / weight:.3g} is absurd; at most {limit:.3g} is taken"
    return ""


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
