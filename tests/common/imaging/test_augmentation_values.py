"""Each change of values on an image whose outcome is known."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from common.imaging.augmentation import VALUE_CHANGES, augment, intensity, modality_dropout

CHANGES = [step.name for step in VALUE_CHANGES]
COUNT = 200


def varied(name: str, image: np.ndarray, count: int = COUNT) -> np.ndarray:
    """The same image `count` times, every one changed on its own."""
    batch = tf.constant(np.stack([image] * count), tf.float32)
    labels = tf.zeros((count, *image.shape[:-1]), tf.uint8)
    return augment(batch, labels, tf.constant((3, 4)), (name,), always=True)[0].numpy()


def picture(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(5, 2, shape or (16, 16, 3)).astype(np.float32)


def lines(image: np.ndarray, other: np.ndarray) -> list[np.ndarray]:
    """Gain and offset that lead from a channel of one to that of the other, which must be exact."""
    found = []
    for channel in range(image.shape[-1]):
        before, after = image[..., channel].ravel(), other[..., channel].ravel()
        line = np.polyfit(before, after, 1)
        np.testing.assert_allclose(np.polyval(line, before), after, atol=1e-4)
        found.append(line)
    return found


def test_brightness_adds_one_number_to_the_whole_example() -> None:
    image = picture()
    difference = varied("brightness", image) - image
    assert np.ptp(difference, axis=(1, 2, 3)).max() < 1e-5
    shifts = difference.mean(axis=(1, 2, 3)) / image.std()
    assert -0.3 <= shifts.min() < -0.27 < 0.27 < shifts.max() <= 0.3 + 1e-6


def test_contrast_stretch_widens_a_part_of_the_range_and_clips_the_rest() -> None:
    image = np.linspace(-2, 8, 1000, dtype=np.float32).reshape(10, 100, 1)
    starts, ends = [], []
    for other in varied("contrast_stretch", image):
        assert (other.min(), other.max()) == pytest.approx((-2, 8), abs=1e-4)
        before, after = image.ravel(), other.ravel()
        between = (after > -2) & (after < 8)
        gain, offset = np.polyfit(before[between], after[between], 1)
        np.testing.assert_allclose(gain * before[between] + offset, after[between], atol=1e-4)
        assert (after[before < before[between].min()] == -2).all()
        assert after[before > before[between].max()] == pytest.approx(8, abs=1e-4)
        starts.append(((-2 - offset) / gain + 2) / 10)
        ends.append(((8 - offset) / gain + 2) / 10)
    assert 0 <= min(starts) + 1e-6 < 0.01 < 0.09 < max(starts) <= 0.1 + 1e-6
    assert 0.7 - 1e-6 <= min(ends) < 0.72 < 0.98 < max(ends) <= 1 + 1e-6


@pytest.mark.parametrize("name", ["gamma", "gamma_inverted"])
def test_gamma_fixes_minimum_and_maximum_and_keeps_the_order(name: str) -> None:
    image = np.sort(picture(8, 8, 1).ravel()).reshape(8, 8, 1)
    images = varied(name, image)
    np.testing.assert_allclose(images.min(axis=(1, 2, 3)), image.min(), atol=1e-5)
    np.testing.assert_allclose(images.max(axis=(1, 2, 3)), image.max(), atol=1e-5)
    assert (np.diff(images.reshape(COUNT, -1), axis=1) > -1e-5).all()


@pytest.mark.parametrize("name", CHANGES)
def test_no_rounding_of_a_range_leads_out_of_it(name: str) -> None:
    # Minimum plus range is often not quite the maximum in float32, and the logarithm of less than nothing is NaN.
    for seed in range(20):
        image = np.random.default_rng(seed).normal(-3, 0.7, (7, 5, 3)).astype(np.float32)
        assert np.isfinite(varied(name, image, 10)).all()


def test_inverted_gamma_is_gamma_of_the_negative() -> None:
    image = picture()
    for number in (0.0, 0.3, 0.9):
        inverted = intensity.gamma_inverted(tf.constant(image), tf.constant([number]))
        np.testing.assert_allclose(inverted, -intensity.gamma(tf.constant(-image), tf.constant([number])), atol=1e-5)
    relative = (image.max() - image) / np.ptp(image)
    middle = (relative > 0.2) & (relative < 0.8)
    powers = []
    for other in varied("gamma_inverted", image):
        power = np.log((image.max() - other[middle]) / np.ptp(image)) / np.log(relative[middle])
        assert np.ptp(power) < 1e-3
        powers.append(power.mean())
    assert 0.7 <= min(powers) + 1e-4 < 0.72 < 1.48 < max(powers) <= 1.5 + 1e-4


@pytest.mark.parametrize("shape", [(16, 16, 3), (4, 8, 8, 4)])
def test_color_jitter_is_a_line_of_its_own_for_every_channel(shape: tuple[int, ...]) -> None:
    image = picture(*shape) * np.arange(1, shape[-1] + 1, dtype=np.float32)
    gains, shifts = [], []
    for other in varied("color_jitter", image, 60):
        own = lines(image, other)
        gains.append([gain for gain, _ in own])
        for channel, line in enumerate(own):
            values = image[..., channel]
            shifts.append((np.polyval(line, values.mean()) - values.mean()) / values.std())
    assert 0.8 <= np.min(gains) + 1e-4 < 0.82 < 1.18 < np.max(gains) <= 1.2 + 1e-4
    assert -0.2 <= min(shifts) + 1e-4 < -0.18 < 0.18 < max(shifts) <= 0.2 + 1e-4
    # The channels are drawn independently of each other.
    assert np.abs(np.corrcoef(np.transpose(gains)) - np.eye(shape[-1])).max() < 0.5


@pytest.mark.parametrize("channels", [1, 2])
def test_color_jitter_leaves_images_without_colour_alone(channels: int) -> None:
    image = picture(8, 8, channels)
    assert (varied("color_jitter", image, 20) == image).all()


@pytest.mark.parametrize("shape", [(32, 48, 3), (8, 16, 12, 1)])
def test_illumination_is_a_smooth_positive_field_that_keeps_the_mean(shape: tuple[int, ...]) -> None:
    image = np.abs(picture(*shape)) + 1
    image.reshape(-1)[0] = 0.5  # the darkest voxel: what lies above it is light
    axes = tuple(range(1, len(shape)))
    ratios = []
    for other in varied("illumination", image, 60):
        np.testing.assert_allclose(
            other.mean(axis=tuple(range(len(shape) - 1))), image.mean(axis=tuple(range(len(shape) - 1))), rtol=1e-4
        )
        light = image > 0.6
        field = np.full(shape, np.nan)
        field[light] = (other[light] - 0.5) / (image[light] - 0.5)
        assert (field[light] > 0).all()
        # The logarithm is a polynomial of second degree, the same for all channels but for what keeps the mean.
        places = np.stack(
            np.meshgrid(*[(2 * np.arange(size) + 1) / size - 1 for size in shape[:-1]], indexing="ij"), axis=-1
        )
        terms = np.concatenate(
            [places, (places**2).sum(-1, keepdims=True), np.ones((*shape[:-1], 1))], axis=-1
        ).reshape(-1, len(shape) + 1)
        for channel in range(shape[-1]):
            logarithm = np.log(field[..., channel]).ravel()
            known = np.isfinite(logarithm)
            coefficients = np.linalg.lstsq(terms[known], logarithm[known], rcond=None)[0]
            np.testing.assert_allclose(terms[known] @ coefficients, logarithm[known], atol=1e-3)
        assert np.abs(coefficients[: len(axes) - 0 - 1]).sum() <= 0.5 + 1e-3
        ratios.append(np.nanmax(field) / np.nanmin(field))
    assert max(ratios) > 1.5
    assert max(ratios) < np.exp(2 * 0.5 + 0.3)


def test_illumination_leaves_an_image_without_light_alone() -> None:
    image = np.full((8, 8, 3), -2.0, np.float32)
    assert (varied("illumination", image, 20) == image).all()


@pytest.mark.parametrize("shape", [(32, 48, 1), (3, 32, 48, 1)])
def test_low_resolution_removes_a_checkerboard(shape: tuple[int, ...]) -> None:
    board = (np.indices(shape[:-1])[-2:].sum(axis=0) % 2 * 2.0 - 1.0)[..., np.newaxis].astype(np.float32)
    images = varied("low_resolution", board)
    left = images.std(axis=tuple(range(1, len(shape) + 1)))
    np.testing.assert_allclose(images.mean(axis=tuple(range(1, len(shape) + 1))), 0, atol=0.02)
    assert (left < 0.05).any()  # near half the resolution
    assert (left < 0.5).mean() > 0.6
    assert left.max() <= 1 + 1e-5


def test_low_resolution_keeps_what_is_coarse_and_every_slice_by_itself() -> None:
    y, x = np.mgrid[:64, :64]
    coarse = np.sin(y / 10) + np.cos(x / 12)
    image = np.stack([coarse, -coarse, np.full_like(coarse, 3)])[..., np.newaxis].astype(np.float32)
    images = varied("low_resolution", image, 40)
    np.testing.assert_allclose(images[:, 2], 3, rtol=1e-5)
    np.testing.assert_allclose(images[:, 0], -images[:, 1], atol=1e-5)
    assert np.abs(images[:, 0] - image[0])[:, 2:-2, 2:-2].max() < 0.05
    # A point is spread over about a pixel of the lower resolution, without moving.
    spot = np.zeros((33, 33, 1), np.float32)
    spot[16, 16] = 1
    for other in varied("low_resolution", spot, 40)[..., 0]:
        centre = (other * np.mgrid[:33, :33]).sum(axis=(1, 2)) / other.sum()
        assert np.abs(centre - 16).max() < 0.6
        assert not other[:12].any()


def boxes_of(mask: np.ndarray) -> list[tuple[int, ...]]:
    """The sizes along each axis of a mask that is one box; [] where it is none."""
    corners = np.argwhere(mask)
    low, high = corners.min(axis=0), corners.max(axis=0) + 1
    return [tuple(high - low)] if mask[tuple(map(slice, low, high))].all() else []


@pytest.mark.parametrize("shape", [(40, 60, 3), (20, 24, 32, 1)])
def test_cutout_changes_exactly_boxes_to_the_mean(shape: tuple[int, ...]) -> None:
    image = picture(*shape)
    mean = image.mean(axis=tuple(range(len(shape) - 1)))
    single = 0
    for other in varied("cutout", image, 60):
        cut = (other != image).any(axis=-1)
        assert cut.any()
        np.testing.assert_allclose(other[cut], np.broadcast_to(mean, other[cut].shape), rtol=1e-5)
        np.testing.assert_array_equal(other[~cut], image[~cut])
        # Cutting along an axis at the box's borders, a box has one profile only; count those with one box.
        for sizes in boxes_of(cut):
            single += 1
            assert all(size <= np.ceil(0.25 * whole) + 1 for size, whole in zip(sizes, shape, strict=False))
        assert cut.mean() <= 3 * np.prod([(np.ceil(0.25 * size) + 1) / size for size in shape[:-1]])
    assert 10 <= single <= 35  # a third of the examples get one box


@pytest.mark.parametrize("name", CHANGES)
def test_all_changes_are_relative_to_the_images_own_range(name: str) -> None:
    image = picture()
    # As if the image had been normalized otherwise. The noise's own numbers do not depend on it either.
    np.testing.assert_allclose(varied(name, image * 40 - 300, 30), varied(name, image, 30) * 40 - 300, atol=0.02)


def test_modality_dropout_takes_whole_channels_and_never_all() -> None:
    image = picture(6, 8, 8, 3) + 20
    batch = tf.constant(np.stack([image] * 600))
    images = modality_dropout(batch, tf.constant((1, 2)), 0.5).numpy()
    gone = (images == 0).all(axis=(1, 2, 3))
    for channel in range(3):
        assert (images[~gone[:, channel], ..., channel] == image[..., channel]).all()
        # 0.5, but not where it would be the last of three: 0.5 - 0.125 / 3.
        assert abs(gone[:, channel].mean() - (0.5 - 0.125 / 3)) < 4 * np.sqrt(0.25 / 600)
    assert not gone.all(axis=1).any()
    assert {0, 1, 2} == set(gone.sum(axis=1))
    again = modality_dropout(batch, tf.constant((1, 2)), 0.5).numpy()
    assert np.array_equal(images, again)
    assert not np.array_equal(images, modality_dropout(batch, tf.constant((1, 3)), 0.5).numpy())


def test_modality_dropout_keeps_one_that_the_case_has() -> None:
    image = picture(8, 8, 4) + 20
    image[..., [0, 2, 3]] = 0
    images = modality_dropout(tf.constant(np.stack([image] * 200)), tf.constant((1, 2)), 0.9).numpy()
    assert (images == image).all()


@pytest.mark.parametrize(("channels", "probability"), [(1, 0.9), (3, 0.0)])
def test_modality_dropout_without_choice_changes_nothing(channels: int, probability: float) -> None:
    images = tf.constant(picture(5, 8, 8, channels))
    assert np.array_equal(modality_dropout(images, tf.constant((1, 2)), probability), images)


def test_modality_dropout_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="from 0 to below 1"):
        modality_dropout(tf.zeros((1, 8, 8, 3)), tf.constant((1, 2)), 1.0)
    with pytest.raises(ValueError, match="2D or 3D images"):
        modality_dropout(tf.zeros((8, 8, 3)), tf.constant((1, 2)), 0.5)


def test_modality_dropout_works_in_a_dataset() -> None:
    images = tf.constant(picture(4, 2, 8, 8, 3) + 20)
    dataset = tf.data.Dataset.from_tensor_slices(images).enumerate()
    mapped = dataset.map(lambda n, batch: modality_dropout(batch, tf.stack([5, tf.cast(n, tf.int32)]), 0.4))
    for number, (batch, dropped) in enumerate(zip(images, mapped, strict=True)):
        assert np.array_equal(dropped, modality_dropout(batch, tf.constant((5, number)), 0.4))
