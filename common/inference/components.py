"""What of a large foreground hangs together, found slab by slab: the pieces of slabs, and which of them are one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage, sparse

from common.inference.scratch import PART, Scratch, let_go

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Components:
    """Connected components, by the faces of their voxels.

    Attributes
    ----------
    pieces : int32 of the image's shape, 0 for background; a component may be of several pieces.
    of_piece : int32, the component of each piece, from 0; -1 for background, which is piece 0.
    starts, stops : shape (components, axes), the box of each.
    """

    pieces: npt.NDArray[np.int32]
    of_piece: npt.NDArray[np.int32]
    starts: Integers
    stops: Integers

    def within(self, window: tuple[slice, ...]) -> npt.NDArray[np.int32]:
        """The component of each voxel of a window, -1 for background."""
        owners: npt.NDArray[np.int32] = self.of_piece[self.pieces[window]]
        return owners


def components_of(foreground: npt.NDArray[Any], scratch: Scratch, voxels: int = PART) -> Components:
    """The components of a foreground, shape (y, x) or (z, y, x), which is read in slabs of about so many voxels."""
    shape = foreground.shape
    pieces = scratch.zeros(shape, np.int32)
    length = max(voxels * shape[0] // foreground.size, 1)
    count, above = 0, np.zeros(shape[1:], np.int32)
    pairs, starts, stops = [], [np.zeros((0, len(shape)), np.int64)], [np.zeros((0, len(shape)), np.int64)]
    for first in range(0, shape[0], length):
        slab = slice(first, min(first + length, shape[0]))
        found, number = ndimage.label(foreground[slab])
        boxes = np.array([[(part.start, part.stop) for part in box] for box in ndimage.find_objects(found)], np.int64)
        if number:
            boxes[:, 0] += first
            starts.append(boxes[..., 0])
            stops.append(boxes[..., 1])
        found = np.where(found > 0, found + count, 0).astype(np.int32)
        touching = (above > 0) & (found[0] > 0)
        pairs.append(np.unique(np.stack([above[touching], found[0][touching]]), axis=1))
        pieces[slab], above = found, found[-1]
        count += number
        for array in (pieces, foreground):
            let_go(array)
    if not count:
        return Components(pieces, np.full(1, -1, np.int32), starts[0], stops[0])
    one, two = np.concatenate(pairs, axis=1) - 1
    graph = sparse.coo_array((np.ones(len(one), np.bool_), (one, two)), shape=(count, count))
    total, owner = sparse.csgraph.connected_components(graph, directed=False)
    lowest = np.full((total, len(shape)), np.iinfo(np.int64).max, np.int64)
    highest = np.zeros((total, len(shape)), np.int64)
    np.minimum.at(lowest, owner, np.concatenate(starts))
    np.maximum.at(highest, owner, np.concatenate(stops))
    return Components(pieces, np.concatenate([[-1], owner]).astype(np.int32), lowest, highest)
