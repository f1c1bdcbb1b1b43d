"""DICOM image series: found in a folder by their headers, and read to one volume each.

Read with pydicom. A file may have any name: the mark in its header tells. Source: DICOM PS3.10 (files), PS3.3, C.7.3
(series).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.uid import UID

from common.errors import DataError
from common.imaging.readers.dicom_geometry import slices_on, stack_planes
from common.imaging.readers.dicom_headers import MARK, MARK_AT, frames_of, number_of_frames, text_of
from common.imaging.readers.dicom_pixels import refuse_unlike, voxels_of
from common.imaging.readers.reason import blaming, reason_of
from common.imaging.volume import Volume

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


@dataclass(frozen=True)
class Series:
    """The files of one SeriesInstanceUID, and what their headers say.

    Attributes
    ----------
    uid : the SeriesInstanceUID.
    study : the StudyInstanceUID; series of one examination share it.
    frame_of_reference : the FrameOfReferenceUID; series in one world share it. "" where the file does not say.
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
    frame_of_reference: str
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
    ignored : files that are no DICOM files.
    damaged : files that are DICOM by their mark or suffix but cannot be read, and empty files, with the reason.
    """

    series: list[Series]
    ignored: list[Path]
    damaged: dict[Path, str]


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

    Raises
    ------
    OSError
        The folder cannot be listed.
    """
    found: dict[str, list[tuple[Path, Dataset]]] = {}
    ignored: list[Path] = []
    damaged: dict[Path, str] = {}
    for path in sorted(folder.iterdir()):
        # A link to nothing may stand for a slice; pipes and devices would block.
        if path.name.startswith(".") or not (path.is_file() or (path.is_symlink() and not path.exists())):
            continue
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
    series = [_series(uid, members) for uid, members in found.items()]
    return Scan(sorted(series, key=lambda s: (s.description, s.uid)), ignored, damaged)


def find_series(folder: Path) -> list[Series]:
    """The series of a folder, of any kind.

    Parameters
    ----------
    folder : Path
        Its own files count, sub-folders do not; files of any name; what is no DICOM file is passed over (`scan_folder`
        names it).

    Raises
    ------
    DataError
        A DICOM file cannot be read: a series might lack a slice without anyone noticing.
    OSError
        The folder cannot be listed.
    """
    scan = scan_folder(folder)
    if scan.damaged:
        path, reason = next(iter(scan.damaged.items()))
        raise DataError(
            f"{len(scan.damaged)} of its files cannot be read as DICOM, the first is {path.name} ({reason}). Copy them "
            "again from their source, or remove them if they are no slices."
        )
    return scan.series


def read_series(series: Series, *, is_label: bool = False, grid: Volume | None = None) -> Volume:
    """Read the images of a series, in the order of their position along the slice normal, onto one grid.

    Parameters
    ----------
    series : Series
    is_label : bool
        Labels keep their numbers as stored where 0 is white.
    grid : Volume, optional
        The image that a label was drawn on; its slices get the label's by their position, and 0 where the label has
        none. Without, the slices must make a regular grid of their own.

    Returns
    -------
    Volume
        Rescaled (Hounsfield units in CT); integers stay integers where the slope is 1 and the intercept whole. The
        spacing in millimetres comes from the positions, the affine keeps oblique orientations. A single image without
        position gets a grid of its own.

    Raises
    ------
    DataError
        The slices do not make one regular grid (see `dicom_geometry.stack_planes`), or not of one kind, hold colours
        that are a rendering, or a file is damaged. The message names files, not the series.
    """
    return read_files(series.files, is_label=is_label, grid=grid)


def read_files(files: Iterable[Path], *, is_label: bool = False, grid: Volume | None = None) -> Volume:
    """As `read_series`, from the files of one series."""
    paths = list(files)
    names = [path.name for path in paths]
    datasets, frames = [], []
    for path in paths:
        with blaming(path.name):
            datasets.append(pydicom.dcmread(path))
            frames.append(frames_of(datasets[-1], path.name))
    refuse_unlike(datasets, names, is_label)
    planes = [frame.plane for own in frames for frame in own]
    if grid is None:
        stack = stack_planes(planes)
        return Volume(voxels_of(datasets, frames, names, stack.order, is_label), stack.spacing, stack.affine)
    slices = slices_on(grid, planes)
    for i, z in enumerate(slices):
        if z in slices[:i]:
            raise DataError(
                f"two slices at one position: {planes[slices.index(z)].name} and {planes[i].name}. Remove copies, or "
                "export the label again."
            )
    voxels = voxels_of(datasets, frames, names, list(range(len(planes))), is_label)
    laid = np.zeros((grid.shape[0], *voxels.shape[1:]), voxels.dtype)
    laid[slices] = voxels
    return Volume(laid, grid.spacing, grid.affine)


def _series(uid: str, members: list[tuple[Path, Dataset]]) -> Series:
    headers = [header for _, header in members]

    def said(keyword: str) -> str:
        """By the first header that says it."""
        return next((text for text in (text_of(header, keyword) for header in headers) if text), "")

    return Series(
        uid=uid,
        study=said("StudyInstanceUID"),
        frame_of_reference=said("FrameOfReferenceUID"),
        patient=said("PatientID"),
        description=said("SeriesDescription"),
        modality=said("Modality"),
        sop_class=said("SOPClassUID"),
        files=tuple(path for path, _ in members),
        frames=sum(number_of_frames(header) for header in headers if "Rows" in header),
        burned_in_annotation=any(text_of(header, "BurnedInAnnotation").upper() == "YES" for header in headers),
    )
