"""Where to cut an image: random patches to train on, and the tiles that cover an image to predict."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

IGNORED = 255
"""The label of voxels that lie outside the image (padding of validation tiles); they count in no metric."""

# With 256 tries an image with 2 % foreground is searched as a whole in less than 1 of 100 calls.
_TRIES = 256


def sample_patch(
    image: npt.NDArray[np.float32],
    label: npt.NDArray[np.uint8],
    patch: Sequence[int],
    rng: np.random.Generator,
    foreground_fraction: float,
    *,
    copy: bool = True,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    """Cut a random patch.

    With probability `foreground_fraction` the patch contains a foreground voxel drawn uniformly from all of them: it
    lies within a quarter of the patch's size from its centre, or farther where the image's border is near. Otherwise,
    and where there is no foreground, every position is equally likely.

    An image smaller than the patch is padded on both sides alike: the label with background, the image with its edge
    value. Not with its reflection: that would show whole objects which the label calls background.

    Parameters
    ----------
    image : shape (y, x, channel) or (z, y, x, channel)
    label : shape (y, x) or (z, y, x)
        Class indices, 0 is background.
    patch : sequence of int
        The size along each spatial axis.
    rng : numpy.random.Generator
        Its state alone decides the outcome.
    foreground_fraction : float in [0, 1]
    copy : bool
        Whether both patches are copies; if not, they are views where neither padding nor another type is needed.

    Returns
    -------
    image_patch : float32, shape (*patch, channel)
    label_patch : uint8, shape patch
    """
    if image.shape[:-1] != label.shape or len(patch) != label.ndim:
        raise ValueError(f"an image of {image.shape}, a label of {label.shape} and a patch of {patch} do not fit")
    wanted = rng.random() < foreground_fraction
    voxel = _foreground_voxel(label, rng) if wanted else None
    starts = []
    for axis, (size, length) in enumerate(zip(label.shape, patch, strict=True)):
        last = max(size - length, 0)
        if voxel is None:
            starts.append(int(rng.integers(last + 1)))
        else:
            jitter = int(rng.integers(-(length // 4), length // 4 + 1))
            starts.append(min(max(voxel[axis] - length // 2 + jitter, 0), last))
    window = tuple(slice(start, start + length) for start, length in zip(starts, patch, strict=True))
    return (
        pad_to(image[window].astype(np.float32, copy=copy), patch, mode="edge"),
        pad_to(label[window].astype(np.uint8, copy=copy), patch, mode="constant"),
    )


def tiles(shape: Sequence[int], tile: Sequence[int], overlap: float) -> list[tuple[slice, ...]]:
    """Cover an image with as few tiles as the overlap allows, evenly spread.

    Parameters
    ----------
    shape : sequence of int
        The image's size along each spatial axis.
    tile : sequence of int
        The tile's size; along an axis where the image is smaller, the slice is the image's.
    overlap : float in [0, 1)
        Neighbouring tiles share at least this fraction of a tile, as far as a step of one voxel allows.

    Returns
    -------
    list of tuples of slices
        One slice a spatial axis, the last axis varies fastest. Every voxel lies in at least one tile.
    """
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap: expected a number from 0 to below 1, found {overlap}")
    if len(shape) != len(tile) or min(*shape, *tile) < 1:
        raise ValueError(f"expected positive sizes of one length, found shape {shape} and tile {tile}")
    axes = []
    for size, length in zip(shape, tile, strict=True):
        room = max(size - length, 0)
        # The small number undoes binary rounding: 10 * (1 - 0.9) is 0.99....
        step = max(int(length * (1 - overlap) + 1e-9), 1)
        gaps = -(-room // step)
        starts = [room * i // gaps for i in range(gaps + 1)] if gaps else [0]
        axes.append([slice(start, start + min(length, size)) for start in starts])
    return list(itertools.product(*axes))


def pad_to(array: npt.NDArray[Any], size: Sequence[int], mode: str) -> npt.NDArray[Any]:
    """Pad the first `len(size)` axes on both sides alike to at least `size` (one more behind where it is odd).

    Parameters
    ----------
    mode : "edge" or "constant"
        Repeat the outermost value, or fill with 0.
    """
    missing = [max(length - have, 0) for length, have in zip(size, array.shape, strict=False)]
    if not any(missing):
        return array
    widths = [(n // 2, n - n // 2) for n in missing] + [(0, 0)] * (array.ndim - len(missing))
    return np.pad(array, widths, mode=mode)  # type: ignore[call-overload, no-any-return]


def _foreground_voxel(label: npt.NDArray[np.uint8], rng: np.random.Generator) -> tuple[int, ...] | None:
    """A voxel drawn uniformly from the foreground.

    Drawing until one is hit is uniform, keeps no index of the image in memory and costs microseconds; the whole label
    is searched only where the foreground is so small that no try hits.
    """
    flat = label.reshape(-1)
    tries = rng.integers(flat.size, size=_TRIES)
    hits = tries[flat[tries] > 0]
    if hits.size:
        return tuple(int(i) for i in np.unravel_index(hits[0], label.shape))
    foreground = np.flatnonzero(flat > 0)
    if not foreground.size:
        return None
    return tuple(int(i) for i in np.unravel_index(foreground[rng.integers(foreground.size)], label.shape))
