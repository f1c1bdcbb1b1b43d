"""Whole predictions from tiles."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.imaging.sliding_window import predict_tiled


def two_classes(batch: np.ndarray) -> np.ndarray:
    """A network that needs no context: probabilities from each voxel's own value."""
    chance = 1 / (1 + np.exp(-batch[..., :1]))
    return np.concatenate([1 - chance, chance], axis=-1)


@given(
    st.lists(st.integers(1, 20), min_size=2, max_size=3),
    st.integers(1, 9),
    st.sampled_from([0.0, 0.25, 0.5, 0.9]),
    st.integers(1, 5),
    st.booleans(),
)
def test_a_network_without_context_predicts_the_same_whole_and_in_tiles(
    shape: list[int], length: int, overlap: float, batch_size: int, fixed: bool
) -> None:
    image = np.random.default_rng(0).normal(size=(*shape, 2)).astype(np.float32)
    tile = [length + axis for axis in range(len(shape))]
    result = predict_tiled(two_classes, image, tile, overlap, batch_size, fixed)
    assert result.dtype == np.float32
    # Up to a thousand tiles add up in one voxel here, each rounded to float32.
    np.testing.assert_allclose(result, two_classes(image), atol=1e-4)


def test_batches_have_the_promised_shapes() -> None:
    seen: list[tuple[int, ...]] = []

    def predict(batch: np.ndarray) -> np.ndarray:
        seen.append(batch.shape)
        assert batch.dtype == np.float32
        return two_classes(batch)

    image = np.zeros((10, 4, 1), np.float32)  # 4 tiles, see test_patches
    predict_tiled(predict, image, (4, 4), 0.5, batch_size=3)
    assert seen == [(3, 4, 4, 1), (1, 4, 4, 1)]
    seen.clear()
    predict_tiled(predict, image, (4, 4), 0.5, batch_size=3, fixed_batch=True)
    assert seen == [(3, 4, 4, 1), (3, 4, 4, 1)]
    seen.clear()
    predict_tiled(predict, image[:3, :3], (4, 4), 0.5)
    assert seen == [(1, 4, 4, 1)]


def test_a_small_image_is_padded_with_its_edge_and_cropped_back() -> None:
    seen: list[np.ndarray] = []

    def predict(batch: np.ndarray) -> np.ndarray:
        seen.append(batch)
        return batch

    result = predict_tiled(predict, np.array([[[1.0], [2.0]]], np.float32), (1, 5), 0.5)
    assert seen[0].ravel().tolist() == [1, 1, 2, 2, 2]
    assert result.ravel().tolist() == [1, 2]


def test_the_middle_of_a_tile_counts_more_than_its_border() -> None:
    def predict(batch: np.ndarray) -> np.ndarray:
        """The first tile says 0 everywhere, the second 1."""
        return np.stack([np.full((8, 1), 0.0), np.full((8, 1), 1.0)])

    result = predict_tiled(predict, np.zeros((12, 1), np.float32), (8,), 0.5)[:, 0]
    # Tiles 0..7 and 4..11: alone at both ends, even halfway (5.5), and in between the nearer centre (3.5, 7.5) wins.
    assert result[:4].tolist() == [0] * 4
    assert result[8:].tolist() == [1] * 4
    assert result[4] < result[5] < 0.5 < result[6] < result[7]
    # Voxel 5 is 1.5 from one centre and 2.5 from the other; sigma is 1: exp(-2.5²/2) / (exp(-1.5²/2) + exp(-2.5²/2)).
    assert result[5] == pytest.approx(0.1192, abs=1e-3)


def test_probabilities_add_up_to_one() -> None:
    def predict(batch: np.ndarray) -> np.ndarray:
        logits = np.random.default_rng(len(batch)).normal(size=(*batch.shape[:-1], 3))
        return np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)

    result = predict_tiled(predict, np.zeros((9, 30, 17, 1), np.float32), (8, 8, 8), 0.5)
    np.testing.assert_allclose(result.sum(axis=-1), 1, atol=1e-5)


def test_an_answer_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected an answer of shape \(1, 4, 4, 'classes'\)"):
        predict_tiled(lambda batch: batch[:, ::2], np.zeros((4, 4, 1), np.float32), (4, 4), 0.5)
    with pytest.raises(ValueError, match="tile"):
        predict_tiled(two_classes, np.zeros((4, 4, 1), np.float32), (4,), 0.5)
