"""One file to one `Volume`, whatever the format: `tiff` reads 2D microscopy, `nifti` reads 2D and 3D medical images.

A reader module has one function, `read(path, is_label) -> Volume`. It raises a `DataError` that says what and what to
do where a sound file holds something that is not taken, and may raise anything on a damaged one. This module makes a
`DataError` that names the file of all of them, and holds what is true of images and labels of all formats.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from common.errors import DataError
from common.imaging.readers import nifti, tiff
from common.imaging.volume import Volume

_READERS: dict[str, tuple[str, Callable[[Path, bool], Volume]]] = {
    ".tif": ("TIFF", tiff.read),
    ".tiff": ("TIFF", tiff.read),
    ".nii": ("NIfTI", nifti.read),
    ".nii.gz": ("NIfTI", nifti.read),
}
SUFFIXES = tuple(_READERS)
_LARGEST_LABEL = np.iinfo(np.int32).max


def suffix_of(path: Path) -> str | None:
    """The suffix by which a reader is chosen, in lower case (`.nii.gz` counts as one), or None if no reader fits."""
    name = path.name.lower()
    return next((suffix for suffix in sorted(SUFFIXES, key=len, reverse=True) if name.endswith(suffix)), None)


def read_image(path: Path, dimensions: int) -> Volume:
    """Read an image.

    Parameters
    ----------
    path : Path
        A `.tif`, `.tiff`, `.nii` or `.nii.gz` file.
    dimensions : 2 or 3
        What the study is about; a file of another number of dimensions is refused.

    Returns
    -------
    Volume
        `array` holds the file's integers, or float32; every value is finite.

    Raises
    ------
    DataError
        The file is missing, damaged, of another format, of other dimensions, or has pixels that are not finite.
    """
    where = f"image {path.name}"
    volume = _read(path, dimensions, is_label=False, where=where)
    array = volume.array
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused below
            array = array.astype(np.float32)
        damaged = array.size - int(np.count_nonzero(np.isfinite(array)))
        if damaged:
            raise DataError(
                f"{where}: {damaged} of {array.size} pixels are not finite numbers (NaN or infinity). "
                "Export the image again with these pixels filled in."
            )
    return Volume(_native(array), volume.spacing, volume.affine)


def read_label(path: Path, dimensions: int) -> Volume:
    """Read a label: a class index or an instance number for each voxel, 0 for background.

    Parameters
    ----------
    path, dimensions
        As for `read_image`.

    Returns
    -------
    Volume
        `array` is int32 of shape (z, y, x, 1), none negative. Labels stored as floating point numbers with integral
        values, as some tools write them, are converted.

    Raises
    ------
    DataError
        As for `read_image`, and for labels of several channels, and values that are negative or not integral.
    """
    where = f"label {path.name}"
    volume = _read(path, dimensions, is_label=True, where=where)
    array = volume.array
    if volume.channels != 1:
        raise DataError(
            f"{where}: expected one number for each pixel, found {volume.channels} channels. "
            "Save the label as a grey image of class indices or instance numbers."
        )
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise DataError(f"{where}: some values are not finite numbers. Export the label again as integers.")
        fractional = array[array != np.rint(array)]
        if fractional.size:
            raise DataError(
                f"{where}: {fractional.size} values are not whole numbers, the first is {fractional[0]:g}. "
                "Export the label again as integers, without interpolation."
            )
    lowest, highest = array.min(), array.max()
    if lowest < 0:
        raise DataError(f"{where}: expected values from 0, found {lowest:g}. Give every voxel a class of 0 or more.")
    if highest > _LARGEST_LABEL:
        raise DataError(f"{where}: the value {highest:g} is too large. Renumber the label from 0.")
    return Volume(_native(array.astype(np.int32)), volume.spacing, volume.affine)


def _read(path: Path, dimensions: int, is_label: bool, where: str) -> Volume:
    if dimensions not in (2, 3):
        raise ValueError(f"dimensions: expected 2 or 3, found {dimensions}")
    suffix = suffix_of(path)
    if suffix is None:
        raise DataError(
            f"{where}: files of this type are not read. Convert it to one of {', '.join(SUFFIXES)}, or remove it."
        )
    if path.is_dir():
        raise DataError(f"{where}: expected a file, found a folder. Put the image file itself in its place.")
    file_format, read = _READERS[suffix]
    try:
        is_empty = path.stat().st_size == 0
        volume = None if is_empty else read(path, is_label)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    except OSError as error:
        raise DataError(
            f"{where}: cannot be read ({_reason(error)}). Check that the file exists, is complete and may be read by "
            "this user; copy it again from its source if it does."
        ) from error
    # A damaged file makes the decoders fail in their own ways (struct, zlib, type and index errors, even memory).
    except Exception as error:
        raise DataError(
            f"{where}: cannot be read as {file_format} ({_reason(error)}). The file is damaged, incomplete or of "
            "another format: copy it again from its source, convert it, or remove it."
        ) from error
    if volume is None:
        raise DataError(f"{where}: the file is empty. Copy it again from its source, or remove it.")
    slices = volume.shape[0]
    if dimensions == 2 and slices != 1:
        raise DataError(
            f"{where}: expected a 2D image, found a volume of {slices} slices. Save one slice a file, or set the "
            "study to 3 dimensions."
        )
    if dimensions == 3 and slices == 1:
        raise DataError(
            f"{where}: expected a 3D volume, found a single slice. Save the whole volume in one NIfTI file, or set "
            "the study to 2 dimensions."
        )
    return volume


def _reason(error: Exception) -> str:
    text = (error.strerror if isinstance(error, OSError) and error.strerror else str(error)) or type(error).__name__
    return text.splitlines()[0][:160].rstrip(".")


def _native(array: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    """In the machine's byte order and contiguous: later steps neither swap nor stride."""
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
