"""Objects as masks of their own, which may overlap, to and from label images, in which none do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from common.inference.scratch import PART, let_go, parts


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

    Of an image that is mapped from disk no more than parts are in memory, if the numbers follow the first voxels.
    """
    starts, stops = _boxes_of(labels)
    read = 0
    for number, (start, stop) in enumerate(zip(starts.tolist(), stops.tolist(), strict=True), start=1):
        if stop[0] == 0:
            continue
        mask = labels[tuple(slice(first, last) for first, last in zip(start, stop, strict=True))] == number
        yield InstanceMask(number, tuple(start), mask)
        at = int(np.ravel_multi_index(tuple(start), labels.shape))
        if abs(at - read) > PART:
            let_go(labels)
            read = at


def _boxes_of(labels: npt.NDArray[np.int32]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The first voxel of the box of each number from 1, and the one after its last; 0 for numbers that are left out."""
    starts: npt.NDArray[np.int64] = np.full((0, labels.ndim), np.iinfo(np.int64).max, np.int64)
    stops: npt.NDArray[np.int64] = np.zeros((0, labels.ndim), np.int64)
    for window in parts(labels.shape):
        found = labels[window]
        highest = int(found.max())
        if highest < 1:
            continue
        if highest > len(starts):
            more = ((0, highest - len(starts)), (0, 0))
            starts, stops = np.pad(starts, more, constant_values=np.iinfo(np.int64).max), np.pad(stops, more)
        lowest = int(found[found > 0].min())
        local = np.where(found > 0, found - np.int32(lowest - 1), 0)
        for number, box in enumerate(ndimage.find_objects(local), start=lowest - 1):
            if box is not None:
                places = [(a.start + b.start, a.start + b.stop) for a, b in zip(window, box, strict=True)]
                starts[number] = np.minimum(starts[number], [first for first, _ in places])
                stops[number] = np.maximum(stops[number], [last for _, last in places])
        let_go(labels)
    return starts, stops


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
