"""What of a prediction is drawn: a plane as a whole, of a volume the slices on which most was found."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from common.imaging.writers.overlay import LONGEST, Plane, planes_of_volume
from common.inference.images import Rows
from common.inference.prediction import Predicted
from common.inference.scratch import let_go

_BLOCK = 1 << 23  # voxels that are read at once


def planes_of(predicted: Predicted, is_patient: bool) -> list[Plane]:
    """The planes to draw, with the outlines of objects, or of classes where objects were not told apart.

    Parameters
    ----------
    predicted : Predicted
    is_patient : whether a volume is turned as radiologists look at it.
    """
    stored, spacing = predicted.case.stored, predicted.classes.spacing
    labels: npt.NDArray[Any] = predicted.classes.array[..., 0] if predicted.objects is None else predicted.objects
    if predicted.case.grid.dimensions == 3:
        image = stored.rows(0, stored.shape[0])
        return planes_of_volume(image, labels, spacing, predicted.case.grid.orientation, is_patient)
    return [plane_of_image(predicted, labels)]


def plane_of_image(predicted: Predicted, labels: npt.NDArray[Any]) -> Plane:
    """A planar image with labels (1, y, x), every `step_of`-th pixel of both."""
    step = step_of(predicted)
    thin = np.array(labels[0, ::step, ::step])
    let_go(labels)
    return Plane(_thinned(predicted.case.stored, step), thin, predicted.classes.spacing[1:])


def step_of(predicted: Predicted) -> int:
    """Every how many pixels of a planar image, along both axes, one is drawn."""
    return max(math.ceil(max(predicted.case.stored.shape[:2]) / LONGEST), 1)


def _thinned(stored: Rows, step: int) -> npt.NDArray[Any]:
    """Every `step`-th pixel of a plane, without holding all of it."""
    height, width, channels = stored.shape
    length = max(_BLOCK // (width * channels) // step, 1) * step
    parts = [
        np.array(stored.rows(first, min(first + length, height))[::step, ::step]) for first in range(0, height, length)
    ]
    return np.concatenate(parts)
