"""Large TIFF images, read a band of rows at a time; only the strips or tiles that a band touches are decoded.

For what most slides and large exports are: one plane of grey or RGB bytes or 16-bit numbers, with its channels beside
each other. `open_banded` takes no other and says so by None; `common.imaging.readers` reads those whole.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile

from common.errors import DataError
from common.imaging.readers import suffix_of, tiff_spacing
from common.imaging.readers.tiff_completeness import page_offsets, refuse_ignored_pages, refuse_missing_pixels

_GREY, _RGB, _YCBCR = tifffile.PHOTOMETRIC.MINISBLACK, tifffile.PHOTOMETRIC.RGB, tifffile.PHOTOMETRIC.YCBCR
_JPEG = (6, 7)  # which decode to RGB whatever the colour space inside


class BandedTiff:
    """An open image of shape (y, x, channel).

    Attributes
    ----------
    shape, dtype : of the stored image.
    spacing : (z, y, x), as `Volume` has it.
    """

    def __init__(self, path: Path, series: tifffile.TiffPageSeries, spacing: tuple[float, float, float]) -> None:
        page = series.keyframe
        self._path, self._page, self._start = path, page, series.dataoffset
        self.shape = (int(page.imagelength), int(page.imagewidth), int(page.samplesperpixel))
        self.dtype = np.dtype(page.dtype).newbyteorder("=")
        self.spacing = spacing

    def rows(self, first: int, end: int) -> npt.NDArray[Any]:
        """The rows from `first` to `end`, shape (end - first, x, channel).

        Raises
        ------
        DataError : they are damaged.
        """
        page = self._page
        if self._start is not None:  # the pixels lie in the file as they are
            handle = page.parent.filehandle
            handle.seek(self._start + first * math.prod(self.shape[1:]) * self.dtype.itemsize)
            read = handle.read_array(page.parent.byteorder + self.dtype.char, (end - first) * math.prod(self.shape[1:]))
            return np.asarray(read, self.dtype).reshape(end - first, *self.shape[1:])
        result = np.empty((end - first, *self.shape[1:]), self.dtype)
        length, width = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, self.shape[1])
        across = math.ceil(self.shape[1] / width)
        handle = page.parent.filehandle
        for index in range(first // length * across, math.ceil(end / length) * across):
            handle.seek(page.dataoffsets[index])
            try:
                decoded, place, size = page.decode(
                    handle.read(page.databytecounts[index]),
                    index,
                    jpegtables=page.jpegtables,
                    jpegheader=page.jpegheader,
                )
                if decoded is None:
                    raise ValueError("parts of the image were never written")
            except Exception as error:  # decoders fail in their own ways on damaged files
                raise DataError(
                    f"image {self._path.name}: cannot be read as TIFF ({str(error) or type(error).__name__}). The file "
                    "is damaged: copy it again from its source."
                ) from error
            top, left = place[2], place[3]
            low, high = max(top, first), min(top + size[1], end)
            right = min(left + size[2], self.shape[1])
            result[low - first : high - first, left:right] = decoded[0, low - top : high - top, : right - left]
        return result

    def close(self) -> None:
        self._page.parent.close()


def open_banded(path: Path) -> BandedTiff | None:
    """Open a TIFF file; None where it is not of the kind that is read in bands, or not sound."""
    if suffix_of(path) not in (".tif", ".tiff"):
        return None
    file = None
    try:
        file = tifffile.TiffFile(path)
        opened = _opened(path, file)
    except Exception:  # whoever reads it whole says what is wrong with it
        opened = None
    if opened is None and file is not None:
        file.close()
    return opened


def _opened(path: Path, file: tifffile.TiffFile) -> BandedTiff | None:
    offsets = page_offsets(file)
    series, page = file.series[0], file.series[0].keyframe
    # Beside the image only smaller levels of it.
    if (
        len(series.pages) != 1
        or page is not file.pages.first
        or not all(s.keyframe.is_reduced for s in file.series[1:])
    ):
        return None
    samples = page.samplesperpixel
    photometric = _RGB if page.photometric == _YCBCR and page.compression in _JPEG else page.photometric
    if (
        page.dtype not in (np.uint8, np.uint16)
        or page.bitspersample not in (8, 16)
        or (photometric, samples) not in ((_GREY, 1), (_RGB, 3))
        or page.planarconfig != tifffile.PLANARCONFIG.CONTIG
        or page.extrasamples
        or page.is_reduced
        or page.is_mask
        or page.imagedepth != 1
        or series.is_multifile
        or series.size != math.prod((page.imagelength, page.imagewidth, samples))
        or (file.is_ome and series.kind != "ome")
    ):
        return None
    refuse_ignored_pages(file, offsets)
    refuse_missing_pixels(file, series, offsets)
    # A strip that is the whole image would be decoded for every band.
    if series.dataoffset is None and not page.is_tiled and page.rowsperstrip >= page.imagelength:
        return None
    return BandedTiff(path, series, tiff_spacing.spacing(file, 0, 1))
