"""A case as the network takes it, without a float32 copy of it where the study lets tiles be prepared one by one.

That is so where nothing is resampled, cropped or searched for its background: then a prepared voxel depends on its
stored one and a few figures of the whole image alone. Other cases are prepared whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import tifffile

from common.errors import DataError
from common.imaging.case import Case
from common.imaging.geometry import Orientation, same_grid, to_ras
from common.imaging.grid import Grid
from common.imaging.loading import read_case
from common.imaging.preprocessing import channels_fit, prepare_case
from common.imaging.readers import tiff_spacing
from common.imaging.resampling import Zoom
from common.imaging.scaling import Scaling, is_measurable, measured
from common.imaging.sliding_window import Image, WholeImage
from common.imaging.volume import Stated, Volume, scaling_affine
from common.inference.banded_tiff import open_banded
from common.study import Study

LARGE = 1 << 24
"""From so many voxels on, each channel counted, images are prepared tile by tile."""

_BLOCK = 1 << 21  # voxels that are measured at once
_LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601


class Rows(Protocol):
    """A stored image, given in parts along its first axis (z, or y of a plane)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(spatial..., channel)."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of what is stored."""

    def rows(self, first: int, end: int) -> npt.NDArray[Any]:
        """Those from `first` to `end`, as stored."""


@dataclass(frozen=True, eq=False)
class OpenCase:
    """A case that is ready to be predicted.

    Attributes
    ----------
    image : what the network takes.
    grid : of that, and the way back to the stored grid.
    stored : the first image that is present, for pictures of it: whole slices (3D) or rows (2D) at a time, in the
        orientation that is stored.
    stated : what the file of that image states of its grid, as in `Volume`.
    close : to be called when it is done with.
    """

    image: Image
    grid: Grid
    stored: Rows
    stated: Stated
    close: Callable[[], None]


def open_case(case: Case, study: Study, large: int = LARGE) -> OpenCase:
    """Read a case, or begin to.

    Parameters
    ----------
    case : its images keyed by the study's modalities, or by "" where it names none; its label plays no part.
    study : Study
    large : see `LARGE`.

    Raises
    ------
    DataError : a file cannot be read, or the case does not fit the study; the message names the case.
    """
    unlabelled = Case(case.name, case.patient, case.images, None)
    banded = _banded(unlabelled, study, large)
    if banded is not None:
        return banded
    images, _ = read_case(unlabelled, study)
    try:
        lazy = _lazy(images, study, large)
        if lazy is not None:
            return lazy
        prepared = prepare_case(images, None, study)
    except DataError as error:
        raise DataError(f"case {case.name}: {error}") from error
    stored = next(image for image in images if image is not None)
    return OpenCase(WholeImage(prepared.image), prepared.grid, _rows_of(stored, study), stored.stated, lambda: None)


class LazyImage:
    """Channels of one grid, prepared as they are read.

    Parameters
    ----------
    channels : for each modality its rows and how they are scaled; None gives zeros.
    wanted : how many channels each of them becomes: grey is repeated for 3, RGB becomes its luminance for 1.
    """

    def __init__(self, channels: Sequence[tuple[Rows, Scaling] | None], wanted: int) -> None:
        self._channels, self._wanted = channels, wanted
        spatial = next(rows.shape[:-1] for rows, _ in (one for one in channels if one is not None))
        self.shape = (*spatial, wanted * len(channels))
        self._band: tuple[int, int] = (0, 0)
        self._rows: list[npt.NDArray[Any] | None] = []

    def read(self, window: tuple[slice, ...]) -> npt.NDArray[np.float32]:
        """The part within a slice for each spatial axis. The rows that it lies in are kept, stored, for the next."""
        band = (window[0].start, window[0].stop)
        if band != self._band or not self._rows:
            self._rows = [one[0].rows(*band) if one is not None else None for one in self._channels]
            self._band = band
        place = (slice(None), *window[1:])
        shape = tuple(part.stop - part.start for part in window)
        result = np.zeros((*shape, self.shape[-1]), np.float32)
        for index, (one, rows) in enumerate(zip(self._channels, self._rows, strict=True)):
            if one is not None and rows is not None:
                values = one[1](_values(rows[place], self._wanted))
                result[..., index * self._wanted : (index + 1) * self._wanted] = values  # grey is repeated
        return result


def _values(stored: npt.NDArray[Any], wanted: int) -> npt.NDArray[np.float32]:
    values: npt.NDArray[np.float32] = stored.astype(np.float32)
    return values if values.shape[-1] <= wanted else (values @ _LUMINANCE)[..., np.newaxis]


@dataclass(frozen=True, eq=False)
class _Array:
    """A stored image in memory."""

    array: npt.NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.array.dtype

    def rows(self, first: int, end: int) -> npt.NDArray[Any]:
        return self.array[first:end]


def _rows_of(volume: Volume, study: Study) -> _Array:
    return _Array(volume.array if study.task.dimensions == 3 else volume.array[0])


def _takes_tiles(study: Study) -> bool:
    settings = study.preprocessing
    return settings.spacing is None and settings.crop == "none" and settings.intensity != "foreground_zscore"


def _banded(case: Case, study: Study, large: int) -> OpenCase | None:
    """A plane whose file is read a band at a time, where study and file let it."""
    source = next(iter(case.images.values()), None)
    if study.task.dimensions != 2 or not _takes_tiles(study) or len(study.task.modalities) > 1 or source is None:
        return None
    if source.series or source.level:
        return None
    file = open_banded(source.path)
    if file is None:
        return None
    wanted = 1 if study.task.modalities else study.task.channels
    if int(np.prod(file.shape)) < large or not _fits(file, wanted, study):
        file.close()
        return None
    try:
        scaling = _scaling(file, wanted, study)
    except DataError as error:
        file.close()
        raise DataError(f"case {case.name}: {error}") from error
    shape = (1, *file.shape[:2])
    zoom = Zoom(shape, shape)
    crop = ((0, 1), (0, shape[1]), (0, shape[2]))
    grid = Grid(2, shape, scaling_affine(file.spacing), Orientation(), zoom, crop)
    return OpenCase(LazyImage([(file, scaling)], wanted), grid, file, _stated(source.path), file.close)


def _stated(path: Path) -> Stated:
    """What a TIFF file of one image says of its grid."""
    with tifffile.TiffFile(path) as file:
        return "spacing" if tiff_spacing.is_stated(file, 0, 1) else "nothing"


def _lazy(images: Sequence[Volume | None], study: Study, large: int) -> OpenCase | None:
    """Volumes in memory of which tiles are prepared, where study and images let it."""
    present = [image for image in images if image is not None]
    names = study.task.modalities
    if not present or not _takes_tiles(study) or sum(image.array.size for image in present) < large:
        return None
    if len(present) < len(images) and study.task.missing_modality == "error":
        return None
    reference, wanted = present[0], 1 if names else study.task.channels
    turned = [to_ras(image) if study.task.dimensions == 3 and image is not None else image for image in images]
    first = next(image for image in turned if image is not None)
    if not all(image is first or same_grid(first, image) for image in turned if image is not None):
        return None
    rows = [None if image is None else _rows_of(image, study) for image in turned]
    if not all(_fits(one, wanted, study) for one in rows if one is not None):
        return None
    channels = [None if one is None else (one, _scaling(one, wanted, study)) for one in rows]
    orientation = Orientation.to_ras(reference.affine) if study.task.dimensions == 3 else Orientation()
    depth, length, width = first.shape
    crop = ((0, depth), (0, length), (0, width))
    zoom = Zoom(first.shape, first.shape)
    grid = Grid(study.task.dimensions, reference.shape, reference.affine, orientation, zoom, crop)
    return OpenCase(LazyImage(channels, wanted), grid, _rows_of(reference, study), reference.stated, lambda: None)


def _fits(rows: Rows, wanted: int, study: Study) -> bool:
    """Whether an image can be measured in blocks. One whose channels do not serve is left to who prepares it whole."""
    found, dtype = rows.shape[-1], rows.dtype
    return channels_fit(found, wanted, dtype) and is_measurable(study.preprocessing.intensity, dtype, found > wanted)


def _scaling(rows: Rows, wanted: int, study: Study) -> Scaling:
    settings = study.preprocessing
    return measured(lambda: _blocks(rows, wanted), settings.intensity, rows.dtype, settings.window)


def _blocks(rows: Rows, wanted: int) -> Iterator[npt.NDArray[Any]]:
    length = max(_BLOCK // max(int(np.prod(rows.shape[1:])), 1), 1)
    for first in range(0, rows.shape[0], length):
        block = rows.rows(first, min(first + length, rows.shape[0]))
        yield _values(block, wanted) if block.shape[-1] > wanted else block
