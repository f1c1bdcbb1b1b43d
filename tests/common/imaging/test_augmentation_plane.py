"""Moving the voxels of known examples by known matrices: one pass, each voxel interpolated once."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from scipy import ndimage

from common.imaging.augmentation import chain, resampling
from common.imaging.augmentation.spatial import source_of

SHAPES = [(32, 32, 3), (24, 40, 1), (9, 64, 2), (1, 16, 1), (12, 10, 14, 2), (1, 9, 9, 1)]


@pytest.fixture(params=[True, False], ids=["compiled", "plain"])
def _compiled(request: pytest.FixtureRequest) -> bool:
    if request.param and not chain.compiler_is_there():
        pytest.skip("this TensorFlow cannot compile for the CPU")
    return bool(request.param)


def turns(*angles_and_factors: tuple[float, float]) -> list[np.ndarray]:
    """In the plane (y, x)."""
    return [
        np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) / factor
        for angle, factor in angles_and_factors
    ]


def in_space(matrix: np.ndarray, dimensions: int) -> np.ndarray:
    whole = np.eye(dimensions)
    whole[-2:, -2:] = matrix
    return whole


def moved(
    image: np.ndarray, label: np.ndarray, matrix: np.ndarray, axes: tuple[int, ...], compiled: bool
) -> tuple[np.ndarray, np.ndarray]:
    def move(image: tf.Tensor, label: tf.Tensor, matrix: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        sizes = [tf.cast(size, tf.float32) for size in tf.unstack(tf.shape(label), num=label.shape.rank)]
        at = resampling.places(source_of(resampling.offsets(sizes), matrix, sizes), tf.shape(label))
        return resampling.interpolated(image, at, axes), resampling.nearest(label, at)

    function = tf.function(move, jit_compile=compiled or None, autograph=False)
    result = function(tf.constant(image, tf.float32), tf.constant(label, tf.uint8), tf.constant(matrix, tf.float32))
    return result[0].numpy(), result[1].numpy()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_image_is_linear_and_label_nearest_at_the_place_the_matrix_says(
    shape: tuple[int, ...], _compiled: bool
) -> None:
    rng = np.random.default_rng(0)
    image, label = rng.normal(size=shape), rng.integers(0, 5, shape[:-1]).astype(np.uint8)
    dimensions = len(shape) - 1
    matrices = [in_space(turn, dimensions) for turn in turns((0.3, 1.0), (-2.0, 0.8), (1.1, 1.25), (0.01, 0.93))]
    if dimensions == 3:
        tilt = np.eye(3)
        tilt[:2, :2] = turns((0.2, 1.0))[0]
        matrices = [matrices[0], matrices[1] @ tilt]
    centre = (np.array(shape[:-1]) - 1) / 2
    grid = np.stack(np.meshgrid(*map(np.arange, shape[:-1]), indexing="ij")).astype(float)
    for number, matrix in enumerate(matrices):
        axes = (1, 2) if dimensions == 3 and number == 0 else tuple(range(dimensions))
        after, label_after = moved(image, label, matrix, axes, _compiled)
        ends = (..., *[np.newaxis] * dimensions)
        source = np.tensordot(matrix, grid - centre[ends], 1) + centre[ends]
        for channel in range(shape[-1]):
            # SciPy calls the mirror image at the outer edge "reflect" too.
            expected = ndimage.map_coordinates(image[..., channel], source, order=1, mode="reflect")
            np.testing.assert_allclose(after[..., channel], expected, atol=1e-3)
        nearest = ndimage.map_coordinates(label, source, order=0, mode="reflect")
        assert (label_after == nearest).mean() > 0.99


def test_matrices_of_whole_numbers_copy_to_the_bit(_compiled: bool) -> None:
    image = np.random.default_rng(0).normal(size=(17, 17, 3)).astype(np.float32)
    label = np.random.default_rng(1).integers(0, 5, (17, 17)).astype(np.uint8)
    matrices = np.array([[[1, 0], [0, 1]], [[1, 0], [0, -1]], [[-1, 0], [0, 1]], [[0, 1], [1, 0]]])
    turn_all = (lambda a: a, lambda a: a[:, ::-1], lambda a: a[::-1], lambda a: a.swapaxes(0, 1))
    for matrix, turn in zip(matrices, turn_all, strict=True):
        after, label_after = moved(image, label, matrix, (0, 1), _compiled)
        assert np.array_equal(after, turn(image))
        assert np.array_equal(label_after, turn(label))
