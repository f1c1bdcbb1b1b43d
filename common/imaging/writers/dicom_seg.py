"""Segmentations as DICOM-SEG (binary), a segment a class, with references to the images they were made of.

Written with highdicom. Source: DICOM PS3.3, C.8.20 (Segmentation Image Module).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.valuerep import DA, TM

from common.errors import DataError
from common.imaging.case import Source
from common.imaging.readers.dicom_folder import find_series
from common.imaging.readers.dicom_geometry import stack_planes
from common.imaging.readers.dicom_headers import frames_of
from common.imaging.readers.faults import ReadError
from common.imaging.readers.reason import reason_of
from common.imaging.writers.codes import Code, SegmentCodes, codes_of

_SERIES_NUMBER = 9000  # far from those of scanners, which count from 1
# What highdicom copies from the images: a header that is legal but lacks one of them must not end a prediction.
_COPIED = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "AccessionNumber",
    "ReferringPhysicianName",
    "PositionReferenceIndicator",
)
_UNICODE = "ISO_IR 192"
_ASCII_EXTENDED = "ISO 2022 IR 6"  # what an empty first value of several means (PS3.3, C.12.1.1.2)
_PARSED: Mapping[str, Callable[[Any], Any]] = {
    "PatientBirthDate": DA,
    "StudyDate": DA,
    "StudyTime": TM,
    "PatientSex": lambda value: ("M", "F", "O", "", None).index(value),
}
"""Copied values that highdicom looks into, and what raises where there is nothing to be seen in them."""


@dataclass(frozen=True)
class Algorithm:
    """What made a segmentation: a name and a version for the header."""

    name: str
    version: str
    software: str


def check(
    source: Source,
    class_names: Sequence[str],
    algorithm: Algorithm,
    codes: Mapping[str, SegmentCodes] | None = None,
) -> None:
    """See that a DICOM-SEG can be made of a series' headers, by making one of a single voxel that is written nowhere.

    Headers that cannot be read are no matter of this function: whoever reads the series says what is wrong with them.

    Parameters
    ----------
    source, class_names, algorithm, codes : as for `write`.

    Raises
    ------
    DataError : the series' headers do not serve for a segmentation.
    """
    try:
        datasets, order = _images(source)
        rows, columns = int(datasets[0].Rows), int(datasets[0].Columns)
    except DataError as error:
        if isinstance(error, ReadError):
            return
        raise
    except Exception:  # damaged
        return
    one = np.zeros((len(order), rows, columns), np.uint8)
    one[0, 0, 0] = 1  # so that one frame alone is encoded
    _segmentation(one, datasets, source, class_names, algorithm, codes)


def write(
    path: Path,
    classes: npt.NDArray[np.uint8],
    source: Source,
    class_names: Sequence[str],
    algorithm: Algorithm,
    codes: Mapping[str, SegmentCodes] | None = None,
) -> None:
    """Write class indices as a DICOM-SEG object.

    Parameters
    ----------
    path : Path
    classes : shape (z, y, x), on the grid of the series as `read_image` gives it; 0 is in no segment.
    source : the DICOM series, or the file of one.
    class_names : of 1, 2, ...; they become the segments' labels.
    algorithm : goes to the segments and the series' description.
    codes : by class name, where they are not to follow from the name (`codes.codes_of`).

    Raises
    ------
    DataError : the series' headers do not serve for a segmentation.
    """
    datasets, order = _images(source)
    frames = np.empty_like(classes)
    frames[order] = classes  # in the order of the headers
    segmentation = _segmentation(frames, datasets, source, class_names, algorithm, codes)
    with _quiet():
        segmentation.save_as(path)


def _segmentation(
    frames: npt.NDArray[np.uint8],
    datasets: list[Dataset],
    source: Source,
    class_names: Sequence[str],
    algorithm: Algorithm,
    codes: Mapping[str, SegmentCodes] | None,
) -> Any:
    """The object; `frames` are in the order of the headers."""
    import highdicom as hd
    from pydicom.sr.codedict import codes as dictionary

    identification = hd.AlgorithmIdentificationSequence(
        name=algorithm.name, family=dictionary.cid7162.ArtificialIntelligence, version=algorithm.version
    )
    descriptions = []
    for number, name in enumerate(class_names, start=1):
        of_class = codes_of(name, codes)
        descriptions.append(
            hd.seg.SegmentDescription(
                segment_number=number,
                segment_label=name[:64],
                segmented_property_category=_concept(of_class.category),
                segmented_property_type=_concept(of_class.type),
                algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
                algorithm_identification=identification,
            )
        )
    with _quiet():
        try:
            return hd.seg.Segmentation(
                source_images=datasets,
                pixel_array=frames,
                segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
                segment_descriptions=descriptions,
                series_instance_uid=hd.UID(),
                series_number=_SERIES_NUMBER,
                sop_instance_uid=hd.UID(),
                instance_number=1,
                manufacturer="Wardround",
                manufacturer_model_name=algorithm.name[:64],
                software_versions=algorithm.software,
                device_serial_number=algorithm.version[:64],
                content_label="SEGMENTATION",
                pixel_measures=_measures_of(datasets[0]),
                series_description=f"Segmentation {algorithm.name} {algorithm.version}"[:64],
            )
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise DataError(
                f"image {source.name}: its headers do not serve for a DICOM-SEG ({reason_of(error)}). Export the "
                "series as it was acquired, or convert it to NIfTI."
            ) from error


def _images(source: Source) -> tuple[list[Dataset], list[int]]:
    """The headers of the images, in the order of their slices where each has a file of its own; and for every z, the
    place of its frame among all of them."""
    files: Sequence[Path] = [source.path]
    if source.path.is_dir():
        series = [one for one in find_series(source.path) if not one.is_segmentation and one.frames]
        files = next(one for one in series if source.series in ("", one.uid)).files
    datasets: list[Dataset] = [pydicom.dcmread(file, stop_before_pixels=True) for file in files]
    frames = [frames_of(dataset, file.name) for dataset, file in zip(datasets, files, strict=True)]
    if len(datasets) > 1 and any(len(own) != 1 for own in frames):
        raise DataError(
            f"image {source.name}: several files of several frames, which a DICOM-SEG cannot be drawn on. Export the "
            "series as one file, or as one a slice."
        )
    stack = stack_planes([frame.plane for own in frames for frame in own])
    order = stack.order
    for dataset in datasets:
        _make_fit(dataset)
        if "ImagePositionPatient" in dataset and "SliceThickness" not in dataset:  # which may be empty; highdicom asks
            dataset.SliceThickness = f"{stack.spacing[0]:.6g}"
    if len(datasets) == 1:
        return datasets, order
    return [datasets[index] for index in order], list(range(len(order)))


def _make_fit(dataset: Dataset) -> None:
    """Changes what is legal in a header, or common, and highdicom does not take: an empty value counts as absent."""
    with _quiet():
        _name_character_set(dataset)
    for element in [element for element in dataset if element.is_empty]:
        del dataset[element.tag]
    for keyword, kind in _PARSED.items():
        try:
            kind(dataset.get(keyword))
        except (ValueError, TypeError):  # archives and anonymizers write such as "00000000", or UNKNOWN for the sex
            del dataset[keyword]
    for keyword in _COPIED:
        if keyword not in dataset:
            setattr(dataset, keyword, None if keyword != "PatientID" else "")


def _name_character_set(dataset: Dataset) -> None:
    """States the character set by a name of the standard; text of one that has none becomes UTF-8."""
    import highdicom as hd

    stated = dataset.get("SpecificCharacterSet")
    names = [str(name or "").strip() for name in (stated if isinstance(stated, MultiValue) else [stated])]
    if not any(names):
        dataset.pop("SpecificCharacterSet", None)
        return
    if len(names) > 1:
        names[0] = names[0] or _ASCII_EXTENDED
    known = {value.value for value in hd.SpecificCharacterSetValues}
    if not known.issuperset(names):
        dataset.decode()
        names = [_UNICODE]
    dataset.SpecificCharacterSet = names if len(names) > 1 else names[0]


def _measures_of(dataset: Dataset) -> Any:
    """The size of a projection's pixels; None leaves it to highdicom, which knows it of slices.

    A projection has no thickness, and without one highdicom does not read again what it wrote.
    """
    import highdicom as hd

    (plane, *_) = (frame.plane for frame in frames_of(dataset, ""))
    if plane.position is not None or plane.spacing is None or plane.depth is not None:
        return None
    return hd.PixelMeasuresSequence(pixel_spacing=plane.spacing, slice_thickness=1.0)


def _concept(code: Code) -> Any:
    import highdicom as hd

    return hd.sr.CodedConcept(code.value, code.scheme, code.meaning)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():  # highdicom remarks on empty segments and odd headers
        warnings.simplefilter("ignore")
        yield
