"""Network input from volumes; expected values by hand, and real cases there and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import DataError
from common.imaging.geometry import Orientation, spacing_of
from common.imaging.intensity import box_of, foreground_of
from common.imaging.preprocessing import Prepared, channels_fit, map_label, prepare_case, prepare_image, prepare_label
from common.imaging.readers import read_image, read_label
from common.imaging.volume import Volume, scaling_affine
from common.study import Study, parse_study

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
STUDY = """
study: t
task: {{dimensions: {dimensions}, channels: {channels}, classes: {classes}, labels: {labels}, {task}}}
model: {{filters: 4, depth: 2}}
preprocessing: {{patch: {patch}, {preprocessing}}}
training: {{rounds: 1}}
cohort: {{sites: [alpha]}}
"""


def needs(folder: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not (DATA / folder).is_dir(), reason=f"needs ../shared/data/{folder}")


def study(
    preprocessing: str = "",
    *,
    dimensions: int = 3,
    channels: int = 1,
    classes: str = "[background, tumour]",
    labels: str = "classes",
    task: str = "",
) -> Study:
    return parse_study(
        STUDY.format(
            dimensions=dimensions,
            channels=channels,
            classes=classes,
            labels=labels,
            task=task,
            patch=[16] * dimensions,
            preprocessing=preprocessing,
        )
    )


def placed(array: np.ndarray, spacing: tuple[float, float, float] = (1.0, 1.0, 1.0), origin: float = 7.0) -> Volume:
    """A grey image somewhere in the world of a patient; axes towards RAS."""
    affine = scaling_affine(spacing)
    affine[:3, 3] = origin
    return Volume(array[..., np.newaxis], spacing, affine)


def mirrored(image: Volume) -> Volume:
    """The same image, stored with its first voxel at the left back as DICOM does."""
    turn = Orientation((0, 1, 2), (False, True, True))
    affine = turn.affine(image.affine, image.shape)
    return Volume(turn.apply(image.array), image.spacing, affine)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * float(np.sum(a & b)) / float(a.sum() + b.sum())


def ball(shape: tuple[int, int, int], centre: tuple[float, float, float], radius: float) -> np.ndarray:
    distance = [(i - c) ** 2 for i, c in zip(np.indices(shape), centre, strict=True)]
    return np.sum(distance, axis=0) < radius**2


def volume(array: np.ndarray) -> Volume:
    """Of a file that says nothing of its grid."""
    return Volume(array, (1.0, 1.0, 1.0), np.eye(4), "nothing")


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
    for dtype in (np.uint8, np.uint16):
        most = np.iinfo(dtype).max
        rgb = volume(np.array([most, 0, 0, 0, most, 0, 0, 0, most], dtype).reshape(1, 1, 3, 3))
        assert prepared(rgb, "none", 1)[0, :, 0].tolist() == pytest.approx([0.299, 0.587, 0.114])


@pytest.mark.parametrize("dtype", [np.float32, np.int16, np.int32])
def test_three_channels_that_are_no_colours_never_become_luminance(dtype: type) -> None:
    measured = np.arange(12, dtype=dtype).reshape(1, 2, 2, 3)
    assert not channels_fit(3, 1, dtype) and channels_fit(3, 3, dtype)
    with pytest.raises(DataError, match="expected 1 channel, found 3"):
        prepared(volume(measured), "none", 1)
    with pytest.raises(DataError, match="T2: image: expected 1 channel, found 3"):
        # Laid onto another grid it is float32 whatever it was before.
        prepare_case(
            [placed(np.zeros((1, 2, 3), np.uint8)), Volume(measured, (1.0, 1.0, 1.0), placed(measured[..., 0]).affine)],
            None,
            study(channels=2, task="modalities: [T1, T2]"),
        )


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


# Cases


def test_images_and_labels_are_turned_together_and_come_back_as_stored() -> None:
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    label = (array > 11).astype(np.int32)
    upright = prepare_case([placed(array)], placed(label), study("intensity: none"))
    stored, stored_label = mirrored(placed(array)), mirrored(placed(label))
    prepared = prepare_case([stored], stored_label, study("intensity: none"))
    assert np.array_equal(prepared.image, upright.image)
    assert np.array_equal(prepared.image[..., 0], array)
    assert prepared.label is not None
    assert np.array_equal(prepared.label, label)
    restored = prepared.grid.restore(prepared.label)
    assert np.array_equal(restored.array, stored_label.array)
    assert np.array_equal(restored.affine, stored.affine)


def test_an_image_and_its_label_may_be_stored_in_different_orientations() -> None:
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    prepared = prepare_case([mirrored(placed(array))], placed((array > 11).astype(np.int32)), study("intensity: none"))
    assert prepared.label is not None
    assert np.array_equal(prepared.label, prepared.image[..., 0] > 11)


def test_labels_beside_the_image_are_refused_with_the_distance() -> None:
    image = placed(np.zeros((4, 5, 6)), (3.0, 1.0, 1.0))
    shifted = placed(np.zeros((4, 5, 6), np.int32), (3.0, 1.0, 1.0), origin=8.0)
    with pytest.raises(DataError, match=r"label: .* up to 1\.0 voxels beside it, 1\.73 mm.*Labels are never moved"):
        prepare_case([image], shifted, study())
    with pytest.raises(DataError, match=r"label: .*expected the shape 4 x 5 x 6, found 4 x 5 x 7"):
        prepare_case([image], placed(np.zeros((4, 5, 7), np.int32), (3.0, 1.0, 1.0)), study())


def test_a_tiff_label_without_pixel_size_belongs_to_its_image() -> None:
    image = Volume(np.zeros((1, 8, 8, 1), np.uint8), (1.0, 0.25, 0.25), scaling_affine((1.0, 0.25, 0.25)), "spacing")
    label = plane([[0, 1] * 4] * 8, np.int32)
    prepared = prepare_case([image], label, study("spacing: [0.5, 0.5]", dimensions=2))
    assert prepared.image.shape == (4, 4, 1)
    assert prepared.grid.restore(np.ones((4, 4), np.uint8)).array.all()


def test_label_values_are_mapped_and_others_are_named() -> None:
    image, label = placed(np.zeros((1, 1, 4))), placed(np.array([[[0, 4, 4, 2]]], np.int32))
    prepared = prepare_case([image], label, study(), {4: 1, 2: 0})
    assert prepared.label is not None
    assert prepared.label.ravel().tolist() == [0, 1, 1, 0]
    with pytest.raises(DataError, match="the values 2 are not in the label map"):
        prepare_case([image], label, study(), {4: 1})
    with pytest.raises(DataError, match="expected class indices 0 to 1, found 4 -> 2"):
        prepare_case([image], label, study(), {4: 2, 2: 1})
    with pytest.raises(DataError, match="10 more are not in the label map"):
        map_label(placed(np.arange(1, 21, dtype=np.int32).reshape(1, 1, 20)), {}, 2)
    assert map_label(placed(np.array([[[0, 5]]], np.int32)), {0: 1, 5: 0}, 2).array.ravel().tolist() == [1, 0]


def test_volumes_are_resampled_to_the_spacing_of_the_study() -> None:
    z = np.arange(6, dtype=np.float32)[:, np.newaxis, np.newaxis] * np.ones((1, 8, 8), np.float32)
    label = placed((z > 2).astype(np.int32), (6.5, 1.0, 1.0))
    prepared = prepare_case([placed(z, (6.5, 1.0, 1.0))], label, study("spacing: [3.25, 1.0, 1.0], intensity: none"))
    assert prepared.image.shape == (12, 8, 8, 1)
    assert spacing_of(prepared.grid.affine) == (3.25, 1.0, 1.0)
    # New centres lie a quarter of a slice beside the old ones.
    assert prepared.label is not None
    assert prepared.label[:, 0, 0].tolist() == [0] * 6 + [1] * 6
    assert prepared.image[4:8, 0, 0, 0] == pytest.approx([1.75, 2.25, 2.75, 3.25], abs=0.02)
    assert np.array_equal(prepared.grid.restore(prepared.label).array, label.array)


def test_the_crop_keeps_the_foreground_and_every_labelled_voxel() -> None:
    shape = (20, 40, 50)
    body = ball(shape, (10, 20, 20), 6)
    image = np.where(body, 100.0, 0.0).astype(np.float32)
    image[10, 20, 20] = 0  # a dark hole belongs to the body
    label = np.zeros(shape, np.int32)
    label[9, 19, 22] = 1
    inside = prepare_case([placed(image)], placed(label), study("crop: foreground, intensity: none"))
    # Within 6 of the centre are 11 voxels; the margin is 2 on either side.
    assert inside.image.shape == (15, 15, 15, 1)
    assert inside.grid.crop == ((3, 18), (13, 28), (13, 28))
    label[2, 39, 45] = 1
    outside = prepare_case([placed(image)], placed(label), study("crop: foreground, intensity: none"))
    assert outside.label is not None
    assert outside.label.sum() == 2
    assert outside.grid.crop == ((0, 18), (13, 40), (13, 48))
    assert np.array_equal(outside.grid.restore(outside.label).array[..., 0], label)


@pytest.mark.parametrize("intensity", ["zscore", "foreground_zscore", "percentile"])
def test_a_label_outside_the_foreground_does_not_change_the_image(intensity: str) -> None:
    shape = (10, 30, 30)
    rng = np.random.default_rng(0)
    image = np.where(ball(shape, (5, 10, 10), 5), rng.normal(100, 5, shape), 0).astype(np.float32)
    label = np.zeros(shape, np.int32)
    label[9, 29, 29] = 1
    settings = study(f"crop: foreground, intensity: {intensity}")
    alone, labelled = (prepare_case([placed(image)], given, settings) for given in (None, placed(label)))
    z, y, x = alone.image.shape[:3]
    assert labelled.image.shape[1] > y
    assert np.array_equal(labelled.image[:z, :y, :x], alone.image)


def test_background_is_what_the_border_shows_not_every_dark_voxel() -> None:
    air = np.full((1, 9, 9, 1), -1024, np.int16)
    air[0, 3:6, 3:6] = 40
    air[0, 4, 4] = -1024
    air[0, 0, 0] = 0  # water on the border of a CT is not its background
    body = foreground_of([air])
    assert box_of(body[:, 1:]) == [(0, 1), (2, 5), (3, 6)]
    assert body.sum() == 10
    # A second channel shows more.
    other = np.zeros((1, 9, 9, 1), np.int16)
    other[0, 7, 7] = 1
    assert foreground_of([air, other]).sum() == 11
    assert foreground_of([np.full((1, 3, 3, 1), 5)]).all()


def test_foreground_zscore_measures_the_foreground_and_leaves_the_background_0() -> None:
    image = np.zeros((5, 5, 6), np.float32)
    image[2, 2, 2:4] = (8, 12)  # mean 10, standard deviation 2
    prepared = prepare_case([placed(image)], None, study("intensity: foreground_zscore")).image[..., 0]
    assert prepared[2, 2, 2:4].tolist() == [-1, 1]
    assert np.count_nonzero(prepared) == 2


def test_a_window_of_hounsfield_units_becomes_0_to_1() -> None:
    image = placed(np.array([[[-1024, -160, 40, 240, 3000]]], np.int16))
    prepared = prepare_case([image], None, study("intensity: window, window: [-160, 240]"))
    assert prepared.image.ravel().tolist() == [0, 0, 0.5, 1, 1]
    assert prepared.label is None


MODALITIES = "modalities: [T1, T2, FLAIR], missing_modality: {}"


def test_each_modality_is_a_channel_normalized_by_itself() -> None:
    t1, flair = np.array([[[0.0, 4.0]]], np.float32), np.array([[[100.0, 500.0]]], np.float32)
    settings = study(channels=3, task=MODALITIES.format("zero"))
    prepared = prepare_case([placed(t1), None, placed(flair)], None, settings)
    assert prepared.image[0, 0].tolist() == [[-1, 0, -1], [1, 0, 1]]
    error = study(channels=3, task=MODALITIES.format("error"))
    with pytest.raises(DataError, match=r"^T2: the image is missing"):
        prepare_case([placed(t1), None, placed(flair)], None, error)
    with pytest.raises(DataError, match="T1, T2, FLAIR: the image is missing"):
        prepare_case([None, None, None], None, settings)
    with pytest.raises(ValueError, match="expected an image for each"):
        prepare_case([placed(t1)], None, settings)
    rgba = Volume(np.zeros((1, 1, 2, 4)), (1.0, 1.0, 1.0), placed(t1).affine)
    with pytest.raises(DataError, match="FLAIR: image: expected 1 channel, found 4"):
        prepare_case([placed(t1), None, rgba], None, settings)


def test_a_modality_of_another_matrix_is_laid_onto_the_first_one() -> None:
    settings = study("intensity: none", channels=2, task="modalities: [T1, T2]")
    x = np.arange(12, dtype=np.float32) * np.ones((6, 12, 1), np.float32)
    t1 = placed(x)
    # Every second voxel of the same ramp, stored mirrored.
    t2 = mirrored(placed(np.ascontiguousarray(x[..., ::2]), (1.0, 1.0, 2.0)))
    prepared = prepare_case([t1, t2], placed(np.zeros((6, 12, 12), np.int32)), settings)
    assert prepared.image.shape == (6, 12, 12, 2)
    assert np.allclose(prepared.image[:, :, :11, 0], prepared.image[:, :, :11, 1], atol=1e-5)
    far = placed(np.zeros((6, 12, 12)), origin=16.0)
    with pytest.raises(DataError, match=r"T2: it covers \d+% of T1 .*9\.0 voxels.*at least 50%"):
        prepare_case([t1, far], None, settings)
    with pytest.raises(DataError, match=r"on the grid of T1 .*put the modality first on which it was drawn"):
        prepare_case([t1, t2], placed(np.zeros((6, 12, 6), np.int32), (1.0, 1.0, 2.0)), settings)
    unplaced = [volume(np.zeros((1, size, size, 1))) for size in (8, 9)]
    with pytest.raises(DataError, match="do not say where the images lie"):
        prepare_case(unplaced, None, settings)


def test_without_settings_a_case_is_prepared_as_its_image_and_label_are() -> None:
    rng = np.random.default_rng(0)
    image = volume(rng.integers(0, 255, (1, 9, 8, 3)).astype(np.uint8))
    label = volume(rng.integers(0, 9, (1, 9, 8, 1)).astype(np.int32))
    for channels, intensity in ((3, "zscore"), (1, "percentile"), (3, "none"), (1, "foreground_zscore")):
        settings = study(f"intensity: {intensity}", dimensions=2, channels=channels, labels="instances")
        prepared = prepare_case([image], label, settings)
        assert np.array_equal(prepared.image, prepared_alone(image, channels, intensity))
        assert prepared.label is not None
        assert np.array_equal(prepared.label, label.array[0, ..., 0] > 0)
        assert np.array_equal(prepared.grid.restore(prepared.label).array, label.array > 0)


def prepared_alone(image: Volume, channels: int, intensity: str) -> np.ndarray:
    return prepare_image(image, dimensions=2, channels=channels, intensity=intensity)


def test_a_stack_is_no_plane() -> None:
    with pytest.raises(ValueError, match="2 dimensions"):
        prepare_case([volume(np.zeros((2, 3, 4, 1)))], None, study(dimensions=2))


def test_a_prepared_case_survives_being_taken_apart() -> None:
    settings = study("spacing: [1.0, 0.7, 0.7], crop: foreground")
    image = placed(ball((8, 9, 10), (4, 4, 4), 3).astype(np.float32))
    for label in (None, placed(np.ones((8, 9, 10), np.int32))):
        prepared = prepare_case([image], label, settings)
        arrays, description = prepared.to_parts()
        again = Prepared.from_parts(arrays, json.loads(json.dumps(description)))
        assert np.array_equal(again.image, prepared.image)
        assert again.grid.to_json() == prepared.grid.to_json()
        assert (again.label is None) is (label is None)
    with pytest.raises(ValueError, match="expected an image and perhaps a label"):
        Prepared.from_parts([], description)
    with pytest.raises(ValueError, match="expected float32 of"):
        Prepared.from_parts([arrays[0][1:]], description)


# Real cases there and back. A spacing not coarser than the stored one must keep the label.


def there_and_back(images: list[Volume | None], label: Volume, settings: Study) -> float:
    """The lowest Dice of a class between a stored label and its prepared form restored."""
    prepared = prepare_case(images, label, settings)
    assert prepared.label is not None
    assert np.isfinite(prepared.image).all()
    restored = prepared.grid.restore(prepared.label)
    assert restored.shape == label.shape
    stored = label.array > 0 if settings.task.labels == "instances" else label.array
    return min(
        dice(restored.array == c, stored == c) for c in range(1, len(settings.task.classes)) if np.any(stored == c)
    )


@needs("hippocampus")
@pytest.mark.parametrize("spacing", ["[1.0, 1.0, 1.0]", "[0.8, 0.8, 0.8]", "[0.5, 0.9, 0.7]"])
def test_hippocampus_labels_come_back(spacing: str) -> None:
    settings = study(
        f"spacing: {spacing}, crop: foreground, intensity: foreground_zscore",
        classes="[background, anterior, posterior]",
    )
    for path in sorted(DATA.glob("hippocampus/*range*/images/*.nii.gz"))[::8]:
        label = read_label(path.parents[1] / "labels" / path.name, 3)
        assert there_and_back([read_image(path, 3)], label, settings) >= 0.98, path.name


@needs("nuclei")
def test_nuclei_labels_come_back() -> None:
    settings = study("spacing: [0.8, 0.8], crop: foreground", dimensions=2, channels=3, labels="instances")
    for folder in sorted(DATA.glob("nuclei/*_*/images")):
        for path in sorted(folder.glob("*.tif"))[:2]:
            label = read_label(folder.parent / "labels" / path.name, 2)
            assert there_and_back([read_image(path, 2)], label, settings) >= 0.98, path.name


@needs("brain_tumor_dicom")
@pytest.mark.parametrize("spacing", ["null", "[3.25, 0.6, 0.6]"])
def test_brain_tumour_labels_of_thick_slices_come_back(spacing: str) -> None:
    names = ("T1pre", "T1post", "T2", "FLAIR")
    settings = study(
        f"spacing: {spacing}, crop: foreground, intensity: foreground_zscore",
        channels=4,
        task=f"modalities: [{', '.join(names)}]",
    )
    session = sorted(DATA.glob("brain_tumor_dicom/*/*"))[0]
    series = {name: next(session.glob(f"*-{name}*")) for name in (*names, "MaskTumor")}
    images: list[Any] = [read_image(series[name], 3) for name in names]
    assert images[0].spacing[0] == pytest.approx(6.5, abs=1e-3)
    assert there_and_back(images, read_label(series["MaskTumor"], 3), settings) >= 0.98


@needs("microscopy_3d")
def test_stacks_of_cells_come_back() -> None:
    settings = study("spacing: [1.0, 0.8, 0.8]", labels="instances")
    image, label = (DATA / "microscopy_3d" / name for name in ("rgb_3D_0.tiff", "rgb_3D_0_segm.tiff"))
    assert there_and_back([read_image(image, 3)], read_label(label, 3), settings) >= 0.98


@needs("dicom_seg")
def test_a_ct_series_in_hounsfield_units_is_windowed() -> None:
    series = DATA / "dicom_seg" / "segmentations" / "ct-3slice"
    image = read_image(series, 3)
    prepared = prepare_case([image], None, study("intensity: window, window: [-160, 240]"))
    turned = prepared.grid.orientation.apply(image.array).astype(np.float64)
    assert np.allclose(prepared.image, np.clip((turned + 160) / 400, 0, 1), atol=1e-6)
    assert np.mean((prepared.image > 0) & (prepared.image < 1)) > 0.01
