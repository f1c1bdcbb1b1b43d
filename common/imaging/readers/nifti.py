"""NIfTI images, on the grid as stored.

Read with nibabel. Source: NIfTI-1 and NIfTI-2 data format, https://nifti.nimh.nih.gov.
"""

from __future__ import annotations

import gzip
import logging
import math
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
# A small packed file can unpack to any size. No scanner makes images of so many voxels, or writes so long a comment.
_MOST_VOXELS = 1 << 31
_LONGEST_HEADER = 1 << 26
_SURPLUS = 1 << 20  # some programs fill files up to whole blocks


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
    packed = path.name.lower().endswith(".gz")
    with gzip.open(path) if packed else path.open("rb") as file:
        start = file.read(_NIFTI2_HEADER)
        # The first field of a header is its own size, in either byte order.
        is_second = _NIFTI2_HEADER in (int.from_bytes(start[:4], "little"), int.from_bytes(start[:4], "big"))
        kind: Any = nib.Nifti2Image if is_second else nib.Nifti1Image
        announced = _announced_bytes(kind.header_class(start[: kind.header_class.sizeof_hdr], check=False))
        # Up to the end, because only there is the checksum of a packed file compared.
        content = start + file.read(max(announced + _SURPLUS - len(start), 0) + 1)
    if len(content) > announced + _SURPLUS:
        raise DataError(
            f"cannot be read: its header announces {announced} bytes, and more follow. Export the file again."
        )
    image: Any = kind.from_bytes(content)

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


def _announced_bytes(header: Any) -> int:
    """The size of the whole file, unpacked, as its header says it.

    Raises
    ------
    DataError
        It says more than any image has.
    Exception
        Of any class, where the header is damaged.
    """
    voxels = math.prod(max(int(length), 0) for length in header.get_data_shape())
    offset = int(header.get_data_offset())
    if voxels > _MOST_VOXELS or offset > _LONGEST_HEADER:
        raise DataError(
            f"cannot be read: its header announces {voxels} voxels from byte {offset} on, of at most {_MOST_VOXELS} "
            f"from at most {_LONGEST_HEADER}. Export the file again, or split it."
        )
    return max(offset, 0) + voxels * int(header.get_data_dtype().itemsize)
