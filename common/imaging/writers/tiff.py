"""Segmentations as TIFF, with the pixel size of the TIFF image they were made of, in the form that says it there.

OME-TIFF begets OME-TIFF, ImageJ's files ImageJ's; other files keep their resolution tags.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile

_COMPRESSION = "zlib"  # lossless, and read by everything
_LEVEL = 6
_STRIP = 1 << 18  # bytes, before they are compressed
_DONE = 1 << 21  # voxels
_CENTIMETRE = 3
_IMAGEJ_TYPES = (np.uint8, np.uint16, np.float32)


def is_ome(path: Path) -> bool:
    """Whether a TIFF file has OME's metadata, and so its segmentation will."""
    with tifffile.TiffFile(path) as file:
        return bool(file.is_ome)


def write(
    path: Path,
    array: npt.NDArray[Any],
    spacing: tuple[float, float, float],
    like: Path,
    *,
    is_stated: bool,
    dtype: npt.DTypeLike = None,
    done: Callable[[], None] = lambda: None,
) -> None:
    """Write a label image, a strip at a time.

    Parameters
    ----------
    path : ends in `.tif` or `.tiff`; in `.ome.tif` where `is_ome(like)`.
    array : integers, shape (z, y, x); z = 1 makes a plane. It may be mapped from disk.
    spacing : (z, y, x) in micrometres, of the image at the level that was read; 1.0 where it states none.
    like : the TIFF image.
    is_stated : whether the image states a distance along any axis, as `Volume.stated` has it: 1.0 is a distance then
        along every axis of which its metadata speak. What is not stated is not written either.
    dtype : of the file's integers, which hold all numbers of the array; None: as the array.
    done : called now and then: what was read of the array up to there is not read again.
    """
    plane = array[0] if array.shape[0] == 1 else array
    axes = "ZYX"[3 - plane.ndim :]
    sizes = dict(zip("ZYX", spacing, strict=True))
    stored = np.dtype(dtype or plane.dtype)
    with tifffile.TiffFile(like) as file:
        page = file.pages.first
        ome, imagej = bool(file.is_ome), bool(file.is_imagej)
        tags, unit = page.resolution, int(page.resolutionunit)
        same_size = (page.imagelength, page.imagewidth) == array.shape[-2:]
        has_tags = "XResolution" in page.tags and min(tags) > 0
        known = {axis: size for axis, size in sizes.items() if size != 1.0 or (is_stated and _speaks_of(file, axis))}
    common: dict[str, Any] = {"photometric": "minisblack", "shape": plane.shape, "dtype": stored}
    rows = max(_STRIP // (plane.shape[-1] * stored.itemsize), 1)
    compressed = {**common, "compression": _COMPRESSION, "rowsperstrip": min(rows, plane.shape[-2])}
    strips = _strips(plane, stored, rows, done)
    deflated = (zlib.compress(strip, _LEVEL) for strip in strips)
    if ome:
        metadata: dict[str, Any] = {"axes": axes}
        for axis in axes:
            if axis in known:
                metadata |= {f"PhysicalSize{axis}": known[axis], f"PhysicalSize{axis}Unit": "µm"}
        tifffile.imwrite(path, deflated, ome=True, metadata=metadata, **compressed)
    elif imagej and {"X", "Y"} <= known.keys() and stored in _IMAGEJ_TYPES:
        metadata = {"axes": axes, "unit": "um"}
        if "Z" in axes and "Z" in known:
            metadata["spacing"] = known["Z"]
        resolution = (1 / sizes["X"], 1 / sizes["Y"])
        tifffile.imwrite(
            path, strips, imagej=True, resolution=resolution, resolutionunit=1, metadata=metadata, **common
        )
    else:
        resolutions: dict[str, Any] = {}
        if has_tags and same_size and not imagej:
            resolutions = {"resolution": tags, "resolutionunit": unit}
        elif {"X", "Y"} <= known.keys():
            resolutions = {"resolution": (1e4 / sizes["X"], 1e4 / sizes["Y"]), "resolutionunit": _CENTIMETRE}
        metadata = {"axes": axes}  # and what tags cannot say exactly, or not of slices
        metadata |= {f"PhysicalSize{axis}": size for axis, size in known.items()}
        tifffile.imwrite(path, deflated, metadata=metadata, **compressed, **resolutions)


def _speaks_of(file: tifffile.TiffFile, axis: str) -> bool:
    """Whether a file that states distances, of 1 perhaps, has one along an axis of "ZYX"."""
    name = f"PhysicalSize{axis}"
    if file.ome_metadata:
        return f"{name}=" in file.ome_metadata
    if file.imagej_metadata:
        return axis != "Z" or "spacing" in file.imagej_metadata
    shaped = file.shaped_metadata
    if shaped and any(key.startswith("PhysicalSize") for key in shaped[0]):
        return name in shaped[0]
    return axis != "Z"  # tags, and what scanners of slides write, are of planes


def _strips(array: npt.NDArray[Any], dtype: np.dtype[Any], rows: int, done: Callable[[], None]) -> Iterator[bytes]:
    """The bytes of each strip of so many rows, plane by plane."""
    read = 0
    for plane in array if array.ndim == 3 else (array,):
        for first in range(0, plane.shape[0], rows):
            strip = plane[first : first + rows].astype(dtype)
            read += strip.size
            if read > _DONE:
                done()
                read = 0
            yield strip.tobytes()
