"""Any file or DICOM folder to one `Volume`: `tiff` reads microscopy, `nifti` and `dicom` images of patients.

Volumes come on the grid as stored: nothing is reoriented, the affine says where the voxels lie. A reader raises a
`ReadError` that says what and what to do where a sound file holds something that is not taken, and may raise anything
on a damaged one. This module makes a `ReadError` that names the file of all of them, and holds what is true of images
and labels of all formats.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.imaging.case import Source
from common.imaging.readers import dicom, dicom_folder, dicom_seg, nifti, tiff
from common.imaging.readers.faults import Fault, NoGridError, ReadError
from common.imaging.readers.reason import reason_of
from common.imaging.volume import Volume
from common.wording import listed

_DICOM = "DICOM"
_FORMATS = {
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".nii": "NIfTI",
    ".nii.gz": "NIfTI",
    ".dcm": _DICOM,
}
SUFFIXES = tuple(_FORMATS)
_LARGEST_LABEL = np.iinfo(np.int32).max


def suffix_of(path: Path) -> str | None:
    """The suffix by which a reader is chosen, in lower case (`.nii.gz` counts as one), or None if it tells nothing."""
    name = path.name.lower()
    return next((suffix for suffix in sorted(SUFFIXES, key=len, reverse=True) if name.endswith(suffix)), None)


def read_image(source: Source | Path, dimensions: int) -> Volume:
    """Read an image.

    Parameters
    ----------
    source : Source or Path
        A TIFF, NIfTI or DICOM file (a DICOM file may have any name), or a folder with the files of a DICOM series.
        A `Source` says which series where the folder holds several, and which level of a TIFF pyramid; other formats
        have none beside 0, the full resolution.
    dimensions : 2 or 3
        What the study is about; an image of another number of dimensions is refused.

    Returns
    -------
    Volume
        On the stored grid. `array` holds the file's integers, or float32; every value is finite.

    Raises
    ------
    ReadError
        It is missing, damaged, of another format, of other dimensions, has voxels that are not finite, lacks the level,
        is larger than any reader takes, or is not what the format's reader takes.
    """
    source = _as_source(source)
    where = f"image {source.name}"
    volume = _read(source, dimensions, where, is_label=False, grid=None)
    array = volume.array
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused below
            array = array.astype(np.float32)
        damaged = array.size - int(np.count_nonzero(np.isfinite(array)))
        if damaged:
            raise ReadError(
                Fault.NOT_FINITE,
                f"{where}: {damaged} of {array.size} pixels are not finite numbers (NaN or infinity). "
                "Export the image again with these pixels filled in.",
            )
    return replace(volume, array=_native(array))


def read_label(source: Source | Path, dimensions: int, *, grid: Volume | None = None) -> Volume:
    """Read a label: a class index or an instance number for each voxel, 0 for background.

    Parameters
    ----------
    source, dimensions
        As for `read_image`; a DICOM segmentation gives each voxel the number of its segment.
    grid : Volume, optional
        The image that the label was drawn on. A DICOM segmentation or series is laid onto its grid, slice by slice, 0
        where it has none. Labels of other formats come on their own grid: whether it is the image's is for the caller
        to see.

    Returns
    -------
    Volume
        `array` is int32 of shape (z, y, x, 1), none negative; `stored` says which type the file has. Labels stored as
        floating point numbers with integral values, as some tools write them, are converted.

    Raises
    ------
    ReadError
        As for `read_image`, and for labels of several channels, values that are negative or not integral, segments
        that overlap, and DICOM labels that do not lie on the grid.
    """
    source = _as_source(source)
    where = f"label {source.name}"
    volume = _read(source, dimensions, where, is_label=True, grid=grid)
    array = volume.array
    if volume.channels != 1:
        raise ReadError(
            Fault.LABEL_CHANNELS,
            f"{where}: expected one number for each pixel, found {volume.channels} channels. "
            "Save the label as a grey image of class indices or instance numbers.",
        )
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise ReadError(
                Fault.NOT_FINITE, f"{where}: some values are not finite numbers. Export the label again as integers."
            )
        fractional = array[array != np.rint(array)]
        if fractional.size:
            raise ReadError(
                Fault.LABEL_VALUES,
                f"{where}: {fractional.size} values are not whole numbers, the first is {fractional[0]:g}. "
                "Export the label again as integers, without interpolation.",
            )
    lowest, highest = array.min(), array.max()
    if lowest < 0:
        raise ReadError(
            Fault.LABEL_VALUES,
            f"{where}: expected values from 0, found {lowest:g}. Give every voxel a class of 0 or more.",
        )
    if highest > _LARGEST_LABEL:
        raise ReadError(Fault.LABEL_VALUES, f"{where}: the value {highest:g} is too large. Renumber the label from 0.")
    return replace(volume, array=_native(array.astype(np.int32)), stored=array.dtype.name)


def _as_source(source: Source | Path) -> Source:
    return source if isinstance(source, Source) else Source(source)


def _read(source: Source, dimensions: int, where: str, *, is_label: bool, grid: Volume | None) -> Volume:
    if dimensions not in (2, 3):
        raise ValueError(f"dimensions: expected 2 or 3, found {dimensions}")
    file_format = ""
    try:
        file_format = _format_of(source.path)
        volume = _read_format(file_format, source, is_label, grid)
    except ReadError as error:
        raise ReadError(error.fault, f"{where}: {error}") from error
    except OSError as error:
        raise ReadError(
            Fault.UNREADABLE,
            f"{where}: cannot be read ({reason_of(error)}). Check that the file exists, is complete and may be read by "
            "this user; copy it again from its source if it does.",
        ) from error
    # A damaged file makes the decoders fail in their own ways (struct, zlib, type and index errors, even memory).
    except Exception as error:
        fault = Fault.NO_GEOMETRY if isinstance(error, NoGridError) else Fault.UNREADABLE
        raise ReadError(
            fault,
            f"{where}: cannot be read as {file_format} ({reason_of(error)}). The file is damaged, incomplete or of "
            "another format: copy it again from its source, convert it, or remove it.",
        ) from error
    slices = volume.shape[0]
    if dimensions == 2 and slices != 1:
        raise ReadError(
            Fault.DIMENSIONS,
            f"{where}: expected a 2D image, found a volume of {slices} slices. Save one slice a file: the "
            "study is of 2 dimensions, which only its coordinator can change.",
        )
    if dimensions == 3 and slices == 1:
        raise ReadError(
            Fault.DIMENSIONS,
            f"{where}: expected a 3D volume, found a single slice. Save the whole volume in one NIfTI file or the "
            "folder of a DICOM series: the study is of 3 dimensions, which only its coordinator can change.",
        )
    return volume


def _format_of(path: Path) -> str:
    """By the suffix, and by DICOM's mark where that tells nothing.

    Raises
    ------
    ReadError
        No reader takes the file, or it is empty.
    OSError
        It cannot be opened.
    """
    suffix = suffix_of(path)
    file_format = _FORMATS.get(suffix or "", "")
    if path.is_dir():
        if file_format in ("", _DICOM):
            return _DICOM
        raise ReadError(Fault.NOT_A_FILE, "expected a file, found a folder. Put the image file itself in its place.")
    if path.stat().st_size == 0:
        raise ReadError(Fault.EMPTY_FILE, "the file is empty. Copy it again from its source, or remove it.")
    if not path.is_file():
        raise ReadError(
            Fault.NOT_A_FILE, "expected a file, found a pipe or device. Put the image file itself in its place."
        )
    if file_format:
        return file_format
    if dicom_folder.is_dicom(path):
        return _DICOM
    raise ReadError(
        Fault.NOT_TAKEN, f"files of this type are not read. Convert it to one of {', '.join(SUFFIXES)}, or remove it."
    )


def _read_format(file_format: str, source: Source, is_label: bool, grid: Volume | None) -> Volume:
    if file_format == "TIFF":
        return tiff.read(source.path, is_label, source.level)
    if source.level != 0:
        raise ReadError(
            Fault.NO_LEVEL,
            f"a {file_format} image has no level {source.level}. Register the data again without --level, or convert "
            "the image to a TIFF pyramid.",
        )
    if file_format == "NIfTI":
        return nifti.read(source.path, is_label)
    return _read_dicom(source, is_label, grid)


def _read_dicom(source: Source, is_label: bool, grid: Volume | None) -> Volume:
    if not source.path.is_dir():
        if not dicom_folder.is_dicom(source.path):
            raise ValueError("it lacks DICOM's mark")
        if not dicom_folder.is_segmentation(source.path):
            return dicom.read_files([source.path], is_label=is_label, grid=grid)
        files: tuple[Path, ...] = (source.path,)
    else:
        series = _choose(dicom_folder.find_series(source.path), source.series, is_label)
        if not series.is_segmentation:
            return dicom.read_series(series, is_label=is_label, grid=grid)
        files = series.files
    if not is_label:
        raise ReadError(Fault.NOT_TAKEN, "expected an image, found a segmentation (DICOM-SEG). Use it as a label.")
    if len(files) != 1:
        raise ReadError(
            Fault.SEVERAL_SERIES,
            f"the series holds {len(files)} segmentations: {listed(file.name for file in files)}. Name the file of "
            "one.",
        )
    return dicom_seg.read(files[0], grid)


def _choose(found: list[dicom_folder.Series], uid: str, is_label: bool) -> dicom_folder.Series:
    """The series that was asked for, or the only one that can be meant."""
    if uid:
        for series in found:
            if series.uid == uid:
                return series
        raise ReadError(
            Fault.MISSING_SERIES,
            f"it holds no series {uid}. It holds {listed(map(_describe, found)) or 'no DICOM files'}.",
        )
    candidates = [series for series in found if series.frames and (is_label or not series.is_segmentation)]
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise ReadError(
            Fault.SEVERAL_SERIES,
            f"it holds {len(candidates)} series: {listed(map(_describe, candidates))}. Say which one is meant by its "
            "SeriesInstanceUID, or keep each in a folder of its own.",
        )
    others = f"; it holds {listed(map(_describe, found))}" if found else ""
    raise ReadError(
        Fault.NOT_A_FILE, f"the folder holds no DICOM images{others}. Choose the folder with the files of a series."
    )


def _describe(series: dicom_folder.Series) -> str:
    return f"{series.uid} ({series.modality or series.kind}, {series.description or 'no description'})"


def _native(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """In the machine's byte order and contiguous: later steps neither swap nor stride."""
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
