"""What is known of a case after it was read once: digests, geometry and statistics; never a pixel.

This is what a site's registry keeps and what the checks across cases compare. Everything is plain numbers and text,
goes to JSON and comes back equal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from common.imaging.case import Source
from common.imaging.geometry import Orientation
from common.imaging.volume import Stated, Volume

_PERCENTILE_SAMPLE = 2_000_000
_MOST_VALUES = 1024
_COUNTED_AT_ONCE = 1 << 22
_TABLE = 1 << 20


@dataclass(frozen=True, kw_only=True)
class SourceFacts:
    """One file or series.

    Attributes
    ----------
    file : the last part of its path.
    digest : SHA-256, hexadecimal, of the file's bytes; of a series, of its files' sorted digests, so that neither
        their names nor their order count.
    pixels : SHA-256 of the voxels with their type and shape, volumes turned to RAS: equal for the same image in two
        files, whichever way it is stored.
    format : "TIFF", "NIfTI" or "DICOM".
    dtype : of the voxels, such as "uint8"; of labels as the file stores them, of images as they are read.
    shape, spacing : (z, y, x), on the stored grid.
    affine : 4 rows of 4, as in `Volume`.
    stated : what of its grid the file states, as in `Volume`.
    channels : 1 for grey images and labels.
    """

    file: str
    digest: str
    pixels: str
    format: str
    dtype: str
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    affine: tuple[tuple[float, ...], ...]
    stated: Stated
    channels: int

    @property
    def volume(self) -> Volume:
        """A volume on this grid without memory behind its voxels (all zero): geometry without pixels."""
        array = np.broadcast_to(np.zeros((), np.uint8), (*self.shape, 1))
        return Volume(array, self.spacing, np.array(self.affine, np.float64), self.stated)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Self:
        """The inverse of `CaseFacts.to_json` for its part."""
        values = {field.name: found[field.name] for field in fields(cls)}
        for name in ("shape", "spacing"):
            values[name] = tuple(values[name])
        values["affine"] = tuple(tuple(row) for row in values["affine"])
        if "counts" in values:
            values["counts"] = {int(value): int(count) for value, count in values["counts"].items()}
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class ImageFacts(SourceFacts):
    """An image. The statistics are over all voxels and channels together; `p01` and `p99` are the first and the last
    percentile, of at most two million voxels evenly drawn. `burned_in` is DICOM's BurnedInAnnotation "YES".
    """

    minimum: float
    maximum: float
    mean: float
    std: float
    p01: float
    p99: float
    burned_in: bool = False


@dataclass(frozen=True, kw_only=True)
class LabelFacts(SourceFacts):
    """A label.

    Attributes
    ----------
    counts : stored value -> number of voxels, of the 1024 lowest values.
    values : how many different values there are.
    foreground : voxels of a class above 0, after the label map where one was given.
    components : connected parts (face to face) of what is not stored as 0.
    """

    counts: dict[int, int]
    values: int
    foreground: int
    components: int


@dataclass(frozen=True, kw_only=True)
class CaseFacts:
    """One case; `images` by modality. Names and patients never leave the site."""

    name: str
    patient: str
    images: dict[str, ImageFacts]
    label: LabelFacts | None

    @property
    def digests(self) -> dict[str, str]:
        """The digest of every source, by what it is: "image" or "image T1post", and "label"."""
        found = {f"image {modality}".strip(): self.images[modality].digest for modality in sorted(self.images)}
        return found if self.label is None else found | {"label": self.label.digest}

    def to_json(self) -> dict[str, Any]:
        """A JSON object of the attributes; label values are keys, and so text."""
        found = asdict(self)
        if self.label is not None:
            found["label"]["counts"] = {str(value): count for value, count in self.label.counts.items()}
        return found

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> CaseFacts:
        """The inverse of `to_json`."""
        return cls(
            name=found["name"],
            patient=found["patient"],
            images={modality: ImageFacts.from_json(image) for modality, image in found["images"].items()},
            label=LabelFacts.from_json(found["label"]) if found["label"] is not None else None,
        )


def image_facts(volume: Volume, source: Source, files: list[Path], *, burned_in: bool = False) -> ImageFacts:
    """The facts of an image that was read from `files` of `source`. Raises OSError where they can no longer be read."""
    return ImageFacts(
        **_source_facts(volume, source, files),
        **statistics_of(volume.array),
        burned_in=burned_in,
    )


def label_facts(
    volume: Volume, source: Source, files: list[Path], label_map: Mapping[int, int] | None = None
) -> tuple[LabelFacts, dict[int, int]]:
    """The facts of a label, and the count of every value in it, of which the facts keep the lowest.

    Parameters
    ----------
    volume : integers, one channel.
    label_map : stored value -> class; a value that is not in it counts as foreground unless it is 0.
    """
    counts = value_counts(volume.array)
    class_of = label_map or {}
    facts = LabelFacts(
        **_source_facts(volume, source, files),
        counts=dict(list(counts.items())[:_MOST_VALUES]),
        values=len(counts),
        foreground=sum(count for value, count in counts.items() if class_of.get(value, value) != 0),
        components=int(ndimage.label(volume.array[..., 0] != 0)[1]),
    )
    return facts, counts


def value_counts(array: npt.NDArray[np.integer[Any]]) -> dict[int, int]:
    """How often each value occurs, in ascending order of the values."""
    found: dict[int, int] = {}
    for part in _parts(array, _COUNTED_AT_ONCE):
        if part.min() >= 0 and part.max() < _TABLE:
            table = np.bincount(part)
            values = np.flatnonzero(table)
            counts = table[values]
        else:
            values, counts = np.unique(part, return_counts=True)
        for value, count in zip(values.tolist(), counts.tolist(), strict=True):
            found[value] = found.get(value, 0) + count
    return dict(sorted(found.items()))


def format_of(source: Source) -> str:
    """The name of the format that `source` is read as."""
    name = source.path.name.lower()
    if name.endswith((".nii", ".nii.gz")):
        return "NIfTI"
    return "TIFF" if name.endswith((".tif", ".tiff")) and not source.series else "DICOM"


def digest_of(files: list[Path]) -> str:
    """SHA-256 of a file's bytes, or of the sorted digests of several files. Raises OSError."""
    digests = []
    for path in files:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()


def _source_facts(volume: Volume, source: Source, files: list[Path]) -> dict[str, Any]:
    return {
        "file": source.name,
        "digest": digest_of(files),
        "pixels": _pixel_digest(volume),
        "format": format_of(source),
        "dtype": volume.stored or volume.array.dtype.name,
        "shape": volume.shape,
        "spacing": tuple(float(distance) for distance in volume.spacing),
        "affine": tuple(tuple(row) for row in volume.affine.tolist()),
        "stated": volume.stated,
        "channels": volume.channels,
    }


def _pixel_digest(volume: Volume) -> str:
    """A slice at a time: views that are flipped or strided are not copied whole."""
    array = volume.array
    if volume.shape[0] > 1:  # planes stay as they are stored, as in preprocessing
        array = Orientation.to_ras(volume.affine).apply(array)
    digest = hashlib.sha256(f"{array.dtype.name} {array.shape}".encode())
    little = array.dtype.newbyteorder("<")
    for section in array:
        digest.update(np.ascontiguousarray(section, dtype=little).data)
    return digest.hexdigest()


def statistics_of(array: npt.NDArray[Any]) -> dict[str, Any]:
    """Mean and deviation in float64, in two passes over pieces: the sums of large integers neither overflow nor lose
    their last digits, and no float64 copy of the image is held.
    """
    mean = sum(float(part.sum(dtype=np.float64)) for part in _parts(array, _COUNTED_AT_ONCE)) / array.size
    squares = sum(float(np.square(part - mean).sum()) for part in _parts(array, _COUNTED_AT_ONCE, np.float64))
    step = -(-array.size // _PERCENTILE_SAMPLE)
    # A step that divides the length of a row would draw the same columns of every row.
    step += step > 1 and array.shape[2] % step == 0
    low, high = np.percentile(array.reshape(-1)[::step].astype(np.float64), (1, 99))
    return {
        "minimum": float(array.min()),
        "maximum": float(array.max()),
        "mean": mean,
        "std": float(np.sqrt(squares / array.size)),
        "p01": float(low),
        "p99": float(high),
    }


def _parts(array: npt.NDArray[Any], size: int, dtype: npt.DTypeLike | None = None) -> Iterator[npt.NDArray[Any]]:
    """The values, flat, in pieces of at most `size`."""
    for section in array:
        flat = section.reshape(-1)
        for start in range(0, flat.size, size):
            part = flat[start : start + size]
            yield part if dtype is None else part.astype(dtype)
