"""Segmentations as DICOM-SEG (binary), a segment a class, with references to the images they were made of.

Written with highdicom. Source: DICOM PS3.3, C.8.20 (Segmentation Image Module).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.dataset import Dataset

from common.errors import DataError
from common.imaging.case import Source
from common.imaging.readers.dicom_folder import find_series
from common.imaging.readers.dicom_geometry import stack_planes
from common.imaging.readers.dicom_headers import frames_of
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


@dataclass(frozen=True)
class Algorithm:
    """What made a segmentation: a name and a version for the header."""

    name: str
    version: str
    software: str


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
    import highdicom as hd
    from pydicom.sr.codedict import codes as dictionary

    datasets, order = _images(source)
    frames = np.empty_like(classes)
    frames[order] = classes  # in the order of the headers
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
            segmentation = hd.seg.Segmentation(
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
        segmentation.save_as(path)


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
    order = stack_planes([frame.plane for own in frames for frame in own]).order
    for dataset in datasets:
        for keyword in _COPIED:
            if keyword not in dataset:
                setattr(dataset, keyword, None if keyword != "PatientID" else "")
    if len(datasets) == 1:
        return datasets, order
    return [datasets[index] for index in order], list(range(len(order)))


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
