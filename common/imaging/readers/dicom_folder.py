"""Which DICOM series a folder holds, by the headers of its files.

A file may have any name: the mark in its header tells. Read with pydicom. Source: DICOM PS3.10 (files), PS3.3, C.7.3
(series).
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import pydicom
from pydicom.dataset import Dataset
from pydicom.uid import UID

from common.imaging.readers.dicom_headers import MARK, MARK_AT, kind_of, number_of_frames, text_of
from common.imaging.readers.faults import Fault, ReadError
from common.imaging.readers.reason import reason_of

SEGMENTATION_CLASSES = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")  # with and without overlap
_DIRECTORY_CLASS = "1.2.840.10008.1.3.10"  # DICOMDIR, the table of contents of a disk
_SUFFIXES = (".dcm", ".dicom", ".ima")
_HEADER = (
    "SOPClassUID",
    "SeriesInstanceUID",
    "StudyInstanceUID",
    "FrameOfReferenceUID",
    "PatientID",
    "SeriesDescription",
    "SeriesNumber",
    "Modality",
    "BurnedInAnnotation",
    "Rows",
    "NumberOfFrames",
)
_SCANS_KEPT = 8


@dataclass(frozen=True)
class Series:
    """The files of one SeriesInstanceUID, and what their headers say.

    Attributes
    ----------
    uid : the SeriesInstanceUID.
    study : the StudyInstanceUID; series of one examination share it.
    patient : the PatientID; it never leaves the site.
    description : the SeriesDescription.
    modality : "CT", "MR", "SEG", ...
    sop_class : the SOPClassUID.
    files : sorted by name, which says nothing of the order of slices.
    frames : the number of images in them; 0 where they hold none (reports, plans, presentation states).
    burned_in_annotation : whether a file says that text is part of its pixels.
    """

    uid: str
    study: str
    patient: str
    description: str
    modality: str
    sop_class: str
    files: tuple[Path, ...]
    frames: int
    burned_in_annotation: bool

    @property
    def is_segmentation(self) -> bool:
        """Whether it holds DICOM-SEG objects, which `dicom_seg` reads."""
        return self.sop_class in SEGMENTATION_CLASSES

    @property
    def kind(self) -> str:
        """The SOP class in words."""
        return UID(self.sop_class).name


@dataclass(frozen=True)
class Scan:
    """What a folder holds.

    Attributes
    ----------
    series : sorted by description, then uid.
    left_aside : files that bear the SeriesInstanceUID of a series of images and hold none themselves, such as a
        structured report on it, with their SOP class in words.
    ignored : files that are no DICOM files.
    damaged : files that are DICOM by their mark or suffix but cannot be read, and empty files, with the reason.
    """

    series: tuple[Series, ...]
    left_aside: Mapping[Path, str]
    ignored: tuple[Path, ...]
    damaged: Mapping[Path, str]


def is_dicom(path: Path) -> bool:
    """Whether a file bears DICOM's mark.

    Raises
    ------
    OSError
        It cannot be opened.
    """
    with path.open("rb") as file:
        return file.read(MARK_AT + len(MARK))[MARK_AT:] == MARK


def is_segmentation(path: Path) -> bool:
    """Whether a DICOM file is a DICOM-SEG, by its header; which raises anything where it is damaged."""
    header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["SOPClassUID"])
    return text_of(header, "SOPClassUID") in SEGMENTATION_CLASSES


def scan_folder(folder: Path) -> Scan:
    """Read the headers of a folder's files; sub-folders and hidden files are left out.

    The last few scans are kept, so that a flat export of many series is not read once for each of them. A file that is
    written to, replaced, given other rights, comes or goes has the folder read again, as does one that the system did
    not let be read.

    Raises
    ------
    OSError
        The folder cannot be listed.
    """
    files = _files(folder)
    mark = hashlib.sha256(repr(files).encode()).hexdigest()
    kept = _kept.get(folder, mark)
    if kept is None:
        kept, passing = _scan([folder / name for name, *_ in files])
        if not passing:
            _kept.put(folder, mark, kept)
    return kept


def find_series(folder: Path) -> list[Series]:
    """The series of a folder, of any kind.

    Parameters
    ----------
    folder : Path
        Its own files count, sub-folders do not; files of any name; what is no DICOM file is passed over (`scan_folder`
        names it).

    Raises
    ------
    ReadError
        A DICOM file cannot be read: a series might lack a slice without anyone noticing.
    OSError
        The folder cannot be listed.
    """
    scan = scan_folder(folder)
    if scan.damaged:
        path, reason = next(iter(scan.damaged.items()))
        raise ReadError(
            Fault.UNREADABLE,
            f"{len(scan.damaged)} of its files cannot be read as DICOM, the first is {path.name} ({reason}). Copy them "
            "again from their source, or remove them if they are no slices.",
        )
    return list(scan.series)


def _scan(paths: list[Path]) -> tuple[Scan, bool]:
    """What the files are, and whether some could not be read for a reason that may pass without a change of theirs."""
    found: dict[str, list[tuple[Path, Dataset]]] = {}
    ignored: list[Path] = []
    damaged: dict[Path, str] = {}
    passing = False
    for path in paths:
        try:
            if not is_dicom(path):
                if path.stat().st_size == 0:
                    damaged[path] = "the file is empty"
                elif path.suffix.lower() in _SUFFIXES:
                    damaged[path] = "it lacks DICOM's mark"
                else:
                    ignored.append(path)
                continue
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(_HEADER))
        except Exception as error:
            damaged[path] = reason_of(error)
            passing = passing or isinstance(error, (OSError, MemoryError))
            continue
        if (
            text_of(header, "SOPClassUID") == _DIRECTORY_CLASS
            or header.file_meta.get("MediaStorageSOPClassUID") == _DIRECTORY_CLASS
        ):
            ignored.append(path)
        elif not text_of(header, "SeriesInstanceUID"):
            damaged[path] = "it states no SeriesInstanceUID"
        else:
            found.setdefault(text_of(header, "SeriesInstanceUID"), []).append((path, header))
    series: list[Series] = []
    left_aside: dict[Path, str] = {}
    for uid, members in found.items():
        members, others = _told_apart(members)
        left_aside.update((path, kind_of(header)) for path, header in others)
        series.append(_series(uid, members))
    ordered = tuple(sorted(series, key=lambda s: (s.description, s.uid)))
    return Scan(ordered, MappingProxyType(left_aside), tuple(ignored), MappingProxyType(damaged)), passing


_Members = list[tuple[Path, Dataset]]


def _told_apart(members: _Members) -> tuple[_Members, _Members]:
    """What makes the series, and what only bears its number: reports and the like beside images.

    A file without an image that is of a class that images of the series have is one of them, and damaged: it stays, so
    that whoever reads the series refuses it.
    """
    classes = {text_of(header, "SOPClassUID") for _, header in members if "Rows" in header}
    if not classes:
        return members, []
    classes.add("")
    kept: _Members = []
    others: _Members = []
    for path, header in members:
        is_image = "Rows" in header or text_of(header, "SOPClassUID") in classes
        (kept if is_image else others).append((path, header))
    return kept, others


def _series(uid: str, members: _Members) -> Series:
    headers = [header for _, header in members]

    def said(keyword: str) -> str:
        """By the first header that says it."""
        return next((text for text in (text_of(header, keyword) for header in headers) if text), "")

    return Series(
        uid=uid,
        study=said("StudyInstanceUID"),
        patient=said("PatientID"),
        description=said("SeriesDescription"),
        modality=said("Modality"),
        sop_class=said("SOPClassUID"),
        files=tuple(path for path, _ in members),
        frames=sum(number_of_frames(header) for header in headers if "Rows" in header),
        burned_in_annotation=any(text_of(header, "BurnedInAnnotation").upper() == "YES" for header in headers),
    )


def _files(folder: Path) -> list[tuple[str, int, int, int, int, int]]:
    """The names of a folder's files, sorted, each with what changes when the file does. Raises OSError."""
    files = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                status = os.stat(entry.path)  # noqa: PTH116 (making a Path takes longer than asking)
            except OSError:
                # A link to nothing may stand for a slice; another file was there a moment ago.
                path = Path(entry.path)
                if not os.path.lexists(path):
                    continue
                if not path.is_symlink():
                    raise
                status = path.lstat()
            # Pipes and devices would block.
            if stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode):
                times = (status.st_mtime_ns, status.st_ctime_ns)
                files.append((entry.name, status.st_size, *times, status.st_ino, status.st_dev))
    return sorted(files)


class _Kept:
    """The scans of the folders that were looked at last; threads may share it."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._scans: OrderedDict[Path, tuple[str, Scan]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, folder: Path, mark: str) -> Scan | None:
        """The scan of a folder whose files still bear this mark."""
        with self._lock:
            found = self._scans.get(folder)
            if found is None or found[0] != mark:
                return None
            self._scans.move_to_end(folder)
            return found[1]

    def put(self, folder: Path, mark: str, scan: Scan) -> None:
        """Keep a scan; that of the folder that was not asked for the longest goes."""
        with self._lock:
            self._scans[folder] = (mark, scan)
            self._scans.move_to_end(folder)
            while len(self._scans) > self._most:
                self._scans.popitem(last=False)


_kept = _Kept(_SCANS_KEPT)
