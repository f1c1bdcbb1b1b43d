"""Moving the pixels of known 2D patches, compiled and by TensorFlow's kernel."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from scipy import ndimage

from common.imaging.augmentation import plane

SHAPES = [(32, 32, 3), (24, 40, 1), (9, 64, 2), (1, 16, 1)]


@pytest.fixture(params=[True, False], ids=["compiled", "kernel"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param and not plane._compiler_is_there():
        pytest.skip("this TensorFlow cannot compile for the CPU")
    monkeypatch.setattr(plane, "_compiler_is_there", lambda: request.param)


def turns(*angles_and_factors: tuple[float, float]) -> np.ndarray:
    angle, factor = np.transpose(angles_and_factors)
    return np.moveaxis(np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / factor, -1, 0)


def moved(image: np.ndarray, label: np.ndarray, matrices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same example once for each matrix."""
    images, labels = plane.move_pixels(
        tf.constant(np.stack([image] * len(matrices)), tf.float32),
        tf.constant(np.stack([label] * len(matrices)), tf.uint8),
        tf.constant(matrices, tf.float32),
    )
    return images.numpy(), labels.numpy()


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("shape", SHAPES)
def test_image_is_linear_and_label_nearest_at_the_place_the_matrix_says(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    image, label = rng.normal(size=shape), rng.integers(0, 5, shape[:-1]).astype(np.uint8)
    matrices = turns((0.3, 1.0), (-2.0, 0.8), (1.1, 1.25), (0.01, 0.93))
    images, labels = moved(image, label, matrices)
    centre = (np.array(shape[:-1]) - 1) / 2
    y, x = np.meshgrid(*map(np.arange, shape[:-1]), indexing="ij")
    for after, label_after, matrix in zip(images, labels, matrices, strict=True):
        source_x, source_y = np.tensordot(matrix, np.stack([x - centre[1], y - centre[0]]), 1)
        source = [source_y + centre[0], source_x + centre[1]]
        for channel in range(shape[-1]):
            # SciPy calls the mirror image at the outer edge "reflect" too.
            expected = ndimage.map_coordinates(image[..., channel], source, order=1, mode="reflect")
            np.testing.assert_allclose(after[..., channel], expected, atol=1e-3)
        nearest = ndimage.map_coordinates(label, source, order=0, mode="reflect")
        assert (label_after == nearest).mean() > 0.99


@pytest.mark.usefixtures("_way")
def test_matrices_of_whole_numbers_copy_to_the_bit() -> None:
    image = np.random.default_rng(0).normal(size=(17, 17, 3)).astype(np.float32)
    label = np.random.default_rng(1).integers(0, 5, (17, 17)).astype(np.uint8)
    matrices = np.array([[[1, 0], [0, 1]], [[-1, 0], [0, 1]], [[1, 0], [0, -1]], [[0, 1], [1, 0]]])
    images, labels = moved(image, label, matrices)
    turn_all = (lambda a: a, lambda a: a[:, ::-1], lambda a: a[::-1], lambda a: a.swapaxes(0, 1))
    for after, label_after, turn in zip(images, labels, turn_all, strict=True):
        assert np.array_equal(after, turn(image))
        assert np.array_equal(label_after, turn(label))


@pytest.mark.usefixtures("_way")
def test_an_example_does_not_depend_on_its_neighbours_in_the_batch() -> None:
    rng = np.random.default_rng(0)
    images, labels = rng.normal(size=(4, 16, 24, 3)), rng.integers(0, 3, (4, 16, 24))
    matrices = turns((0.3, 1.0), (-2.0, 0.8), (1.1, 1.25), (0.0, 1.0))
    together = [
        values.numpy()
        for values in plane.move_pixels(
            tf.constant(images, tf.float32), tf.constant(labels, tf.uint8), tf.constant(matrices, tf.float32)
        )
    ]
    images[[0, 2, 3]] = np.nan
    alone = plane.move_pixels(
        tf.constant(images, tf.float32), tf.constant(labels, tf.uint8), tf.constant(matrices, tf.float32)
    )
    assert np.array_equal(together[0][1], alone[0][1])
    assert np.array_equal(together[1][1], alone[1][1])
