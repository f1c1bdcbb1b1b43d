"""NIfTI images, on the grid as stored.

Read with nibabel. Source: NIfTI-1 and NIfTI-2 data format, https://nifti.nimh.nih.gov.
"""

from __future__ import annotations

import gzip
import logging
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from common.errors import DataError
from common.imaging.volume import Volume

# nibabel reports odd headers to its logger, which prints to stderr. Whatever matters is raised by `read`.
logging.getLogger("nibabel.global").setLevel(logging.CRITICAL + 1)

_MILLIMETRES = {"meter": 1e3, "mm": 1.0, "micron": 1e-3, "unknown": 1.0}
_NIFTI2_HEADER = 540


def read(path: Path, is_label: bool) -> Volume:
    """Read a `.nii` or `.nii.gz` file.

    Parameters
    ----------
    path : Path
    is_label : bool
        Unused: labels are stored as images are.

    Returns
    -------
    Volume
        The file's (i, j, k[, channel]) axes transposed to (k, j, i, channel), whichever way they point: the affine
        says it. Slope and intercept are applied; integers stay integers where there are none. Spacing and affine are
        in millimetres.

    Raises
    ------
    DataError
        The file is sound but holds something else; the message lacks the file's name.
    Exception
        Of any class, where the file is damaged or of another format.
    """
    content = path.read_bytes()
    if path.name.lower().endswith(".gz"):
        # Decompressed whole, because only then is the checksum at its end compared.
        content = gzip.decompress(content)
    # The first field of a header is its own size, in either byte order.
    size_field = content[:4]
    is_second = _NIFTI2_HEADER in (int.from_bytes(size_field, "little"), int.from_bytes(size_field, "big"))
    image: Any = (nib.Nifti2Image if is_second else nib.Nifti1Image).from_bytes(content)

    shape = image.shape
    if len(shape) == 5 and shape[3] == 1:  # a vector a voxel: the fourth axis is time
        shape = (*shape[:3], shape[4])
    if not 2 <= len(shape) <= 4:
        raise DataError(f"expected an image of 2 or 3 axes, or 4 with channels last, found {image.shape}. Split it.")
    voxels = np.asanyarray(image.dataobj)
    if voxels.dtype.kind not in "iuf":
        raise DataError(f"voxels of type {voxels.dtype} are not taken. Save them as integers or real numbers.")
    voxels = voxels.reshape((*shape, 1, 1)[:4])

    affine = np.array(image.affine, dtype=np.float64)
    if not np.isfinite(affine).all() or np.linalg.det(affine[:3, :3]) == 0.0:
        raise DataError("the header's affine is not invertible. Export the file again with its orientation.")
    affine[:3] *= _MILLIMETRES[image.header.get_xyzt_units()[0]]
    x, y, z = (float(length) for length in np.linalg.norm(affine[:3, :3], axis=0))
    return Volume(voxels.transpose(2, 1, 0, 3), (z, y, x), affine)
