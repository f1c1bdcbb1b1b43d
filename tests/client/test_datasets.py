"""What a site draws for a round: seeded, complete, and from its own files alone."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tifffile

from client.case_cache import CaseCache
from client.datasets import Cancelled, SiteDataset
from client.selection import select_folder
from common.errors import DataError
from common.imaging.patches import IGNORED
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


def _dataset(study: Study, site: str, folder: Path) -> SiteDataset:
    return SiteDataset(study, site, select_folder(study, folder))


def _batches(dataset: tf.data.Dataset) -> list[tuple[np.ndarray, np.ndarray]]:
    return list(dataset.as_numpy_iterator())


def test_a_rounds_batches_are_the_same_bits_whenever_they_are_drawn(
    folder: Path, tiny_study: Callable[..., Study]
) -> None:
    study = tiny_study()
    first = _batches(_dataset(study, "alpha", folder).training(3))
    dataset = _dataset(study, "alpha", folder)
    _batches(dataset.training(1))
    again = _batches(dataset.training(3))
    assert len(first) == dataset.training_batches == 3
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one[0], two[0])
        np.testing.assert_array_equal(one[1], two[1])


def test_rounds_that_are_drawn_in_turns_do_not_mix_and_are_let_go(
    folder: Path, tiny_study: Callable[..., Study]
) -> None:
    study = tiny_study()
    alone = [_batches(_dataset(study, "alpha", folder).training(number)) for number in (1, 2)]
    dataset = _dataset(study, "alpha", folder)
    data = [dataset.training(number) for number in (1, 2)]
    in_turns = zip(*(part.as_numpy_iterator() for part in data), strict=True)
    for pair, expected in zip(in_turns, zip(*alone, strict=True), strict=True):
        for (images, labels), (expected_images, expected_labels) in zip(pair, expected, strict=True):
            np.testing.assert_array_equal(images, expected_images)
            np.testing.assert_array_equal(labels, expected_labels)
    del data, in_turns
    gc.collect()
    assert not dataset._rounds


def test_the_last_batch_holds_what_is_left(folder: Path, tiny_study: Callable[..., Study]) -> None:
    study = tiny_study()
    study = dataclasses.replace(
        study, training=dataclasses.replace(study.training, batch_size=3, patches_per_epoch=5, local_epochs=1)
    )
    batches = _batches(_dataset(study, "alpha", folder).training(1))
    assert [(len(images), len(labels)) for images, labels in batches] == [(3, 3), (2, 2)]
    assert all(image.any() for images, _ in batches for image in images)


def test_another_round_another_site_another_seed_draw_otherwise(folder: Path, tiny_study: Callable[..., Study]) -> None:
    study = tiny_study()
    base = _batches(_dataset(study, "alpha", folder).training(1))[0][0]
    for other in (
        _dataset(study, "alpha", folder).training(2),
        _dataset(study, "beta", folder).training(1),
        _dataset(dataclasses.replace(study, seed=99), "alpha", folder).training(1),
    ):
        assert not np.array_equal(base, _batches(other)[0][0])


def test_every_training_case_is_drawn_once_a_pass(folder: Path, tiny_study: Callable[..., Study]) -> None:
    study = tiny_study()
    study = dataclasses.replace(
        study, training=dataclasses.replace(study.training, patches_per_epoch=None, local_epochs=2)
    )
    dataset = _dataset(study, "alpha", folder)
    from client.datasets import Draw

    drawn = [case.name for case in dataset._order(Draw(study.name, study.seed, 1, "alpha"))]
    names = {case.name for case in dataset.training_cases}
    assert len(drawn) == 2 * len(names)
    assert set(drawn[: len(names)]) == set(drawn[len(names) :]) == names


def test_training_and_validation_share_no_case(folder: Path, tiny_study: Callable[..., Study]) -> None:
    dataset = _dataset(tiny_study(), "alpha", folder)
    training = {case.name for case in dataset.training_cases}
    validation = {case.name for case in dataset.validation_cases}
    assert not training & validation
    assert len(training | validation) == CASES
    assert validation


def test_over_the_folds_of_a_study_every_case_validates_once(folder: Path, tiny_study: Callable[..., Study]) -> None:
    study = tiny_study()
    validated: list[str] = []
    for fold in range(3):
        evaluation = dataclasses.replace(study.evaluation, folds=3, fold=fold)
        dataset = _dataset(dataclasses.replace(study, evaluation=evaluation), "alpha", folder)
        validation = {case.name for case in dataset.validation_cases}
        assert not validation & {case.name for case in dataset.training_cases}
        assert (len(validation), len(dataset.training_cases)) == (CASES // 3, CASES - CASES // 3)
        validated += validation
    assert len(set(validated)) == len(validated) == CASES


def test_validation_covers_every_voxel_once(folder: Path, tiny_study: Callable[..., Study]) -> None:
    dataset = _dataset(tiny_study(), "alpha", folder)
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

    assert len(_batches(_dataset(tiny_study(), "alpha", folder).training(1, stop_at_second))) == 1


def test_a_case_that_does_not_fit_the_study_refuses_the_site_that_may_miss_none(
    folder: Path, tiny_study: Callable[..., Study]
) -> None:
    tifffile.imwrite(folder / "labels" / "2.tif", np.full((22, 40), 7, np.uint8))
    with pytest.raises(DataError, match=r"all 6 cases to be sound, found 5(.|\n)*E204 label 2.tif: .* found 7"):
        _dataset(tiny_study(), "alpha", folder)


def test_a_case_that_does_not_fit_is_kept_out_where_enough_are_left(
    folder: Path, tiny_study: Callable[..., Study]
) -> None:
    tifffile.imwrite(folder / "labels" / "2.tif", np.full((22, 40), 7, np.uint8))
    study = tiny_study()
    study = dataclasses.replace(study, cohort=dataclasses.replace(study.cohort, minimum_cases=5))
    cases = select_folder(study, folder)
    dataset = SiteDataset(study, "alpha", cases)
    assert (cases.kept_out, len(dataset.training_cases) + len(dataset.validation_cases)) == (1, 5)
    assert "E204" in [finding.code for finding in cases.findings]


def test_what_is_drawn_does_not_depend_on_the_cache(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, tiny_study: Callable[..., Study]
) -> None:
    study = tiny_study()
    without = _batches(_dataset(study, "alpha", folder).training(1))
    cache = CaseCache(tmp_path_factory.mktemp("cache"), 10**9)
    for _ in ("filled", "used"):
        cached = SiteDataset(study, "alpha", select_folder(study, folder), cache)
        for one, two in zip(without, _batches(cached.training(1)), strict=True):
            np.testing.assert_array_equal(one[0], two[0])
            np.testing.assert_array_equal(one[1], two[1])


def test_a_folder_is_examined_once_by_a_site_that_remembers(
    folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_study: Callable[..., Study],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry = tmp_path_factory.mktemp("work") / "registry.sqlite"
    first = select_folder(tiny_study(), folder, registry)
    monkeypatch.setattr("client.registry.examine_case", None)
    assert select_folder(tiny_study(), folder, registry) == first


def test_files_that_change_while_the_site_runs_end_the_round(folder: Path, tiny_study: Callable[..., Study]) -> None:
    dataset = _dataset(tiny_study(), "alpha", folder)
    for label in (folder / "labels").iterdir():
        tifffile.imwrite(label, np.zeros_like(tifffile.imread(label)))
    assert _batches(dataset.training(1)) == []
    assert dataset.failure is not None
    assert "have changed since they were checked" in str(dataset.failure)


def test_a_modality_that_a_case_lacks_stays_zero_and_the_only_one_is_never_dropped(
    folder: Path, tiny_study: Callable[..., Study]
) -> None:
    study = tiny_study()
    study = dataclasses.replace(
        study,
        task=dataclasses.replace(study.task, channels=2, modalities=("CT", "MR"), missing_modality="zero"),
        training=dataclasses.replace(study.training, modality_dropout=0.9),
    )
    dataset = SiteDataset(study, "alpha", select_folder(tiny_study(), folder))
    images = np.random.default_rng(0).normal(size=(32, 16, 16, 2)).astype(np.float32)
    images[..., 1] = 0
    varied, _ = dataset._vary(images, np.zeros((32, 16, 16), np.uint8), np.array([1, 2], np.int32))
    assert not np.any(varied[..., 1])
    assert np.all(np.any(varied[..., 0], axis=(1, 2)))
