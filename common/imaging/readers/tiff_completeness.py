"""Whether a TIFF file holds all that it describes.

tifffile, made to rescue what it can, fills what a file lacks with zeros, leaves slices out and goes on without the
metadata that tell channels from slices. An image with a black lower half, or half a stack, must not be trained on.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import tifffile

_CUT = "the file ends before its last pixel, or parts of the image were never written"
_TYPE_SIZES = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8)  # in bytes, by the number of the tag's type
_FIRST_PRIVATE_TAG = 32768  # what makers add need not be sound to read the image


def page_offsets(file: tifffile.TiffFile) -> list[int]:
    """Where the pages of a file lie; raises ValueError where their chain breaks off or their tags are not in the file.

    Every page holds the offset of the next; that of the last is 0 (TIFF 6.0, section 2).
    """
    if file.tiff.is_ndpi:  # has tags of its own form
        return [page.offset for page in file.pages]
    offsets: dict[int, None] = {}
    offset = file.pages.first.offset
    while offset:
        if offset in offsets:
            raise ValueError("its pages follow each other in a circle")
        offsets[offset] = None
        offset = _next_page(file, offset)
    return list(offsets)


def refuse_ignored_pages(file: tifffile.TiffFile, offsets: Sequence[int]) -> None:
    """Raise ValueError where the metadata of OME, ImageJ or tifffile describe fewer pages than there are.

    A description that contradicts the pages makes tifffile take the first page for the whole image.
    """
    series = file.series
    if file.is_imagej and not any(one.kind in ("imagej", "ome") for one in series):
        raise ValueError(_CUT)
    if not all(one.kind in ("shaped", "imagej", "ome") for one in series):
        return
    described = sum(len(one) for one in series if not one.keyframe.is_reduced)
    if len(offsets) > described:
        pages = [page.aspage() for page in file.pages]
        if sum(not (page.is_reduced or page.is_mask) for page in pages) > described:
            raise ValueError("its metadata describe fewer pages than it has")


def refuse_missing_pixels(
    file: tifffile.TiffFile, series: tifffile.TiffPageSeries, offsets_of_pages: Sequence[int]
) -> None:
    """Raise ValueError where strips or tiles of a series lie beyond the end of the file, or nowhere."""
    end = file.filehandle.size
    start = series.dataoffset
    if start is not None:  # one block, which the first page alone may describe
        stop = start + series.nbytes
        if start <= 0 or stop > end or any(start <= offset < stop for offset in offsets_of_pages):
            raise ValueError(_CUT)
        return
    for page in (series[i] for i in range(len(series))):
        if page is None:
            raise ValueError(_CUT)
        if page.is_subifd:
            _next_page(file, page.offset)
        offsets, counts = page.dataoffsets, page.databytecounts
        if not len(offsets) == len(counts) >= math.prod(page.chunked):
            raise ValueError(_CUT)
        if any(
            offset <= 0 or count <= 0 or offset + count > end for offset, count in zip(offsets, counts, strict=True)
        ):
            raise ValueError(_CUT)
        if page.is_contiguous and sum(counts) < page.nbytes:
            raise ValueError(_CUT)


def _next_page(file: tifffile.TiffFile, offset: int) -> int:
    """The offset of the page after the one at an offset, all tags of which are in the file."""
    layout, handle = file.tiff, file.filehandle
    handle.seek(offset)
    try:
        count = struct.unpack(layout.tagnoformat, handle.read(layout.tagnosize))[0]
        tags = handle.read(count * layout.tagsize)
        following: int = struct.unpack(layout.offsetformat, handle.read(layout.offsetsize))[0]
    except struct.error as error:
        raise ValueError("the file ends before its last page") from error
    # A tag is its code, its type, the count of its values and, where they do not fit in the rest, their offset.
    form = struct.Struct(layout.byteorder + ("HHQQ" if layout.is_bigtiff else "HHII"))
    for code, kind, values, value_offset in form.iter_unpack(tags):
        size = values * (_TYPE_SIZES[kind] if kind < len(_TYPE_SIZES) else 0)
        beyond = size > layout.offsetsize and value_offset + size > handle.size
        if code < _FIRST_PRIVATE_TAG and beyond:
            raise ValueError(_CUT)
    return following
