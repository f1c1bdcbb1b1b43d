"""Objects as a file of masks of their own, run-length encoded in COCO's format, in which they may overlap.

Source: the COCO data format, https://cocodataset.org/#format-data.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from common.imaging.writers.object_masks import run_lengths
from common.inference.instance_masks import InstanceMask


def write_masks(
    path: Path, masks: Iterable[InstanceMask], shape: tuple[int, int, int], image: str, category: str
) -> None:
    """Write objects, each as it comes, so that memory need hold one at a time.

    Parameters
    ----------
    masks : of three axes (z, y, x).
    shape : of the image (z, y, x). Each slice is an image of its own in the file, and an object of several slices has a
        mask in each, all with its number as "object".
    image : what the image is called.
    category : the objects' class.
    """
    depth, height, width = shape
    images = [
        {"id": z + 1, "file_name": image, "height": height, "width": width, **({"slice": z} if depth > 1 else {})}
        for z in range(depth)
    ]
    with path.open("w", encoding="utf-8") as file:
        categories = [{"id": 1, "name": category}]
        head = json.dumps({"images": images, "categories": categories}, ensure_ascii=False)
        file.write(head[:-1] + ', "annotations": [')
        number = 0
        for mask in masks:
            for annotation in _annotations(mask, (height, width)):
                number += 1
                file.write(("," if number > 1 else "") + "\n " + json.dumps({"id": number, **annotation}))
        file.write("\n]}\n")


def _annotations(mask: InstanceMask, size: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """One for each slice that the object lies in."""
    first, top, left = mask.start
    for z, plane in enumerate(mask.mask, start=first):
        rows, columns = np.flatnonzero(plane.any(axis=1)), np.flatnonzero(plane.any(axis=0))
        if not rows.size:
            continue
        part = plane[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        start = int(top + rows[0]), int(left + columns[0])
        yield {
            "image_id": z + 1,
            "category_id": 1,
            "object": mask.number,
            "iscrowd": 0,
            "area": int(np.count_nonzero(part)),
            "bbox": [start[1], start[0], part.shape[1], part.shape[0]],
            "segmentation": {"size": list(size), "counts": run_lengths(part, start, size)},
        }
