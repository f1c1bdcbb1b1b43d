"""What a site draws for a round: seeded, complete, and from its own files alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tifffile

from client.datasets import Cancelled, SiteDataset
from common.errors import DataError
from common.learning.model import IGNORED
from common.study import Study

CASES = 6


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
    for index in range(CASES):
        rng = np.random.default_rng(index)
        shape = (20 + index, 40)
        label = np.zeros(shape, np.uint8)
        label[4:12, 5:15] = 1
        tifffile.imwrite(
            tmp_path / "images" / f"{index}.tif", (label * 100 + rng.integers(0, 50, shape)).astype(np.uint8)
        )
        tifffile.imwrite(tmp_path / "labels" / f"{index}.tif", label)
    return tmp_path


def _batches(dataset: tf.data.Dataset) -> list[tuple[np.ndarray, np.ndarray]]:
    return list(dataset.as_numpy_iterator())


def test_a_rounds_batches_are_the_same_bits_whenever_they_are_drawn(
    folder: Path, tiny_study: Callable[..., Study]
) -> None:
    study = tiny_study()
    first = _batches(SiteDataset(study, "alpha", folder).training(3))
    dataset = SiteDataset(study, "alpha", folder)
    _batches(dataset.training(1))
    again = _batches(dataset.training(3))
    assert len(first) == dataset.training_batches == 3
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one[0], two[0])
        np.testing.assert_array_equal(one[1], two[1])


def test_another_round_another_site_another_seed_draw_otherwise(folder: Path, tiny_study: Callable[..., Study]) -> None:
    study = tiny_study()
    base = _batches(SiteDataset(study, "alpha", folder).training(1))[0][0]
    for other in (
        SiteDataset(study, "alpha", folder).training(2),
        SiteDataset(study, "beta", folder).training(1),
        SiteDataset(dataclasses.replace(study, seed=99), "alpha", folder).training(1),
    ):
        assert not np.array_equal(base, _batches(other)[0][0])


def test_every_training_case_is_drawn_once_a_pass(folder: Path, tiny_study: Callable[..., Study]) -> None:
    study = tiny_study()
    study = dataclasses.replace(
        study, training=dataclasses.replace(study.training, patches_per_epoch=None, local_epochs=2)
    )
    dataset = SiteDataset(study, "alpha", folder)
    from client.datasets import Draw

    drawn = [case.name for case in dataset._order(Draw(study.name, study.seed, 1, "alpha"))]
    names = {case.name for case in dataset.training_cases}
    assert len(drawn) == 2 * len(names)
    assert set(drawn[: len(names)]) == set(drawn[len(names) :]) == names


def test_training_and_validation_share_no_case(folder: Path, tiny_study: Callable[..., Study]) -> None:
    dataset = SiteDataset(tiny_study(), "alpha", folder)
    training = {case.name for case in dataset.training_cases}
    validation = {case.name for case in dataset.validation_cases}
    assert not training & validation
    assert len(training | validation) == CASES
    assert validation


def test_validation_covers_every_voxel_once(folder: Path, tiny_study: Callable[..., Study]) -> None:
    dataset = SiteDataset(tiny_study(), "alpha", folder)
    counted = foreground = 0
    for _, labels in _batches(dataset.validation()):
        assert labels.shape == (1, 16, 16)  # the tile, which is the patch where the study names no other
        counted += int((labels != IGNORED).sum())
        foreground += int((labels == 1).sum())
    # Case i has (20 + i) x 40 voxels, 80 of them foreground.
    assert counted == sum((20 + int(case.name.split(".")[0])) * 40 for case in dataset.validation_cases)
    assert foreground == 80 * len(dataset.validation_cases)


def test_a_cancelled_round_ends_its_data_early(folder: Path, tiny_study: Callable[..., Study]) -> None:
    def stop_at_second(index: int) -> None:
        if index == 1:
            raise Cancelled

    assert len(_batches(SiteDataset(tiny_study(), "alpha", folder).training(1, stop_at_second))) == 1


def test_a_case_that_does_not_fit_the_study_is_refused_before_any_training(
    folder: Path, tiny_study: Callable[..., Study]
) -> None:
    tifffile.imwrite(folder / "labels" / "2.tif", np.full((22, 40), 7, np.uint8))
    with pytest.raises(DataError, match="2"):
        SiteDataset(tiny_study(), "alpha", folder)
