"""Masks as run lengths, as in COCO's files.

Source: the COCO data format, https://cocodataset.org/#format-data: a mask's `counts` are the lengths of runs of 0 and 1
in turn, the first of 0, along the columns of the image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def run_lengths(mask: npt.NDArray[np.bool_], start: Sequence[int], shape: Sequence[int]) -> list[int]:
    """COCO's uncompressed counts of a mask (y, x) whose first pixel is at `start` in an image of `shape`."""
    top, left = start
    height, width = shape
    padded = np.zeros((mask.shape[0] + 2, mask.shape[1]), np.int8)
    padded[1:-1] = mask
    steps = np.diff(padded, axis=0).T  # a row for each of the mask's columns: 1 begins a run, -1 ends it
    columns, begins = np.nonzero(steps == 1)
    _, ends = np.nonzero(steps == -1)
    first = (columns + left) * height + top + begins
    last = (columns + left) * height + top + ends
    # Runs that reach a column's end and go on at the next one's start are one.
    joined = first[1:] == last[:-1]
    first, last = first[np.r_[True, ~joined]], last[np.r_[~joined, True]]
    counts = np.diff(np.r_[0, np.stack([first, last], axis=1).ravel(), height * width])
    return [int(count) for count in (counts[:-1] if counts[-1] == 0 else counts)]
