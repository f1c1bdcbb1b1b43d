"""Objects of an image that is too large to be flooded at once: block by block, each object numbered once.

Blocks are looked at with a margin around them. An object belongs to the block that its centre lies in; one whose pixels
were mostly given to others already is the same object seen from the next block. So what is no larger than the margin
comes out as if the image had been looked at as a whole; larger objects may be cut where a block's margin ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Labels = npt.NDArray[np.int32]
Find = Callable[[npt.NDArray[np.float32]], Labels]

BLOCK = {2: (2048, 2048), 3: (128, 192, 192)}
MARGIN = {2: (256, 256), 3: (32, 48, 48)}


def number_objects(
    find: Find,
    maps: npt.NDArray[Any],
    result: Labels,
    block: Sequence[int] | None = None,
    margin: Sequence[int] | None = None,
) -> int:
    """Find the objects of an image.

    Parameters
    ----------
    find : makes labels 0, 1, 2, ... of shape (spatial...) of maps (spatial..., outputs), as `instances_of`.
    maps : of the whole image, shape (spatial..., outputs); a block at a time is taken as float32.
    result : int32 zeros of shape (spatial...); becomes the labels.
    block, margin : sizes along the spatial axes; None: `BLOCK` and `MARGIN`.

    Returns
    -------
    int
        The number of objects, which are 1 to this number.
    """
    spatial = result.shape
    block, margin = block or BLOCK[len(spatial)], margin or MARGIN[len(spatial)]
    count = 0
    for core, window in _blocks(spatial, block, margin):
        labels = find(np.asarray(maps[window], np.float32))
        if core == window:  # the image is one block
            result[window] = labels
            return int(labels.max())
        count = _add(labels, result[window], core, window, count)
    return count


def _add(labels: Labels, taken: Labels, core: tuple[slice, ...], window: tuple[slice, ...], count: int) -> int:
    """Give the objects of a block that are new, and no later block's, their numbers."""
    boxes = ndimage.find_objects(labels)
    for number, box in enumerate(boxes, start=1):
        if box is None:
            continue
        mask = labels[box] == number
        centre = [float(np.mean(places)) + part.start for places, part in zip(np.nonzero(mask), box, strict=True)]
        place = tuple(int(at) + part.start for at, part in zip(centre, window, strict=True))
        if _is_later(place, core):
            continue
        free = mask & (taken[box] == 0)
        if np.count_nonzero(free) * 2 > np.count_nonzero(mask):
            count += 1
            taken[box][free] = count
    return count


def _is_later(place: tuple[int, ...], core: tuple[slice, ...]) -> bool:
    """Whether a place lies in a block that comes after this one; the last axis varies fastest."""
    for at, part in zip(place, core, strict=True):
        if at >= part.stop:
            return True
        if at < part.start:
            return False
    return False


def _blocks(
    spatial: Sequence[int], block: Sequence[int], margin: Sequence[int]
) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Blocks and what is looked at for them."""
    # What is no larger than a block with its margins is one.
    sizes = [
        n if n <= length + 2 * around else length for n, length, around in zip(spatial, block, margin, strict=True)
    ]
    counts = [-(-n // size) for n, size in zip(spatial, sizes, strict=True)]
    for index in np.ndindex(*counts):
        core = tuple(slice(i * size, min((i + 1) * size, n)) for i, size, n in zip(index, sizes, spatial, strict=True))
        window = tuple(
            slice(max(part.start - around, 0), min(part.stop + around, n))
            for part, around, n in zip(core, margin, spatial, strict=True)
        )
        yield core, window
