"""What a DICOM file says of each of its frames, whether in its top level or in functional groups.

Source: DICOM PS3.3, C.7.6.16 (Multi-frame Functional Groups Module).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset

from common.imaging.readers.dicom_geometry import Plane, Vector
from common.imaging.readers.faults import Fault, ReadError

# pydicom remarks on odd headers, on stderr. Whatever matters is raised by the readers.
logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
warnings.filterwarnings("ignore", module="pydicom")
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE

MARK = b"DICM"
MARK_AT = 128


@dataclass(frozen=True)
class Frame:
    """One frame: where it lies, and what makes its stored numbers the quantity that was measured.

    Attributes
    ----------
    plane : Plane
    slope, intercept : value = slope * stored + intercept; 1 and 0 where the file does not say.
    segment : the number of the segment in a binary or fractional segmentation, else 0.
    """

    plane: Plane
    slope: float
    intercept: float
    segment: int


def frames_of(dataset: Dataset, name: str) -> list[Frame]:
    """Every frame of a file, in stored order; one for a classic image.

    Parameters
    ----------
    dataset : Dataset
        The pixels are not read.
    name : str
        The file's, for messages.

    Raises
    ------
    ReadError
        The file holds no image, or its header contradicts itself.
    """
    if "Rows" not in dataset or "Columns" not in dataset:
        raise ReadError(Fault.NOT_TAKEN, f"{name} holds no image ({kind_of(dataset)}). Choose a series of images.")
    if "TotalPixelMatrixColumns" in dataset:
        raise ReadError(Fault.NOT_TAKEN, f"{name} holds a slide in tiles, which is not read. Export it as TIFF.")
    count = number_of_frames(dataset)
    shared = _first(dataset, "SharedFunctionalGroupsSequence")
    own = dataset.get("PerFrameFunctionalGroupsSequence")
    if own is not None and len(own) != count:
        raise ReadError(Fault.NOT_TAKEN, f"{name} describes {len(own)} frames and holds {count}. Export it again.")
    if own is None and count > 1:
        raise ReadError(
            Fault.NOT_TAKEN,
            f"{name} holds {count} frames and does not say where each of them lies. Export the image as an enhanced "
            "multi-frame file or as a file for each slice.",
        )
    return [
        _frame(
            dataset,
            [group for group in (own[i] if own else None, shared) if group is not None],
            name if count == 1 else f"{name} frame {i + 1}",
            is_alone=count == 1,
        )
        for i in range(count)
    ]


def spacing_between_slices(dataset: Dataset) -> float | None:
    """What a segmentation states as the distance of its slices in millimetres; it may leave out empty ones."""
    shared = _first(dataset, "SharedFunctionalGroupsSequence")
    measures = None if shared is None else _first(shared, "PixelMeasuresSequence")
    stated = None if measures is None else measures.get("SpacingBetweenSlices")
    return None if stated is None or not np.isfinite(float(stated)) or float(stated) <= 0 else float(stated)


def number_of_frames(dataset: Dataset) -> int:
    """At least 1."""
    return max(1, int(dataset.get("NumberOfFrames") or 1))


def kind_of(dataset: Dataset) -> str:
    """The SOP class in words."""
    uid = dataset.get("SOPClassUID")
    return str(uid.name) if uid else "no SOP class"


def text_of(dataset: Dataset, keyword: str) -> str:
    """An attribute as text, "" where it is missing or empty."""
    value = dataset.get(keyword)
    return "" if value is None else str(value).strip()


def _frame(dataset: Dataset, groups: list[Dataset], name: str, is_alone: bool) -> Frame:
    def of(sequence: str, keyword: str, top_level: bool) -> Any:
        for item in _items(groups, sequence):
            if item.get(keyword) is not None:
                return item[keyword].value
        return dataset.get(keyword) if top_level else None

    # The top level of a file of several frames cannot say where each of them lies.
    position = of("PlanePositionSequence", "ImagePositionPatient", is_alone)
    orientation = of("PlaneOrientationSequence", "ImageOrientationPatient", is_alone)
    spacing = of("PixelMeasuresSequence", "PixelSpacing", True)
    if spacing is None:
        spacing = dataset.get("ImagerPixelSpacing") or dataset.get("NominalScannedPixelSpacing")
    depth = _numbers(of("PixelMeasuresSequence", "SliceThickness", True), 1, "SliceThickness", name)
    slope = _numbers(of("PixelValueTransformationSequence", "RescaleSlope", True), 1, "RescaleSlope", name)
    intercept = _numbers(of("PixelValueTransformationSequence", "RescaleIntercept", True), 1, "RescaleIntercept", name)
    segment = of("SegmentIdentificationSequence", "ReferencedSegmentNumber", False)
    plane = Plane(
        name=name,
        rows=int(dataset.Rows),
        columns=int(dataset.Columns),
        spacing=_numbers(spacing, 2, "PixelSpacing", name),
        position=_numbers(position, 3, "ImagePositionPatient", name),
        orientation=_numbers(orientation, 6, "ImageOrientationPatient", name),
        depth=depth[0] if depth else None,
    )
    return Frame(plane, slope[0] if slope else 1.0, intercept[0] if intercept else 0.0, int(segment or 0))


def _items(groups: list[Dataset], sequence: str) -> Iterator[Dataset]:
    for group in groups:
        item = _first(group, sequence)
        if item is not None:
            yield item


def _first(dataset: Dataset, sequence: str) -> Dataset | None:
    items = dataset.get(sequence)
    return items[0] if items else None


def _numbers(value: Any, count: int, keyword: str, name: str) -> Vector | None:
    """An attribute of one or several numbers, None where it is missing or empty."""
    if value is None or value == "":
        return None
    try:
        numbers = tuple(float(number) for number in np.atleast_1d(value))
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) == 0 and not isinstance(value, str) and len(value) == 0:
        return None
    if len(numbers) != count or not np.isfinite(numbers).all():
        raise ReadError(
            Fault.NO_GEOMETRY,
            f"{name}: {keyword} is {value}, which is not {count} finite numbers. Export the file again.",
        )
    return numbers
