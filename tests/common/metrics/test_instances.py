"""Matched objects: expected values by hand, and brute force over every pair of objects."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from common.metrics.instances import (
    IOU_PERCENTS,
    InstanceCounts,
    equivalent_diameter,
    match_instances,
)

Labels = npt.NDArray[np.int64]


def line(*runs: tuple[int, int]) -> Labels:
    """A row of pixels: (label, length) one after the other."""
    return np.concatenate([np.full(length, label) for label, length in runs])[np.newaxis]


def test_average_precision_of_a_known_pair() -> None:
    truth = line((1, 10), (0, 2), (7, 10), (0, 2), (3, 10), (0, 10))
    found = line((5, 8), (0, 4), (9, 10), (0, 14), (2, 5), (0, 3))
    counts = match_instances(found, truth)
    # 1 and 5: IoU 8/10. 7 and 9: 1. 3 was missed. 2 is nothing.
    assert (counts.objects, counts.found) == (3, 3)
    ap = dict(zip(IOU_PERCENTS, counts.average_precision(), strict=True))
    assert ap[50] == ap[75] == pytest.approx(2 / 4)
    assert ap[80] == ap[90] == pytest.approx(1 / 5)  # 8/10 is not above 0.80


def test_an_iou_of_exactly_the_threshold_is_no_match() -> None:
    halves, whole = line((1, 5), (2, 5)), line((1, 10))
    assert match_instances(halves, whole).tp[0] == 0  # two partners of IoU 1/2 each
    assert match_instances(line((1, 6), (2, 4)), whole).tp.tolist() == [1, 1] + [0] * 7  # 6/10, above 0.55 alone
    assert match_instances(line((1, 7), (0, 3)), whole).tp.tolist() == [1, 1, 1, 1] + [0] * 5  # 7/10


def test_objects_need_not_hang_together_nor_be_numbered_in_order() -> None:
    truth = line((70_000, 3), (0, 2), (70_000, 3))
    assert match_instances(line((2, 3), (0, 2), (2, 3)), truth).average_precision().tolist() == [1.0] * 9
    assert match_instances(line((2, 3), (0, 2), (1, 3)), truth).tp[0] == 0  # 3/6 each


def test_empty_masks() -> None:
    nothing, something = np.zeros((4, 4), int), np.eye(4, dtype=int)
    assert np.isnan(match_instances(nothing, nothing).average_precision()).all()
    assert np.isnan(match_instances(nothing, nothing).f1_of_sizes()).all()
    for prediction, truth in ((nothing, something), (something, nothing)):
        assert match_instances(prediction, truth).average_precision().tolist() == [0.0] * 9
        f1 = match_instances(prediction, truth).f1_of_sizes()
        assert f1.tolist() == pytest.approx([0] + [np.nan] * 3, nan_ok=True)


def disc(canvas: Labels, label: int, corner: int, size: int) -> None:
    canvas[corner : corner + size, :size] = label


def test_f1_by_size_goes_by_the_true_object_and_for_surplus_ones_by_their_own() -> None:
    truth, found = np.zeros((120, 60), int), np.zeros((120, 60), int)
    disc(truth, 1, 0, 5)  # diameter 5.6: found
    disc(found, 1, 0, 5)
    disc(truth, 2, 10, 7)  # 7.9: missed
    disc(truth, 3, 20, 20)  # 22.6: found, as one of 18, 20.3
    disc(found, 3, 20, 18)
    disc(found, 4, 50, 10)  # 11.3: nothing there
    disc(truth, 5, 70, 40)  # 45.1: found too small, 20 x 40, whose diameter is 31.9: IoU 1/2
    found[70:90, :40] = 5
    counts = match_instances(found, truth)
    assert counts.tp_of_sizes.tolist() == [1, 0, 1, 0]
    assert counts.fn_of_sizes.tolist() == [1, 0, 0, 1]
    assert counts.fp_of_sizes.tolist() == [0, 1, 1, 0]
    assert counts.f1_of_sizes().tolist() == pytest.approx([2 / 3, 0, 2 / 3, 0])


def test_size_is_that_of_a_disc_or_a_ball() -> None:
    radius = 12
    for dimensions in (2, 3):
        axes = np.indices([2 * radius + 3] * dimensions) - radius - 1
        shape = np.linalg.norm(axes, axis=0) <= radius
        assert equivalent_diameter(int(shape.sum()), dimensions) == pytest.approx(2 * radius, rel=0.02)
    cube = np.ones((8, 8, 8), int)  # a ball of diameter 9.93, whereas a disc of 512 pixels has 25.5
    assert match_instances(cube, cube).tp_of_sizes.tolist() == [1, 0, 0, 0]
    # 100 pi / 4 = 78.5: 78 pixels are below a diameter of 10, 79 are not.
    for pixels, expected in ((78, [1, 0, 0, 0]), (79, [0, 1, 0, 0])):
        assert match_instances(line((1, pixels)), line((1, pixels))).tp_of_sizes.tolist() == expected


def test_counts_of_images_add() -> None:
    one = match_instances(line((1, 10), (2, 10)), line((1, 10), (2, 10)))
    other = match_instances(line((1, 10), (0, 10)), line((0, 10), (2, 10)))
    total = sum([one, other], InstanceCounts.zero())
    assert total.average_precision()[0] == pytest.approx(2 / 4)
    assert (total.objects, total.found) == (3, 3)
    assert total.tp.dtype == total.fn_of_sizes.dtype == np.int64


def test_what_cannot_be_matched_is_refused() -> None:
    mask = np.zeros((4, 4), int)
    for prediction, truth in ((mask, mask[1:]), (mask[0], mask[0]), (mask.astype(float), mask)):
        with pytest.raises(ValueError, match="expected"):
            match_instances(prediction, truth)


labels = arrays.arrays(np.int64, (6, 7), elements=st.integers(0, 4))


@given(labels, labels)
def test_against_brute_force(prediction: Labels, truth: Labels) -> None:
    counts = match_instances(prediction, truth)
    theirs, ours = ([array == value for value in np.unique(array) if value] for array in (truth, prediction))
    for index, percent in enumerate(IOU_PERCENTS):
        # Sets of pixels, one pair after the other.
        pairs = [
            (row, column)
            for row, one in enumerate(theirs)
            for column, other in enumerate(ours)
            if 100 * int((one & other).sum()) > percent * int((one | other).sum())
        ]
        assert len({row for row, _ in pairs}) == len({column for _, column in pairs}) == len(pairs)  # unique
        tp = len(pairs)
        assert (counts.tp[index], counts.fp[index], counts.fn[index]) == (tp, len(ours) - tp, len(theirs) - tp)
    for part, whole in (
        (counts.tp_of_sizes, counts.tp),
        (counts.fp_of_sizes, counts.fp),
        (counts.fn_of_sizes, counts.fn),
    ):
        assert part.sum() == whole[0]
