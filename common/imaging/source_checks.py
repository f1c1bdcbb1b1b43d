"""From a source to its voxels, or to the code of what is wrong with it. No exception but `Refused` comes out."""

from __future__ import annotations

import errno
import re
import stat
from dataclasses import dataclass
from pathlib import Path

import pydicom

from common.imaging.case import Source
from common.imaging.facts import format_of
from common.imaging.findings import Code, Finding
from common.imaging.readers import dicom_folder, read_image, read_label, suffix_of
from common.imaging.readers.faults import Fault, ReadError
from common.imaging.volume import Volume

_CODES = {
    Fault.UNREADABLE: Code.UNREADABLE,
    Fault.EMPTY_FILE: Code.EMPTY_FILE,
    Fault.NOT_A_FILE: Code.NOT_A_FILE,
    Fault.MISSING_SERIES: Code.MISSING_FILE,
    Fault.SEVERAL_SERIES: Code.SEVERAL_SERIES,
    Fault.NOT_TAKEN: Code.NOT_TAKEN,
    Fault.NO_LEVEL: Code.NO_LEVEL,
    Fault.TOO_LARGE: Code.TOO_LARGE,
    Fault.DIMENSIONS: Code.DIMENSIONS,
    Fault.NOT_FINITE: Code.NOT_FINITE,
    Fault.NO_GEOMETRY: Code.NO_GEOMETRY,
    Fault.SLICES: Code.SLICES,
    Fault.LABEL_VALUES: Code.LABEL_VALUES,
    Fault.LABEL_CHANNELS: Code.LABEL_CHANNELS,
    Fault.LABEL_SHAPE: Code.SHAPE_MISMATCH,
    Fault.LABEL_PLACE: Code.AFFINE_MISMATCH,
}
_SENTENCE = re.compile(r"\.\s+(?=[A-Z])")
_LONGEST_MESSAGE = 300


class Refused(Exception):
    """A source that cannot be examined further."""

    def __init__(self, code: Code, message: str, advice: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.advice = advice

    def finding(self, case: str, file: str) -> Finding:
        """What to report of it."""
        return self.code.finding(self.message, case=case, file=file, advice=self.advice)


@dataclass(frozen=True)
class Origin:
    """The files that a source is made of, and whether DICOM says that text is burnt into their pixels."""

    files: list[Path]
    burned_in: bool = False


def origin_of(source: Source) -> Origin:
    """What a source is made of; of a DICOM file, that file. Raises Refused where it can no longer be listed."""
    if format_of(source) != "DICOM":
        return Origin([source.path])
    try:
        if not source.path.is_dir():
            header = pydicom.dcmread(source.path, stop_before_pixels=True, specific_tags=["BurnedInAnnotation"])
            return Origin([source.path], str(header.get("BurnedInAnnotation", "")).strip().upper() == "YES")
        series = [found for found in dicom_folder.find_series(source.path) if source.series in ("", found.uid)]
    # The pixels were read from it before: it was changed since, or a decoder fails in its own way.
    except Exception as error:
        raise _refused(error, f"image {source.name}") from error
    files = [path for found in series for path in found.files]
    return Origin(files, any(found.burned_in_annotation for found in series))


def read(source: Source, dimensions: int | None, *, is_label: bool = False, grid: Volume | None = None) -> Volume:
    """Read an image or a label.

    Parameters
    ----------
    dimensions : 2 or 3; None takes either.
    grid : of the image that a label was drawn on.

    Raises
    ------
    Refused : with the code of what is wrong.
    """
    what = f"{'label' if is_label else 'image'} {source.name}"
    _look_at(source, what)
    if dimensions is not None:
        return _read(source, dimensions, is_label, grid, what)
    # Most files of a format have these dimensions, so that few are read in vain.
    first, second = (2, 3) if format_of(source) == "TIFF" else (3, 2)
    try:
        return _read(source, first, is_label, grid, what)
    except Refused as refused:
        if refused.code is not Code.DIMENSIONS:
            raise
    return _read(source, second, is_label, grid, what)


def _read(source: Source, dimensions: int, is_label: bool, grid: Volume | None, what: str) -> Volume:
    try:
        return read_label(source, dimensions, grid=grid) if is_label else read_image(source, dimensions)
    # Readers raise `ReadError`. A file that trips them in a way of its own must not stop the check of the rest.
    except Exception as error:
        raise _refused(error, what) from error


def _look_at(source: Source, what: str) -> None:
    """Refuse what cannot be opened, and what must not be: opening a pipe would wait for ever."""
    path = source.path
    try:
        status = path.stat()
        if not stat.S_ISDIR(status.st_mode):
            if not stat.S_ISREG(status.st_mode):
                raise Refused(Code.NOT_A_FILE, f"{what}: is a pipe, a socket or a device")
            with path.open("rb"):
                pass
    except FileNotFoundError:
        reason = "is a link to a file that does not exist" if path.is_symlink() else "does not exist"
        raise Refused(Code.MISSING_FILE, f"{what}: {reason}") from None
    except NotADirectoryError:
        raise Refused(Code.MISSING_FILE, f"{what}: does not exist: a part of its path is a file") from None
    except OSError as error:
        raise _refused(error, what) from error
    if stat.S_ISDIR(status.st_mode):
        if suffix_of(path) is not None:
            raise Refused(Code.NOT_A_FILE, f"{what}: expected a file, found a folder")
    elif status.st_size == 0:
        raise Refused(Code.EMPTY_FILE, f"{what}: has no bytes")


def _refused(error: Exception, what: str) -> Refused:
    """The code of an exception, and its message in two parts: what is wrong, and what to do."""
    if isinstance(error, ReadError):
        # What the system said is the cause, under the reader's words for it.
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in (errno.EACCES, errno.EPERM, errno.ELOOP):
            return _refused(cause, what)
        message, *rest = _SENTENCE.split(str(error), maxsplit=1)
        return Refused(_CODES[error.fault], message.rstrip(".")[:_LONGEST_MESSAGE], rest[0] if rest else "")
    if isinstance(error, OSError):
        if error.errno == errno.ELOOP:
            return Refused(Code.LINK_LOOP, f"{what}: is a link that leads back to itself")
        if error.errno in (errno.EACCES, errno.EPERM):
            return Refused(Code.NO_PERMISSION, f"{what}: may not be read by this user")
    reason = (str(error).splitlines() or [""])[0][:_LONGEST_MESSAGE] or type(error).__name__
    return Refused(Code.UNREADABLE, f"{what}: cannot be read ({reason})")
