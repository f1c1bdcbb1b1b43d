"""Network input from volumes; expected values by hand."""

from __future__ import annotations

import numpy as np
import pytest

from common.errors import DataError
from common.imaging.preprocessing import prepare_image, prepare_label
from common.imaging.volume import Volume


def volume(array: np.ndarray) -> Volume:
    return Volume(array, (1.0, 1.0, 1.0), np.eye(4))


def plane(values: list[list[float]], dtype: type) -> Volume:
    return volume(np.array(values, dtype)[np.newaxis, ..., np.newaxis])


def prepared(image: Volume, intensity: str, channels: int = 1) -> np.ndarray:
    return prepare_image(image, dimensions=2, channels=channels, intensity=intensity)


def test_zscore_of_all_channels_together() -> None:
    rgb = volume(np.array([0, 0, 0, 4, 4, 4], np.uint8).reshape(1, 1, 2, 3))
    # mean 2, standard deviation 2
    assert prepared(rgb, "zscore", 3).tolist() == [[[-1, -1, -1], [1, 1, 1]]]


def test_zscore_is_precise_for_large_16_bit_images() -> None:
    noise = np.random.default_rng(0).normal(60000, 3, (1, 1000, 1000, 1)).round().astype(np.uint16)
    result = prepared(volume(noise), "zscore")
    # Neighbouring float32 numbers at 60000 are 0.004 apart, 0.0013 standard deviations.
    assert abs(result.mean(dtype=np.float64)) < 0.0013
    assert result.std(dtype=np.float64) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("intensity", ["zscore", "percentile"])
@pytest.mark.parametrize("value", [0, 3, 65535])
def test_constant_images_become_zero(intensity: str, value: int) -> None:
    assert not prepared(plane([[value] * 7] * 7, np.uint16), intensity).any()


def test_percentiles_become_0_to_1_and_the_rest_is_clipped() -> None:
    # Of 0..200 the 0.5th percentile is 1 and the 99.5th is 199.
    result = prepared(plane([list(range(201))], np.int16), "percentile")[0, :, 0]
    assert result[[0, 1, 100, 199, 200]].tolist() == pytest.approx([0, 0, 0.5, 1, 1])


def test_a_few_bright_spots_on_black_are_not_lost_to_percentiles() -> None:
    image = np.zeros((1, 100, 100, 1), np.uint8)
    image[0, 5, 5] = 50
    assert prepared(volume(image), "percentile")[5, 5, 0] == 1.0


def test_no_normalisation_scales_by_the_type_alone() -> None:
    assert prepared(plane([[0, 51, 255]], np.uint8), "none").ravel().tolist() == pytest.approx([0, 0.2, 1])
    assert prepared(plane([[0, 13107, 65535]], np.uint16), "none").ravel().tolist() == pytest.approx([0, 0.2, 1])
    assert prepared(plane([[-1000.0, 2.5]], np.float32), "none").ravel().tolist() == [-1000.0, 2.5]


def test_grey_is_repeated_and_rgb_becomes_luminance() -> None:
    assert prepared(plane([[10, 20]], np.float32), "none", 3).tolist() == [[[10, 10, 10], [20, 20, 20]]]
    rgb = volume(np.array([1, 0, 0, 0, 1, 0, 0, 0, 1], np.float32).reshape(1, 1, 3, 3))
    assert prepared(rgb, "none", 1)[0, :, 0].tolist() == pytest.approx([0.299, 0.587, 0.114])


def test_other_channels_are_refused() -> None:
    with pytest.raises(DataError, match="expected 3 channels, found 2"):
        prepared(volume(np.zeros((1, 4, 4, 2))), "none", 3)


def test_2d_loses_the_depth_axis_and_3d_keeps_it() -> None:
    image = volume(np.arange(24, dtype=np.uint8).reshape(2, 3, 4, 1))
    assert prepare_image(image, dimensions=3, channels=1, intensity="none").shape == (2, 3, 4, 1)
    assert prepare_label(image, dimensions=3, classes=24, labels="classes").shape == (2, 3, 4)
    assert prepared(plane([[1, 2]], np.uint8), "none").shape == (1, 2, 1)
    with pytest.raises(ValueError, match="2 dimensions"):
        prepared(image, "none")


def test_the_volume_is_left_as_it_is() -> None:
    image = plane([[1.0, 2.0]], np.float32)
    for intensity in ("zscore", "percentile", "none"):
        prepared(image, intensity)[:] = 9
    assert image.array.ravel().tolist() == [1.0, 2.0]


def test_instances_become_one_class() -> None:
    label = plane([[0, 1, 256, 70000]], np.int32)
    result = prepare_label(label, dimensions=2, classes=2, labels="instances")
    assert result.dtype == np.uint8
    assert result.tolist() == [[0, 1, 1, 1]]


def test_class_indices_stay_and_others_are_refused() -> None:
    label = plane([[0, 2, 1]], np.int32)
    assert prepare_label(label, dimensions=2, classes=3, labels="classes").tolist() == [[0, 2, 1]]
    with pytest.raises(DataError, match="0 to 1, found values from 0 to 2"):
        prepare_label(label, dimensions=2, classes=2, labels="classes")


def test_names_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="intensity"):
        prepared(plane([[1, 2]], np.uint8), "minmax")
    with pytest.raises(ValueError, match="labels"):
        prepare_label(plane([[1]], np.int32), dimensions=2, classes=2, labels="boxes")
    with pytest.raises(ValueError, match="instance labels make 2"):
        prepare_label(plane([[1]], np.int32), dimensions=2, classes=3, labels="instances")
