"""What a published model says of a case: the class of every voxel of its stored grid, and objects where it has any.

What is held in memory: the image as it is stored (not even that of large TIFF files, see `images`), the classes as
bytes, and one tile's length of probabilities. Objects need the probabilities of the whole image: those of large images
go to a temporary file.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import DataError
from common.imaging.case import Case
from common.imaging.grid import Grid
from common.imaging.sliding_window import predict_slabs
from common.imaging.volume import Volume
from common.inference.images import LARGE, OpenCase, open_case
from common.inference.lite import Head, LiteModel, class_indices
from common.inference.object_blocks import number_objects
from common.inference.restoring import restored_classes
from common.study import Study

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int32]
_JUST_FOREGROUND = np.float16(0.50049)  # the float16 after 0.5


@dataclass(frozen=True, eq=False)
class Predicted:
    """What a model says of a case.

    Attributes
    ----------
    classes : uint8 class indices on the stored grid, shape (z, y, x, 1).
    objects : int32 numbers of objects on the same grid, shape (z, y, x), 0 where there is none; None where the study
        has classes and not instances, or they were not asked for.
    case : what it was predicted from, still open.
    """

    classes: Volume
    objects: Labels | None
    case: OpenCase

    @property
    def object_count(self) -> int | None:
        """The number of objects, which are 1 to this number."""
        return None if self.objects is None else int(self.objects.max())


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

    Raises
    ------
    DataError : the case cannot be read or does not fit the study.
    PublishError : the model does not run.
    """
    opened = open_case(case, study, large)
    try:
        classes, found = _predicted(model, study, opened, mirror, overlap, objects, temporary, large, progress)
    except BaseException:
        opened.close()
        raise
    return Predicted(classes, found, opened)


def _predicted(
    model: LiteModel,
    study: Study,
    case: OpenCase,
    mirror: bool | None,
    overlap: float | None,
    objects: bool,
    temporary: Path | None,
    large: int,
    progress: Callable[[float], None],
) -> tuple[Volume, Labels | None]:
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
    maps = _Maps(case.grid, head, model.output_shape[-1], temporary, large) if _has_objects(study) and objects else None

    def decide(probabilities: Floats) -> npt.NDArray[np.uint8]:
        return class_indices(probabilities, head)

    def keep(window: tuple[slice, ...], probabilities: Floats) -> None:
        if maps is not None:
            maps.put(window, probabilities)

    classes = restored_classes(_reported(slabs, case.image.shape[0], progress), case.grid, decide, keep)
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
    """A network's outputs on the grid of the turned image, for objects; of large images half as precise, on disk."""

    def __init__(self, grid: Grid, head: Head, outputs: int, temporary: Path | None, large: int) -> None:
        self._grid, self._head, self._temporary = grid, head, temporary
        self._shape = grid.zoom.before
        self._is_large = math.prod(self._shape) * outputs >= large
        self._maps = self._zeros((*self._shape, outputs), np.float16 if self._is_large else np.float32)
        if head == "softmax":
            self._maps[..., 0] = 1  # background, where the crop does not reach

    def put(self, window: tuple[slice, ...], probabilities: Floats) -> None:
        self._maps[window] = probabilities
        if self._is_large:  # what rounding made a tie stays foreground
            foreground = 1 if self._head == "softmax" else 0
            kept = self._maps[window][..., foreground]
            kept[(kept <= 0.5) & (class_indices(probabilities, self._head) > 0)] = _JUST_FOREGROUND

    def objects(self, spacing: tuple[float, float, float]) -> Labels:
        """Their numbers on the stored grid, shape (z, y, x)."""
        from common.inference.instances import instances_of

        flat = self._grid.dimensions == 2
        turned = [spacing[axis] for axis in self._grid.orientation.axes][1 if flat else 0 :]
        labels = self._zeros(self._shape, np.int32)
        number_objects(
            lambda maps: instances_of(maps, self._head, spacing=turned),
            self._maps[0] if flat else self._maps,
            labels[0] if flat else labels,
        )
        return self._grid.orientation.undo(labels)

    def _zeros(self, shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
        if not self._is_large:
            return np.zeros(shape, dtype)
        size = math.prod(shape) * np.dtype(dtype).itemsize
        try:
            with tempfile.TemporaryFile(dir=self._temporary) as file:  # the mapping keeps it after it is closed
                # Where a mapping has no blocks behind it, a full disk would end the process.
                os.posix_fallocate(file.fileno(), 0, size)
                return np.memmap(file, dtype, "r+", shape=shape)
        except OSError as error:
            where = self._temporary or tempfile.gettempdir()
            raise DataError(
                f"its objects need {size / 1e9:.2g} GB of disk for a while, which {where} does not give "
                f"({error.strerror or error}); free space in OUT, or give another --out"
            ) from error
