"""Arrays as large as an image that need not be in memory: parts of files that vanish by themselves.

What a process touches of a mapped file counts as its memory until it lets go of it; the numbers stay, in the file. So
whoever goes through such an array part by part, and lets go of each, holds no more than a part.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import DataError

PART = 1 << 21
"""Voxels that are worked on at once."""


@dataclass(frozen=True)
class Scratch:
    """Where arrays come from.

    Attributes
    ----------
    on_disk : whether they are mapped from files; else they are in memory.
    folder : for the files; None for the system's. On Linux it shows nothing of them.
    """

    on_disk: bool
    folder: Path | None = None

    def zeros(self, shape: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """A new array of zeros.

        Raises
        ------
        DataError : the disk has no room for it.
        """
        if not self.on_disk:
            return np.zeros(tuple(shape), dtype)
        size = math.prod(shape) * np.dtype(dtype).itemsize
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:  # the mapping keeps it after it is closed
                # Where a mapping has no blocks behind it, a full disk would end the process.
                os.posix_fallocate(file.fileno(), 0, size)
                return np.memmap(file, dtype, "r+", shape=tuple(shape))
        except OSError as error:
            where = self.folder or tempfile.gettempdir()
            raise DataError(
                f"an image of its size needs {size / 1e9:.2g} GB of disk more for a while, which {where} does not give "
                f"({error.strerror or error}); free space in OUT, or give another --out"
            ) from error


IN_MEMORY = Scratch(on_disk=False)


def let_go(array: npt.NDArray[Any]) -> None:
    """Free the memory of an array that is mapped from a file, which keeps its numbers; others are left as they are."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap):
        base.madvise(mmap.MADV_DONTNEED)


def parts(shape: Sequence[int], voxels: int = PART) -> Iterator[tuple[slice, ...]]:
    """Parts of an array of `shape` in the order of its voxels, each of whole rows and, beyond one row, of at most
    `voxels`."""
    axis = next(
        (axis for axis in range(len(shape)) if math.prod(shape[axis + 1 :]) <= voxels or axis == len(shape) - 2),
        len(shape) - 1,
    )
    length = max(voxels // max(math.prod(shape[axis + 1 :]), 1), 1)
    rest = tuple(slice(0, size) for size in shape[axis + 1 :])
    for index in np.ndindex(*shape[:axis]):
        for first in range(0, shape[axis], length):
            before = tuple(slice(at, at + 1) for at in index)
            yield (*before, slice(first, min(first + length, shape[axis])), *rest)
