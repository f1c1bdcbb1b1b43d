"""Objects in COCO's format: slices, boxes, and objects that share voxels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.inference.instance_masks import InstanceMask, numbered_masks
from common.inference.mask_file import write_masks


def decoded(segmentation: dict[str, Any]) -> npt.NDArray[np.bool_]:
    height, width = segmentation["size"]
    values = np.arange(len(segmentation["counts"])) % 2 == 1
    runs = np.repeat(values, segmentation["counts"])
    return np.pad(runs, (0, height * width - runs.size)).reshape(width, height).T


def test_objects_of_every_slice_are_masks_of_their_own(tmp_path: Path) -> None:
    labels = np.zeros((2, 5, 6), np.int32)
    labels[0, 1:3, 1:4], labels[1, 1:3, 1:3], labels[1, 4, 5] = 1, 1, 7
    write_masks(tmp_path / "a.json", numbered_masks(labels), (2, 5, 6), "a.tif", "cell")
    content = json.loads((tmp_path / "a.json").read_text())
    assert [image["slice"] for image in content["images"]] == [0, 1]
    assert content["categories"] == [{"id": 1, "name": "cell"}]
    found = [(one["image_id"], one["object"], one["area"], one["bbox"]) for one in content["annotations"]]
    assert found == [(1, 1, 6, [1, 1, 3, 2]), (2, 1, 4, [1, 1, 2, 2]), (2, 7, 1, [5, 4, 1, 1])]
    assert np.array_equal(decoded(content["annotations"][1]["segmentation"]), labels[1] == 1)


def test_objects_that_overlap_keep_all_their_voxels(tmp_path: Path) -> None:
    one = InstanceMask(1, (0, 0, 0), np.ones((1, 4, 4), np.bool_))
    two = InstanceMask(2, (0, 2, 3), np.ones((1, 2, 3), np.bool_))
    write_masks(tmp_path / "a.json", [one, two], (1, 6, 7), "Zellen ä.tif", "cell")
    content = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert content["images"] == [{"id": 1, "file_name": "Zellen ä.tif", "height": 6, "width": 7}]
    first, second = (decoded(entry["segmentation"]) for entry in content["annotations"])
    assert np.count_nonzero(first & second) == 2
    assert [entry["area"] for entry in content["annotations"]] == [16, 6]
