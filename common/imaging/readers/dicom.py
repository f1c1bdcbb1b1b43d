"""DICOM image series, read to one volume each; `dicom_folder` finds them.

Read with pydicom. Source: DICOM PS3.10 (files), PS3.3, C.7.3 (series).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom

from common.imaging.readers.dicom_folder import Series
from common.imaging.readers.dicom_geometry import slices_on, stack_planes
from common.imaging.readers.dicom_headers import frames_of
from common.imaging.readers.dicom_pixels import refuse_unlike, voxels_of
from common.imaging.readers.faults import Fault, ReadError, refuse_no_grid, refuse_too_many
from common.imaging.readers.reason import blaming
from common.imaging.volume import Volume


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
    ReadError
        The slices do not make one regular grid (see `dicom_geometry.stack_planes`), or not of one kind, hold colours
        that are a rendering, have more voxels together than are taken, or a file is damaged. The message names files,
        not the series.
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
    samples = int(datasets[0].get("SamplesPerPixel") or 1)
    refuse_too_many(
        sum(math.prod((plane.rows, plane.columns, samples)) for plane in planes),
        "its headers announce",
        "Export a part of the series, or the series at a coarser resolution.",
    )
    if grid is None:
        stack = stack_planes(planes)
        refuse_no_grid(stack.spacing, stack.affine)
        voxels = voxels_of(datasets, frames, names, stack.order, is_label)
        return Volume(voxels, stack.spacing, stack.affine, stack.stated)
    slices = slices_on(grid, planes)
    for i, z in enumerate(slices):
        if z in slices[:i]:
            raise ReadError(
                Fault.SLICES,
                f"two slices at one position: {planes[slices.index(z)].name} and {planes[i].name}. Remove copies, or "
                "export the label again.",
            )
    voxels = voxels_of(datasets, frames, names, list(range(len(planes))), is_label)
    laid = np.zeros((grid.shape[0], *voxels.shape[1:]), voxels.dtype)
    laid[slices] = voxels
    return replace(grid, array=laid)
