"""Dice, IoU, precision and recall; expected values by hand, and SimpleITK's."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk

from common.metrics.overlap import OverlapCounts, count_overlap

TRUTH = np.array([[0, 1, 1, 1], [2, 2, 0, 0]], np.uint8)
PREDICTION = np.array([[1, 1, 1, 0], [2, 1, 0, 0]], np.uint8)
# class 1: predicted at 4 voxels, true at 3, both at 2; class 2: predicted at 1, true at 2, both at 1


def test_counts_of_a_known_pair() -> None:
    counts = count_overlap(PREDICTION, TRUTH, 3)
    assert (counts.tp.tolist(), counts.fp.tolist(), counts.fn.tolist()) == ([2, 1], [2, 0], [1, 1])


def test_dice_and_iou_of_a_known_pair() -> None:
    counts = count_overlap(PREDICTION, TRUTH, 3)
    assert counts.dice().tolist() == pytest.approx([4 / 7, 2 / 3])
    assert counts.iou().tolist() == pytest.approx([2 / 5, 1 / 2])


def test_empty_classes() -> None:
    prediction, truth = np.array([0, 1, 2]), np.array([0, 1, 0])
    # class 1 agrees, class 2 is predicted only, class 3 is nowhere; then class 2 is true only.
    assert count_overlap(prediction, truth, 4).dice().tolist() == pytest.approx([1, 0, np.nan], nan_ok=True)
    assert count_overlap(prediction, truth, 4).iou().tolist() == pytest.approx([1, 0, np.nan], nan_ok=True)
    assert count_overlap(truth, prediction, 4).dice().tolist() == pytest.approx([1, 0, np.nan], nan_ok=True)


def test_counts_of_parts_add_up_to_the_counts_of_the_whole() -> None:
    rows = [count_overlap(p, t, 3) for p, t in zip(PREDICTION, TRUTH, strict=True)]
    total = sum(rows, OverlapCounts.zero(3))
    whole = count_overlap(PREDICTION, TRUTH, 3)
    for name in ("tp", "fp", "fn"):
        assert np.array_equal(getattr(total, name), getattr(whole, name))
        assert getattr(total, name).dtype == np.int64


def test_counts_of_different_classes_do_not_add() -> None:
    with pytest.raises(ValueError, match="do not add"):
        OverlapCounts.zero(2) + OverlapCounts.zero(3)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        count_overlap(PREDICTION, TRUTH[0], 3)
    with pytest.raises(ValueError, match="truth: expected 0 to 1, found 0 to 2"):
        count_overlap(np.zeros_like(TRUTH), TRUTH, 2)
    with pytest.raises(ValueError, match="prediction: expected integers"):
        count_overlap(PREDICTION.astype(np.float32), TRUTH, 3)


def test_precision_and_recall_of_a_known_pair() -> None:
    counts = count_overlap(PREDICTION, TRUTH, 3)
    assert counts.precision().tolist() == pytest.approx([2 / 4, 1 / 1])
    assert counts.recall().tolist() == pytest.approx([2 / 3, 1 / 2])


def test_precision_needs_something_found_and_recall_something_there() -> None:
    prediction, truth = np.array([0, 1, 2]), np.array([0, 1, 0])
    # class 2 is predicted only, class 3 is nowhere; then class 2 is true only.
    assert count_overlap(prediction, truth, 4).precision().tolist() == pytest.approx([1, 0, np.nan], nan_ok=True)
    assert count_overlap(prediction, truth, 4).recall().tolist() == pytest.approx([1, np.nan, np.nan], nan_ok=True)
    assert count_overlap(truth, prediction, 4).precision().tolist() == pytest.approx([1, np.nan, np.nan], nan_ok=True)
    assert count_overlap(truth, prediction, 4).recall().tolist() == pytest.approx([1, 0, np.nan], nan_ok=True)


def test_overlap_against_simpleitk() -> None:
    rng = np.random.default_rng(2)
    prediction, truth = (rng.integers(0, 3, (5, 12, 9)).astype(np.uint8) for _ in range(2))
    counts = count_overlap(prediction, truth, 3)
    measures = sitk.LabelOverlapMeasuresImageFilter()
    measures.Execute(sitk.GetImageFromArray(prediction), sitk.GetImageFromArray(truth))  # (source, target)
    for index in (0, 1):
        assert counts.dice()[index] == pytest.approx(measures.GetDiceCoefficient(index + 1))
        assert counts.iou()[index] == pytest.approx(measures.GetJaccardCoefficient(index + 1))
        assert 1 - counts.recall()[index] == pytest.approx(measures.GetFalseNegativeError(index + 1))
        assert 1 - counts.precision()[index] == pytest.approx(measures.GetFalseDiscoveryRate(index + 1))
