"""What a published model says of a case: the class of every voxel of its stored grid, and objects where it has any.

What is held in memory: the image as it is stored (not even that of large TIFF files, see `images`), one tile's length
of probabilities, and a block of what objects are found in (`object_blocks`). What there is of a large image for each
voxel, its classes and the numbers of its objects included, lies in temporary files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.errors import DataError
from common.imaging.case import Case
from common.imaging.grid import Grid
from common.imaging.sliding_window import predict_slabs
from common.imaging.volume import Volume
from common.inference.images import LARGE, OpenCase, open_case
from common.inference.instances import DEFAULTS, distance_in, foreground_in
from common.inference.lite import Head, LiteModel, class_indices
from common.inference.object_blocks import number_objects
from common.inference.restoring import restored_classes
from common.inference.scratch import Scratch, let_go
from common.study import Study

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Predicted:
    """What a model says of a case.

    Attributes
    ----------
    classes : uint8 class indices on the stored grid, shape (z, y, x, 1). Of a large image, as the objects are, mapped
        from a file: whoever goes through all of it lets go of what is done (`scratch.let_go`).
    objects : int32 numbers of objects on the same grid, shape (z, y, x), 0 where there is none; None where the study
        has classes and not instances, or they were not asked for.
    object_count : the number of objects, which are 1 to this number; None where `objects` is.
    case : what it was predicted from, still open.
    """

    classes: Volume
    objects: Labels | None
    object_count: int | None
    case: OpenCase


def predict_case(
    model: LiteModel,
    study: Study,
    case: Case,
    *,
    mirror: bool | None = None,
    overlap: float | None = None,
    objects: bool = True,
    temporary: Path | None = None,
    large: int = LARGE,
    progress: Callable[[float], None] = lambda _: None,
    when_open: Callable[[OpenCase], None] = lambda _: None,
) -> Predicted:
    """Segment a case.

    Parameters
    ----------
    model : of the study; its tile is the network's input.
    study : Study
    case : its images keyed by the study's modalities, or by "" where it names none.
    mirror : whether each tile's answer is the mean over its mirror images; None as the study says.
    overlap : of tiles; None as the study says.
    objects : whether objects are told apart in a study of instances.
    temporary : a folder for what large images put aside; None for the system's. Its files vanish by themselves.
    large : see `images.LARGE`.
    progress : called with the share of the image that is done, from 0 to 1.
    when_open : called with what was read, before it is segmented.

    Raises
    ------
    DataError : the case cannot be read or does not fit the study.
    PublishError : the model does not run.
    """
    opened = open_case(case, study, large)
    try:
        when_open(opened)
        voxels = math.prod(opened.grid.stored_shape) * opened.image.shape[-1]
        scratch = Scratch(on_disk=voxels >= large, folder=temporary)
        classes, found = _predicted(model, study, opened, mirror, overlap, objects, scratch, progress)
    except BaseException:
        opened.close()
        raise
    labels, count = (None, None) if found is None else found
    return Predicted(classes, labels, count, opened)


def _predicted(
    model: LiteModel,
    study: Study,
    case: OpenCase,
    mirror: bool | None,
    overlap: float | None,
    objects: bool,
    scratch: Scratch,
    progress: Callable[[float], None],
) -> tuple[Volume, tuple[Labels, int] | None]:
    tile, channels = model.input_shape[1:-1], model.input_shape[-1]
    if channels != case.image.shape[-1] or len(tile) != study.task.dimensions:
        raise DataError(
            f"the model takes {len(tile)} axes and {channels} channels, and its study has {study.task.dimensions} and "
            f"{case.image.shape[-1]}: file and study are not of one version. Copy the version's folder again."
        )
    head: Head = study.model.head
    wants_mirror = study.evaluation.mirror if mirror is None else mirror
    slabs = predict_slabs(
        model,
        case.image,
        tile,
        study.evaluation.overlap if overlap is None else overlap,
        batch_size=model.input_shape[0],
        fixed_batch=True,
        mirror=range(len(tile)) if wants_mirror else (),
    )
    maps = _Maps(case.grid, head, scratch) if _has_objects(study) and objects else None

    def decide(probabilities: Floats) -> npt.NDArray[np.uint8]:
        return class_indices(probabilities, head)

    def keep(window: tuple[slice, ...], probabilities: Floats) -> None:
        if maps is not None:
            maps.put(window, probabilities)

    classes = restored_classes(_reported(slabs, case.image.shape[0], progress), case.grid, decide, keep, scratch)
    classes = replace(classes, stated=case.stated)
    return classes, None if maps is None else maps.objects(classes.spacing)


def _has_objects(study: Study) -> bool:
    return study.task.labels == "instances"


def _reported(
    slabs: Iterator[tuple[slice, Floats]], length: int, progress: Callable[[float], None]
) -> Iterator[tuple[slice, Floats]]:
    for slab, answer in slabs:
        yield slab, answer
        progress(slab.stop / length)


class _Maps:
    """What objects are made of, on the grid of the turned image: where there are any and what splits them."""

    def __init__(self, grid: Grid, head: Head, scratch: Scratch) -> None:
        self._grid, self._head, self._scratch = grid, head, scratch
        self._splitting = DEFAULTS[head]
        self._foreground = scratch.zeros(grid.zoom.before, np.bool_)
        self._distance = scratch.zeros(grid.zoom.before, np.float32) if self._splitting.by_distance else None

    def put(self, window: tuple[slice, ...], probabilities: Floats) -> None:
        self._foreground[window] = foreground_in(probabilities, self._head, self._splitting.threshold)
        let_go(self._foreground)
        if self._distance is not None:
            self._distance[window] = distance_in(probabilities, self._head)
            let_go(self._distance)

    def objects(self, spacing: tuple[float, float, float]) -> tuple[Labels, int]:
        """Their numbers on the stored grid, shape (z, y, x), and how many there are."""
        grid = self._grid
        flat = 3 - grid.dimensions  # a plane's only slice is left out
        labels = self._scratch.zeros(grid.zoom.before, np.int32)
        foreground, distance, result = (
            None if array is None else array[0] if flat else array
            for array in (self._foreground, self._distance, labels)
        )
        assert foreground is not None and result is not None
        turned = [spacing[axis] for axis in grid.orientation.axes][flat:]
        count = number_objects(foreground, distance, result, self._splitting, turned, self._scratch)
        return grid.orientation.undo(labels), count
