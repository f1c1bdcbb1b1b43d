"""The distance between pixels that a TIFF file states, in micrometres: OME, ImageJ, Aperio or the resolution tags.

Sources: OME-XML schema 2016-06 (`PhysicalSize`, `UnitsLength`), the `ImageDescription` of ImageJ (`unit`, `spacing`),
TIFF 6.0 (`XResolution`, `YResolution`, `ResolutionUnit`).
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from typing import Any

import tifffile

from common.imaging.readers.faults import Fault, ReadError

# Micrometres in a unit. OME's names tell case apart ("mm", "Mm"); Å, µ and μ are compared in Unicode's NFKC form.
_OME_UNITS = {
    "pm": 1e-6,
    "Å": 1e-4,
    "nm": 1e-3,
    "μm": 1.0,
    "um": 1.0,
    "mm": 1e3,
    "cm": 1e4,
    "dm": 1e5,
    "m": 1e6,
    "in": 25400.0,
}
# ImageJ takes what a person typed, in any case. Without a unit its numbers are still the image's proportions.
_IMAGEJ_UNITS = {
    **{name.lower(): factor for name, factor in _OME_UNITS.items() if name != "in"},
    "angstrom": 1e-4,
    "nanometer": 1e-3,
    "nanometers": 1e-3,
    "micron": 1.0,
    "microns": 1.0,
    "micrometer": 1.0,
    "micrometers": 1.0,
    "\\u00b5m": 1.0,
    "millimeter": 1e3,
    "millimeters": 1e3,
    "meter": 1e6,
    "meters": 1e6,
    "": 1.0,
    "pixel": 1.0,
    "pixels": 1.0,
}
_NO_UNIT, _INCH = 1, 2
_Lengths = tuple[float | None, float | None, float | None]
_RESOLUTION_UNITS = {3: 1e4, 4: 1e3, 5: 1.0}  # centimetre; millimetre and micrometre as an extension


def spacing(file: tifffile.TiffFile, image: int, images: int) -> tuple[float, float, float]:
    """The (z, y, x) spacing of an image of a file, in micrometres; `is_stated` tells what is said from what is not.

    Parameters
    ----------
    file : open
    image, images : the image's number among those that the file's metadata describes, and how many these are.

    Returns
    -------
    tuple
        1.0 along each axis for which the file states no length, or one that is not positive, or in a unit that is no
        length. A resolution per inch is left out: it is a default for screens and printers, not a measurement.

    Raises
    ------
    ReadError
        What is stated is not a number.
    """
    z, y, x = _lengths(file, image, images)
    return z or 1.0, y or 1.0, x or 1.0


def is_stated(file: tifffile.TiffFile, image: int, images: int) -> bool:
    """Whether the file states a distance along any axis. Parameters and errors are those of `spacing`."""
    return any(_lengths(file, image, images))


def _lengths(file: tifffile.TiffFile, image: int, images: int) -> _Lengths:
    """Along (z, y, x), each positive or None."""
    page = file.pages.first
    if file.ome_metadata:
        return _of_ome(_ome_pixels(file.ome_metadata, image, images))
    if file.imagej_metadata:
        return _of_imagej(file.imagej_metadata, page)
    if file.is_svs:
        size = tifffile.tifffile.svs_description_metadata(page.description).get("MPP")
        return None, _length(size, 1.0, "MPP"), _length(size, 1.0, "MPP")
    shaped = file.shaped_metadata
    if shaped and any(key.startswith("PhysicalSize") for key in shaped[0]):
        return _of_ome(shaped[0])
    x, y = page.resolution
    factor = _RESOLUTION_UNITS.get(page.resolutionunit)
    return None, _inverse(y, factor), _inverse(x, factor)


def _ome_pixels(xml: str, image: int, images: int) -> Mapping[str, Any]:
    described = tifffile.xml2dict(xml)["OME"]["Image"]
    if not isinstance(described, list):
        described = [described]
    # Images without pixels in this file are described, but are no series of it: then the first one must do.
    pixels: Mapping[str, Any] = described[image if len(described) == images else 0]["Pixels"]
    return pixels


def _of_ome(pixels: Mapping[str, Any]) -> _Lengths:
    z, y, x = (
        _length(
            pixels.get(f"PhysicalSize{axis}"),
            _OME_UNITS.get(_normal(pixels.get(f"PhysicalSize{axis}Unit", "µm"))),
            f"PhysicalSize{axis}",
        )
        for axis in "ZYX"
    )
    return z, y, x


def _of_imagej(metadata: Mapping[str, Any], page: tifffile.TiffPage) -> _Lengths:
    unit = _normal(metadata.get("unit", "")).lower()
    # Along y and z ImageJ states a unit only where it differs from the one along x.
    z_unit, y_unit = (_normal(metadata.get(key, unit)).lower() for key in ("zunit", "yunit"))
    depth = metadata.get("spacing")
    x, y = page.resolution
    # Converters leave a resolution for printers in place: without a unit of ImageJ's, it is no measurement.
    is_bare = unit in ("", "pixel", "pixels")
    per_inch = is_bare and page.resolutionunit != _NO_UNIT
    lengths = (
        _length(
            -depth if isinstance(depth, (int, float)) and depth < 0 else depth, _IMAGEJ_UNITS.get(z_unit), "spacing"
        ),
        _inverse(y, None if per_inch else _IMAGEJ_UNITS.get(y_unit)),
        _inverse(x, None if per_inch else _IMAGEJ_UNITS.get(unit)),
    )
    # One pixel a pixel is what writers put where they know nothing.
    return (None, None, None) if is_bare and set(lengths) <= {None, 1.0} else lengths


def _normal(unit: object) -> str:
    return unicodedata.normalize("NFKC", str(unit)).strip()


def _inverse(resolution: float, factor: float | None) -> float | None:
    return _length(1.0 / resolution if resolution > 0 else None, factor, "resolution")


def _length(value: object, factor: float | None, name: str) -> float | None:
    if value is None or factor is None:
        return None
    if not isinstance(value, (int, float)):
        raise ReadError(
            Fault.NO_GEOMETRY, f"its {name} {value!r} is not a number. Correct the metadata, or export the image again."
        )
    length = float(value) * factor
    return length if math.isfinite(length) and length > 0 else None
