"""Where in an image a published model saw what it predicts: Grad-CAM maps on the stored grid, of what is drawn of it.

The maps are outputs of a file that was published for it (`publishing.explain`), so that LiteRT alone computes them.
What is held are the planes that are drawn, not the maps of the whole image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import PublishError
from common.imaging.sliding_window import predict_slabs
from common.imaging.writers.overlay import Plane, largest_slices, planes_of_volume
from common.inference.lite import LiteModel
from common.inference.pictures import plane_of_image, step_of
from common.inference.prediction import Predicted
from common.inference.published import PublishedModel
from common.inference.restoring import restored_classes
from common.study import Study

Floats = npt.NDArray[np.float32]


def open_explanation(published: PublishedModel, threads: int = 1) -> LiteModel:
    """The file that explains a published version, checked; what it answers are probabilities and then the maps.

    Raises
    ------
    PublishError : the version was published without it, or it is damaged or of another study.
    """
    listed, folder = published.explanation, published.file.parent
    if listed is None:
        raise PublishError(
            f"{folder}: published without the file that explains it; ask its publisher for a version of the study with "
            "publishing.explain: true, or leave the explanation out"
        )
    listed.check()
    model = LiteModel(listed.file, threads=threads)
    study = published.study
    tile = (1, *study.publishing.tile)
    fits = model.input_shape == (*tile, study.task.channels) and model.output_shape[:-1] == tile
    if not fits or model.output_shape[-1] <= len(study.task.foreground):
        raise PublishError(f"{listed.file}: not of the study beside it; copy the version's folder again")
    return model


def explained_planes(
    model: LiteModel,
    study: Study,
    predicted: Predicted,
    is_patient: bool,
    progress: Callable[[float], None] = lambda _: None,
) -> list[list[Plane]]:
    """What is to be drawn of each foreground class: planes with the outline of what was predicted, and heat.

    Heat is the class's Grad-CAM map in relation to its largest value in the image, from 0 to 1, and 0 everywhere where
    the class was not predicted. Tiles are blended as probabilities are. A plane is drawn as a whole, of a volume the
    slices across each axis on which most of the class was predicted; the middle ones where none was.

    Parameters
    ----------
    model : of `open_explanation`.
    predicted : a case, still open.
    is_patient : whether a volume is turned as radiologists look at it.
    progress : called with the share of the image that is done, from 0 to 1.

    Raises
    ------
    DataError : the case cannot be read again.
    PublishError : the model does not run.
    """
    case, classes = predicted.case, predicted.classes.array[..., 0]
    count = len(study.task.foreground)
    # One foreground class where there are objects.
    labels = [predicted.objects] if predicted.objects is not None else [classes == 1 + index for index in range(count)]
    maps = _FlatMaps(predicted, count) if case.grid.dimensions == 2 else _SliceMaps(predicted, labels)
    slabs = predict_slabs(
        model, case.image, model.input_shape[1:-1], study.evaluation.overlap, batch_size=1, fixed_batch=True
    )

    def keep(window: tuple[slice, ...], values: Floats) -> None:
        maps.put(window, values[..., values.shape[-1] - count :])

    def advance() -> Iterator[tuple[slice, Floats]]:
        for slab, answer in slabs:
            yield slab, answer
            progress(slab.stop / case.image.shape[0])

    # Classes are what the ordinary file predicted; here only the way back to the stored grid is of use.
    restored_classes(advance(), case.grid, lambda values: np.zeros(values.shape[:-1], np.uint8), keep)
    return [maps.planes(index, labels[index], is_patient) for index in range(count)]


class _FlatMaps:
    """Maps of a plane, as thin as it is drawn."""

    def __init__(self, predicted: Predicted, count: int) -> None:
        self._predicted = predicted
        self._step = step_of(predicted)
        _, height, width = predicted.case.grid.zoom.before
        self._maps = np.zeros((-(-height // self._step), -(-width // self._step), count), np.float32)
        self._highest = np.zeros(count, np.float32)

    def put(self, window: tuple[slice, ...], values: Floats) -> None:
        skipped = [-part.start % self._step for part in window[1:]]
        thin = values[0, skipped[0] :: self._step, skipped[1] :: self._step]
        rows, columns = (
            slice(first, first + size)
            for first, size in zip(
                [(part.start + skip) // self._step for part, skip in zip(window[1:], skipped, strict=True)],
                thin.shape[:2],
                strict=True,
            )
        )
        self._maps[rows, columns] = thin
        self._highest = np.maximum(self._highest, values.max(axis=(0, 1, 2)))

    def planes(self, index: int, labels: npt.NDArray[Any], is_patient: bool) -> list[Plane]:
        del is_patient
        heat = _relative(self._maps[..., index], self._highest[index])
        return [replace(plane_of_image(self._predicted, labels), heat=heat)]


class _SliceMaps:
    """Maps of a volume on three slices for each class, of the turned grid."""

    def __init__(self, predicted: Predicted, labels: Sequence[npt.NDArray[Any]]) -> None:
        self._predicted = predicted
        grid = predicted.case.grid
        self._at = [largest_slices(grid.orientation.apply(of_class)) for of_class in labels]
        shape = grid.zoom.before
        self._maps = [
            [np.zeros(shape[:axis] + shape[axis + 1 :], np.float32) for axis in range(3)] for _ in range(len(labels))
        ]
        self._highest = np.zeros(len(labels), np.float32)

    def put(self, window: tuple[slice, ...], values: Floats) -> None:
        for index, (places, planes) in enumerate(zip(self._at, self._maps, strict=True)):
            for axis, (at, plane) in enumerate(zip(places, planes, strict=True)):
                if window[axis].start <= at < window[axis].stop:
                    others = tuple(part for other, part in enumerate(window) if other != axis)
                    plane[others] = np.take(values[..., index], at - window[axis].start, axis)
        self._highest = np.maximum(self._highest, values.max(axis=(0, 1, 2)))

    def planes(self, index: int, labels: npt.NDArray[Any], is_patient: bool) -> list[Plane]:
        stored, grid = self._predicted.case.stored, self._predicted.case.grid
        heat = [_relative(plane, self._highest[index]) for plane in self._maps[index]]
        image = stored.rows(0, stored.shape[0])
        spacing = self._predicted.classes.spacing
        return planes_of_volume(image, labels, spacing, grid.orientation, is_patient, heat)


def _relative(heat: Floats, highest: np.float32) -> Floats:
    return heat / highest if highest > 0 else heat
