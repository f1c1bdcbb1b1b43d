"""Segmentations as NIfTI, with the geometry of the NIfTI image they were made of, header codes included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt

from common.imaging.geometry import Affine


def write(path: Path, array: npt.NDArray[Any], affine: Affine, like: Path | None = None) -> None:
    """Write a label image.

    Parameters
    ----------
    path : ends in `.nii` or `.nii.gz`.
    array : integers, shape (z, y, x).
    affine : as in `Volume`, in millimetres; for where there is no `like`.
    like : the NIfTI image that the label lies on: its affine, sform, qform, their codes and its unit are taken over
        unchanged, and its version, NIfTI-1 or NIfTI-2.
    """
    voxels = array.transpose(2, 1, 0)
    if like is None:
        fresh: Any = nib.Nifti1Image(voxels, affine)  # type: ignore[no-untyped-call]
        fresh.header.set_xyzt_units("mm")
        fresh.to_filename(str(path))
        return
    image: Any = nib.load(like)
    header = image.header.copy()
    header.set_data_dtype(array.dtype)
    header.set_slope_inter(1, 0)
    header["cal_min"], header["cal_max"] = 0, 0  # a window for the image's own numbers
    header.set_intent("none")
    header["descrip"] = b"segmentation"
    header.extensions.clear()  # they may say whose image it is
    result = type(image)(np.asarray(voxels), None, header)
    result.to_filename(str(path))
