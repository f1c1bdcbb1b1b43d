"""HD95 and surface Dice: shapes whose borders are known, SimpleITK, and brute force over the borders' points."""

from __future__ import annotations

import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest
import SimpleITK as sitk
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from common.metrics.surface import SurfaceOverlap, measure_surfaces

Mask = npt.NDArray[np.uint8]


def square(first: int, size: int, shape: tuple[int, ...]) -> Mask:
    mask = np.zeros(shape, np.uint8)
    mask[tuple(slice(first, first + size) for _ in shape)] = 1
    return mask


def test_a_shift_moves_the_border_by_the_spacing_of_its_axis() -> None:
    truth = square(5, 8, (24, 24))
    # Of 4 borders of 8 voxels the two along y stay where they are, the two along x are 2 voxels of 3 mm away.
    shifted = np.roll(truth, 2, axis=1)
    found = measure_surfaces(shifted, truth, 2, spacing=(1.0, 3.0), tolerance=1.0)
    assert found.hd95[0] == pytest.approx(6.0)
    assert 0 < found.overlap.dice()[0] < 1
    along_y = measure_surfaces(np.roll(truth, 2, axis=0), truth, 2, spacing=(1.0, 3.0), tolerance=1.0)
    assert along_y.hd95[0] == pytest.approx(2.0)


def test_surface_dice_counts_length_in_2d() -> None:
    """Two parts of one mask: a square that was found and one that was missed, of 4 and of 8 voxels."""
    there = square(2, 4, (30, 30)) | square(15, 8, (30, 30))
    found = measure_surfaces(square(2, 4, (30, 30)), there, 2, spacing=(1.0, 1.0), tolerance=1.0)
    # The border of a square of n voxels has 4 (n - 1) points of length 1 and a cut corner of sqrt(1/2) at each corner.
    small, large = (4 * (size - 1) + 4 * math.sqrt(0.5) for size in (4, 8))
    assert found.overlap.area[0] == pytest.approx(2 * small + large)
    assert found.overlap.dice()[0] == pytest.approx(2 * small / (2 * small + large))


def test_area_in_3d_goes_by_the_spacing() -> None:
    found = measure_surfaces(*[square(4, 20, (28, 28, 28))] * 2, 2, spacing=(2.0, 1.0, 1.0), tolerance=0.0)
    # Twice (prediction and truth) the box's surface of 40 x 20 x 20, but for its rounded edges.
    assert found.overlap.area[0] == pytest.approx(2 * (4 * 40 * 20 + 2 * 20 * 20), rel=0.05)
    assert found.overlap.dice()[0] == 1 and found.hd95[0] == 0


def test_a_border_at_the_tolerance_is_within_it() -> None:
    truth = square(5, 8, (24, 24))
    spacing = (0.1, float(np.float32(0.1)))  # 3 steps are 0.30000000000000004 and 0.3000000045
    for axis in (0, 1):
        moved = np.roll(truth, 3, axis)
        within, beyond = (measure_surfaces(moved, truth, 2, spacing=spacing, tolerance=at) for at in (0.3, 0.29))
        assert within.overlap.dice()[0] == 1 > beyond.overlap.dice()[0]


def test_empty_masks() -> None:
    nothing, something = np.zeros((6, 8), np.uint8), square(2, 3, (6, 8))
    neither = measure_surfaces(nothing, nothing, 3, spacing=(1.0, 1.0), tolerance=1.0)
    assert np.isnan(neither.hd95).all() and np.isnan(neither.overlap.dice()).all()
    for prediction, truth in ((nothing, something), (something, nothing)):
        one = measure_surfaces(prediction, truth, 3, spacing=(3.0, 4.0), tolerance=1.0)
        assert one.hd95.tolist() == pytest.approx([math.hypot(18, 32), np.nan], nan_ok=True)
        assert one.overlap.dice().tolist() == pytest.approx([0, np.nan], nan_ok=True)


def test_surfaces_of_images_add() -> None:
    there = square(4, 6, (20, 20))
    parts = [measure_surfaces(np.roll(there, by, 0), there, 2, spacing=(1, 1), tolerance=1).overlap for by in (0, 4)]
    total = sum(parts, SurfaceOverlap.zero(2))
    assert total.area[0] == parts[0].area[0] + parts[1].area[0]
    assert parts[1].dice()[0] < total.dice()[0] < parts[0].dice()[0]
    with pytest.raises(ValueError, match="do not add"):
        total + SurfaceOverlap.zero(3)


def test_what_cannot_be_compared_is_refused() -> None:
    mask = square(1, 2, (5, 5))
    for prediction, spacing, tolerance in (
        (mask[1:], (1.0, 1.0), 1.0),
        (mask, (1.0, 1.0, 1.0), 1.0),
        (mask, (1.0, 0.0), 1.0),
        (mask, (1.0, math.nan), 1.0),
        (mask, (1.0, 1.0), -1.0),
    ):
        with pytest.raises(ValueError, match="expected"):
            measure_surfaces(prediction, mask, 2, spacing=spacing, tolerance=tolerance)


def ball(centre: tuple[float, ...], radius: float, shape: tuple[int, ...], spacing: tuple[float, ...]) -> Mask:
    indices = np.stack(np.indices(shape), axis=-1)
    return np.asarray(np.linalg.norm((indices - centre) * spacing, axis=-1) <= radius, np.uint8)


@pytest.mark.parametrize(("shape", "spacing"), [((60, 70), (1.0, 0.7)), ((30, 44, 40), (2.5, 1.0, 1.2))])
def test_against_simpleitk(shape: tuple[int, ...], spacing: tuple[float, ...]) -> None:
    """SimpleITK's borders are voxels, ours lie between them: the percentiles agree to a voxel."""
    middle = tuple(n / 2 for n in shape)
    truth, prediction = ball(middle, 12, shape, spacing), ball(tuple(m + 2 for m in middle), 14, shape, spacing)
    directions = []
    for one, other in ((truth, prediction), (prediction, truth)):
        images = [sitk.GetImageFromArray(mask) for mask in (one, other)]
        for image in images:
            image.SetSpacing(spacing[::-1])
        contour, other_contour = (sitk.LabelContour(image) for image in images)
        distance = sitk.Abs(sitk.SignedMaurerDistanceMap(other_contour, squaredDistance=False, useImageSpacing=True))
        values = sitk.GetArrayFromImage(distance)[sitk.GetArrayFromImage(contour) > 0]
        directions.append(float(np.percentile(values, 95)))
    found = measure_surfaces(prediction, truth, 2, spacing=spacing, tolerance=1.0)
    assert found.hd95[0] == pytest.approx(max(directions), abs=max(spacing))


def border(mask: Mask, spacing: tuple[float, float]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Every point between 2 x 2 voxels that are not all alike, by brute force, and the border's length there."""
    padded = np.pad(mask, 1)
    height, width = spacing
    points, lengths = [], []
    for y, x in itertools.product(range(padded.shape[0] - 1), range(padded.shape[1] - 1)):
        corners = padded[y : y + 2, x : x + 2]
        if corners.sum() in (0, 4):
            continue
        points.append((y * height, x * width))
        if corners.sum() == 2 and corners[0, 0] != corners[1, 1]:  # two side by side: straight through
            lengths.append(height if corners[0, 0] == corners[1, 0] else width)
        else:  # corners are cut off, two of them where the diagonals differ
            lengths.append((1 + (corners.sum() == 2)) * math.hypot(height, width) / 2)
    return np.array(points), np.array(lengths)


masks = arrays.arrays(np.uint8, (7, 6), elements=st.integers(0, 1))


@given(masks, masks, st.sampled_from([(1.0, 1.0), (2.0, 0.7)]), st.sampled_from([0.0, 1.0, 1.5]))
def test_against_brute_force(prediction: Mask, truth: Mask, spacing: tuple[float, float], tolerance: float) -> None:
    found = measure_surfaces(prediction, truth, 2, spacing=spacing, tolerance=tolerance)
    if not prediction.any() or not truth.any():
        return
    (points, lengths), (others, other_lengths) = border(prediction, spacing), border(truth, spacing)
    apart = np.linalg.norm(points[:, np.newaxis] - others[np.newaxis], axis=-1)
    near, other_near = apart.min(axis=1), apart.min(axis=0)
    within = lengths[near <= tolerance + 1e-9].sum() + other_lengths[other_near <= tolerance + 1e-9].sum()
    assert found.overlap.dice()[0] == pytest.approx(within / (lengths.sum() + other_lengths.sum()))
    directions = []
    for distances, weights in ((near, lengths), (other_near, other_lengths)):
        # The least distance within which 95 % of the border's length lies.
        candidates = [at for at in sorted(distances) if weights[distances <= at].sum() >= 0.95 * weights.sum() - 1e-9]
        directions.append(candidates[0])
    assert found.hd95[0] == pytest.approx(max(directions))
