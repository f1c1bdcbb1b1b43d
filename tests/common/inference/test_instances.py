"""Objects told apart, and their masks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from common.imaging.distance import decode_distance, encode_distance
from common.imaging.readers import read_label
from common.inference.instance_masks import InstanceMask, label_image, label_layers, masks_of
from common.inference.instances import Splitting, instances_of, split
from common.inference.lite import class_indices
from common.metrics.instances import InstanceCounts, match_instances

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
Numbers = npt.NDArray[np.int32]


def two_balls(dimensions: int, radius: float = 8.0, between: int = 14, thick: int = 1) -> Numbers:
    """Two that touch, cut along the plane midway; in 3D along x too, with slices `thick` apart."""
    shape = (40, 60) if dimensions == 2 else (40 // thick, 40, 60)
    grid = np.indices(shape, dtype=np.float32)
    if dimensions == 3:
        grid[0] *= thick
    centre = [20.0] * (dimensions - 1)
    first, second = (
        sum((axis - middle) ** 2 for axis, middle in zip(grid, [*centre, x], strict=True)) for x in (22, 22 + between)
    )
    numbers = np.where(first <= second, 1, 2)
    return np.where(np.minimum(first, second) <= radius**2, numbers, 0).astype(np.int32)


def maps_of(numbers: npt.NDArray[Any], spacing: tuple[float, ...] | None = None) -> npt.NDArray[np.float32]:
    """What a network that makes no error answers with the head "distance"."""
    foreground, distance = decode_distance(encode_distance(numbers, spacing))
    return np.stack([foreground.astype(np.float32), distance], axis=-1)


def agreement(found: Numbers, truth: npt.NDArray[Any]) -> float:
    return float(match_instances(found, truth).average_precision()[0])


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("method", ["distance", "shape", "both"])
def test_two_touching_balls_are_separated(dimensions: int, method: Any) -> None:
    truth = two_balls(dimensions)
    found = instances_of(maps_of(truth), "distance", Splitting(method=method))
    assert found.dtype == np.int32
    assert found.max() == 2
    assert np.mean(found == truth) > 0.999
    assert instances_of(maps_of(truth), "distance", Splitting(method="components")).max() == 1


def test_balls_of_thick_slices_are_separated() -> None:
    truth = two_balls(3, thick=4)
    spacing = (4.0, 1.0, 1.0)
    for method in ("distance", "shape", "both"):
        found = instances_of(maps_of(truth, spacing), "distance", Splitting(method=method), spacing=spacing)  # type: ignore[arg-type]
        assert found.max() == 2
        assert np.mean(found == truth) > 0.99


def test_softmax_and_sigmoid_split_by_shape_unless_told_otherwise() -> None:
    truth = two_balls(2)
    inside = (truth > 0).astype(np.float32)[..., np.newaxis]
    both = np.concatenate([1 - inside, inside], axis=-1)
    assert np.array_equal(instances_of(inside, "sigmoid"), instances_of(both, "softmax"))
    assert instances_of(inside, "sigmoid").max() == 2


def test_the_shape_parts_what_the_predicted_distance_leaves_together() -> None:
    truth = two_balls(2)
    maps = maps_of(truth)
    maps[..., 1] = maps[..., 0]  # a network that saw no valley
    assert instances_of(maps, "distance", Splitting(method="distance")).max() == 1
    assert instances_of(maps, "distance", Splitting(method="both")).max() == 2


def test_a_dent_is_no_border_and_a_valley_is() -> None:
    """Heights along a line: peaks of 1 and 0.8 with a pass at 0.5, which is 0.3 below the lower of the two."""
    depth = np.array([[0.2, 1.0, 0.5, 0.8, 0.3]], np.float32)
    foreground = np.ones(depth.shape, bool)
    assert split(foreground, depth, height=0.31).max() == split(foreground, depth, height=0.31).min()
    parts = split(foreground, depth, height=0.29)
    assert len(np.unique(parts)) == 2
    assert parts[0, 0] == parts[0, 1] != parts[0, 3] == parts[0, 4]


def test_joined_peaks_count_as_the_higher_one() -> None:
    """0.9 and 0.85 are one object (pass 0.8); the pass from it to 1.0 is 0.6: 0.3 below 0.9, though 0.25 below 0.85."""
    depth = np.array([[0.85, 0.8, 0.9, 0.6, 1.0]], np.float32)
    foreground = np.ones(depth.shape, bool)
    assert len(np.unique(split(foreground, depth, height=0.28))) == 2
    assert len(np.unique(split(foreground, depth, height=0.32))) == 1


def test_small_objects_are_left_out_and_numbers_follow_the_first_voxel() -> None:
    inside = np.zeros((6, 12, 1), np.float32)
    inside[2:5, 8:11], inside[3:6, 0:3], inside[0, 5] = 1, 1, 1
    found = instances_of(inside, "sigmoid", least_size=2)
    assert found[3, 9] == 1
    assert found[4, 1] == 2
    assert found.max() == 2
    assert instances_of(inside, "sigmoid", least_size=0)[0, 5] == 1
    assert not instances_of(np.zeros_like(inside), "sigmoid").any()


def test_wrong_outputs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected probabilities \(spatial..., 2\) of the head distance"):
        instances_of(np.zeros((4, 4, 1), np.float32), "distance")
    with pytest.raises(ValueError, match="expected the head distance"):
        instances_of(np.zeros((4, 4, 1), np.float32), "sigmoid", Splitting(method="distance"))
    with pytest.raises(ValueError, match="height"):
        Splitting(method="shape", height=0)


@given(arrays.arrays(np.float32, (6, 7), elements=st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])), st.data())
def test_every_voxel_of_the_foreground_is_in_one_connected_object(depth: npt.NDArray[np.float32], data: Any) -> None:
    from scipy import ndimage

    foreground = data.draw(arrays.arrays(np.bool_, depth.shape))
    found = split(foreground, depth, height=data.draw(st.sampled_from([0.01, 0.3, 0.6])))
    assert np.array_equal(found > 0, foreground)
    for number in np.unique(found[found > 0]):
        assert ndimage.label(found == number)[1] == 1


def test_perfect_maps_of_real_labels_give_the_labels_back() -> None:
    folder = DATA / "nuclei" / "fluo_small" / "labels"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data/nuclei")
    total = InstanceCounts.zero()
    for path in sorted(folder.glob("*.tif"))[:24]:
        truth = read_label(path, 2).array[0, ..., 0]
        total += match_instances(instances_of(maps_of(truth), "distance", least_size=1), truth)
    assert total.objects > 200
    assert total.average_precision()[0] >= 0.95


def test_foreground_alone_is_the_class_of_the_distance_head() -> None:
    probabilities = np.array([[[0.6, 0.1], [0.4, 0.9], [0.5, 0.5]]], np.float32)
    assert class_indices(probabilities, "distance").tolist() == [[1, 0, 0]]


def test_nothing_here_loads_tensorflow() -> None:
    code = "import sys, common.inference.instances, common.inference.instance_masks; print('tensorflow' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


# Masks. ------------------------------------------------------------------------------------------------------------


@given(arrays.arrays(np.int32, arrays.array_shapes(min_dims=2, max_dims=3, max_side=6), elements=st.integers(0, 5)))
def test_a_label_image_goes_to_masks_and_back(labels: Numbers) -> None:
    masks = masks_of(labels)
    assert [mask.number for mask in masks] == [int(n) for n in np.unique(labels) if n]
    assert sum(mask.size for mask in masks) == np.count_nonzero(labels)
    assert np.array_equal(label_image(masks, labels.shape), labels)
    assert np.array_equal(label_layers(masks, labels.shape), labels[np.newaxis])


def test_objects_that_overlap_are_kept_whole_on_layers() -> None:
    large = InstanceMask(1, (0, 0), np.ones((4, 4), np.bool_))
    small = InstanceMask(2, (3, 3), np.ones((2, 2), np.bool_))
    apart = InstanceMask(7, (5, 0), np.ones((1, 2), np.bool_))
    assert [large.overlap(small), small.overlap(large), large.overlap(apart)] == [1, 1, 0]
    layers = label_layers([small, apart, large], (6, 6))
    assert len(layers) == 2
    back = {mask.number: mask for layer in layers for mask in masks_of(layer)}
    for mask in (large, small, apart):
        assert back[mask.number].box == mask.box
        assert np.array_equal(back[mask.number].mask, mask.mask)
    assert label_image([small, large, apart], (6, 6))[3, 3] == 2  # the smaller is not covered


def test_masks_that_do_not_fit_are_refused() -> None:
    mask = InstanceMask(3, (2, 2), np.ones((3, 3), np.bool_))
    with pytest.raises(ValueError, match="object 3: expected it in an image"):
        label_layers([mask], (4, 6))
    with pytest.raises(ValueError, match="different numbers"):
        label_image([mask, mask], (6, 6))
    with pytest.raises(ValueError, match="with a voxel"):
        InstanceMask(1, (0, 0), np.zeros((2, 2), np.bool_))
