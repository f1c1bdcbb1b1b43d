"""Which updates can never be summed; the bound, and that no honest weighting comes near it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.study import parse_study
from server.plausible import ABSURD, implausible, most_weight, no_shares, norm


def test_the_norm_is_over_all_floating_point_tensors_with_axes() -> None:
    tensors = [np.full(9, 1, np.float32), np.full(4, 2, np.float64), np.full(7, 9, np.int32), np.float32(1e6)]
    assert norm([np.asarray(tensor) for tensor in tensors]) == 5.0  # sqrt(9 + 16)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("size", [1, 2**20, 2**20 + 1])
def test_the_norm_is_exact_for_large_tensors_and_large_values(dtype: type, size: int) -> None:
    assert norm([np.full(size, 2, dtype)]) == pytest.approx(2 * math.sqrt(size), rel=1e-6)
    large = 6e4 if dtype is np.float16 else 3e38
    assert norm([np.full(size, large, dtype)]) == pytest.approx(float(dtype(large)) * math.sqrt(size), rel=1e-6)


@given(
    bad=st.sampled_from([math.nan, math.inf, -math.inf]),
    place=st.integers(0, 2**20 + 4),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
)
def test_one_value_that_is_not_finite_is_found_wherever_it_is(bad: float, place: int, dtype: type) -> None:
    tensor = np.zeros(2**20 + 5, dtype)
    tensor[place] = bad
    assert implausible([np.ones(3, np.float32), tensor], 1.0) == (
        "update: tensor 1 holds values that are not finite (NaN or infinite)"
    )


def test_a_scalar_that_is_not_finite_is_found() -> None:
    assert "tensor 1" in implausible([np.zeros(3, np.float32), np.asarray(math.nan, np.float32)], 1.0)


@pytest.mark.parametrize(("broadcast", "limit"), [(0.0, ABSURD), (0.5, ABSURD), (7.0, 7 * ABSURD)])
def test_the_bound_grows_with_the_broadcast(broadcast: float, limit: float) -> None:
    assert implausible([np.array([limit * 0.999])], broadcast) == ""
    assert "absurd" in implausible([np.array([limit * 1.001])], broadcast)


@given(delta=st.floats(0, 100, width=32), patches=st.integers(1, 10**7))
def test_an_update_weighted_by_many_patches_is_no_outlier(delta: float, patches: int) -> None:
    loss, weight = np.asarray(3.0, np.float32), np.asarray(patches, np.float32)
    update = [loss, np.full(4, delta * patches, np.float32), weight, np.asarray(patches, np.int64)]
    assert implausible(update, 1.0) == ""


def test_a_scalar_before_the_weights_is_no_weight() -> None:
    loss = np.asarray(1e9, np.float32)
    assert "absurd" in implausible([loss, np.full(4, 1e6, np.float32), np.asarray(1, np.float32)], 1.0)


def test_integers_are_not_judged() -> None:
    assert implausible([np.full(4, 2**62, np.int64), np.array([True])], 1.0) == ""


@pytest.mark.parametrize(
    ("update", "most", "refusal"),
    [
        ([np.full(4, 40.0), np.asarray(40.0)], 40.0, ""),
        ([np.full(4, 40.0), np.asarray(41.0)], 40.0, "its weight of 41 is impossible; from 0 to 40 is taken"),
        ([np.full(4, 1e33), np.asarray(1e30)], 40.0, "its weight of 1e+30 is impossible"),
        ([np.full(4, 40.0), np.asarray(-40.0)], 40.0, "its weight of -40 is impossible"),
        ([np.ones(4), np.asarray(1.0), np.ones(4), np.asarray(-1.0)], 1.0, "its weight of -1 is impossible"),
        ([np.ones(4), np.asarray(1e-30)], 40.0, "its norm of 2e+30 is absurd"),  # alone, its mean would be that
        ([np.ones(4), np.asarray(0.0)], 40.0, "its norm of inf is absurd"),
        ([np.zeros(4), np.asarray(0.0)], 40.0, ""),  # what a site sends whose training was not finite
        ([np.ones(4), np.asarray(40.0), np.full(4, 1e9), np.asarray(40.0)], 40.0, "is absurd"),  # each by its own
    ],
)
def test_a_weight_is_no_more_than_the_site_can_have(update: list[Any], most: float, refusal: str) -> None:
    found = implausible([part.astype(np.float32) for part in update], 1.0, most)
    assert (refusal in found) if refusal else found == ""


@pytest.mark.parametrize(
    ("training", "most"),
    [
        ("{rounds: 1}", 7.0),
        ("{rounds: 1, local_epochs: 2}", 14.0),
        ("{rounds: 1, local_epochs: 2, patches_per_epoch: 30}", 60.0),
        ("{rounds: 1, local_epochs: 999998, patches_per_epoch: 999}", 998998016.0),  # float32 of 998998002
        ("{rounds: 1, weighting: equal, patches_per_epoch: 30}", 1.0),
    ],
)
def test_the_most_that_an_update_weighs_is_the_patches_of_its_round(training: str, most: float) -> None:
    study = parse_study(
        f"""
study: weights
seed: 1
task: {{dimensions: 2, channels: 1, classes: [background, cell]}}
model: {{filters: 4, depth: 2}}
preprocessing: {{patch: [16, 16]}}
training: {training}
cohort: {{sites: [alpha], quorum: 1, deadline: 10m}}
"""
    )
    assert most_weight(study, 7) == most


@pytest.mark.parametrize("value", [-0.001, 1.001, 1e30, math.nan])
def test_what_is_no_dice_is_found(value: float) -> None:
    yes = np.asarray(1, np.int32)
    assert no_shares([np.array([0.0, 1.0, 0.5], np.float32), yes]) == ""
    assert "tensor 1" in no_shares([yes, np.array([0.5, value], np.float32)])
    assert "tensor 0" in no_shares([np.asarray(2, np.int32), yes])
