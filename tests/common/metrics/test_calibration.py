"""Expected calibration error by hand, and against the definition, bin by bin."""

from __future__ import annotations

import math

import numpy as np
import pytest

from common.metrics.calibration import BINS, CalibrationCounts, count_calibration, predicted_confidence


def test_error_of_a_known_case() -> None:
    # Two bins of 15: (12/15, 13/15] holds 0.81 and 0.85, of which one is right: |1/2 - 0.83| over 2 of 5 voxels;
    # (14/15, 1] holds three of 0.95, all right: |1 - 0.95| over 3 of 5.
    confidence = np.array([0.81, 0.85, 0.95, 0.95, 0.95])
    correct = np.array([True, False, True, True, True])
    counts = count_calibration(confidence, correct)
    assert counts.voxels[12] == 2 and counts.voxels[14] == 3 and counts.voxels.sum() == 5
    assert counts.error() == pytest.approx(0.4 * 0.33 + 0.6 * 0.05)


def test_against_the_definition() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.random((40, 50)).astype(np.float32)
    correct = rng.random((40, 50)) < confidence**2
    expected = 0.0
    for low in np.arange(BINS) / BINS:
        inside = (confidence > low) & (confidence <= low + 1 / BINS)
        if inside.any():
            expected += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean(dtype=np.float64))
    assert count_calibration(confidence, correct).error() == pytest.approx(expected, abs=1e-6)


def test_an_edge_is_in_the_bin_below_it() -> None:
    counts = count_calibration(np.array([0.0, 1 / BINS, 1.0, 1.00001]), np.ones(4, bool))
    assert counts.voxels.tolist() == [2] + [0] * (BINS - 2) + [2]


def test_counts_of_images_add() -> None:
    rng = np.random.default_rng(1)
    confidence, correct = rng.random(100), rng.random(100) < 0.5
    parts = [count_calibration(confidence[half], correct[half]) for half in (slice(30), slice(30, None))]
    whole = count_calibration(confidence, correct)
    assert sum(parts, CalibrationCounts.zero()).error() == pytest.approx(whole.error())


def test_nothing_has_no_error_and_what_is_no_probability_is_refused() -> None:
    assert math.isnan(CalibrationCounts.zero().error())
    with pytest.raises(ValueError, match="expected 0 to 1"):
        count_calibration(np.array([1.1]), np.array([True]))
    with pytest.raises(ValueError, match="expected 0 to 1"):
        count_calibration(np.array([math.nan]), np.array([True]))
    with pytest.raises(ValueError, match="differ"):
        count_calibration(np.zeros(3), np.zeros(2, bool))


def test_confidence_is_that_of_the_predicted_class() -> None:
    softmax = np.array([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1]], np.float32)
    assert predicted_confidence(softmax, "softmax").tolist() == pytest.approx([0.5, 0.6])
    # Sigmoid: one foreground class above a half; none, so the background with 1 - 0.4.
    sigmoid = np.array([[0.7, 0.9], [0.4, 0.1]], np.float32)
    assert predicted_confidence(sigmoid, "sigmoid").tolist() == pytest.approx([0.9, 0.6])
    assert predicted_confidence(sigmoid, "distance").tolist() == pytest.approx([0.7, 0.6])
