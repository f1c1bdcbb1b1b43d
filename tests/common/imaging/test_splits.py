"""Splits: whole patients, the same ones wherever and in whatever order they are counted."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.imaging.case import Case, Source
from common.imaging.splits import k_folds, split_by_patient, split_cases
from common.study import Evaluation


def case(name: str, patient: str = "") -> Case:
    return Case(name, patient or name, {"": Source(Path(f"{name}.tif"))}, None)


def cases(sizes: list[int]) -> list[Case]:
    """A patient for each size, with as many cases."""
    return [case(f"p{p:02}-{n:02}", f"p{p:02}") for p, size in enumerate(sizes) for n in range(size)]


def names(found: list[Case]) -> list[str]:
    return [one.name for one in found]


PATIENTS = st.lists(st.integers(1, 9), min_size=0, max_size=20)
FRACTION = st.floats(0, 0.99)


@given(PATIENTS, FRACTION, st.integers(0, 2**31 - 1), st.randoms())
def test_the_split_is_a_partition_by_patient_whatever_the_order(sizes, fraction, seed, random) -> None:
    everything = cases(sizes)
    training, validation = split_by_patient(everything, fraction, seed)
    assert sorted(names(training) + names(validation)) == sorted(names(everything))
    assert not {one.patient for one in training} & {one.patient for one in validation}
    assert names(training) == sorted(names(training)) and names(validation) == sorted(names(validation))
    random.shuffle(everything)
    assert split_by_patient(everything, fraction, seed) == (training, validation)


@given(PATIENTS, st.floats(0.001, 0.99), st.integers(0, 1000))
def test_two_patients_are_enough_for_both_sides(sizes, fraction, seed) -> None:
    training, validation = split_by_patient(cases(sizes), fraction, seed)
    assert bool(validation) == (len(sizes) > 1)
    assert bool(training) == bool(sizes)


@given(PATIENTS, FRACTION, st.integers(0, 1000))
def test_no_single_patient_more_or_less_comes_nearer_to_the_fraction(sizes, fraction, seed) -> None:
    everything = cases(sizes)
    training, validation = split_by_patient(everything, fraction, seed)
    patients = {one.patient for one in validation}
    if len(patients) < 2 or len(sizes) - len(patients) < 2:
        return  # the rule that both sides have a patient may decide
    wanted = max(1, int(len(everything) * fraction + 0.5))
    off = abs(len(validation) - wanted)
    for size in (sum(one.patient == patient for one in training) for patient in {one.patient for one in training}):
        assert abs(len(validation) + size - wanted) >= off


@given(st.integers(0, 60), FRACTION, st.integers(0, 2**31 - 1))
def test_with_a_case_a_patient_the_lowest_hashes_of_seed_and_name_validate(count, fraction, seed) -> None:
    everything = [case(f"case{n:03}") for n in range(count)]
    wanted = max(int(count * fraction + 0.5), 1) if fraction > 0 else 0
    wanted = max(min(wanted, count - 1), 0)
    order = sorted(names(everything), key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    assert names(split_by_patient(everything, fraction, seed)[1]) == sorted(order[:wanted])


def test_a_new_case_moves_few_others() -> None:
    before = set(names(split_by_patient(cases([1] * 100), 0.2, seed=7)[1]))
    after = set(names(split_by_patient(cases([1] * 101), 0.2, seed=7)[1]))
    assert len(before ^ after) <= 2
    assert set(names(split_by_patient(cases([1] * 100), 0.2, seed=8)[1])) != before


def test_a_fraction_of_one_or_less_than_none_is_a_mistake_of_the_program() -> None:
    for fraction in (-0.1, 1.0):
        with pytest.raises(ValueError, match="fraction"):
            split_by_patient([], fraction, 0)


@given(st.lists(st.integers(1, 9), min_size=2, max_size=20), st.data(), st.integers(0, 1000))
def test_every_patient_validates_in_exactly_one_fold_of_nearly_equal_size(sizes, data, seed) -> None:
    k = data.draw(st.integers(2, len(sizes)))
    everything = cases(sizes)
    folds = k_folds(everything, k, seed)
    assert len(folds) == k
    assert sorted(name for _, validation in folds for name in names(validation)) == sorted(names(everything))
    for training, validation in folds:
        assert training and validation
        assert sorted(names(training) + names(validation)) == sorted(names(everything))
        assert not {one.patient for one in training} & {one.patient for one in validation}
    lengths = [len(validation) for _, validation in folds]
    assert max(lengths) - min(lengths) <= max(sizes)
    assert k_folds(everything[::-1], k, seed) == folds


@given(st.lists(st.integers(1, 9), max_size=9), st.integers(2, 20), st.integers(0, 1000))
def test_with_more_folds_than_patients_each_validates_in_one_and_none_is_left_without_training(sizes, k, seed) -> None:
    everything = cases(sizes)
    folds = k_folds(everything, k, seed)
    validating = sorted(name for _, validation in folds for name in names(validation))
    assert validating == (sorted(names(everything)) if len(sizes) > 1 else [])
    assert all(bool(training) == bool(sizes) for training, _ in folds)
    assert [bool(validation) for _, validation in folds][: len(sizes)] == [len(sizes) > 1] * min(len(sizes), k)


def test_the_study_divides_by_its_folds_where_it_has_some_and_else_by_its_fraction() -> None:
    everything = cases([1] * 12)
    fraction = Evaluation(validation_fraction=0.25)
    assert split_cases(everything, fraction, 7) == split_by_patient(everything, 0.25, 7)
    folds = [Evaluation(validation_fraction=0.25, folds=3, fold=fold) for fold in range(3)]
    assert [split_cases(everything, one, 7) for one in folds] == k_folds(everything, 3, 7)
    assert split_cases(everything, folds[0], 8) != split_cases(everything, folds[0], 7)


def test_a_single_fold_is_a_mistake_of_the_program() -> None:
    with pytest.raises(ValueError, match="2 folds or more"):
        k_folds(cases([5, 5]), 1, 0)


@pytest.mark.parametrize(
    "evaluation", [Evaluation(validation_fraction=0.3), Evaluation(validation_fraction=0.0, folds=4, fold=1)]
)
def test_independent_sides_of_patients_do_not_move_when_one_is_added(evaluation: Evaluation) -> None:
    everything = cases([1] * 60)
    whole = set(names(split_cases(everything, evaluation, 7, independent=True)[1]))
    assert 8 <= len(whole) <= 26
    for count in range(1, 60):
        training, validation = split_cases(everything[:count], evaluation, 7, independent=True)
        assert set(names(validation)) == whole & set(names(everything[:count]))
        assert len(training) + len(validation) == count
