"""Objects of an image that is too large to be flooded at once, as if it were: block by block, in bounded memory.

Flooding never leaves a connected component of the foreground. So each block looks at the components that begin in it,
whole, and with as much around them as smoothing reaches: whatever the blocks, the objects are those of the whole image,
numbers included. Only a component that is longer than the longest of `Blocks.levels` is cut into blocks with a margin
around them. Of that one, an object belongs to the block that its centre lies in; one whose voxels were mostly given to
others already is the same object seen from the next block. There objects larger than the margin may be cut where it
ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from common.inference.components import Components, components_of
from common.inference.instances import (
    Depth,
    Labels,
    Splitting,
    depth_of,
    distance_to_background,
    numbered,
    objects_of,
    smoothed,
    smoothing_reach,
    split,
)
from common.inference.scratch import Scratch, let_go, parts

Window = tuple[slice, ...]


@dataclass(frozen=True)
class Blocks:
    """How an image is cut up; sizes are along the spatial axes.

    Attributes
    ----------
    levels : pairs of a block's size and the longest components that are looked at with those that begin in the same
        block, from small to large. What is looked at is a block and one such component beside it.
    size, margin : of blocks for longer components, which are cut, and of what is looked at beside such a block.
    """

    levels: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    size: tuple[int, ...]
    margin: tuple[int, ...]


BLOCKS = {
    2: Blocks((((1024, 1024), (512, 512)), ((1280, 1280), (1280, 1280))), (1024, 1024), (256, 256)),
    3: Blocks((((64, 96, 96), (64, 96, 96)), ((96, 144, 144), (96, 144, 144))), (64, 96, 96), (32, 48, 48)),
}


def number_objects(
    foreground: npt.NDArray[np.bool_],
    distance: Depth | None,
    result: Labels,
    splitting: Splitting,
    spacing: Sequence[float] | None,
    scratch: Scratch,
    blocks: Blocks | None = None,
) -> int:
    """Find the objects of an image.

    Parameters
    ----------
    foreground : bool, shape (y, x) or (z, y, x).
    distance : float32 of that shape, what the network says of it; None where the splitting does not need it.
    result : int32 zeros of that shape; becomes the labels, which are those of `instances.objects_of`.
    splitting, spacing : as of `instances_of`.
    scratch : for what has to be kept of each voxel: 4 bytes, 8 where objects are told apart by their shape.
    blocks : None: `BLOCKS`.

    Returns
    -------
    int
        The number of objects, which are 1 to this number.
    """
    blocks = blocks or BLOCKS[result.ndim]
    if result.size <= math.prod(n + 2 * margin for n, margin in zip(blocks.size, blocks.margin, strict=True)):
        result[...] = objects_of(np.asarray(foreground), distance, splitting, spacing)
        return int(result.max())
    components = components_of(foreground, scratch)
    if not len(components.starts):
        return 0
    finder = _Finder(foreground, distance, components, splitting, spacing, scratch, blocks)
    finder.measure()
    return _renumbered(result, finder.find(result))


class _Finder:
    """The objects of an image of several blocks."""

    def __init__(
        self,
        foreground: npt.NDArray[np.bool_],
        distance: Depth | None,
        components: Components,
        splitting: Splitting,
        spacing: Sequence[float] | None,
        scratch: Scratch,
        blocks: Blocks,
    ) -> None:
        self._foreground, self._distance, self._components = foreground, distance, components
        self._splitting, self._spacing, self._scratch, self._blocks = splitting, spacing, scratch, blocks
        self._shape = foreground.shape
        self._box = tuple(
            slice(int(first), int(last))
            for first, last in zip(components.starts.min(axis=0), components.stops.max(axis=0), strict=True)
        )
        self._groups, self._group_of, self._cut = _grouped(components, self._shape, blocks)
        # Each voxel's distance to the background, and that of the deepest of each component; of background, which comes
        # last, 1.
        self._deep: Depth | None = None
        self._largest = np.ones(len(components.starts) + 1, np.float32)

    def measure(self) -> None:
        """Distances to the background, and the largest of each component, where objects are told apart by them."""
        if not self._splitting.by_shape:
            return
        self._deep = deep = self._scratch.zeros(self._shape, np.float32)
        self._largest[:-1] = 0
        for own, window in self._windows((1,) * len(self._shape)):
            depth = self._depth_within(window)
            deep[window][own] = depth[own]
            self._note_largest(self._components.within(window)[own], depth[own])
            self._let_go()
        for core, window, own in self._cut_windows():
            depth = self._depth_within(window)
            inner = tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(core, window, strict=True))
            mine = own[inner]
            deep[core][mine] = depth[inner][mine]
            self._note_largest(self._components.within(core)[mine], depth[inner][mine])
            self._let_go()

    def find(self, result: Labels) -> int:
        """Number the objects, in no order; returns how many there are."""
        count = 0
        reach = smoothing_reach(self._splitting.smoothing, self._spacing, len(self._shape))
        for own, window in self._windows(reach, self._box):
            found = self._objects(own, window)
            place = result[window]
            np.copyto(place, found + np.int32(count), where=found > 0)
            count += int(found.max())
            self._let_go(result)
        for core, window, own in self._cut_windows():
            count = _add(self._objects(own, window), result[window], core, window, count)
            self._let_go(result)
        return count

    def _objects(self, own: npt.NDArray[np.bool_], window: Window) -> Labels:
        if self._splitting.method == "components":
            return numbered(np.asarray(ndimage.label(own)[0], np.int32), self._splitting.least_size)
        shape = None if self._deep is None else self._deep[window] / self._largest[self._components.within(window)]
        predicted = self._distance[window] if self._distance is not None and self._splitting.by_distance else None
        depth = depth_of(predicted, shape)
        found = split(own, smoothed(depth, self._splitting.smoothing, self._spacing), self._splitting.height)
        return numbered(found, self._splitting.least_size)

    def _depth_within(self, window: Window) -> Depth:
        inside = np.asarray(self._foreground[window])
        if inside.all():  # farther from the background than is looked
            steps = self._spacing or (1.0,) * len(self._shape)
            farthest = min(step * margin for step, margin in zip(steps, self._blocks.margin, strict=True))
            return np.full(inside.shape, farthest, np.float32)
        return distance_to_background(inside, self._spacing)

    def _note_largest(self, owner: npt.NDArray[np.int32], depth: Depth) -> None:
        np.maximum.at(self._largest, owner, depth)

    def _windows(self, reach: Sequence[int], within: Window | None = None) -> Iterator[tuple[Any, Window]]:
        """For each group which voxels of a window are its own, and the window: its components and `reach` beside."""
        limits = within or tuple(slice(0, n) for n in self._shape)
        for number, members in enumerate(self._groups):
            starts, stops = self._components.starts[members].min(axis=0), self._components.stops[members].max(axis=0)
            window = tuple(
                slice(max(int(first) - beside, limit.start), min(int(last) + beside, limit.stop))
                for first, last, beside, limit in zip(starts, stops, reach, limits, strict=True)
            )
            yield self._group_of[self._components.within(window)] == number, window

    def _cut_windows(self) -> Iterator[tuple[Window, Window, Any]]:
        """Blocks, what is looked at for them, and which voxels of that are of components that are too large."""
        if not self._cut.any():
            return
        for core, window in _blocks(self._shape, self._blocks):
            own = self._cut[self._components.within(window)]
            if own.any():
                yield core, window, own

    def _let_go(self, *others: npt.NDArray[Any]) -> None:
        for array in (self._foreground, self._distance, self._deep, self._components.pieces, *others):
            if array is not None:
                let_go(array)


def _grouped(
    components: Components, shape: Sequence[int], blocks: Blocks
) -> tuple[list[npt.NDArray[np.int64]], npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """Components that are looked at together; the group of each, or -1; and whether it is cut instead.

    The last entry of both is of background.
    """
    lengths = components.stops - components.starts
    keys = np.full(len(lengths), -1, np.int64)
    offset = 0
    for size, longest in blocks.levels:
        fits = (keys < 0) & (lengths <= np.array(longest)).all(axis=1)
        counts = [-(-n // length) for n, length in zip(shape, size, strict=True)]
        keys[fits] = offset + np.ravel_multi_index(tuple((components.starts[fits] // np.array(size)).T), counts)
        offset += math.prod(counts)
    members = np.flatnonzero(keys >= 0)
    _, group = np.unique(keys[members], return_inverse=True)
    group_of = np.full(len(keys) + 1, -1, np.int32)
    group_of[members] = group
    order = np.argsort(group, kind="stable")
    groups = np.split(members[order], np.flatnonzero(np.diff(group[order])) + 1) if len(members) else []
    return groups, group_of, np.append(keys < 0, False)


def _add(labels: Labels, taken: Labels, core: Window, window: Window, count: int) -> int:
    """Number the objects of a block that are new and no later block's; those of earlier ones grow by what is new."""
    boxes = ndimage.find_objects(labels)
    for number, box in enumerate(boxes, start=1):
        if box is None:
            continue
        mask = labels[box] == number
        centre = [float(np.mean(places)) + part.start for places, part in zip(np.nonzero(mask), box, strict=True)]
        place = tuple(int(at) + part.start for at, part in zip(centre, window, strict=True))
        if _is_later(place, core):
            continue
        others = taken[box][mask]
        free = mask & (taken[box] == 0)
        if np.count_nonzero(free) * 2 > np.count_nonzero(mask):
            count += 1
            taken[box][free] = count
        else:
            taken[box][free] = np.bincount(others[others > 0]).argmax()
    return count


def _is_later(place: tuple[int, ...], core: Window) -> bool:
    """Whether a place lies in a block that comes after this one; the last axis varies fastest."""
    for at, part in zip(place, core, strict=True):
        if at >= part.stop:
            return True
        if at < part.start:
            return False
    return False


def _blocks(spatial: Sequence[int], blocks: Blocks) -> Iterator[tuple[Window, Window]]:
    """Blocks and what is looked at for them."""
    counts = [-(-n // size) for n, size in zip(spatial, blocks.size, strict=True)]
    for index in np.ndindex(*counts):
        core = tuple(
            slice(i * size, min((i + 1) * size, n)) for i, size, n in zip(index, blocks.size, spatial, strict=True)
        )
        window = tuple(
            slice(max(part.start - around, 0), min(part.stop + around, n))
            for part, around, n in zip(core, blocks.margin, spatial, strict=True)
        )
        yield core, window


def _renumbered(result: Labels, count: int) -> int:
    """Number objects by their first voxels; returns how many there are."""
    numbers = np.zeros(count + 1, np.int32)
    total = 0
    for part in parts(result.shape):
        labels = result[part]
        values, first = np.unique(labels, return_index=True)
        is_new = (values > 0) & (numbers[values] == 0)
        new = values[is_new][np.argsort(first[is_new])]
        numbers[new] = np.arange(total + 1, total + len(new) + 1)
        total += len(new)
        result[part] = numbers[labels]
        let_go(result)
    return total
