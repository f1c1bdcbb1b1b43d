"""Slabs and mirror images: the same as the whole, and no more in memory than a tile's length."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.imaging.patches import pad_to, tiles
from common.imaging.sliding_window import WholeImage, predict_slabs, predict_tiled


def neighbours(batch: np.ndarray) -> np.ndarray:
    """A network that sees more than a voxel: where in the tile it lies matters."""
    sums = np.cumsum(batch, axis=1)
    return np.concatenate([np.sin(sums), np.cos(batch)], axis=-1)


def averaged_at_once(image: np.ndarray, tile: list[int], overlap: float) -> np.ndarray:
    """Every tile's answer, weighted, added up in double precision over the whole image."""
    padded = pad_to(image, tile, mode="edge")
    total = np.zeros((*padded.shape[:-1], image.shape[-1] * 2))
    weights = np.zeros((*padded.shape[:-1], 1))
    grid = np.meshgrid(*[(np.arange(n) - (n - 1) / 2) / (n / 8) for n in tile], indexing="ij")
    weight = np.exp(-0.5 * sum(axis**2 for axis in grid))
    weight = np.maximum(weight / weight.max(), 1e-3)[..., np.newaxis]
    for window in tiles(padded.shape[:-1], tile, overlap):
        total[window] += weight * neighbours(padded[window][np.newaxis])[0]
        weights[window] += weight
    starts = [(have - size) // 2 for have, size in zip(padded.shape[:-1], image.shape[:-1], strict=True)]
    inside = tuple(slice(start, start + size) for start, size in zip(starts, image.shape[:-1], strict=True))
    return (total / weights)[inside]


@given(
    st.lists(st.integers(1, 24), min_size=2, max_size=3),
    st.integers(1, 9),
    st.sampled_from([0.0, 0.25, 0.5, 0.8]),
    st.integers(1, 7),
)
def test_slabs_follow_each_other_and_hold_the_mean_of_all_tiles(
    shape: list[int], length: int, overlap: float, batch_size: int
) -> None:
    image = np.random.default_rng(0).normal(size=(*shape, 1)).astype(np.float32)
    tile = [length + axis for axis in range(len(shape))]
    parts, end = [], 0
    for slab, answer in predict_slabs(neighbours, WholeImage(image), tile, overlap, batch_size):
        assert slab.start == end
        assert answer.shape == (slab.stop - slab.start, *shape[1:], 2)
        assert slab.stop - slab.start <= max(tile[0], 1)
        parts.append(answer.copy())
        end = slab.stop
    assert end == shape[0]
    whole = np.concatenate(parts)
    np.testing.assert_allclose(whole, averaged_at_once(image, tile, overlap), atol=1e-5)
    assert np.array_equal(whole, predict_tiled(neighbours, image, tile, overlap, batch_size))


def test_every_tile_is_read_once_and_rows_in_order() -> None:
    image = np.zeros((50, 20, 1), np.float32)
    read: list[tuple[slice, ...]] = []

    class Counted(WholeImage):
        def read(self, window: tuple[slice, ...]) -> np.ndarray:
            read.append(window)
            return super().read(window)

    for _ in predict_slabs(neighbours, Counted(image), (8, 8), 0.25, 3, fixed_batch=True):
        pass
    assert read == tiles((50, 20), (8, 8), 0.25)


@pytest.mark.parametrize("axes", [(), (0,), (1,), (0, 1), (0, 1, 2)])
def test_mirrored_answers_are_averaged_on_the_image(axes: tuple[int, ...]) -> None:
    shape = (8, 6, 4)[-max(len(axes), 2) :] if 2 not in axes else (8, 6, 4)
    image = np.random.default_rng(1).normal(size=(*shape, 1)).astype(np.float32)
    chosen = [some for count in range(len(axes) + 1) for some in itertools.combinations(axes, count)]
    expected = np.mean(
        [np.flip(neighbours(np.flip(image, some)[np.newaxis])[0], some) for some in chosen], axis=0, dtype=np.float64
    )
    result = predict_tiled(neighbours, image, shape, 0.5, mirror=axes)
    np.testing.assert_allclose(result, expected, atol=1e-6)


def test_an_axis_that_the_image_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mirror: expected axes from 0 to 1, found \(2,\)"):
        predict_tiled(neighbours, np.zeros((4, 4, 1), np.float32), (4, 4), 0.5, mirror=(2,))
