"""DICOM segmentations (DICOM-SEG) as labels: the number of a segment becomes the value of its voxels.

Read with highdicom. Source: DICOM PS3.3, C.8.20 (Segmentation Image Module).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import highdicom
import numpy as np
import numpy.typing as npt
from highdicom.seg import Segmentation, SegmentationTypeValues

from common.imaging.readers.dicom_geometry import Plane, slices_on, spanning_stack
from common.imaging.readers.dicom_headers import frames_of, spacing_between_slices
from common.imaging.readers.faults import Fault, ReadError, refuse_too_many
from common.imaging.readers.reason import blaming
from common.imaging.volume import Volume

logging.getLogger("highdicom").setLevel(logging.CRITICAL + 1)

_THRESHOLD = 0.5


def read(path: Path, grid: Volume | None = None) -> Volume:
    """Read a DICOM-SEG file: binary, fractional (a voxel counts from 0.5) or a label map.

    Parameters
    ----------
    path : Path
    grid : Volume, optional
        The image that it was drawn on. Every frame goes to the slice that it states the position of; slices without
        a frame are background. Without, the grid is the smallest that holds all frames.

    Returns
    -------
    Volume
        Shape (z, y, x, 1), uint16, 0 where there is no segment.

    Raises
    ------
    ReadError
        The file is damaged or no DICOM-SEG, segments overlap, or frames do not lie on slices of the grid. The message
        names the file where others are concerned.
    """
    segmentation = _open(path)
    names = _names(segmentation)
    if segmentation.is_tiled:
        raise ReadError(Fault.NOT_TAKEN, "it segments a slide in tiles, which is not read. Export the label as TIFF.")
    frames = frames_of(segmentation, path.name)
    planes = [frame.plane for frame in frames]
    if grid is None:
        grid = _own_grid(planes, spacing_between_slices(segmentation))
    refuse_too_many(math.prod(grid.shape), "its frames span a grid of", "Export the label on the image's grid.")
    slices = slices_on(grid, planes)
    depth, rows, columns = grid.shape
    label = np.zeros((depth, rows, columns), np.uint16)
    overlaps: dict[tuple[int, int], int] = {}
    for number, (frame, z) in enumerate(zip(frames, slices, strict=True)):
        with blaming(path.name):
            values = _values(segmentation, number, frame.segment)
        unknown = sorted(set(np.unique(values).tolist()) - names.keys() - {0})
        if unknown:
            raise ReadError(
                Fault.NOT_TAKEN,
                f"voxels of {frame.plane.name} have the value {unknown[0]}, which is no segment of it. "
                f"It has {_list(names, names)}: export it again.",
            )
        both = (label[z] != 0) & (values != 0) & (label[z] != values)
        pairs, counts = np.unique(np.stack([label[z][both], values[both]]), axis=1, return_counts=True)
        for first, second, count in zip(*pairs.tolist(), counts.tolist(), strict=True):
            overlaps[first, second] = overlaps.get((first, second), 0) + count
        label[z] = np.where(values != 0, values, label[z])
    if overlaps:
        (first, second), count = min(overlaps.items())
        raise ReadError(
            Fault.NOT_TAKEN,
            f"segments overlap: {_list(names, (first, second))} share {count} voxels. A voxel of a label has one "
            "class: export the segments without overlap, or one file for each.",
        )
    return replace(grid, array=label[..., np.newaxis])


def _open(path: Path) -> Segmentation:
    with blaming(path.name):
        return highdicom.seg.segread(path)


def _names(segmentation: Segmentation) -> dict[int, str]:
    """Number 0 of a label map is its background."""
    return {
        number: str(segmentation.get_segment_description(number).segment_label)
        for number in segmentation.segment_numbers
        if number != 0
    }


def _values(segmentation: Segmentation, index: int, segment: int) -> npt.NDArray[np.uint16]:
    """One frame as label values, shape (y, x)."""
    stored = segmentation.get_stored_frame(index, as_index=True)
    kind = segmentation.segmentation_type
    if kind == SegmentationTypeValues.LABELMAP:
        padding = segmentation.get("PixelPaddingValue")
        return np.where(stored == padding, 0, stored).astype(np.uint16) if padding else stored.astype(np.uint16)
    if kind == SegmentationTypeValues.FRACTIONAL:
        stored = stored >= _THRESHOLD * int(segmentation.MaximumFractionalValue)
    return np.where(stored, segment, 0).astype(np.uint16)


def _own_grid(planes: list[Plane], distance: float | None) -> Volume:
    """The smallest grid that holds all frames; of its voxels only the shape counts."""
    stack, depth = spanning_stack(planes, distance)
    voxels = np.broadcast_to(np.uint8(0), (depth, planes[0].rows, planes[0].columns, 1))
    return Volume(voxels, stack.spacing, stack.affine, stack.stated)


def _list(names: dict[int, str], numbers: Collection[int]) -> str:
    return ", ".join(f"{number} ({names.get(number, 'unnamed')})" for number in sorted(numbers))
