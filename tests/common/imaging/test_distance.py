"""Instance labels as encoded distances; expected values by hand."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import ndimage

from common.imaging.distance import DEEPEST, decode_distance, encode_distance
from common.imaging.preprocessing import prepare_case
from common.imaging.volume import Volume
from common.study import Study, parse_study


def distance_study(preprocessing: str = "intensity: none", dimensions: int = 2) -> Study:
    return parse_study(
        f"""
        study: cells
        task: {{dimensions: {dimensions}, channels: 1, classes: [background, cell], labels: instances}}
        model: {{filters: 4, depth: 2, head: distance}}
        preprocessing: {{patch: {[16] * dimensions}, {preprocessing}}}
        training: {{rounds: 1, client_optimizer: {{name: sgd, learning_rate: 1e-2}}}}
        cohort: {{sites: [alpha]}}
        """
    )


def test_depth_grows_from_1_at_the_border_to_254() -> None:
    line = np.array(
        [[0, 0, 0, 0, 0, 0, 0], [0, 7, 7, 7, 7, 7, 0], [0, 7, 7, 7, 7, 7, 0], [0, 7, 7, 7, 7, 7, 0], [0] * 7]
    )
    # Distances to the nearest voxel outside are 1 along the rim and 2 in the three middle voxels; 1 + 253 / 2 = 127.5,
    # which rounds to 126 + 1: `rint` goes to the even of 126.5.
    assert encode_distance(line).tolist() == [
        [0] * 7,
        [0, 127, 127, 127, 127, 127, 0],
        [0, 127, 254, 254, 254, 127, 0],
        [0, 127, 127, 127, 127, 127, 0],
        [0] * 7,
    ]


def test_where_two_objects_touch_is_a_border_of_both() -> None:
    row = np.array([[1] * 5 + [2] * 5])
    # The image's border is none, so 1 is deepest at its left end: 5 steps from 2; in fifths of 253, plus 1.
    expected = [254, 203, 153, 102, 52]
    assert encode_distance(row).tolist() == [expected + expected[::-1]]


def test_spacing_counts_along_its_own_axis() -> None:
    numbers = np.zeros((5, 9, 9), np.uint16)
    numbers[1:4, 1:8, 1:8] = 300
    even, thick = encode_distance(numbers), encode_distance(numbers, (10.0, 1.0, 1.0))
    # Evenly spaced, the middle is 2 from above and below. With thick slices it is 4 from the sides, 20 from above.
    assert even[2, 2:7, 2:7].min() == even[2].max() == DEEPEST
    assert even[1, 4, 4] == 127
    assert [thick[1, 4, 4], thick[2, 4, 4], thick[2, 4, 1]] == [254, 254, 1 + round(253 / 4)]


def test_what_is_no_object_and_what_fills_the_image() -> None:
    assert not encode_distance(np.array([[0, -3], [0, 0]])).any()
    assert (encode_distance(np.full((3, 4), 9)) == DEEPEST).all()


def test_numbers_may_be_as_large_as_files_have_them() -> None:
    numbers = np.array([[2**31 - 1, 2**31 - 1, 0, 70_000]])
    assert np.array_equal(encode_distance(numbers), encode_distance(np.array([[1, 1, 0, 2]])))


@given(arrays.arrays(np.int32, arrays.array_shapes(min_dims=2, max_dims=3, max_side=8), elements=st.integers(0, 4)))
def test_decoding_gives_each_object_its_distance_over_its_largest(numbers: npt.NDArray[np.int32]) -> None:
    spacing = (3.0, 1.0, 0.5)[: numbers.ndim]
    foreground, distance = decode_distance(encode_distance(numbers, spacing))
    assert np.array_equal(foreground, numbers > 0)
    for number in np.unique(numbers[numbers > 0]):
        inside = numbers == number
        if inside.all():
            expected = np.ones(numbers.shape)
        else:
            depth = ndimage.distance_transform_edt(inside, sampling=spacing)  # of the whole image, not of a box
            expected = depth / depth.max()
        assert np.abs(distance[inside] - expected[inside]).max() <= 0.5 / (DEEPEST - 1) + 1e-6


def test_ignored_voxels_are_not_foreground() -> None:
    foreground, distance = decode_distance(np.array([0, 1, 254, 255], np.uint8))
    assert foreground.tolist() == [False, True, True, False]
    assert distance.tolist() == [0, 0, 1, 0]


def volume(array: npt.ArrayLike, spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> Volume:
    """Of shape (z, y, x), one channel."""
    values = np.asarray(array)[..., np.newaxis]
    return Volume(values, spacing, np.diag([*spacing[::-1], 1.0]))


def test_a_case_is_prepared_with_the_distance_of_its_stored_grid() -> None:
    numbers = np.zeros((1, 8, 8), np.int32)
    numbers[0, 1:7, 1:4], numbers[0, 1:7, 4:7] = 5, 9
    image = volume(numbers.astype(np.float32))
    prepared = prepare_case([image], volume(numbers), distance_study())
    assert prepared.label is not None
    assert np.array_equal(prepared.label, encode_distance(numbers[0]))
    fine = prepare_case([image], volume(numbers), distance_study("spacing: [0.5, 0.5], label_interpolation: linear"))
    assert fine.label is not None
    assert fine.label.shape == (16, 16)
    assert set(np.unique(fine.label)) == set(np.unique(prepared.label))


def test_distances_go_by_the_spacing_of_the_turned_volume() -> None:
    numbers = np.zeros((5, 9, 9), np.int32)
    numbers[1:4, 1:8, 1:8] = 1
    spacing = (10.0, 1.0, 1.0)
    case = volume(numbers.astype(np.float32), spacing)
    prepared = prepare_case([case], volume(numbers, spacing), distance_study(dimensions=3))
    assert prepared.label is not None
    assert np.array_equal(prepared.label, encode_distance(numbers, spacing))


def test_a_label_map_chooses_objects_and_keeps_them_apart() -> None:
    numbers = np.array([[[1, 1, 2, 2, 3, 3, 0, 0]] * 8], np.int32)
    prepared = prepare_case([volume(numbers.astype(np.float32))], volume(numbers), distance_study(), {1: 1, 2: 1, 3: 0})
    assert prepared.label is not None
    assert np.array_equal(prepared.label, encode_distance(np.where(numbers == 3, 0, numbers)[0]))
