"""Objects as masks of their own, which may overlap, to and from label images, in which none do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage


@dataclass(frozen=True, eq=False)
class InstanceMask:
    """One object: which voxels of a box are its own.

    Attributes
    ----------
    number : above 0; what a label image calls it.
    start : the box's first voxel, one index a spatial axis.
    mask : bool, of the box's shape, at least one voxel is true.
    """

    number: int
    start: tuple[int, ...]
    mask: npt.NDArray[np.bool_]

    def __post_init__(self) -> None:
        if self.number < 1 or len(self.start) != self.mask.ndim or min(self.start, default=0) < 0:
            raise ValueError(f"expected a number above 0 and a box in the image, found {self.number} at {self.start}")
        if self.mask.dtype != np.bool_ or not self.mask.any():
            raise ValueError(f"object {self.number}: expected a mask of booleans with a voxel, found {self.mask.dtype}")

    @property
    def box(self) -> tuple[slice, ...]:
        """Where the mask lies in the image."""
        return tuple(slice(first, first + size) for first, size in zip(self.start, self.mask.shape, strict=True))

    @property
    def size(self) -> int:
        """The number of the object's voxels."""
        return int(np.count_nonzero(self.mask))

    def overlap(self, other: InstanceMask) -> int:
        """The number of voxels that both have."""
        common = [
            slice(max(one.start, two.start), min(one.stop, two.stop))
            for one, two in zip(self.box, other.box, strict=True)
        ]
        if any(part.start >= part.stop for part in common):
            return 0
        own, others = (
            one.mask[tuple(slice(p.start - first, p.stop - first) for p, first in zip(common, one.start, strict=True))]
            for one in (self, other)
        )
        return int(np.count_nonzero(own & others))


def masks_of(labels: npt.NDArray[Any]) -> list[InstanceMask]:
    """The objects of a label image (spatial...) of integers, 0 being background, in the order of their numbers."""
    numbers, places = np.unique(labels, return_inverse=True)
    if numbers.size and numbers[0] < 0:
        raise ValueError(f"expected numbers from 0, found {numbers[0]}")
    has_background = bool(numbers.size) and numbers[0] == 0
    compact = places.reshape(labels.shape).astype(np.int32) + (0 if has_background else 1)
    objects = numbers[1:] if has_background else numbers
    return [
        InstanceMask(int(number), mask.start, mask.mask)
        for number, mask in zip(objects, numbered_masks(compact), strict=True)
    ]


def numbered_masks(labels: npt.NDArray[np.int32]) -> Iterator[InstanceMask]:
    """As `masks_of`, one mask at a time, for numbers that leave few out: memory holds a box for each up to the largest.

    The image is not copied, so it may be one that is mapped from disk.
    """
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is not None:
            yield InstanceMask(number, tuple(part.start for part in box), labels[box] == number)


def label_layers(masks: Iterable[InstanceMask], shape: Sequence[int]) -> npt.NDArray[np.int32]:
    """Label images that hold all objects whole: int32 (layers, *shape).

    Each object, from the largest to the smallest, is put on the first layer where it overlaps none: one layer where no
    objects overlap. `masks_of` of every layer gives them back.

    Raises
    ------
    ValueError : an object does not lie in the image, or two have the same number.
    """
    layers = [np.zeros(tuple(shape), np.int32)]
    for mask in _ordered(masks, shape):
        free = next((layer for layer in layers if not layer[mask.box][mask.mask].any()), None)
        if free is None:
            free = np.zeros(tuple(shape), np.int32)
            layers.append(free)
        free[mask.box][mask.mask] = mask.number
    return np.stack(layers)


def label_image(masks: Iterable[InstanceMask], shape: Sequence[int]) -> npt.NDArray[np.int32]:
    """One label image, int32 of `shape`; a voxel of several objects goes to the smallest of them.

    Raises ValueError as `label_layers` does.
    """
    result = np.zeros(tuple(shape), np.int32)
    for mask in _ordered(masks, shape):
        result[mask.box][mask.mask] = mask.number
    return result


def _ordered(masks: Iterable[InstanceMask], shape: Sequence[int]) -> list[InstanceMask]:
    """From the largest to the smallest, checked to be of different numbers and in the image."""
    ordered = sorted(masks, key=lambda mask: (-mask.size, mask.number))
    if len({mask.number for mask in ordered}) != len(ordered):
        raise ValueError("expected objects of different numbers")
    for mask in ordered:
        if len(shape) != len(mask.start) or any(part.stop > size for part, size in zip(mask.box, shape, strict=True)):
            raise ValueError(f"object {mask.number}: expected it in an image of {tuple(shape)}, found {mask.box}")
    return ordered
