"""Where in a mapped file a prepared case lies: decoding the file anew takes longer than reading a patch of it."""

from __future__ import annotations

import mmap
from typing import Any, NamedTuple

import numpy as np

from common.imaging.grid import Grid
from common.imaging.preprocessing import Prepared
from common.wire.tensors import Array


class Layout(NamedTuple):
    """The arrays of a case by their places in its file, and its grid."""

    image: _Place
    label: _Place | None
    grid: Grid

    @staticmethod
    def of(prepared: Prepared, mapped: mmap.mmap) -> Layout:
        """The layout of a case whose arrays are views of a mapped file."""
        label = None if prepared.label is None else _Place.of(prepared.label, mapped)
        return Layout(_Place.of(prepared.image, mapped), label, prepared.grid)

    def read(self, mapped: mmap.mmap) -> Prepared:
        """The case in a file of exactly the content that the layout was taken from; nothing is copied."""
        label = None if self.label is None else self.label.view(mapped)
        return Prepared(self.image.view(mapped), label, self.grid)


class _Place(NamedTuple):
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @staticmethod
    def of(array: Array, mapped: mmap.mmap) -> _Place:
        offset = array.ctypes.data - np.frombuffer(mapped, np.uint8).ctypes.data
        return _Place(offset if array.size else 0, array.dtype, array.shape)

    def view(self, mapped: mmap.mmap) -> Array:
        return np.ndarray(self.shape, self.dtype, mapped, self.offset)
