"""Predict an image of any size with a network of a fixed input size: overlapping tiles, averaged.

Each tile's answer is weighted by a Gaussian around its centre, because a network knows least at a tile's border.
Source: nnU-Net, Isensee et al. 2021, doi:10.1038/s41592-020-01008-z (sigma of an eighth of the tile; mirror images).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from common.imaging.patches import pad_to, tiles

Predict = Callable[[npt.NDArray[np.float32]], npt.NDArray[Any]]
Floats = npt.NDArray[np.float32]
_LOWEST_WEIGHT = 1e-3


class Image(Protocol):
    """A prepared image that need not be in memory as a whole; tiles are read in order, the last axis fastest."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(y, x, channel) or (z, y, x, channel)."""

    def read(self, window: tuple[slice, ...]) -> Floats:
        """The part within a slice for each spatial axis."""


class WholeImage:
    """A prepared image in memory, float32 of shape (spatial..., channel)."""

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self._array = np.asarray(array, dtype=np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._array.shape

    def read(self, window: tuple[slice, ...]) -> Floats:
        return self._array[window]


def predict_tiled(
    predict: Predict,
    image: Floats,
    tile: Sequence[int],
    overlap: float,
    batch_size: int = 8,
    fixed_batch: bool = False,
    mirror: Sequence[int] = (),
) -> Floats:
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
    mirror : sequence of int
        Spatial axes, counted from 0: each tile's answer becomes the mean over its mirror images along every choice of
        these axes (2 to the power of their number), mirrored back.

    Returns
    -------
    float32 array
        Shape (spatial..., classes): the weighted mean of the tiles' answers, so probabilities still add up to 1.

    Raises
    ------
    ValueError
        The sizes do not fit each other, or the answer is not of the shape that was asked for.
    """
    result: Floats | None = None
    for slab, answer in predict_slabs(predict, WholeImage(image), tile, overlap, batch_size, fixed_batch, mirror):
        if slab.stop - slab.start == image.shape[0]:
            return np.array(answer)
        if result is None:
            result = np.empty((*image.shape[:-1], answer.shape[-1]), np.float32)
        result[slab] = answer
    assert result is not None  # there is at least one slab
    return result


def predict_slabs(
    predict: Predict,
    image: Image,
    tile: Sequence[int],
    overlap: float,
    batch_size: int = 8,
    fixed_batch: bool = False,
    mirror: Sequence[int] = (),
) -> Iterator[tuple[slice, Floats]]:
    """As `predict_tiled`, a slab at a time: what is held is one tile long along the first axis, whatever the image's
    length.

    Parameters
    ----------
    image : Image
        Each tile is read once.

    Yields
    ------
    slab : where along the first axis; slabs follow each other from 0 to the image's end.
    probabilities : float32 of shape (slab's length, other spatial axes..., classes)
        Valid until the next one is asked for.
    """
    spatial = image.shape[:-1]
    if len(tile) != len(spatial):
        raise ValueError(f"tile: expected {len(spatial)} sizes for an image of {image.shape}, found {tuple(tile)}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, found {batch_size}")
    windows = tiles(spatial, tile, overlap)
    band: _Band | None = None
    for first in range(0, len(windows), batch_size):
        batch = windows[first : first + batch_size]
        inputs = np.stack([pad_to(image.read(window), tile, mode="edge") for window in batch])
        answers = _mirrored(predict, inputs, batch_size if fixed_batch else None, mirror)
        if len(windows) == 1:
            yield slice(0, spatial[0]), _cropped(answers[0], spatial)
            return
        if band is None:
            band = _Band(spatial, tile, answers.shape[-1])
        for window, answer in zip(batch, answers, strict=True):
            if window[0].start > band.start:
                yield band.finish(window[0].start)
            band.add(window, answer)
    assert band is not None  # there is at least one tile
    yield band.finish(spatial[0])


class _Band:
    """The running sums of the tiles that began last along the first axis, and of those that reach into them."""

    def __init__(self, spatial: Sequence[int], tile: Sequence[int], outputs: int) -> None:
        self.start = 0
        self._spatial, self._tile = spatial, tile
        self._weight = _gaussian(tile)[..., np.newaxis]
        length = min(tile[0], spatial[0])
        self._total = np.zeros((length, *spatial[1:], outputs), np.float32)
        self._weights = np.zeros((length, *spatial[1:], 1), np.float32)

    def add(self, window: tuple[slice, ...], answer: Floats) -> None:
        sizes = [part.stop - part.start for part in window]
        place = (slice(0, sizes[0]), *window[1:])
        self._total[place] += _cropped(self._weight * answer, sizes)
        self._weights[place] += _cropped(self._weight, sizes)

    def finish(self, end: int) -> tuple[slice, Floats]:
        """What no later tile reaches, which begins at `end`; the rest moves to the front."""
        slab, count = slice(self.start, end), end - self.start
        done = self._total[:count] / self._weights[:count]
        for sums in (self._total, self._weights):
            sums[: len(sums) - count] = sums[count:]
            sums[len(sums) - count :] = 0
        self.start = end
        return slab, done


def _mirrored(predict: Predict, batch: Floats, fixed: int | None, mirror: Sequence[int]) -> Floats:
    """The mean of the answers to a batch's mirror images, mirrored back."""
    axes = sorted(set(mirror))
    if axes and not 0 <= axes[0] <= axes[-1] < batch.ndim - 2:
        raise ValueError(f"mirror: expected axes from 0 to {batch.ndim - 3}, found {tuple(mirror)}")
    total = _answer(predict, batch, fixed)
    chosen = [some for count in range(1, len(axes) + 1) for some in itertools.combinations(axes, count)]
    for some in chosen:
        flipped = tuple(axis + 1 for axis in some)
        total = total + np.flip(_answer(predict, np.flip(batch, flipped), fixed), flipped)
    return total / np.float32(len(chosen) + 1) if chosen else total


def _answer(predict: Predict, batch: Floats, fixed: int | None) -> Floats:
    count = len(batch)
    if fixed is not None and count < fixed:
        batch = np.concatenate([batch, np.zeros((fixed - count, *batch.shape[1:]), dtype=np.float32)])
    answers = np.asarray(predict(batch), dtype=np.float32)
    if answers.ndim != batch.ndim or answers.shape[:-1] != batch.shape[:-1]:
        raise ValueError(f"expected an answer of shape {(*batch.shape[:-1], 'classes')}, found {answers.shape}")
    return answers[:count]


def _cropped(array: Floats, spatial: Sequence[int]) -> Floats:
    """Undo `pad_to`."""
    starts = [(have - size) // 2 for have, size in zip(array.shape, spatial, strict=False)]
    window = tuple(slice(start, start + size) for start, size in zip(starts, spatial, strict=True))
    return array[window]


def _gaussian(tile: Sequence[int]) -> Floats:
    """Weights of shape `tile`, largest at the centre; the floor keeps a border that only one tile covers divisible."""
    weight: npt.NDArray[np.float64] = np.ones((), dtype=np.float64)
    for length in tile:
        distance = (np.arange(length) - (length - 1) / 2) / (length / 8)
        weight = weight[..., np.newaxis] * np.exp(-0.5 * distance**2)
    return np.asarray(np.maximum(weight / weight.max(), _LOWEST_WEIGHT), dtype=np.float32)
