"""Random patches and covering tiles."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.imaging.patches import pad_to, sample_patch, tiles

sizes = st.lists(st.integers(1, 24), min_size=2, max_size=3)


@st.composite
def shape_and_tile(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    shape = draw(sizes)
    return shape, draw(st.lists(st.integers(1, 12), min_size=len(shape), max_size=len(shape)))


def numbered(shape: tuple[int, ...] | list[int]) -> np.ndarray:
    """Voxels that tell where they came from, never 0."""
    return np.arange(1, np.prod(shape) + 1, dtype=np.float32).reshape(*shape, 1)


@given(shape_and_tile(), st.floats(0, 0.95))
def test_tiles_cover_every_voxel_with_equal_tiles_that_overlap_enough(
    given_sizes: tuple[list[int], list[int]], overlap: float
) -> None:
    shape, tile = given_sizes
    windows = tiles(shape, tile, overlap)
    covered = np.zeros(shape, bool)
    for window in windows:
        assert [s.stop - s.start for s in window] == [min(pair) for pair in zip(shape, tile, strict=True)]
        covered[window] = True
    assert covered.all()
    assert len(set(map(str, windows))) == len(windows)
    for axis, length in enumerate(tile):
        starts = sorted({window[axis].start for window in windows})
        assert all(b - a <= max(length * (1 - overlap), 1) + 1e-6 for a, b in itertools.pairwise(starts))


def test_tiles_of_a_known_image() -> None:
    # 10 voxels, tiles of 4, half overlap: a step of 2 at most, so 4 tiles.
    assert [window[0] for window in tiles((10,), (4,), 0.5)] == [slice(0, 4), slice(2, 6), slice(4, 8), slice(6, 10)]
    assert tiles((4, 3), (4, 8), 0.5) == [(slice(0, 4), slice(0, 3))]
    # No more tiles than needed without overlap.
    assert len(tiles((256, 256), (128, 128), 0.0)) == 4


@pytest.mark.parametrize("overlap", [-0.1, 1.0])
def test_tiles_refuse_an_overlap_out_of_range(overlap: float) -> None:
    with pytest.raises(ValueError, match="overlap"):
        tiles((8,), (4,), overlap)


@given(shape_and_tile(), st.integers(0, 2**32), st.floats(0, 1))
def test_patches_have_their_size_and_image_and_label_stay_together(
    given_sizes: tuple[list[int], list[int]], seed: int, fraction: float
) -> None:
    shape, patch = given_sizes
    image = numbered(shape)
    label = (image[..., 0] % 5).astype(np.uint8)
    image_patch, label_patch = sample_patch(image, label, patch, np.random.default_rng(seed), fraction)
    assert image_patch.shape == (*patch, 1)
    assert label_patch.shape == tuple(patch)
    assert (image_patch.dtype, label_patch.dtype) == (np.float32, np.uint8)
    inside = pad_to(np.ones([min(pair) for pair in zip(shape, patch, strict=True)], bool), patch, mode="constant")
    assert np.array_equal(label_patch[inside], image_patch[inside][:, 0] % 5)
    assert not label_patch[~inside].any()
    # Neighbours in the patch are neighbours in the image.
    corner = np.unravel_index(int(image_patch[inside].min()) - 1, shape)
    window = tuple(slice(c, c + min(pair)) for c, *pair in zip(corner, shape, patch, strict=True))
    assert np.array_equal(image_patch[inside], image[window].reshape(-1, 1))


def test_small_images_are_centred_in_their_padding() -> None:
    image_patch, label_patch = sample_patch(
        np.array([[[1.0], [2.0]]], np.float32), np.array([[1, 2]], np.uint8), (1, 5), np.random.default_rng(0), 0.0
    )
    assert image_patch[0, :, 0].tolist() == [1, 1, 2, 2, 2]
    assert label_patch[0].tolist() == [0, 1, 2, 0, 0]


def test_small_volumes_are_centred_in_their_padding_along_every_axis() -> None:
    image = np.random.default_rng(0).normal(size=(2, 7, 3, 2)).astype(np.float32)
    label = np.ones((2, 7, 3), np.uint8)
    image_patch, label_patch = sample_patch(image, label, (4, 4, 8), np.random.default_rng(1), 1.0)
    assert image_patch.shape == (4, 4, 8, 2)
    assert np.array_equal(label_patch, np.pad(np.ones((2, 4, 3), np.uint8), ((1, 1), (0, 0), (2, 3))))
    # Two slices and five columns of padding: each repeats the voxel at the volume's edge.
    assert np.array_equal(image_patch[0], image_patch[1])
    assert np.array_equal(image_patch[3], image_patch[2])
    assert all(np.array_equal(image_patch[:, :, column], image_patch[:, :, 2]) for column in (0, 1))
    assert all(np.array_equal(image_patch[:, :, column], image_patch[:, :, 4]) for column in (5, 6, 7))


@pytest.mark.parametrize("voxel", [(0, 0), (63, 99), (30, 50)])
def test_a_single_foreground_voxel_is_always_found_when_asked_for(voxel: tuple[int, int]) -> None:
    label = np.zeros((64, 100), np.uint8)
    label[voxel] = 1
    rng = np.random.default_rng(0)
    places = set()
    for _ in range(200):
        _, patch = sample_patch(numbered((64, 100)), label, (16, 16), rng, 1.0)
        assert patch.sum() == 1
        places.add(tuple(np.argwhere(patch)[0].tolist()))
    if voxel == (30, 50):  # far from the border: within a quarter of the patch from its centre, and not always there
        assert {p for place in places for p in place} == set(range(4, 13))


def test_foreground_is_drawn_uniformly() -> None:
    label = np.zeros((1, 1000), np.uint8)
    label[0, [100, 500, 900]] = (1, 2, 1)
    rng = np.random.default_rng(0)
    found = [float(sample_patch(numbered((1, 1000)), label, (1, 8), rng, 1.0)[0].mean()) // 333 for _ in range(600)]
    # Each of the three voxels 200 times; three standard deviations are 35.
    assert all(abs(found.count(third) - 200) < 35 for third in (0, 1, 2))


def test_the_fraction_of_patches_with_foreground_is_kept() -> None:
    label = np.zeros((200, 200), np.uint8)
    label[100, 100] = 1
    rng = np.random.default_rng(0)
    hits = sum(int(sample_patch(numbered((200, 200)), label, (8, 8), rng, 0.5)[1].any()) for _ in range(1000))
    # By chance alone a patch holds the voxel in 1 of 600 cases; three standard deviations are 47.
    assert abs(hits - 500) < 50


def test_uniform_patches_reach_every_position_and_need_no_foreground() -> None:
    rng = np.random.default_rng(0)
    empty = np.zeros((5, 5), np.uint8)
    corners = {float(sample_patch(numbered((5, 5)), empty, (3, 3), rng, 1.0)[0].min()) for _ in range(300)}
    assert corners == {1, 2, 3, 6, 7, 8, 11, 12, 13}


def test_the_generator_alone_decides() -> None:
    label = np.random.default_rng(5).integers(0, 2, (40, 40), dtype=np.uint8)
    first, again, other = (
        sample_patch(numbered((40, 40)), label, (8, 8), np.random.default_rng(seed), 0.5)[0] for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_patch_is_a_copy() -> None:
    image, label = numbered((8, 8)), np.ones((8, 8), np.uint8)
    image_patch, label_patch = sample_patch(image, label, (8, 8), np.random.default_rng(0), 0.0)
    image_patch[:], label_patch[:] = 0, 0
    assert image.all()
    assert label.all()
