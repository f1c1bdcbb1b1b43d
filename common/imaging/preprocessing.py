"""From volumes as they were read to what the network takes: one grid, the wanted spacing and channels, a common range.

`prepare_case` does it all, in the order that docs/preprocessing.md describes; `Prepared.grid` leads back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from common.errors import DataError
from common.imaging.distance import encode_distance
from common.imaging.geometry import Orientation, displacement, is_unplaced, same_grid, to_ras
from common.imaging.grid import Box, Grid
from common.imaging.intensity import INTENSITIES, box_of, foreground_of, normalize
from common.imaging.resampling import Zoom, lay_onto
from common.imaging.volume import Volume
from common.study import Preprocessing, Study
from common.wording import counted, listed

__all__ = [
    "CHANNELS_ADVICE",
    "INTENSITIES",
    "LABELS",
    "Grid",
    "Prepared",
    "channels_fit",
    "map_label",
    "prepare_case",
    "prepare_image",
    "prepare_label",
]

LABELS = ("classes", "instances")
CHANNELS_ADVICE = "Convert the image, or ask for a study of its channels (grey serves for 3, 8 or 16 bit RGB for 1)."
# Luma of ITU-R BT.601, section 2.5.1.
_LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_RGB_TYPES = (np.dtype(np.uint8), np.dtype(np.uint16))
_CROP_MARGIN = 2
LEAST_COVERED = 0.5


@dataclass(frozen=True, eq=False)
class Prepared:
    """A case as the network takes it.

    Attributes
    ----------
    image : float32, shape (y, x, channel) or (z, y, x, channel)
    label : uint8 class indices, shape (y, x) or (z, y, x), or None; with the study's head "distance" objects as
        `common.imaging.distance.encode_distance` has them.
    grid : where it lies, and the way back to the stored grid.
    """

    image: npt.NDArray[np.float32]
    label: npt.NDArray[np.uint8] | None
    grid: Grid

    def __post_init__(self) -> None:
        if self.image.shape[:-1] != self.grid.shape or self.image.dtype != np.float32:
            raise ValueError(f"expected float32 of {self.grid.shape}, found {self.image.dtype} of {self.image.shape}")
        if self.label is not None and (self.label.shape != self.grid.shape or self.label.dtype != np.uint8):
            raise ValueError(f"expected uint8 of {self.grid.shape}, found {self.label.dtype} of {self.label.shape}")

    def to_parts(self) -> tuple[list[npt.NDArray[Any]], dict[str, Any]]:
        """The image and, if there is one, the label; and what else there is to store, as JSON takes it."""
        arrays: list[npt.NDArray[Any]] = [self.image] if self.label is None else [self.image, self.label]
        return arrays, self.grid.to_json()

    @classmethod
    def from_parts(cls, arrays: Sequence[npt.NDArray[Any]], description: Mapping[str, Any]) -> Prepared:
        """What `to_parts` took apart. Raises ValueError where the parts do not fit."""
        if len(arrays) not in (1, 2):
            raise ValueError(f"expected an image and perhaps a label, found {len(arrays)} arrays")
        return cls(arrays[0], arrays[1] if len(arrays) == 2 else None, Grid.from_json(description))


def prepare_case(
    images: Sequence[Volume | None], label: Volume | None, study: Study, label_map: Mapping[int, int] | None = None
) -> Prepared:
    """Prepare the images of a case, and its label, as the study says.

    In this order: turned to the closest RAS orientation (3D); put on the first present image's grid; the label's values
    mapped to classes; resampled; cropped; intensities. The label decides nothing of the image but how far the crop
    reaches, so an image is prepared the same without it.

    Parameters
    ----------
    images : one for each of `task.modalities`, in their order, or the one image; None where a modality is missing.
        As `read_image` returns them.
    label : as `read_label` returns it, or None where there is none.
    study : Study
    label_map : stored value to class index
        What the site's labels mean; 0 stays 0 unless it says otherwise. None: values are class indices.

    Raises
    ------
    DataError
        A modality is missing and the study does not take zeros for it, or all are; channels do not serve; images cannot
        be put on one grid, or the label is not on it; a value of the label is not in the map or no class.
    ValueError
        The number of images or their dimensions are not the study's.
    """
    task, settings = study.task, study.preprocessing
    names = task.modalities or ("image",)
    if len(images) != len(names):
        raise ValueError(f"expected an image for each of {names}, found {len(images)}")
    for volume in (*images, label):
        if volume is not None and task.dimensions == 2 and volume.shape[0] != 1:
            raise ValueError(f"expected 2 dimensions, found a volume of shape {volume.shape} (z, y, x)")
    present = {name: volume for name, volume in zip(names, images, strict=True) if volume is not None}
    missing = [name for name in names if name not in present]
    if missing and (task.missing_modality == "error" or not present):
        advice = "" if not present else ", or ask the coordinator for missing_modality: zero"
        raise DataError(f"{', '.join(missing)}: the image is missing. Register it, or leave the case out{advice}.")

    stored = next(iter(present.values()))
    orientation = Orientation.to_ras(stored.affine) if task.dimensions == 3 else Orientation()
    turned = {name: to_ras(volume) if task.dimensions == 3 else volume for name, volume in present.items()}
    gridded = _on_one_grid(turned)
    reference = next(iter(gridded.values()))
    classes = None
    if label is not None:
        label = to_ras(label) if task.dimensions == 3 else label
        _check_label_grid(reference, label, names=list(gridded))
        mapped = label if label_map is None else map_label(label, label_map, len(task.classes))
        classes = prepare_label(mapped, dimensions=3, classes=len(task.classes), labels=task.labels)
        if study.model.head == "distance":
            # A map says which numbers are objects, and makes no one object of several; any number may be one then.
            numbers = label.array[..., 0].astype(np.int64)
            classes = encode_distance(np.where(classes > 0, numbers - numbers.min() + 1, 0), reference.spacing)

    zoom = _zoom(reference, settings)
    foreground = None
    if settings.crop == "foreground" or settings.intensity == "foreground_zscore":
        foreground = zoom.label(foreground_of([volume.array for volume in gridded.values()]))
    if classes is not None:
        encoded = study.model.head == "distance"  # distances are interpolated no more than numbers of classes are
        classes = zoom.label(classes, "nearest" if encoded else settings.label_interpolation)
    measured, crop = _boxes(zoom, settings, foreground, classes)

    wanted = 1 if task.modalities else task.channels
    mask = None if foreground is None else _cut(foreground, crop)
    channels: list[npt.NDArray[np.float32]] = []
    shape = tuple(end - first for first, end in crop)
    for name in names:
        if name not in gridded:
            channels.append(np.zeros((*shape, wanted), np.float32))
            continue
        try:
            values = zoom.image(_fewer_channels(gridded[name].array, wanted, present[name].array.dtype))
        except DataError as error:
            raise DataError(f"{name}: {error}") from error
        normal = normalize(
            _cut(values, crop),
            settings.intensity,
            stored=present[name].array.dtype,
            measured=_cut(values, measured),
            foreground=mask,
            window=settings.window,
        )
        channels.append(_more_channels(normal, wanted))
    image = np.ascontiguousarray(channels[0] if len(channels) == 1 else np.concatenate(channels, axis=-1))
    if image.base is not None:  # what is cached does not keep the whole image alive for a part of it
        image = image.copy()
    prepared_label = None if classes is None else np.array(_cut(classes, crop), np.uint8, order="C")
    grid = Grid(task.dimensions, stored.shape, stored.affine, orientation, zoom, crop)
    if task.dimensions == 2:
        image, prepared_label = image[0], None if prepared_label is None else prepared_label[0]
    return Prepared(image, prepared_label, grid)


def channels_fit(found: int, wanted: int, stored: npt.DTypeLike = np.uint8) -> bool:
    """Whether `prepare_image` can make `wanted` channels of `found`: the same number, grey to 3, or RGB to 1.

    Parameters
    ----------
    stored : the type of the voxels in the file. Colours are 8 or 16 bits without a sign; three channels of another
        type were measured, and have no luminance.
    """
    is_rgb = found == 3 and np.dtype(stored) in _RGB_TYPES
    return found == wanted or (found, wanted) == (1, 3) or (is_rgb and wanted == 1)


def prepare_image(
    volume: Volume, *, dimensions: int, channels: int, intensity: str, window: Sequence[float] | None = None
) -> npt.NDArray[np.float32]:
    """Make network input of an image on its own grid: channels and intensities alone.

    Parameters
    ----------
    volume : Volume
    dimensions : 2 or 3
    channels : int
        Grey is repeated for 3; RGB becomes its luminance (ITU-R BT.601) for 1.
    intensity : one of `INTENSITIES`
        See `common.imaging.intensity.normalize`; of all voxels and channels together.
    window : (lowest, highest), for the intensity "window".

    Returns
    -------
    float32 array
        Shape (y, x, channel) in 2D, (z, y, x, channel) in 3D.

    Raises
    ------
    DataError
        The image's channels do not serve for the wanted number.
    ValueError
        The volume is not of `dimensions`, or the intensity's name is unknown.
    """
    if intensity not in INTENSITIES:
        raise ValueError(f"intensity: expected one of {INTENSITIES}, found {intensity!r}")
    array = _spatial(volume, dimensions)
    foreground = foreground_of([array]) if intensity == "foreground_zscore" else None
    values = _fewer_channels(array, channels, array.dtype)
    normal = normalize(values, intensity, stored=array.dtype, foreground=foreground, window=window)
    return _more_channels(normal, channels)


def prepare_label(volume: Volume, *, dimensions: int, classes: int, labels: str) -> npt.NDArray[np.uint8]:
    """Make class indices of a label.

    Parameters
    ----------
    volume : Volume
        As `read_label` returns it.
    dimensions : 2 or 3
    classes : int
        The number of classes with the background, 2 to 255.
    labels : "classes" or "instances"
        `classes`: the values are the indices. `instances`: every number above 0 becomes class 1, so there are exactly
        two classes.

    Returns
    -------
    uint8 array
        Shape (y, x) in 2D, (z, y, x) in 3D; values below `classes`.

    Raises
    ------
    DataError
        A value is no class.
    ValueError
        The volume is not of `dimensions`, or the other arguments are out of their range.
    """
    if labels not in LABELS:
        raise ValueError(f"labels: expected one of {LABELS}, found {labels!r}")
    if not 2 <= classes <= 255:  # 255 marks padding
        raise ValueError(f"classes: expected 2 to 255 with the background, found {classes}")
    if labels == "instances" and classes != 2:
        raise ValueError(f"classes: instance labels make 2 classes, background and object, found {classes}")
    array = _spatial(volume, dimensions)[..., 0]
    if labels == "instances":
        return np.asarray(array > 0, dtype=np.uint8)
    highest, lowest = int(array.max()), int(array.min())
    if lowest < 0 or highest >= classes:
        raise DataError(
            f"label: expected class indices 0 to {classes - 1}, found values from {lowest} to {highest}. "
            "Correct the label, or the study's classes."
        )
    return np.asarray(array, dtype=np.uint8)


def map_label(label: Volume, label_map: Mapping[int, int], classes: int) -> Volume:
    """Replace a label's values by class indices.

    Parameters
    ----------
    label : as `read_label` returns it.
    label_map : stored value to class index; 0 stays 0 unless it says otherwise.
    classes : the study's number of classes, with the background.

    Raises
    ------
    DataError : values of the label are not in the map, or the map leads to what is no class.
    """
    full = {0: 0, **label_map}
    wrong = [f"{value} -> {index}" for value, index in sorted(full.items()) if not 0 <= index < classes]
    if wrong:
        raise DataError(
            f"label map: expected class indices 0 to {classes - 1}, found {', '.join(wrong)}. "
            "Correct the label map of the data set."
        )
    values, places = np.unique(label.array, return_inverse=True)
    unknown = [int(value) for value in values if int(value) not in full]
    if unknown:
        raise DataError(
            f"label: the values {listed(unknown, most=10)} are not in the label map. Add them to the data set's "
            "label map (0 for background), or correct the label."
        )
    mapped = np.array([full[int(value)] for value in values], np.int32)[places].reshape(label.array.shape)
    return replace(label, array=mapped)


def _on_one_grid(images: dict[str, Volume]) -> dict[str, Volume]:
    """Images of other grids, linearly resampled onto that of the first."""
    first, reference = next(iter(images.items()))
    gridded = {}
    for name, volume in images.items():
        if volume is reference or same_grid(reference, volume):
            gridded[name] = volume
            continue
        if is_unplaced(reference) or is_unplaced(volume):
            raise DataError(
                f"{name}: it is not on the grid of {first} ({_difference(reference, volume)}), and the files do not "
                "say where the images lie. Export both on one grid."
            )
        laid, covered = lay_onto(volume, reference)
        if covered < LEAST_COVERED:
            raise DataError(
                f"{name}: it covers {covered:.0%} of {first} ({_difference(reference, volume)}); at least "
                f"{LEAST_COVERED:.0%} is needed. Check that both are of one examination, and register them."
            )
        gridded[name] = laid
    return gridded


def _check_label_grid(reference: Volume, label: Volume, names: list[str]) -> None:
    if not same_grid(reference, label):
        raise DataError(
            f"label: it is not on the grid of {names[0]} ({_difference(reference, label)}). Labels are never moved: "
            f"export the label on the grid of {names[0]}"
            + (", or put the modality first on which it was drawn." if len(names) > 1 else ".")
        )


def _difference(expected: Volume, found: Volume) -> str:
    if expected.shape != found.shape:
        return f"expected the shape {_sizes(expected)}, found {_sizes(found)} (z, y, x after turning to RAS)"
    voxels, distance = displacement(expected, found)
    return f"it lies up to {voxels:.1f} voxels beside it, {distance:.2f} mm, or um in microscopy"


def _sizes(volume: Volume) -> str:
    return " x ".join(str(n) for n in volume.shape)


def _zoom(reference: Volume, settings: Preprocessing) -> Zoom:
    if settings.spacing is None:
        return Zoom(reference.shape, reference.shape)
    # In 2D the plane keeps its depth.
    wanted = (*reference.spacing[: 3 - len(settings.spacing)], *settings.spacing)
    return Zoom.to_spacing(reference.shape, reference.spacing, wanted)


def _boxes(
    zoom: Zoom,
    settings: Preprocessing,
    foreground: npt.NDArray[np.bool_] | None,
    classes: npt.NDArray[np.uint8] | None,
) -> tuple[Box, Box]:
    """The part whose intensities are measured, which the image alone decides, and the part that is kept."""
    whole = cast(Box, tuple((0, length) for length in zoom.after))
    if settings.crop != "foreground" or foreground is None:
        return whole, whole
    image_box = box_of(foreground, _CROP_MARGIN)
    if image_box is None:  # the foreground is so small that no resampled voxel hit it
        return whole, whole
    label_box = None if classes is None else box_of(classes > 0, _CROP_MARGIN)
    both = [
        (min(first, other_first), max(end, other_end))
        for (first, end), (other_first, other_end) in zip(image_box, label_box or image_box, strict=True)
    ]
    return cast(Box, tuple(image_box)), cast(Box, tuple(both))


def _cut(array: npt.NDArray[Any], box: Box) -> npt.NDArray[Any]:
    return array[tuple(slice(first, end) for first, end in box)]


def _spatial(volume: Volume, dimensions: int) -> npt.NDArray[Any]:
    if dimensions == 3:
        return volume.array
    if dimensions == 2 and volume.shape[0] == 1:
        plane: npt.NDArray[Any] = volume.array[0]
        return plane
    raise ValueError(f"expected {dimensions} dimensions, found a volume of shape {volume.shape} (z, y, x)")


def _fewer_channels(array: npt.NDArray[Any], wanted: int, stored: npt.DTypeLike) -> npt.NDArray[np.float32]:
    """As float32; RGB becomes its luminance where one channel is wanted."""
    found = array.shape[-1]
    if not channels_fit(found, wanted, stored):
        raise DataError(f"image: expected {counted(wanted, 'channel')}, found {found}. {CHANNELS_ADVICE}")
    values: npt.NDArray[np.float32] = array.astype(np.float32)
    if found <= wanted:
        return values
    luminance: npt.NDArray[np.float32] = values @ _LUMINANCE
    return luminance[..., np.newaxis]


def _more_channels(values: npt.NDArray[np.float32], wanted: int) -> npt.NDArray[np.float32]:
    """Grey is repeated; after everything else, which is then done once."""
    return values if values.shape[-1] == wanted else np.repeat(values, wanted, axis=-1)
