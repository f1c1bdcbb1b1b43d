"""The voxels of DICOM files: decoded, rescaled to the quantity that was measured, larger is brighter.

Decoded with pydicom and its plugins pylibjpeg, Pillow, pyjpegls and, for JPEG that these do not take, imagecodecs.
Source: DICOM PS3.3, C.7.6.3 (Image Pixel Module) and C.11.1 (Modality LUT Module).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset
from pydicom.pixels.utils import iter_pixels

from common.imaging.readers.dicom_codecs import register
from common.imaging.readers.dicom_headers import Frame, kind_of
from common.imaging.readers.faults import Fault, ReadError
from common.imaging.readers.reason import blaming

_GREY = ("MONOCHROME1", "MONOCHROME2")
_PALETTE = "PALETTE COLOR"
# SOP classes whose colours are what was seen, not a rendering of something that was measured.
_COLOUR_CLASSES = (
    "1.2.840.10008.5.1.4.1.1.7",  # Secondary Capture
    "1.2.840.10008.5.1.4.1.1.77.1",  # Visible Light: endoscopy, microscopy, photography, ophthalmology
    "1.2.840.10008.5.1.4.1.1.6",  # Ultrasound
    "1.2.840.10008.5.1.4.1.1.3",
)
_KIND = ("PhotometricInterpretation", "SamplesPerPixel")

Voxels = npt.NDArray[Any]


def refuse_unlike(datasets: Sequence[Dataset], names: Sequence[str], is_label: bool) -> None:
    """Raise a ReadError where files do not hold pixels of one kind, or of a kind that is no image or no label."""
    first = datasets[0]
    for dataset, name in zip(datasets, names, strict=True):
        for keyword in _KIND:
            if dataset.get(keyword) != first.get(keyword):
                raise ReadError(
                    Fault.SLICES,
                    f"slices of different kinds: {names[0]} has {keyword} {first.get(keyword)}, {name} has "
                    f"{dataset.get(keyword)}. Keep one of the two kinds.",
                )
        if "ModalityLUTSequence" in dataset:
            raise ReadError(
                Fault.NOT_TAKEN,
                f"{name} needs a table to make sense of its numbers (ModalityLUTSequence), which is not read. Export "
                "it with a rescale slope and intercept.",
            )
    interpretation = str(first.get("PhotometricInterpretation", ""))
    if interpretation in _GREY or (interpretation == _PALETTE and is_label):
        return
    if interpretation == _PALETTE:
        raise ReadError(Fault.NOT_TAKEN, "its pixels are indices into a palette of colours. Export it as grey or RGB.")
    if not is_label and not str(first.get("SOPClassUID", "")).startswith(_COLOUR_CLASSES):
        raise ReadError(
            Fault.NOT_TAKEN,
            f"expected grey voxels, found colours ({interpretation}, {kind_of(first)}): a rendering, not what was "
            "measured. Export the original series.",
        )


def voxels_of(
    datasets: Sequence[Dataset],
    frames: Sequence[Sequence[Frame]],
    names: Sequence[str],
    order: list[int],
    is_label: bool,
) -> Voxels:
    """Decode all frames into one array.

    Parameters
    ----------
    datasets : sequence of Dataset
    frames : for each dataset, what it says of its frames.
    names : of the files, for messages.
    order : for every z, the index of the frame, counted through all datasets.
    is_label : bool
        Labels keep their numbers as stored also in MONOCHROME1, where 0 is white; images are turned to "larger is
        brighter".

    Returns
    -------
    shape (z, y, x, channel)
        Integers where every slope is 1 and every intercept whole, of the smallest type for the stored bits; else
        float32.

    Raises
    ------
    ReadError
        The pixels of a file are damaged or of an encoding that is not decoded.
    """
    register()
    slice_of = {frame: z for z, frame in enumerate(order)}
    dtype = _type_of(datasets, frames)
    voxels = np.empty(0, dtype)
    number = 0
    for dataset, own_frames, name in zip(datasets, frames, names, strict=True):
        with blaming(name):
            for stored, frame in zip(iter_pixels(dataset), own_frames, strict=True):
                values = _values(stored, dataset, frame, dtype, is_label)
                if number == 0:
                    voxels = np.empty((len(order), *values.shape), dtype)
                if dtype.kind in "iu" and not _holds(dtype, values):  # more bits are in use than BitsStored says
                    dtype = np.dtype(np.int32 if dtype.itemsize < 4 else np.int64)
                    voxels = voxels.astype(dtype)
                voxels[slice_of[number]] = values
                number += 1
    return voxels


def _values(stored: Voxels, dataset: Dataset, frame: Frame, dtype: np.dtype[Any], is_label: bool) -> Voxels:
    """One frame, shape (y, x, channel)."""
    if stored.ndim == 2:
        stored = stored[..., np.newaxis]
    if dataset.PhotometricInterpretation == "MONOCHROME1" and not is_label:
        lowest, highest = _stored_range(dataset)
        stored = (lowest + highest) - stored.astype(np.int64)
    if dtype.kind == "f":
        return stored * np.float64(frame.slope) + np.float64(frame.intercept)
    return stored.astype(np.int64) + int(frame.intercept) if frame.intercept else stored


def _type_of(datasets: Sequence[Dataset], frames: Sequence[Sequence[Frame]]) -> np.dtype[Any]:
    if any("FloatPixelData" in dataset or "DoubleFloatPixelData" in dataset for dataset in datasets):
        return np.dtype(np.float32)
    if any(frame.slope != 1.0 or not frame.intercept.is_integer() for own in frames for frame in own):
        return np.dtype(np.float32)
    extremes = []
    for dataset, own in zip(datasets, frames, strict=True):
        lowest, highest = _stored_range(dataset)
        extremes += [lowest + int(min(f.intercept for f in own)), highest + int(max(f.intercept for f in own))]
    lowest, highest = min(extremes), max(extremes)
    types = (np.uint8, np.uint16, np.uint32) if lowest >= 0 else (np.int8, np.int16, np.int32)
    fitting = (t for t in types if np.iinfo(t).min <= lowest and highest <= np.iinfo(t).max)
    return np.dtype(next(fitting, np.int64))


def _stored_range(dataset: Dataset) -> tuple[int, int]:
    bits = int(dataset.get("BitsStored") or dataset.BitsAllocated)
    if int(dataset.get("PixelRepresentation") or 0) == 1:
        return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return 0, 2**bits - 1


def _holds(dtype: np.dtype[Any], values: Voxels) -> bool:
    limits = np.iinfo(dtype)
    return bool(limits.min <= values.min() and values.max() <= limits.max)
