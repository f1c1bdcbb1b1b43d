"""Objects of large images, found block by block, are those of the whole image, numbers included."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy import ndimage

from common.errors import DataError
from common.imaging.distance import decode_distance, encode_distance
from common.inference.components import components_of
from common.inference.instance_masks import masks_of, numbered_masks
from common.inference.instances import Splitting, objects_of
from common.inference.object_blocks import Blocks, number_objects
from common.inference.scratch import IN_MEMORY, Scratch, let_go, parts

SMALL = {
    2: Blocks((((24, 24), (20, 20)), ((40, 40), (60, 60))), (24, 24), (16, 16)),
    3: Blocks((((8, 16, 16), (8, 14, 14)), ((12, 24, 24), (30, 40, 40))), (8, 16, 16), (6, 10, 10)),
}
SHAPES = {2: (190, 173), 3: (40, 70, 61)}


def blobs(shape: tuple[int, ...], count: int, seed: int = 0) -> npt.NDArray[np.int32]:
    """Balls that touch and overlap, later ones over earlier ones."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, np.int32)
    grid = np.indices(shape)
    for number in range(1, count + 1):
        centre, radius = [rng.uniform(0, n) for n in shape], rng.uniform(2, 6)
        inside = sum((axis - at) ** 2 for axis, at in zip(grid, centre, strict=True)) <= radius**2
        labels[inside] = number
    return labels


def noisy_distance(labels: npt.NDArray[np.int32], levels: int = 0) -> npt.NDArray[np.float32]:
    """As a network might say it; with few `levels` there are plateaus and ties everywhere."""
    _, distance = decode_distance(encode_distance(labels))
    noisy = distance + np.random.default_rng(1).normal(0, 0.1, labels.shape)
    return np.asarray(np.rint(noisy * levels) / levels if levels else noisy, np.float32)


def in_blocks(
    foreground: npt.NDArray[np.bool_],
    distance: npt.NDArray[np.float32] | None,
    splitting: Splitting,
    scratch: Scratch = IN_MEMORY,
    **options: Any,
) -> npt.NDArray[np.int32]:
    spacing = options.pop("spacing", None)
    result = scratch.zeros(foreground.shape, np.int32)
    blocks = options.pop("blocks", SMALL[foreground.ndim])
    count = number_objects(foreground, distance, result, splitting, spacing, scratch, blocks)
    assert count == result.max()
    return result


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("smoothing", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("method", ["components", "shape", "distance", "both"])
def test_blocks_give_the_objects_of_the_whole_image(method: Any, smoothing: float, dimensions: int) -> None:
    labels = blobs(SHAPES[dimensions], 160 if dimensions == 2 else 60)
    foreground, distance = labels > 0, noisy_distance(labels)
    spacing = None if dimensions == 2 else (2.0, 0.7, 0.7)
    splitting = Splitting(method=method, smoothing=smoothing, height=0.05, least_size=6)
    whole = objects_of(foreground, distance, splitting, spacing)
    components = components_of(foreground, IN_MEMORY)
    lengths = components.stops - components.starts
    longest = SMALL[dimensions].levels
    # All that there is to be right about: components of both sizes, none to cut, clumps of several objects.
    assert (lengths > longest[0][1]).any()
    assert (lengths <= longest[1][1]).all()
    assert whole.max() > (len(lengths) * 0.7 if method == "components" else len(lengths))
    found = in_blocks(foreground, distance, splitting, spacing=spacing)
    assert np.array_equal(found, whole)


@pytest.mark.parametrize("method", ["shape", "distance", "both"])
def test_ties_are_broken_as_in_the_whole_image(method: Any) -> None:
    labels = blobs(SHAPES[2], 160, seed=3)
    splitting = Splitting(method=method, smoothing=0.0, height=0.3, least_size=1)
    distance = noisy_distance(labels, levels=4)
    whole = objects_of(labels > 0, distance, splitting, None)
    assert np.array_equal(in_blocks(labels > 0, distance, splitting), whole)


def test_arrays_on_disk_give_the_same_and_leave_nothing(tmp_path: Path) -> None:
    labels = blobs(SHAPES[2], 150, seed=4)
    scratch = Scratch(on_disk=True, folder=tmp_path)
    foreground = scratch.zeros(labels.shape, np.bool_)
    foreground[...] = labels > 0
    splitting = Splitting(method="shape")
    found = in_blocks(foreground, None, splitting, scratch)
    assert np.array_equal(found, objects_of(labels > 0, None, splitting, None))
    assert not list(tmp_path.iterdir())


def test_what_is_too_long_to_be_looked_at_whole_is_cut_where_the_whole_image_is() -> None:
    """A chain of discs through the image: one component, longer than all blocks."""
    labels = np.zeros((60, 400), np.int32)
    grid = np.indices(labels.shape)
    for number, x in enumerate(range(12, 390, 13), start=1):
        labels[(grid[0] - 30) ** 2 + (grid[1] - x) ** 2 <= 49] = number
    foreground = labels > 0
    assert ndimage.label(foreground)[1] == 1
    for splitting in (Splitting(method="shape"), Splitting(method="distance"), Splitting(method="both", height=0.06)):
        distance = noisy_distance(labels, levels=50)
        whole = objects_of(foreground, distance, splitting, None)
        assert whole.max() == labels.max()
        assert np.array_equal(in_blocks(foreground, distance, splitting), whole)


@pytest.mark.parametrize("size", [90, 200])
def test_an_image_that_is_all_foreground_is_one_object(size: int) -> None:
    foreground = np.ones((size, size), np.bool_)
    splitting = Splitting(method="shape")
    assert objects_of(foreground, None, splitting, None).all()
    assert (in_blocks(foreground, None, splitting) == 1).all()


def test_a_small_image_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    foreground = np.zeros((40, 30), np.bool_)
    foreground[3:7, 3:7], foreground[30:35, 20:25] = True, True
    monkeypatch.setattr("common.inference.object_blocks.components_of", None)
    found = in_blocks(foreground, None, Splitting(method="shape"), blocks=None)
    assert (found[4, 4], found[31, 22], found.max()) == (1, 2, 2)


def test_nothing_is_no_object() -> None:
    assert not in_blocks(np.zeros((190, 173), np.bool_), None, Splitting(method="shape")).any()


@pytest.mark.parametrize("voxels", [1, 300, 10**6])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_components_are_those_of_the_whole_image_whatever_the_slabs(dimensions: int, voxels: int) -> None:
    foreground = np.random.default_rng(5).random(SHAPES[dimensions]) < 0.4
    whole, count = ndimage.label(foreground)
    found = components_of(foreground, IN_MEMORY, voxels)
    owner = found.within((slice(None),) * dimensions)
    assert len(found.starts) == count
    assert np.array_equal(owner >= 0, foreground)
    assert len(np.unique(np.stack([whole[foreground], owner[foreground]]), axis=1).T) == count
    for box, mine in zip(ndimage.find_objects(owner + 1), range(count), strict=True):
        assert [part.start for part in box] == found.starts[mine].tolist()
        assert [part.stop for part in box] == found.stops[mine].tolist()


def test_masks_of_an_image_on_disk_are_those_of_one_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.inference.instance_masks.PART", 500)
    monkeypatch.setattr("common.inference.instance_masks.parts", lambda shape: parts(shape, 500))
    labels = blobs((3, 50, 60), 20)
    labels[labels == 7] = 0
    mapped = Scratch(on_disk=True, folder=tmp_path).zeros(labels.shape, np.int32)
    mapped[...] = labels
    found, expected = list(numbered_masks(mapped)), masks_of(labels)
    assert [(one.number, one.start) for one in found] == [(one.number, one.start) for one in expected]
    assert all(np.array_equal(one.mask, other.mask) for one, other in zip(found, expected, strict=True))


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DataError, match=r"needs 0\.02 GB of disk .*No space left on device.*free space in OUT"):
        Scratch(on_disk=True, folder=tmp_path).zeros((5000, 1000), np.int32)


def test_what_is_let_go_of_keeps_its_numbers_and_frees_its_memory(tmp_path: Path) -> None:
    def resident() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssFile:")[1].split()[0]) * 1024 + int(status.split("RssShmem:")[1].split()[0]) * 1024

    mapped = Scratch(on_disk=True, folder=tmp_path).zeros((64, 1 << 18), np.int32)
    mapped[...] = np.arange(64)[:, np.newaxis]
    before = resident()
    let_go(mapped[3:, ::2].T)  # of any part
    assert before - resident() > mapped.nbytes * 0.9
    assert (mapped == np.arange(64)[:, np.newaxis]).all()
    let_go(np.zeros(3))  # nothing happens


@pytest.mark.parametrize("shape", [(1, 7, 5), (4, 6, 5), (9, 8), (11,)])
@pytest.mark.parametrize("voxels", [1, 12, 31, 1000])
def test_parts_follow_each_other_and_cover_an_array(shape: tuple[int, ...], voxels: int) -> None:
    places = np.arange(np.prod(shape)).reshape(shape)
    taken = [places[part] for part in parts(shape, voxels)]
    assert np.concatenate([part.ravel() for part in taken]).tolist() == places.ravel().tolist()
    assert all(part.size <= max(voxels, shape[-1]) for part in taken)
