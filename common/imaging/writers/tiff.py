"""Segmentations as TIFF, with the pixel size of the TIFF image they were made of, in the form that says it there.

OME-TIFF begets OME-TIFF, ImageJ's files ImageJ's; other files keep their resolution tags.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile

_COMPRESSION = "zlib"  # lossless, and read by everything
_CENTIMETRE = 3
_IMAGEJ_TYPES = (np.uint8, np.uint16, np.float32)


def is_ome(path: Path) -> bool:
    """Whether a TIFF file has OME's metadata, and so its segmentation will."""
    with tifffile.TiffFile(path) as file:
        return bool(file.is_ome)


def write(path: Path, array: npt.NDArray[Any], spacing: tuple[float, float, float], like: Path) -> None:
    """Write a label image.

    Parameters
    ----------
    path : ends in `.tif` or `.tiff`; in `.ome.tif` where `is_ome(like)`.
    array : integers, shape (z, y, x); z = 1 makes a plane.
    spacing : (z, y, x) in micrometres, of the image at the level that was read; 1.0 where it states none.
    like : the TIFF image.
    """
    plane = array[0] if array.shape[0] == 1 else array
    axes = "ZYX"[3 - plane.ndim :]
    z, y, x = spacing
    is_known = (y, x) != (1.0, 1.0) or z != 1.0
    with tifffile.TiffFile(like) as file:
        page = file.pages.first
        ome, imagej = bool(file.is_ome), bool(file.is_imagej)
        tags, unit = page.resolution, int(page.resolutionunit)
        same_size = (page.imagelength, page.imagewidth) == array.shape[-2:]
        has_tags = "XResolution" in page.tags and min(tags) > 0
    common: dict[str, Any] = {"photometric": "minisblack"}
    if ome:
        metadata: dict[str, Any] = {"axes": axes}
        for axis, size in zip(axes, spacing[3 - plane.ndim :], strict=True):
            if is_known:
                metadata |= {f"PhysicalSize{axis}": size, f"PhysicalSize{axis}Unit": "µm"}
        tifffile.imwrite(path, plane, ome=True, metadata=metadata, compression=_COMPRESSION, **common)
    elif imagej and is_known and plane.dtype in _IMAGEJ_TYPES:
        metadata = {"axes": axes, "unit": "um", **({"spacing": z} if "Z" in axes else {})}
        resolution = (1 / x, 1 / y)
        tifffile.imwrite(path, plane, imagej=True, resolution=resolution, resolutionunit=1, metadata=metadata, **common)
    else:
        resolutions: dict[str, Any] = {}
        if has_tags and same_size and not imagej:
            resolutions = {"resolution": tags, "resolutionunit": unit}
        elif is_known:
            resolutions = {"resolution": (1e4 / x, 1e4 / y), "resolutionunit": _CENTIMETRE}
        metadata = {"axes": axes}
        if is_known:  # what tags cannot say exactly, or not of slices
            metadata |= {f"PhysicalSize{axis}": size for axis, size in zip("ZYX", spacing, strict=True)}
        tifffile.imwrite(path, plane, metadata=metadata, compression=_COMPRESSION, **resolutions, **common)
