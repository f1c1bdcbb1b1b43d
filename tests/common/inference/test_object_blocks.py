"""Objects of large images, found block by block, are those of the whole image."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from common.inference.object_blocks import number_objects


def find(maps: np.ndarray) -> np.ndarray:
    return np.asarray(ndimage.label(maps[..., 0] > 0.5)[0], np.int32)


@pytest.mark.parametrize("shape", [(100, 90), (24, 50, 41)])
def test_blocks_give_the_objects_of_the_whole_image(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    maps = np.zeros((*shape, 1), np.float16)
    for _ in range(60):
        corner = [int(rng.integers(0, n - 6)) for n in shape]
        maps[tuple(slice(at, at + int(rng.integers(2, 7))) for at in corner)] = 0.9
    whole = find(maps)
    largest = max(part.stop - part.start for box in ndimage.find_objects(whole) for part in box)
    found = np.zeros(shape, np.int32)
    count = number_objects(find, maps, found, block=[16] * len(shape), margin=[largest] * len(shape))
    assert count == whole.max() == found.max()
    assert np.array_equal(found > 0, whole > 0)
    pairs = set(zip(found.ravel().tolist(), whole.ravel().tolist(), strict=True))
    assert len(pairs) == count + 1  # the same objects by other numbers


def test_a_small_image_is_looked_at_once() -> None:
    calls = []

    def once(maps: np.ndarray) -> np.ndarray:
        calls.append(maps.shape)
        assert maps.dtype == np.float32
        return find(maps)

    maps = np.zeros((40, 30, 1), np.float16)
    maps[3:5, 3:5], maps[30:35, 20:25] = 1, 1
    found = np.zeros((40, 30), np.int32)
    assert number_objects(once, maps, found) == 2
    assert calls == [(40, 30, 1)]
    assert found[4, 4] == 1
    assert found[31, 22] == 2


def test_nothing_is_no_object() -> None:
    found = np.zeros((40, 30), np.int32)
    assert number_objects(find, np.zeros((40, 30, 1), np.float32), found, block=[16, 16], margin=[4, 4]) == 0
    assert not found.any()
