"""The tiles that files are tried on: of the holdout's images, on which int8 finds its ranges, and made up."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from scipy.ndimage import gaussian_filter

from common.export.conversion import Tile
from common.imaging.patches import pad_to
from common.study import Study
from server.evaluation import Holdout

_BLOB_VOXELS = 3.0


def calibration_tiles(study: Study, holdout: Holdout) -> list[tuple[str, Tile]]:
    """Names and one tile each of the images to calibrate on: every site in turn, so that all kinds of image count.

    Labels are not looked at. Which images and where in them follows from the study's seed and the images' names.
    """

    def digest(index: int) -> bytes:
        return hashlib.sha256(f"{study.seed}/calibration/{holdout.cases[index]}".encode()).digest()

    by_site: dict[str | None, list[int]] = {}
    for index in sorted(range(len(holdout)), key=digest):
        by_site.setdefault(holdout.sites[index], []).append(index)
    # (how many of its site came before, site): one of each site, then the next of each.
    turns = sorted((turn, site or "", index) for site, indices in by_site.items() for turn, index in enumerate(indices))
    chosen = [index for _, _, index in turns[: study.publishing.calibration_images]]
    return [
        (holdout.cases[index], _crop(holdout.load(index)[0], study.publishing.tile, digest(index))) for index in chosen
    ]


def _crop(image: Tile, tile: Sequence[int], seed: bytes) -> Tile:
    """A crop of the tile's size, its place drawn from the seed; padded as for inference."""
    rng = np.random.default_rng(int.from_bytes(seed[:8], "little"))
    padded = pad_to(image, tile, mode="edge")
    starts = [int(rng.integers(size - length + 1)) for size, length in zip(padded.shape, tile, strict=False)]
    window = tuple(slice(start, start + length) for start, length in zip(starts, tile, strict=True))
    return np.ascontiguousarray(padded[window], dtype=np.float32)


def made_up_tile(study: Study, tiles: Sequence[Tile] = ()) -> Tile:
    """A tile (*tile, channel) of smooth blobs, which is nobody's image and follows from the study's seed.

    Its mean and deviation in each channel are those of `tiles`, or 0 and 1. Values are kept to a 16th of the deviation,
    so that it compresses.
    """
    rng = np.random.default_rng(study.seed)
    shape = (*study.publishing.tile, study.task.channels)
    blobs = gaussian_filter(rng.standard_normal(shape), (*[_BLOB_VOXELS] * study.task.dimensions, 0), mode="nearest")
    axes = tuple(range(study.task.dimensions))
    blobs = np.round((blobs - blobs.mean(axes)) / blobs.std(axes) * 16) / 16
    values = np.concatenate([tile.reshape(-1, study.task.channels) for tile in tiles]) if tiles else np.array([-1, 1])
    return np.asarray(blobs * values.std(0) + values.mean(0), np.float32)
