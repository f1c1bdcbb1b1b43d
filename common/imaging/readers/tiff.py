"""2D TIFF images, grey or RGB, with their pixel size where the file states it.

Read with tifffile and imagecodecs (all common compressions). Source of the tags: TIFF 6.0, Adobe 1992.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile

from common.errors import DataError
from common.imaging.volume import Volume, scaling_affine

# tifffile reports damage to its logger, which prints to stderr. Whatever matters is raised by `read`.
logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)

_MICROMETRES = {"nm": 1e-3, "um": 1.0, "µm": 1.0, "μm": 1.0, "\\u00b5m": 1.0, "micron": 1.0, "microns": 1.0, "mm": 1e3}
_CENTIMETRE = 3  # ResolutionUnit


def read(path: Path, is_label: bool) -> Volume:
    """Read a TIFF file that holds one 2D image.

    Parameters
    ----------
    path : Path
    is_label : bool
        Labels keep their numbers as stored; images are turned to "larger is brighter" where the file says that 0 is
        white, and are refused where their numbers are indices into a palette.

    Returns
    -------
    Volume
        Shape (1, y, x, channel), one channel for grey and three for RGB; an alpha channel is dropped. The spacing is
        in micrometres, from OME or ImageJ metadata or a resolution per centimetre; else 1.0. A resolution per inch is
        left out: it is a default for screens and printers, not a measurement.

    Raises
    ------
    DataError
        The file is sound but not one grey or RGB image; the message lacks the file's name.
    Exception
        Of any class, where the file is damaged or of another format.
    """
    with tifffile.TiffFile(path) as file:
        # Reduced pages are previews of the first.
        pages = [page for page in (any_page.aspage() for any_page in file.pages) if not page.is_reduced]
        if not pages:
            raise ValueError("it holds no image")
        page = pages[0]
        # A writer may describe a whole stack by its first page alone, which only the series tells.
        if len(pages) > 1 or file.series[0].size > page.size:
            raise DataError("expected one 2D image, found a stack or several images. Save one image a file.")
        _refuse_missing_pixels(file, page)
        array = _channels_last(page.asarray(), page.axes)
        array = _drop_alpha(array, page)
        if not is_label:
            array = _brighter_is_larger(array, page)
        elif array.dtype == np.bool_:
            array = array.astype(np.uint8)
        spacing = (1.0, *_pixel_size(file, page))
    return Volume(array[np.newaxis], spacing, scaling_affine(spacing))


def _refuse_missing_pixels(file: tifffile.TiffFile, page: tifffile.TiffPage) -> None:
    """tifffile fills what a file lacks with zeros; an image with a black lower half must not be trained on."""
    end = file.filehandle.size
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
        if offset <= 0 or count <= 0 or offset + count > end:
            raise ValueError("the file ends before its last pixel, or parts of the image were never written")


def _channels_last(array: npt.NDArray[Any], axes: str) -> npt.NDArray[Any]:
    if axes == "YX":
        return array[..., np.newaxis]
    if axes == "YXS":
        return array
    if axes == "SYX":
        return np.moveaxis(array, 0, -1)
    raise DataError(f"expected a 2D image, found axes {axes} of shape {array.shape}. Save it as grey or RGB.")


def _drop_alpha(array: npt.NDArray[Any], page: tifffile.TiffPage) -> npt.NDArray[Any]:
    samples = array.shape[2]
    if samples == 2 and page.extrasamples:
        return array[..., :1]
    if samples == 4 and page.photometric != tifffile.PHOTOMETRIC.SEPARATED:
        return array[..., :3]
    if samples in (1, 3):
        return array
    raise DataError(f"expected a grey, RGB or RGBA image, found {samples} samples a pixel. Save it as grey or RGB.")


def _brighter_is_larger(array: npt.NDArray[Any], page: tifffile.TiffPage) -> npt.NDArray[Any]:
    if page.photometric == tifffile.PHOTOMETRIC.PALETTE:
        raise DataError("its pixels are indices into a palette of colours. Save it as grey or RGB.")
    if array.dtype.kind not in "iuf":
        raise DataError(f"pixels of type {array.dtype} are not taken. Save it as 8-bit, 16-bit or float.")
    if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE and array.dtype.kind == "u":
        inverted: npt.NDArray[Any] = np.iinfo(array.dtype).max - array
        return inverted
    return array


def _pixel_size(file: tifffile.TiffFile, page: tifffile.TiffPage) -> tuple[float, float]:
    """The (y, x) spacing in micrometres, 1.0 where it is not stated."""
    if file.ome_metadata:
        image = tifffile.xml2dict(file.ome_metadata)["OME"]["Image"]
        pixels = (image[0] if isinstance(image, list) else image)["Pixels"]
        return _ome_size(pixels, "Y"), _ome_size(pixels, "X")
    if file.imagej_metadata:
        factor = _MICROMETRES.get(str(file.imagej_metadata.get("unit", "")).lower())
    else:
        factor = 1e4 if page.resolutionunit == _CENTIMETRE else None
    x, y = page.resolution
    if factor is None or x <= 0 or y <= 0:
        return 1.0, 1.0
    return factor / y, factor / x


def _ome_size(pixels: dict[str, Any], axis: str) -> float:
    size = pixels.get(f"PhysicalSize{axis}")
    factor = _MICROMETRES.get(str(pixels.get(f"PhysicalSize{axis}Unit", "µm")))
    return 1.0 if size is None or factor is None else float(size) * factor
