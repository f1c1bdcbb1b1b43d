"""TIFF images of two or three dimensions, OME-TIFF and ImageJ TIFF among them, at the pyramid's level asked for.

Read with tifffile and imagecodecs (all common compressions). What the axes are is what the file's metadata says;
slices without metadata are a Z stack. Sources: TIFF 6.0, Adobe 1992 and its supplements; the OME-TIFF specification.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile

from common.imaging.readers import tiff_spacing
from common.imaging.readers.faults import Fault, ReadError, refuse_too_many
from common.imaging.readers.tiff_completeness import page_offsets, refuse_ignored_pages, refuse_missing_pixels
from common.imaging.volume import Volume, scaling_affine

# tifffile reports damage to its logger, which prints to stderr. Whatever matters is raised by `read`.
logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)

_SMALLER = (
    "Register the data with a smaller level of its pyramid, or save the image in parts or at a coarser resolution."
)
_UNNAMED = "IQ"  # tifffile's letters for an axis that no metadata names
_AXES = {"T": "time points", "A": "angles", "P": "phases", "H": "lifetimes", "E": "wavelengths", "M": "mosaic tiles"}
# What slide scanners, and Bio-Formats after them, store beside a slide.
_OVERVIEWS = {"thumbnail", "macro", "label", "map", "macro image", "label image", "thumbnail image"}
_PHOTOMETRIC = tifffile.PHOTOMETRIC
_JPEG = {6, 7}  # which decode to RGB whatever the colour space inside
_ALPHA = {1, 2}  # ExtraSamples, associated and unassociated
_UNSPECIFIED = 0


@dataclass(frozen=True)
class _Image:
    """What a file holds one of: its levels, the largest first, each one series or slices that are series each."""

    levels: list[list[tifffile.TiffPageSeries]]
    index: int
    count: int


def read(path: Path, is_label: bool, level: int = 0) -> Volume:
    """Read a TIFF file that holds one image, a volume or a slice.

    Parameters
    ----------
    path : Path
    is_label : bool
        Labels keep their numbers as stored; images are turned to "larger is brighter" where the file says that 0 is
        white, and are refused where their numbers are indices into a palette.
    level : int
        Of the image's pyramid: 0 is the full resolution, which every file has. No other level is decoded.

    Returns
    -------
    Volume
        Shape (z, y, x, channel): one channel for grey, three for RGB, as many as stated for fluorescence; an alpha
        channel is dropped. The spacing is in micrometres, of the level, from OME, ImageJ or Aperio metadata or a
        resolution per centimetre; 1.0 where nothing is stated. The affine is `scaling_affine(spacing)`: the world is
        a frame of this level alone, its origin the centre of this level's first pixel.

    Raises
    ------
    ReadError
        The file is sound but not one grey, RGB or multi-channel image, has several points in time, lacks the level, or
        would decode to more voxels than are taken; the message lacks the file's name.
    Exception
        Of any class, where the file is damaged or of another format.
    """
    with tifffile.TiffFile(path) as file:
        pages = page_offsets(file)
        image = _the_one_image(file)
        refuse_ignored_pages(file, pages)
        if not 0 <= level < len(image.levels):
            raise ReadError(
                Fault.NO_LEVEL,
                f"level {level} of the pyramid does not exist: the levels are 0 to {len(image.levels) - 1}. "
                "Register the data again without --level, or with one of these.",
            )
        parts = image.levels[level]
        axes, shape = _axes_of(parts)
        names = _named(axes, shape)
        samples = _samples_kept(parts[0].keyframe, dict(zip(names, shape, strict=True)).get("S", 1), is_label)
        for part in parts:
            refuse_missing_pixels(file, part, pages)
        # Whole tiles are decoded, however little of them the image covers.
        decoded = max(math.prod(shape), *(math.prod(part.keyframe.chunks) for part in parts))
        refuse_too_many(decoded, "it decodes to", _SMALLER)
        array = parts[0].asarray() if len(parts) == 1 else np.stack([part.asarray() for part in parts])
        if array.shape != shape:
            raise ValueError("parts of the image were never written")
        array = _zyxc(array, names, samples)
        array = array.astype(np.uint8) if array.dtype == np.bool_ else array  # labels alone: images were refused
        if not is_label:
            array = _brighter_is_larger(array, parts[0].keyframe)
        full = tiff_spacing.spacing(file, image.index, image.count)
        is_stated = tiff_spacing.is_stated(file, image.index, image.count)
        factors = _downsampling(*(_sizes(*_axes_of(of)) for of in (image.levels[0], parts)))
    z, y, x = (length * factor for length, factor in zip(full, factors, strict=True))
    return Volume(array, (z, y, x), scaling_affine((z, y, x)), "spacing" if is_stated else "nothing")


# Which image


def _the_one_image(file: tifffile.TiffFile) -> _Image:
    series = file.series
    if file.is_ome and not any(one.kind in ("ome", "imagej") for one in series):
        raise ReadError(
            Fault.NOT_TAKEN,
            "its OME metadata do not describe the pixels in this file. Export the image again, as one OME-TIFF file.",
        )
    if any(one.is_multifile for one in series):
        raise ReadError(
            Fault.NOT_TAKEN, "its slices are spread over several files. Save the image as one OME-TIFF file."
        )
    # Reduced pages are the image again, smaller; masks tell where it is valid.
    whole = [one for one in series if not (one.keyframe.is_reduced or one.keyframe.is_mask)]
    if not whole:
        raise ValueError("it holds no image")
    images = [one for one in whole if one.name.lower() not in _OVERVIEWS] or whole
    first = images[0]
    if len(images) > 1:
        if not all(_is_slice_of(first, one) for one in images):
            raise ReadError(Fault.NOT_TAKEN, f"expected one image, found {len(images)} images. Save one image a file.")
        return _Image([images], 0, 1)
    smaller = [one for one in series if one.keyframe.is_reduced and _is_level_of(first, one)]
    levels = sorted([*first.levels[1:], *smaller], key=lambda one: one.size, reverse=True)
    return _Image([[first], *([one] for one in levels)], series.index(first), len(series))


def _is_slice_of(first: tifffile.TiffPageSeries, other: tifffile.TiffPageSeries) -> bool:
    """Whether both are slices of a stack that was written page by page, each with a description of itself alone."""
    return (
        first.kind == other.kind == "shaped"
        and first.axes in ("YX", "YXS", "SYX")
        and len(first.levels) == len(other.levels) == 1
        and (first.axes, first.shape, first.dtype, first.keyframe.photometric)
        == (other.axes, other.shape, other.dtype, other.keyframe.photometric)
    )


def _is_level_of(image: tifffile.TiffPageSeries, other: tifffile.TiffPageSeries) -> bool:
    """Whether a reduced page shows all of the image: in its proportions, but for the rounding of its size."""
    if (image.axes, image.dtype) != (other.axes, other.dtype):
        return False
    full, reduced = (_sizes(one.axes, one.shape) for one in (image, other))
    if any(reduced[axis] != full[axis] for axis in full if axis not in "YX"):
        return False
    factor = full["Y"] / reduced["Y"] if full["Y"] > full["X"] else full["X"] / reduced["X"]
    return factor > 1 and all(abs(full[axis] / factor - reduced[axis]) <= 1 for axis in "YX")


def _downsampling(full: dict[str, int], reduced: dict[str, int]) -> tuple[float, float, float]:
    """How many full-resolution pixels make one of the level along (z, y, x).

    Writers halve, once or often, or divide by another whole number, and round the size. So the number that explains the
    size is taken before the ratio of the sizes, which would make square pixels oblong.
    """

    def factor(axis: str) -> float:
        many, few = full.get(axis, 1), reduced.get(axis, 1)
        ratio = many / few
        for whole in (2 ** round(math.log2(ratio)), round(ratio)):
            if few in (many // whole, -(-many // whole)):
                return float(whole)
        return ratio

    return factor("Z"), factor("Y"), factor("X")


# Which axes


def _axes_of(parts: Sequence[tifffile.TiffPageSeries]) -> tuple[str, tuple[int, ...]]:
    """tifffile's axes and the shape; the slices of a stack are its first axis."""
    axes, shape = parts[0].axes, tuple(parts[0].shape)
    return (axes, shape) if len(parts) == 1 else ("I" + axes, (len(parts), *shape))


def _sizes(axes: str, shape: Sequence[int]) -> dict[str, int]:
    return dict(zip(_named(axes, shape), shape, strict=True))


def _named(axes: str, shape: Sequence[int]) -> str:
    """The axes with the unnamed one called Z, once they can be those of a volume with channels."""
    named = dict(zip(axes, shape, strict=True))
    for axis, size in named.items():
        if size > 1 and axis not in "ZYXCS" + _UNNAMED:
            what = _AXES.get(axis, f"positions along an axis {axis}")
            raise ReadError(
                Fault.NOT_TAKEN,
                f"expected one image, found {size} {what}. Save each in a file of its own; if these are the slices of "
                "a Z stack, correct the axes in the metadata.",
            )
    unnamed = [i for i, axis in enumerate(axes) if axis in _UNNAMED and shape[i] > 1]
    if unnamed and (len(unnamed) > 1 or named.get("Z", 1) > 1):
        raise ReadError(
            Fault.NOT_TAKEN,
            f"the file does not say which axes its shape {tuple(shape)} has. Save it as OME-TIFF or ImageJ TIFF, with "
            "the axes named.",
        )
    if unnamed:
        axes = axes.replace("Z", "z")  # of length 1
        axes = axes[: unnamed[0]] + "Z" + axes[unnamed[0] + 1 :]
    return axes


def _zyxc(array: npt.NDArray[Any], names: str, samples: slice) -> npt.NDArray[Any]:
    """The array with axes (z, y, x, channel): the channels of a file vary slower than the samples of a pixel."""
    flat = tuple(slice(None) if axis in "ZYXCS" else 0 for axis in names)
    array = array[flat]
    names = "".join(axis for axis in names if axis in "ZYXCS")
    array = array.transpose([names.index(axis) for axis in "ZYXCS" if axis in names])
    array = array[tuple(slice(None) if axis in names else np.newaxis for axis in "ZYXCS")]
    array = array[..., samples]
    return array.reshape((*array.shape[:3], -1))


# Which numbers


def _samples_kept(page: tifffile.TiffPage, samples: int, is_label: bool) -> slice:
    """The samples of a pixel that are its value, all but alpha; refuses images that are neither grey nor RGB."""
    if page.dtype is None or page.dtype.kind not in ("iufb" if is_label else "iuf"):
        raise ReadError(
            Fault.NOT_TAKEN, f"pixels of type {page.dtype} are not taken. Save it as 8-bit, 16-bit or float."
        )
    photometric = page.photometric
    is_rgb = photometric == _PHOTOMETRIC.RGB or (photometric == _PHOTOMETRIC.YCBCR and page.compression in _JPEG)
    if not is_label:
        if photometric == _PHOTOMETRIC.PALETTE:
            raise ReadError(
                Fault.NOT_TAKEN, "its pixels are indices into a palette of colours. Save it as grey or RGB."
            )
        if not is_rgb and photometric not in (_PHOTOMETRIC.MINISBLACK, _PHOTOMETRIC.MINISWHITE):
            name = photometric.name if isinstance(photometric, _PHOTOMETRIC) else photometric
            raise ReadError(Fault.NOT_TAKEN, f"its colours are stored as {name}. Save it as grey or RGB.")
    extra = tuple(page.extrasamples)
    # Many writers leave the alpha of RGBA unmarked. Beside grey, samples that are not marked are channels.
    unmarked_alpha = is_rgb and samples == 4 and extra in ((), (_UNSPECIFIED,))
    if samples > 1 and (unmarked_alpha or (extra and extra[-1] in _ALPHA)):
        return slice(samples - 1)
    return slice(None)


def _brighter_is_larger(array: npt.NDArray[Any], page: tifffile.TiffPage) -> npt.NDArray[Any]:
    if page.photometric == _PHOTOMETRIC.MINISWHITE and array.dtype.kind == "u":
        white: Any = array.dtype.type((1 << page.bitspersample) - 1)  # 12 bits lie in a uint16
        inverted: npt.NDArray[Any] = white - array
        return inverted
    return array
