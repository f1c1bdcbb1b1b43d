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

from common.imaging.readers.faults import MOST_VOXELS, Fault, ReadError, refuse_no_grid
from common.imaging.volume import Volume

# nibabel reports odd headers to its logger, which prints to stderr. Whatever matters is raised by `read`.
logging.getLogger("nibabel.global").setLevel(logging.CRITICAL + 1)

_MILLIMETRES = {"meter": 1e3, "mm": 1.0, "micron": 1e-3, "unknown": 1.0}
_TIMES = ("sec", "msec", "usec")
_NIFTI2_HEADER = 540
_LONGEST_HEADER = 1 << 26  # nobody writes so long a comment
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
        says it. A fourth axis counts channels unless the header calls it time, by a unit of time or a distance between
        its volumes. Slope and intercept are applied; integers stay integers where there are none. Spacing and affine
        are in millimetres, and count as stated, whichever of NIfTI's three ways says them.

    Raises
    ------
    ReadError
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
        header = kind.header_class(start[: kind.header_class.sizeof_hdr], check=False)
        announced = _announced_bytes(header, None if packed else path.stat().st_size)
        # Up to the end, because only there is the checksum of a packed file compared.
        content = start + file.read(max(announced + _SURPLUS - len(start), 0) + 1)
    if len(content) > announced + _SURPLUS:
        raise ReadError(
            Fault.UNREADABLE,
            f"cannot be read: its header announces {announced} bytes, and more follow. Export the file again.",
        )
    image: Any = kind.from_bytes(content)

    shape = image.shape
    if len(shape) == 5 and shape[3] == 1:  # a vector a voxel: the fourth axis is time
        shape = (*shape[:3], shape[4])
    if not 2 <= len(shape) <= 4:
        raise ReadError(
            Fault.NOT_TAKEN,
            f"expected an image of 2 or 3 axes, or 4 with channels last, found {image.shape}. Split it.",
        )
    if len(image.shape) == 4 and shape[3] > 1 and _says_time(image.header):
        raise ReadError(
            Fault.NOT_TAKEN,
            f"holds {shape[3]} volumes along its fourth axis, which its header calls time. Save the one volume that is "
            "wanted, or each in a file of its own; if they are channels, save them without a unit of time.",
        )
    voxels = np.asanyarray(image.dataobj)
    if voxels.dtype.kind not in "iuf":
        raise ReadError(
            Fault.NOT_TAKEN, f"voxels of type {voxels.dtype} are not taken. Save them as integers or real numbers."
        )
    voxels = voxels.reshape((*shape, 1, 1)[:4])

    affine = np.array(image.affine, dtype=np.float64)
    if not np.isfinite(affine).all() or np.linalg.det(affine[:3, :3]) == 0.0:
        raise ReadError(
            Fault.NO_GEOMETRY, "the header's affine is not invertible. Export the file again with its orientation."
        )
    affine[:3] *= _MILLIMETRES[image.header.get_xyzt_units()[0]]
    x, y, z = (float(length) for length in np.linalg.norm(affine[:3, :3], axis=0))
    refuse_no_grid((z, y, x), affine)
    return Volume(voxels.transpose(2, 1, 0, 3), (z, y, x), affine)


def _says_time(header: Any) -> bool:
    """Whether the fourth axis is time: it has a unit of time, or a distance that is not what writers put for none."""
    return header.get_xyzt_units()[1] in _TIMES or float(header["pixdim"][4]) not in (0.0, 1.0)


def _announced_bytes(header: Any, size: int | None) -> int:
    """The size of the whole file, unpacked, as its header says it.

    Parameters
    ----------
    header : of either version of NIfTI.
    size : of the file in bytes; None where it is packed. A file that lacks what it announces is damaged, not large.

    Raises
    ------
    ReadError
        It says more than any image has.
    Exception
        Of any class, where the header is damaged.
    """
    voxels = math.prod(max(int(length), 0) for length in header.get_data_shape())
    offset = int(header.get_data_offset())
    announced = max(offset, 0) + voxels * int(header.get_data_dtype().itemsize)
    if voxels > MOST_VOXELS or offset > _LONGEST_HEADER:
        is_whole = offset <= _LONGEST_HEADER and (size is None or size >= announced)
        raise ReadError(
            Fault.TOO_LARGE if is_whole else Fault.UNREADABLE,
            f"cannot be read: its header announces {voxels} voxels from byte {offset} on, of at most {MOST_VOXELS} "
            f"from at most {_LONGEST_HEADER}. Export the file again, or split it.",
        )
    return announced
