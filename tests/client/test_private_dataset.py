"""The steps of private training: who takes part, in what, and where the chance comes from."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import numpy as np
import pytest

from client import private_dataset as module
from client.private_dataset import PrivateSiteDataset, SecretDraw
from tests.client.private_site import private_dataset, private_study, write_cases

KEY, OTHER = SecretDraw(b"\x01" * 32), SecretDraw(b"\x02" * 32)
NAMES = ["P1_a", "P1_b", "P2_a", "P3_a", "P3_b", "P3_c"]

Steps = list[tuple[np.ndarray, np.ndarray, np.ndarray]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_cases(tmp_path, NAMES)
    return tmp_path


def _steps(dataset: PrivateSiteDataset, draw: SecretDraw = KEY) -> Steps:
    return list(dataset.private_training(draw).as_numpy_iterator())


def test_a_step_has_the_crops_of_the_patients_who_were_drawn_and_a_seed_of_its_own(folder: Path) -> None:
    study = private_study("epsilon: 8, patients_per_step: 1.5, steps_per_round: 12, crops_per_patient: 2")
    dataset = private_dataset(study, folder, "^(P[0-9]+)_")
    assert list(dataset.patients) == ["P1", "P2", "P3"]
    assert dataset.images_alone == 0
    steps = _steps(dataset)
    assert len(steps) == dataset.training_batches == 12
    for number, (images, labels, seed) in enumerate(steps):
        taking_part = dataset.taking_part(KEY, number)
        assert images.shape == (len(taking_part), 2, 16, 16, 1)
        assert labels.shape == (len(taking_part), 2, 16, 16)
        np.testing.assert_array_equal(seed, KEY.seed("noise", number))
    assert {len(images) for images, _, _ in steps} >= {1, 2}
    assert len({seed.tobytes() for _, _, seed in steps}) == 12


def test_a_step_that_nobody_was_drawn_for_is_there_all_the_same(folder: Path) -> None:
    study = private_study("epsilon: 8, patients_per_step: 1, steps_per_round: 40")
    empty = [step for step in _steps(private_dataset(study, folder)) if not len(step[0])]
    assert 0 < len(empty) < 40
    assert empty[0][0].shape == (0, 1, 16, 16, 1)
    assert empty[0][2].any()


def test_every_patient_is_drawn_by_chance_alone_at_the_rate_that_is_accounted_for(folder: Path) -> None:
    dataset = private_dataset(private_study("epsilon: 8, patients_per_step: 1.5"), folder)  # 6 images, a quarter each
    drawn = np.array([[name in dataset.taking_part(KEY, step) for name in dataset.patients] for step in range(4000)])
    np.testing.assert_allclose(drawn.mean(0), 0.25, atol=0.03)  # 4.4 deviations of 0.0068
    sizes = drawn.sum(1)
    assert sizes.var() == pytest.approx(6 * 0.25 * 0.75, rel=0.1)  # binomial: a fixed batch would have none
    together = (drawn[:, 0] & drawn[:, 1]).mean()
    assert together == pytest.approx(0.0625, abs=0.016)


def test_what_is_drawn_of_a_patient_does_not_depend_on_the_other_patients(folder: Path, tmp_path: Path) -> None:
    study = private_study("epsilon: 8, patients_per_step: 1000, steps_per_round: 3")  # all in every step
    whole = private_dataset(study, folder, "^(P[0-9]+)_")
    part = tmp_path / "part"
    write_cases(part, NAMES[:3])
    fewer = private_dataset(study, part, "^(P[0-9]+)_")
    for (images, _, _), (others, _, _) in zip(_steps(whole), _steps(fewer), strict=True):
        np.testing.assert_array_equal(images[:2], others)


def test_the_same_key_gives_the_same_bits_and_another_one_others(folder: Path) -> None:
    study = private_study("epsilon: 8, patients_per_step: 1000")
    first, again, other = (
        _steps(private_dataset(study, folder), draw) for draw in (KEY, SecretDraw(bytes(KEY.key)), OTHER)
    )
    for one, two, three in zip(first, again, other, strict=True):
        for left, right in zip(one, two, strict=True):
            np.testing.assert_array_equal(left, right)
        assert not np.array_equal(one[0], three[0])
        assert not np.array_equal(one[2], three[2])


def test_no_draw_follows_from_what_the_coordinator_knows(folder: Path) -> None:
    """Another study seed, round or site changes nothing: all of it comes from the key."""
    import dataclasses

    study = private_study("epsilon: 8, patients_per_step: 2")
    other = dataclasses.replace(study, seed=study.seed + 1, name="another")
    first = _steps(private_dataset(study, folder, site="alpha"))
    second = _steps(private_dataset(other, folder, site="beta"))
    for one, two in zip(first, second, strict=True):
        for left, right in zip(one, two, strict=True):
            np.testing.assert_array_equal(left, right)
    assert "Draw(" not in inspect.getsource(module).replace("SecretDraw(", "")
    with pytest.raises(NotImplementedError):
        private_dataset(study, folder).training(1)


def test_the_key_is_shown_nowhere() -> None:
    assert "01" not in repr(KEY)
    assert "01" not in f"{KEY}"


def test_images_without_patients_count_as_patients_and_the_data_set_says_how_many(folder: Path) -> None:
    study = private_study()
    assert private_dataset(study, folder).images_alone == len(NAMES)
    assert len(private_dataset(study, folder).patients) == len(NAMES)


def test_the_digest_tells_which_images_of_which_patients_are_trained_on(folder: Path, tmp_path: Path) -> None:
    study = private_study()
    first = private_dataset(study, folder).digest
    assert private_dataset(study, folder).digest == first
    part = tmp_path / "part"
    write_cases(part, NAMES[:-1])
    assert private_dataset(study, part).digest != first


def test_a_patient_more_moves_no_other_between_training_and_validation(tmp_path: Path) -> None:
    study = private_study("epsilon: 8")
    study = dataclasses.replace(study, evaluation=dataclasses.replace(study.evaluation, validation_fraction=0.3))
    names = [f"p{number}" for number in range(14)]
    sides: dict[str, bool] = {}
    for count in (6, 9, 14):
        folder = tmp_path / str(count)
        write_cases(folder, names[:count])
        dataset = private_dataset(study, folder)
        for training, cases in ((True, dataset.training_cases), (False, dataset.validation_cases)):
            for case in cases:
                assert sides.setdefault(case.patient, training) == training
    assert len(sides) == 14 and not all(sides.values())
