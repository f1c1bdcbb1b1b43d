"""From a network's answers on the prepared grid to classes on the stored one, a slab at a time.

Probabilities are interpolated linearly and decided on the stored grid, which leaves smoother borders than classes
brought back. Never more of them is held than a slab and what interpolation reaches around it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from common.imaging.geometry import spacing_of
from common.imaging.grid import Grid
from common.imaging.resampling import Zoom
from common.imaging.volume import Volume
from common.inference.scratch import IN_MEMORY, Scratch, let_go

Floats = npt.NDArray[np.float32]
Decide = Callable[[Floats], npt.NDArray[np.uint8]]
_REACH = 4.0  # standard deviations to which a Gaussian filter looks


def restored_classes(
    slabs: Iterable[tuple[slice, Floats]],
    grid: Grid,
    decide: Decide,
    keep: Callable[[tuple[slice, ...], Floats], None],
    scratch: Scratch = IN_MEMORY,
) -> Volume:
    """The class of every stored voxel.

    Parameters
    ----------
    slabs : as `predict_slabs` yields them, of the whole prepared image.
    grid : of the prepared image.
    decide : makes classes, uint8 of shape (n, y, x), of probabilities (n, y, x, outputs).
    keep : is given every part of the probabilities once they are on the grid that has the stored grid's spacing but
        the prepared one's orientation: where, as slices of (z, y, x), and float32 of shape (z, y, x, outputs). Called
        in order; nothing outside the crop comes.
    scratch : where the classes are kept.

    Returns
    -------
    Volume
        uint8, shape (*stored_shape, 1); background where the prepared grid does not reach.
    """
    turned = scratch.zeros(grid.zoom.before, np.uint8)
    for window, values in restored_slabs(slabs, grid):
        turned[window] = decide(values)
        let_go(turned)
        keep(window, values)
    array = grid.orientation.undo(turned)[..., np.newaxis]  # a view: a copy would be one in memory
    return Volume(array, spacing_of(grid.stored_affine), grid.stored_affine)


def restored_slabs(
    slabs: Iterable[tuple[slice, Floats]], grid: Grid
) -> Iterator[tuple[tuple[slice, slice, slice], Floats]]:
    """A network's probabilities on the grid that has the stored grid's spacing but the prepared one's orientation.

    Parameters
    ----------
    slabs, grid : as of `restored_classes`.

    Yields
    ------
    where : slices of (z, y, x), in order; nothing outside the crop comes.
    probabilities : float32 of shape (z, y, x, outputs)
    """
    axis = 3 - grid.dimensions  # of (z, y, x), along which slabs follow each other
    where, back = grid.zoom.back(grid.crop)
    if back is None:
        for _ in slabs:  # nothing of it reaches the stored grid
            pass
    else:
        buffer = _Buffer(axis)
        done = 0  # rows of `back.after` along the axis
        for slab, answer in slabs:
            buffer.append(answer if grid.dimensions == 3 else answer[np.newaxis])
            end = _last_row(back, axis, slab.stop)
            if end > done:
                values = _rows(back, axis, done, end, buffer)
                first = where[axis].start
                place = list(where)
                place[axis] = slice(first + done, first + end)
                yield (place[0], place[1], place[2]), values
                done = end
                buffer.forget(_needed(back, axis, done, done + 1)[0] if done < back.after[axis] else slab.stop)


class _Buffer:
    """The last rows along an axis of (z, y, x, outputs)."""

    def __init__(self, axis: int) -> None:
        self._axis = axis
        self._first = 0
        self._rows: Floats | None = None

    def append(self, rows: Floats) -> None:
        self._rows = rows if self._rows is None else np.concatenate([self._rows, rows], axis=self._axis)

    def rows(self, first: int, end: int) -> Floats:
        assert self._rows is not None and first >= self._first
        return self._rows[self._slice(first - self._first, end - self._first)]

    def forget(self, before: int) -> None:
        """Rows before this one are asked for no more."""
        assert self._rows is not None
        kept = self._rows[self._slice(before - self._first, None)]
        # A copy, as a view would keep everything; nothing, so that what comes next need not be joined to it.
        self._rows = kept.copy() if kept.shape[self._axis] else None
        self._first = before

    def _slice(self, first: int, end: int | None) -> tuple[slice, ...]:
        return (*[slice(None)] * self._axis, slice(first, end))


def _needed(back: Zoom, axis: int, first: int, end: int) -> tuple[int, int]:
    """The known rows (first, end) that decide the wanted rows from `first` to `end`."""
    scale, offset, length = back.scale[axis], back.offset[axis], back.before[axis]
    # The filter's radius, rounded as SciPy does, and the row beside it that a line goes to.
    halo = int(_REACH * max((scale - 1) / 2, 0.0) + 0.5)
    low = math.floor(scale * first + offset) - halo
    high = math.ceil(scale * (end - 1) + offset) + halo + 1
    return min(max(low, 0), length - 1), max(min(high, length), 1)


def _last_row(back: Zoom, axis: int, known: int) -> int:
    """How many rows of the wanted grid the first `known` rows of the other decide."""
    count = back.after[axis]
    if known >= back.before[axis]:
        return count
    low, high = 0, count
    while low < high:  # what is needed grows with the row
        middle = (low + high + 1) // 2
        if _needed(back, axis, middle - 1, middle)[1] <= known:
            low = middle
        else:
            high = middle - 1
    return low


def _rows(back: Zoom, axis: int, first: int, end: int, buffer: _Buffer) -> Floats:
    """The wanted rows from `first` to `end`, float32 of shape (z, y, x, outputs)."""
    low, high = _needed(back, axis, first, end)
    before, after, offset = list(back.before), list(back.after), list(back.offset)
    before[axis], after[axis] = high - low, end - first
    offset[axis] = back.scale[axis] * first + back.offset[axis] - low
    if back.scale[axis] == 1.0 and not offset[axis]:
        offset[axis] = 0.0
    part = replace(
        back,
        before=(before[0], before[1], before[2]),
        after=(after[0], after[1], after[2]),
        offset=(offset[0], offset[1], offset[2]),
    )
    return part.image(buffer.rows(low, high), order=1)
