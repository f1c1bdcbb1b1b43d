"""Predict an image of any size with a network of a fixed input size: overlapping tiles, averaged.

Each tile's answer is weighted by a Gaussian around its centre, because a network knows least at a tile's border.
Source: nnU-Net, Isensee et al. 2021, doi:10.1038/s41592-020-01008-z (sigma of an eighth of the tile).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from common.imaging.patches import pad_to, tiles

Predict = Callable[[npt.NDArray[np.float32]], npt.NDArray[Any]]
_LOWEST_WEIGHT = 1e-3


def predict_tiled(
    predict: Predict,
    image: npt.NDArray[np.float32],
    tile: Sequence[int],
    overlap: float,
    batch_size: int = 8,
    fixed_batch: bool = False,
) -> npt.NDArray[np.float32]:
    """Predict class probabilities for every voxel of an image.

    Parameters
    ----------
    predict : callable
        Takes float32 of shape (b, *tile, channel), answers (b, *tile, classes).
    image : float32, shape (y, x, channel) or (z, y, x, channel)
        Prepared as for training. Smaller than the tile, it is padded with its edge value, as in training, and the
        answer is cropped back.
    tile : sequence of int
        The network's input size along each spatial axis.
    overlap : float in [0, 1)
        The fraction of a tile that neighbours share at least.
    batch_size : int
        The most tiles in one call.
    fixed_batch : bool
        Every call gets exactly `batch_size` tiles; the last one is filled up with zeros. For models that were exported
        with a fixed batch.

    Returns
    -------
    float32 array
        Shape (spatial..., classes): the weighted mean of the tiles' answers, so probabilities still add up to 1.

    Raises
    ------
    ValueError
        The sizes do not fit each other, or the answer is not of the shape that was asked for.
    """
    spatial = image.shape[:-1]
    if len(tile) != len(spatial):
        raise ValueError(f"tile: expected {len(spatial)} sizes for an image of {image.shape}, found {tuple(tile)}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, found {batch_size}")
    padded = pad_to(np.asarray(image, dtype=np.float32), tile, mode="edge")
    windows = tiles(padded.shape[:-1], tile, overlap)
    weight = _gaussian(tile)[..., np.newaxis]
    total: npt.NDArray[np.float32] | None = None
    weights = np.zeros((*padded.shape[:-1], 1), dtype=np.float32)
    for first in range(0, len(windows), batch_size):
        batch = windows[first : first + batch_size]
        answers = _answer(predict, np.stack([padded[window] for window in batch]), batch_size if fixed_batch else None)
        if len(windows) == 1:
            return _cropped(answers[0], spatial)
        if total is None:
            total = np.zeros((*padded.shape[:-1], answers.shape[-1]), dtype=np.float32)
        for window, answer in zip(batch, answers, strict=True):
            total[window] += weight * answer
            weights[window] += weight
    assert total is not None  # there is at least one tile
    total /= weights
    return _cropped(total, spatial)


def _answer(predict: Predict, batch: npt.NDArray[np.float32], fixed: int | None) -> npt.NDArray[np.float32]:
    count = len(batch)
    if fixed is not None and count < fixed:
        batch = np.concatenate([batch, np.zeros((fixed - count, *batch.shape[1:]), dtype=np.float32)])
    answers = np.asarray(predict(batch), dtype=np.float32)
    if answers.ndim != batch.ndim or answers.shape[:-1] != batch.shape[:-1]:
        raise ValueError(f"expected an answer of shape {(*batch.shape[:-1], 'classes')}, found {answers.shape}")
    return answers[:count]


def _cropped(array: npt.NDArray[np.float32], spatial: Sequence[int]) -> npt.NDArray[np.float32]:
    """Undo `pad_to`."""
    starts = [(have - size) // 2 for have, size in zip(array.shape, spatial, strict=False)]
    window = tuple(slice(start, start + size) for start, size in zip(starts, spatial, strict=True))
    return np.array(array[window], dtype=np.float32)


def _gaussian(tile: Sequence[int]) -> npt.NDArray[np.float32]:
    """Weights of shape `tile`, largest at the centre; the floor keeps a border that only one tile covers divisible."""
    weight: npt.NDArray[np.float64] = np.ones((), dtype=np.float64)
    for length in tile:
        distance = (np.arange(length) - (length - 1) / 2) / (length / 8)
        weight = weight[..., np.newaxis] * np.exp(-0.5 * distance**2)
    return np.asarray(np.maximum(weight / weight.max(), _LOWEST_WEIGHT), dtype=np.float32)
