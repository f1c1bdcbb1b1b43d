"""Orientation, agreement and resampling of grids, judged by world positions and by SimpleITK."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from common.errors import DataError
from common.imaging.geometry import Orientation, displacement, same_grid, spacing_of, to_ras
from common.imaging.grid import Grid
from common.imaging.resampling import Zoom, lay_onto
from common.imaging.volume import Volume, scaling_affine

shapes = st.tuples(*[st.integers(1, 7)] * 3)
spacings = st.tuples(*[st.floats(0.3, 7.0)] * 3)
angles = st.tuples(*[st.floats(-0.5, 0.5)] * 3)
orientations = st.builds(Orientation, st.permutations((0, 1, 2)).map(tuple), st.tuples(*[st.booleans()] * 3))


def rotation(x: float, y: float, z: float) -> np.ndarray:
    """A rotation by angles in radians, about one axis after the other."""
    result = np.eye(3)
    for (i, j), angle in zip(((1, 2), (0, 2), (0, 1)), (x, y, z), strict=True):
        turn = np.eye(3)
        turn[[i, j], [i, j]] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        result = turn @ result
    return result


def affine_of(
    spacing: tuple[float, ...], turned: tuple[float, ...] = (0, 0, 0), origin: tuple[float, ...] = (0, 0, 0)
) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = rotation(*turned) @ np.diag(spacing[::-1])
    affine[:3, 3] = origin
    return affine


def volume_of(array: np.ndarray, affine: np.ndarray) -> Volume:
    return Volume(array if array.ndim == 4 else array[..., np.newaxis], spacing_of(affine), affine)


def world(volume: Volume) -> np.ndarray:
    """The world position of every voxel, shape (z, y, x, 3)."""
    z, y, x = np.indices(volume.shape, dtype=float)
    return np.stack([x, y, z, np.ones_like(x)], axis=-1) @ volume.affine.T[:, :3]


@st.composite
def numbered_volumes(draw: st.DrawFn) -> Volume:
    """Every voxel has a number of its own; anywhere, at any angle below 30 degrees, in any orientation."""
    shape = draw(shapes)
    turn = draw(orientations)
    origin = draw(st.tuples(*[st.floats(-200, 200)] * 3))
    affine = affine_of(draw(spacings), draw(angles), origin)
    array = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    return volume_of(turn.apply(array), turn.affine(affine, shape))


# Orientation


@given(numbered_volumes())
def test_turning_to_ras_leaves_every_voxel_where_it_is_in_the_world(volume: Volume) -> None:
    turned = to_ras(volume)
    before, after = (v.array[..., 0].argsort(axis=None) for v in (volume, turned))
    places_before, places_after = world(volume).reshape(-1, 3)[before], world(turned).reshape(-1, 3)[after]
    assert np.allclose(places_before, places_after, atol=1e-9)
    # Below 30 degrees about each axis the closest orientation is beyond doubt when turned about one; here it is that no
    # axis points away from its world axis.
    assert np.linalg.det(turned.affine[:3, :3]) > 0
    assert turned.spacing == pytest.approx(spacing_of(turned.affine))


@given(orientations, shapes, spacings)
def test_every_stored_orientation_gives_the_same_volume(turn: Orientation, shape: Any, spacing: Any) -> None:
    upright = volume_of(np.arange(np.prod(shape)).reshape(shape), affine_of(spacing, (0.2, -0.1, 0.1), (5, 6, 7)))
    stored = volume_of(turn.apply(upright.array), turn.affine(upright.affine, upright.shape))
    turned = to_ras(stored)
    assert np.array_equal(turned.array, upright.array)
    assert np.allclose(turned.affine, upright.affine, atol=1e-9)
    assert np.array_equal(turn.undo(turn.apply(upright.array)), upright.array)
    assert turn.shape(upright.shape) == stored.shape


def test_an_upright_volume_is_returned_as_it_is() -> None:
    volume = volume_of(np.zeros((2, 3, 4)), affine_of((1, 2, 3)))
    assert to_ras(volume) is volume


def test_a_left_posterior_superior_volume_is_turned_by_hand() -> None:
    # x to the left, y to the posterior: what DICOM calls upright.
    stored = volume_of(np.arange(6).reshape(1, 2, 3), np.diag([-2.0, -1.0, 1.0, 1.0]))
    turned = to_ras(stored)
    assert turned.array[0, ..., 0].tolist() == [[5, 4, 3], [2, 1, 0]]
    assert turned.affine.tolist() == [[2, 0, 0, -4], [0, 1, 0, -1], [0, 0, 1, 0], [0, 0, 0, 1]]


# Agreement


def test_grids_agree_within_half_a_voxel() -> None:
    a = volume_of(np.zeros((4, 5, 6)), affine_of((3, 1, 1), (0.1, 0.2, 0), (9, 9, 9)))
    for voxels, agree in ((0.4, True), (0.6, False)):
        affine = a.affine.copy()
        affine[:3, 3] += voxels * affine[:3, 2]  # along z, whose voxels are 3 long
        b = volume_of(np.zeros((4, 5, 6)), affine)
        assert displacement(a, b) == pytest.approx((voxels, 3 * voxels))
        assert same_grid(a, b) is agree
    assert same_grid(a, b, tolerance=0.7)
    assert not same_grid(a, volume_of(np.zeros((4, 5, 7)), a.affine))


def test_a_spacing_that_differs_shows_at_the_far_corner() -> None:
    a, b = (volume_of(np.zeros((1, 1, 101)), affine_of((1, 1, x), origin=(1, 1, 1))) for x in (1.0, 1.02))
    assert displacement(a, b) == pytest.approx((2.0, 2.0))


def test_a_mirrored_label_is_not_on_the_grid() -> None:
    image = volume_of(np.zeros((3, 3, 3)), affine_of((1, 1, 1)))
    assert not same_grid(image, volume_of(np.zeros((3, 3, 3)), np.diag([-1.0, 1.0, 1.0, 1.0])))


def test_a_label_that_says_nothing_agrees_with_an_image_without_orientation_alone() -> None:
    silent = replace(volume_of(np.zeros((3, 3, 3)), np.eye(4)), stated="nothing")
    stack = replace(volume_of(np.zeros((3, 3, 3)), scaling_affine((0.5, 0.1, 0.1))), stated="spacing")
    assert same_grid(stack, silent) and same_grid(silent, stack)
    assert not same_grid(stack, replace(silent, stated="spacing")), "a distance of 1 that is stated is a distance"
    assert not same_grid(stack, replace(silent, stated="place")), "and so is the identity of a file that means it"
    assert not same_grid(stack, replace(stack, spacing=(1.0, 0.1, 0.1), affine=scaling_affine((1.0, 0.1, 0.1))))
    assert not same_grid(volume_of(np.zeros((3, 3, 3)), affine_of((0.5, 0.1, 0.1), origin=(40, 0, 0))), silent)


# Resampling


def resample(volume: Volume, spacing: Any, order: int = 3) -> Volume:
    """An image (order 1, linear, or 3, cubic) or a label (0) at another spacing, as preparing resamples it."""
    zoom = Zoom.to_spacing(volume.shape, volume.spacing, spacing)
    if not zoom.changes:
        return volume
    affine = zoom.affine(volume.affine)
    array = zoom.image(volume.array, order) if order else zoom.label(volume.array[..., 0])[..., np.newaxis]
    return Volume(array, spacing_of(affine), affine)


@given(
    st.tuples(*[st.integers(30, 36)] * 3),
    *[st.tuples(*[st.floats(0.8, 1.6)] * 3)] * 2,
    st.sampled_from([1, 3]),
)
def test_a_ramp_has_its_world_values_after_resampling(shape: Any, old: Any, new: Any, order: int) -> None:
    affine = affine_of(old, (0.3, 0.1, -0.2), (10, -20, 30))
    slope = np.array([0.7, -1.3, 2.1])
    volume = volume_of(np.zeros(shape), affine)
    extent = np.abs(rotation(0.3, 0.1, -0.2).T @ slope)  # the ramp's rise along each axis of the grid, x first
    result = resample(volume_of((world(volume) @ slope).astype(np.float32), affine), new, order)
    # Smoothing against aliasing and the spline's border bend the ramp at its ends; a spline's border fades by 0.27 a
    # voxel (the pole of the cubic B-spline).
    ends = [4 * max(n / o, 1) + (5 if order == 3 else 0) for o, n in zip(old, new, strict=True)]
    index = np.linalg.solve(affine, np.c_[world(result).reshape(-1, 3), np.ones(result.array.size)].T)[2::-1].T
    inside = np.all((index >= ends) & (index <= np.array(shape) - 1 - ends), axis=1)
    assert inside.any()
    error = np.abs(result.array.ravel() - world(result).reshape(-1, 3) @ slope)[inside]
    tolerance = 1e-4 + (2e-3 * float(extent @ old[::-1]) if order == 3 else 0)
    assert error.max() < tolerance


def test_a_linear_ramp_is_exact_up_to_the_outermost_centres() -> None:
    volume = volume_of(np.arange(10, dtype=np.float32).reshape(10, 1, 1), affine_of((2, 1, 1)))
    result = resample(volume, (1, 1, 1), 1)
    # Twenty voxels of 1 cover the ten of 2: the first centre lies a quarter of an old voxel before the old one.
    assert result.shape == (20, 1, 1)
    assert result.affine[2, 3] == -0.5
    assert result.array.ravel().tolist() == [0, *np.arange(0.25, 9, 0.5).tolist(), 9]


@given(shapes, spacings, spacings)
def test_the_centre_of_the_field_of_view_and_the_spacing_are_kept(shape: Any, old: Any, new: Any) -> None:
    volume = volume_of(np.zeros(shape), affine_of(old, (0.1, 0.2, 0.3), (1, 2, 3)))
    result = resample(volume, new, 0)
    centres = [world(v).reshape(-1, 3).mean(axis=0) for v in (volume, result)]
    assert np.allclose(*centres, atol=1e-6)
    for before, wanted, after in zip(old, new, result.spacing, strict=True):
        assert after == pytest.approx(before if abs(wanted / before - 1) <= 0.01 else wanted)


def test_spacings_within_1_percent_are_left_as_they_are() -> None:
    volume = volume_of(np.random.default_rng(0).normal(size=(4, 4, 4)), affine_of((1, 1, 1)))
    assert resample(volume, (1.009, 0.995, 1.0)) is volume
    assert resample(volume, (2.0, 0.995, 1.009)).shape == (2, 4, 4)


def test_a_pattern_too_fine_for_the_new_spacing_becomes_grey_instead_of_aliasing() -> None:
    stripes = np.tile(np.array([0, 1], np.float32), 32).reshape(1, 1, 64)
    result = resample(volume_of(stripes, affine_of((1, 1, 1))), (1, 1, 4.5)).array.ravel()
    assert np.abs(result[1:-1] - 0.5).max() < 0.02


def test_splines_stay_within_the_range_of_the_image() -> None:
    edge = np.r_[np.zeros(8), np.ones(8)].astype(np.float32).reshape(16, 1, 1)
    result = resample(volume_of(edge, affine_of((2, 1, 1))), (0.7, 1, 1))
    assert (result.array.min(), result.array.max()) == (0, 1)


def test_labels_keep_their_type_and_values() -> None:
    label = np.array([0, 700, 3], np.int32).reshape(1, 1, 3)
    result = resample(volume_of(label, affine_of((1, 1, 1))), (1, 1, 0.5), 0)
    assert result.array.dtype == np.int32
    assert result.array.ravel().tolist() == [0, 0, 700, 700, 3, 3]


@given(arrays(np.uint8, (5, 6, 7), elements=st.integers(0, 3)), spacings)
def test_linear_labels_hold_no_class_that_was_not_there(label: np.ndarray, new: Any) -> None:
    zoom = Zoom.to_spacing(label.shape, (1, 1, 1), new)
    assert set(np.unique(zoom.label(label, "linear"))) <= set(np.unique(label))


def test_a_linear_label_is_closer_to_the_true_border_than_a_nearest_one() -> None:
    y, x = np.indices((40, 40)) - 19.5
    disc = (np.hypot(y, x) < 15).astype(np.uint8)[np.newaxis]
    zoom = Zoom.to_spacing(disc.shape, (1, 1, 1), (1, 0.25, 0.25))
    fine = np.hypot(*(np.indices((160, 160)) / 4 - 19.875)) < 15
    wrong = {how: int((zoom.label(disc, how)[0] != fine).sum()) for how in ("nearest", "linear")}
    assert wrong["linear"] < wrong["nearest"]


def test_a_spacing_in_the_wrong_unit_is_refused_before_memory_ends() -> None:
    with pytest.raises(DataError, match=r"resampled from 5, 1, 1 to 0\.005, 0\.001, 0\.001 .*unit"):
        resample(volume_of(np.zeros((20, 200, 200)), affine_of((5, 1, 1))), (0.005, 0.001, 0.001))


def test_laying_onto_another_grid_says_what_is_covered() -> None:
    values = np.arange(1, 11, dtype=np.float32).reshape(10, 1, 1)
    volume = volume_of(values, affine_of((1, 1, 1)))
    target = volume_of(np.zeros((8, 1, 1)), affine_of((1, 1, 1), origin=(0, 0, 5.5)))
    laid, covered = lay_onto(volume, target)
    # 5.5 to 8.5 lie between centres, 9.5 on the border of the field of view; beyond it there is the lowest value.
    assert laid.array.ravel().tolist() == [6.5, 7.5, 8.5, 9.5, 10, 1, 1, 1]
    assert covered == 5 / 8
    assert same_grid(laid, target, 0)


# The way back


@given(shapes, spacings, spacings, st.data())
def test_every_restored_voxel_comes_from_the_nearest_prepared_one(shape: Any, old: Any, new: Any, data: Any) -> None:
    turn = data.draw(orientations)
    stored_affine = turn.affine(affine_of(old, (0.1, 0.2, 0.1), (3, 4, 5)), shape)
    stored_shape = turn.shape(shape)
    orientation = Orientation.to_ras(stored_affine)
    zoom = Zoom.to_spacing(shape, old, new)
    crop = []
    for length in zoom.after:
        first = data.draw(st.integers(0, length - 1))
        crop.append((first, data.draw(st.integers(first + 1, length))))
    grid = Grid(3, stored_shape, stored_affine, orientation, zoom, tuple(crop))
    inside = np.ones(grid.shape, np.uint8)
    restored = grid.restore(inside)
    assert restored.shape == stored_shape
    assert restored.affine is stored_affine
    # Where each stored voxel lies on the prepared grid, by the affines alone.
    place = world(restored).reshape(-1, 3)
    index = np.linalg.solve(grid.affine, np.c_[place, np.ones(len(place))].T)[2::-1]
    beyond = np.zeros(len(place))
    for axis, ((first, end), length) in enumerate(zip(crop, zoom.after, strict=True)):
        # Where the crop reaches the border of the field of view, the rest of the stored border belongs to it.
        low = -0.5 - index[axis] if first else -np.inf
        high = index[axis] - (end - first - 0.5) if end < length else -np.inf
        beyond = np.maximum(np.where(beyond == 0, -np.inf, beyond), np.maximum(low, high))
    clear = np.abs(beyond) > 1e-4
    assert np.array_equal(restored.array.ravel()[clear] == 1, (beyond < 0)[clear])


@given(shapes, spacings, orientations)
def test_a_grid_survives_json(shape: Any, spacing: Any, turn: Orientation) -> None:
    affine = affine_of((1.1, 0.7, 0.3), (0.1, 0.2, 0.3), (0.1, 1 / 3, 7e-9))
    zoom = Zoom.to_spacing(turn.shape(shape), (1.1, 0.7, 0.3), spacing)
    grid = Grid(3, shape, affine, turn, zoom, tuple((0, n) for n in zoom.after))
    again = Grid.from_json(json.loads(json.dumps(grid.to_json())))
    assert again.to_json() == grid.to_json()
    assert (again.orientation, again.zoom, again.crop) == (grid.orientation, grid.zoom, grid.crop)
    assert np.array_equal(again.affine, grid.affine)


@pytest.mark.parametrize("key", ["axes", "crop", "scale", "stored_affine", "dimensions"])
def test_a_damaged_description_is_no_grid(key: str) -> None:
    zoom = Zoom((2, 3, 4), (2, 3, 4))
    values = Grid(3, (2, 3, 4), np.eye(4), Orientation(), zoom, ((0, 2), (0, 3), (0, 4))).to_json()
    for wrong in (None, [1], "x"):
        with pytest.raises(ValueError, match=r"."):
            Grid.from_json({**values, key: wrong})
    del values[key]
    with pytest.raises(ValueError, match=key):
        Grid.from_json(values)


def test_probabilities_are_interpolated_before_the_decision() -> None:
    # Two prepared voxels of 4 over eight stored ones; class 1 falls from 0.9 to 0.3 on the way.
    zoom = Zoom.to_spacing((1, 1, 8), (1, 1, 1), (1, 1, 4))
    grid = Grid(2, (1, 1, 8), np.eye(4), Orientation(), zoom, ((0, 1), (0, 1), (0, 2)))
    first = np.array([[0.9, 0.3]], np.float32)
    # Stored voxels lie at -0.375, -0.125, ..., 1.375; class 1 is above 0.5 up to 2 / 3.
    expected = [1, 1, 1, 1, 1, 0, 0, 0]
    softmax = grid.restore_probabilities(np.stack([1 - first, first], axis=-1))
    assert softmax.array.ravel().tolist() == expected
    assert grid.restore_probabilities(first[..., np.newaxis], "sigmoid").array.ravel().tolist() == expected
    assert grid.restore((first > 0.5).astype(np.uint8)).array.ravel().tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="prepared shape"):
        grid.restore(np.zeros((1, 3), np.uint8))


# SimpleITK, which shares no code with the above


@pytest.fixture(scope="module")
def itk() -> ModuleType:
    return pytest.importorskip("SimpleITK")


def itk_image(itk: ModuleType, volume: Volume) -> Any:
    """ITK's world is LPS+: x and y are mirrored."""
    image = itk.GetImageFromArray(np.ascontiguousarray(volume.array[..., 0]).astype(np.float32))
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ volume.affine
    spacing = volume.spacing[::-1]
    image.SetSpacing(spacing)
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    return image


def smooth_image(shape: tuple[int, int, int]) -> np.ndarray:
    from scipy import ndimage

    noise = np.random.default_rng(0).normal(size=shape)
    return ndimage.gaussian_filter(noise, 1.5).astype(np.float32)


@pytest.mark.parametrize("turn", [Orientation(p, f) for p, f in itertools.product(
    itertools.permutations((0, 1, 2)), [(False, False, False), (True, False, True), (False, True, True)])])  # fmt: skip
def test_simpleitk_turns_to_the_same_ras(itk: ModuleType, turn: Orientation) -> None:
    upright = volume_of(smooth_image((5, 7, 9)), affine_of((3, 0.9, 0.8), (0.2, 0.1, -0.3), (-30, 12, 5)))
    stored = volume_of(turn.apply(upright.array), turn.affine(upright.affine, upright.shape))
    if np.linalg.det(stored.affine[:3, :3]) < 0:
        # ITK takes no left-handed direction; the z axis the other way round is the same image right-handed.
        flip = Orientation((0, 1, 2), (True, False, False))
        stored = volume_of(flip.apply(stored.array), flip.affine(stored.affine, stored.shape))
    oracle = itk.DICOMOrient(itk_image(itk, stored), "RAS")
    mine = itk_image(itk, to_ras(stored))
    assert np.array_equal(itk.GetArrayFromImage(oracle), itk.GetArrayFromImage(mine))
    assert oracle.GetOrigin() == pytest.approx(mine.GetOrigin(), abs=1e-6)
    assert oracle.GetDirection() == pytest.approx(mine.GetDirection(), abs=1e-6)


@pytest.mark.parametrize("spacing", [(1.0, 0.8, 0.8), (6.5, 0.45, 0.9), (2.4, 0.5, 0.65)])
@pytest.mark.parametrize("order", [1, 3])
def test_simpleitk_resamples_to_the_same_values(itk: ModuleType, spacing: Any, order: int) -> None:
    volume = volume_of(smooth_image((12, 30, 26)), affine_of((6.5, 1.0, 0.9), (0.2, 0.1, -0.3), (-30, 12, 5)))
    mine = resample(volume, spacing, order)
    interpolator = itk.sitkLinear if order == 1 else itk.sitkBSpline
    target = itk_image(itk, mine)
    # No axis becomes coarser, so nothing is smoothed first.
    assert all(new <= old * 1.01 for new, old in zip(mine.spacing, volume.spacing, strict=True))
    oracle = itk.GetArrayFromImage(itk.Resample(itk_image(itk, volume), target, itk.Transform(), interpolator, np.nan))
    known = np.isfinite(oracle)
    assert known.mean() > 0.9
    # The splines' ranges are clipped here and not there, so the image's own range is the common one.
    oracle = np.clip(oracle, volume.array.min(), volume.array.max())
    # 1e-4 of the range: float32, and ITK ends the spline's prefilter at a tolerance of its own.
    assert np.abs(mine.array[..., 0] - oracle)[known].max() < 1e-4 * np.ptp(volume.array)


def test_simpleitk_lays_onto_another_grid_with_the_same_values(itk: ModuleType) -> None:
    volume = volume_of(smooth_image((14, 22, 24)), affine_of((3, 1.2, 1.1), (0.1, 0.05, -0.1), (-12, -11, -20)))
    target = volume_of(np.zeros((20, 25, 30)), affine_of((1.5, 1, 1), (0.0, 0.1, 0.1), (-14, -10, -12)))
    laid, covered = lay_onto(volume, target)
    moved = itk.Resample(itk_image(itk, volume), itk_image(itk, target), itk.Transform(), itk.sitkLinear, np.nan)
    oracle = itk.GetArrayFromImage(moved)
    known = np.isfinite(oracle)
    assert 0.5 < covered < 1
    assert known.mean() == pytest.approx(covered, abs=1e-3)
    assert np.abs(laid.array[..., 0] - oracle)[known].max() < 1e-4 * np.ptp(volume.array)
