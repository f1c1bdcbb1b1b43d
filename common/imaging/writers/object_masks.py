"""Objects as masks of their own in JSON, run-length encoded as in COCO, which lets them overlap.

Source: the COCO data format, https://cocodataset.org/#format-data: a mask's `counts` are the lengths of runs of 0 and 1
in turn, the first of 0, along the columns of the image.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage


def write(path: Path, labels: npt.NDArray[np.integer[Any]], image: str, category: str) -> None:
    """Write the objects of a label image.

    Parameters
    ----------
    labels : shape (z, y, x), 0 for background. Each slice is an image of its own in the file, and an object of several
        slices has a mask in each, all with its number as "object".
    image : what the image is called.
    category : the objects' class.

    An object's mask is written as it is found, so that memory holds one at a time.
    """
    depth, height, width = labels.shape
    images = [
        {"id": z + 1, "file_name": image, "height": height, "width": width, **({"slice": z} if depth > 1 else {})}
        for z in range(depth)
    ]
    with path.open("w", encoding="utf-8") as file:
        categories = [{"id": 1, "name": category}]
        head = json.dumps({"images": images, "categories": categories}, ensure_ascii=False)
        file.write(head[:-1] + ', "annotations": [')
        number = 0
        for z in range(depth):
            for annotation in _annotations(labels[z], z + 1):
                number += 1
                file.write(("," if number > 1 else "") + "\n " + json.dumps({"id": number, **annotation}))
        file.write("\n]}\n")


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


def _annotations(plane: npt.NDArray[np.integer[Any]], image: int) -> Iterator[dict[str, Any]]:
    for number, box in enumerate(ndimage.find_objects(plane), start=1):
        if box is None:
            continue
        mask = plane[box] == number
        top, left = box[0].start, box[1].start
        yield {
            "image_id": image,
            "category_id": 1,
            "object": number,
            "iscrowd": 0,
            "area": int(np.count_nonzero(mask)),
            "bbox": [left, top, mask.shape[1], mask.shape[0]],
            "segmentation": {"size": list(plane.shape), "counts": run_lengths(mask, (top, left), plane.shape)},
        }
