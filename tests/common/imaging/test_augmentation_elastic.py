"""Elastic deformation of a known image."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from common.imaging.augmentation import augment
from common.imaging.augmentation.elastic import largest_shift

SEED = (3, 4)


def deformed(
    image: np.ndarray, label: np.ndarray, *, count: int = 40, seed: int = 3, through_plane: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """The same example `count` times, every one deformed on its own."""
    images, labels = augment(
        tf.constant(np.stack([image] * count), tf.float32),
        tf.constant(np.stack([label] * count), tf.uint8),
        tf.constant((seed, 4), tf.int32),
        ("elastic",),
        through_plane=through_plane,
        always=True,
    )
    return images.numpy(), labels.numpy()


def places(shape: tuple[int, ...]) -> np.ndarray:
    """An image whose channels hold each voxel's own coordinates: deformed, it shows where each voxel came from."""
    return np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1).astype(np.float32)


def inside(shape: tuple[int, ...]) -> tuple[slice, ...]:
    """The part that no mirror image reaches, whatever the shift."""
    margins = [int(np.ceil(largest_shift(len(shape)) * size)) + 1 for size in shape]
    return tuple(slice(margin, size - margin) for margin, size in zip(margins, shape, strict=True))


@pytest.mark.parametrize("shape", [(64, 96), (40, 56, 48)], ids=["2d", "3d"])
def test_voxels_move_smoothly_each_way_and_never_beyond_the_bound(shape: tuple[int, ...]) -> None:
    origin = places(shape)
    images, _ = deformed(origin, np.zeros(shape, np.uint8))
    shifts = (images - origin)[(slice(None), *inside(shape))]
    for axis, size in enumerate(shape):
        bound = largest_shift(len(shape)) * size
        largest = np.abs(shifts[..., axis]).max(axis=tuple(range(1, len(shape) + 1)))
        assert largest.max() <= bound
        assert largest.max() > 0.4 * bound
        assert (largest > 0.01 * bound).all()
        assert shifts[..., axis].min() < -0.3 * bound < 0.3 * bound < shifts[..., axis].max()
        for other in range(len(shape)):
            # Smooth: neighbours move almost alike.
            step = np.abs(np.diff(shifts[..., axis], axis=other + 1)).max()
            assert step < 2 * bound / (shape[other] / 4) + 1e-4


@settings(max_examples=15)
@given(shape=st.lists(st.integers(12, 40), min_size=2, max_size=3).map(tuple), seed=st.integers(0, 1000))
def test_the_field_never_folds(shape: tuple[int, ...], seed: int) -> None:
    images, _ = deformed(places(shape), np.zeros(shape, np.uint8), count=4, seed=seed)
    part = images[(slice(None), *inside(shape))]
    gradients = np.stack(
        [
            np.diff(part, axis=axis + 1)[
                (slice(None), *[slice(None) if other == axis else slice(0, -1) for other in range(len(shape))])
            ]
            for axis in range(len(shape))
        ],
        axis=-1,
    )
    assert np.linalg.det(gradients).min() > 0


def test_a_square_moves_less_than_the_bound_and_stays_one_piece_of_its_class() -> None:
    label = np.zeros((96, 96), np.uint8)
    label[30:60, 40:70] = 2
    images, labels = deformed(label[..., np.newaxis].astype(np.float32), label)
    bound = largest_shift(2) * 96
    assert np.mean([np.array_equal(moved, label) for moved in labels]) < 0.1
    for image, moved in zip(images[..., 0], labels, strict=True):
        assert set(np.unique(moved)) == {0, 2}
        assert ndimage.label(moved, np.ones((3, 3)))[1] == 1  # sampled, a sharp corner may touch by a diagonal alone
        rows, columns = np.argwhere(moved).T
        for found, wanted in zip((rows.min(), rows.max(), columns.min(), columns.max()), (30, 59, 40, 69), strict=True):
            assert abs(found - wanted) <= bound + 1
        # The label follows the image.
        assert ((image > 1.0) == (moved == 2)).mean() > 0.995


@pytest.mark.parametrize("shape", [(48, 40), (14, 20, 18)], ids=["2d", "3d"])
def test_images_are_interpolated_linearly_and_labels_take_the_nearest_voxel(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    image = np.concatenate([rng.normal(size=(*shape, 2)), places(shape)], axis=-1)
    label = rng.integers(0, 5, shape).astype(np.uint8)
    images, labels = deformed(image, label, count=5)
    core = inside(shape)
    for after, label_after in zip(images, labels, strict=True):
        origin = [after[..., 2 + axis][core] for axis in range(len(shape))]
        for channel in range(2):
            expected = ndimage.map_coordinates(image[..., channel], origin, order=1)
            np.testing.assert_allclose(after[..., channel][core], expected, atol=1e-3)
        nearest = label[tuple(np.round(where).astype(int) for where in origin)]
        assert (label_after[core] == nearest).mean() > 0.999


def test_what_moves_in_from_outside_is_the_mirror_image() -> None:
    ramp = np.tile(np.arange(64, dtype=np.float32), (64, 1))[..., np.newaxis]
    images, labels = deformed(ramp, np.full((64, 64), 3, np.uint8))
    assert (labels == 3).all()
    # The mirror image of a ramp: values rise to the edge and never fall far below it.
    assert images[:, :, -1].min() > 63 - largest_shift(2) * 64 - 0.5
    assert images.min() >= 0
    assert images.max() <= 63


def test_slices_stay_in_their_plane_where_they_are_thick() -> None:
    shape = (6, 24, 24)
    images, _ = deformed(places(shape), np.zeros(shape, np.uint8), through_plane=False)
    np.testing.assert_allclose(images[..., 0], np.broadcast_to(places(shape)[..., 0], images.shape[:-1]), atol=1e-5)
    assert (images[..., 1] != places(shape)[..., 1]).any()


def test_a_fifth_of_the_examples_are_deformed_and_the_others_keep_their_bits() -> None:
    image = np.random.default_rng(0).normal(size=(16, 16, 1)).astype(np.float32)
    batch = tf.constant(np.stack([image] * 400))
    images, _ = augment(batch, tf.zeros((400, 16, 16), tf.uint8), tf.constant(SEED), ("elastic",))
    share = np.mean([not np.array_equal(image, other) for other in images])
    assert abs(share - 0.2) < 4 * np.sqrt(0.2 * 0.8 / 400)
