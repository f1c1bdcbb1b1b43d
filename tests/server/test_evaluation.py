"""The holdout: which site a case came from, what counts as a mean, and whole images measured as they are."""

from __future__ import annotations

import asyncio
import csv
import dataclasses
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import tensorflow as tf
import tensorflow_federated as tff
import tifffile

import server.evaluation.holdout
from common.errors import DataError
from common.export.forward import predictor
from common.imaging.sliding_window import Predict
from common.models import build_network, probabilities
from common.study import Study, parse_study
from server.evaluation import Holdout, HoldoutResult, site_of_origin

STUDY = """
study: cells
task: {{dimensions: 2, channels: 1, classes: [{classes}]}}
model: {{filters: 2, depth: 1, head: {head}}}
preprocessing: {{intensity: none, patch: [16, 16]}}
training: {{rounds: 1}}
cohort: {{sites: [north, south, far-north]}}
evaluation: {{overlap: 0.5}}
"""


def study(head: str = "softmax", classes: str = "background, cell, debris") -> Study:
    return parse_study(STUDY.format(head=head, classes=classes))


def write_case(folder: Path, name: str, label: npt.NDArray[np.uint8]) -> None:
    """An image whose grey value gives the class away: 0, 100, 200."""
    for kind, array in (("images", label * 100), ("labels", label)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(folder / kind / f"{name}.tif", array.astype(np.uint8))


def blocks(height: int, width: int) -> npt.NDArray[np.uint8]:
    label = np.zeros((height, width), np.uint8)
    label[: height // 2, : width // 3] = 1
    label[height // 2 :, width // 2 :] = 2
    return label


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_case(tmp_path, "0000-north", blocks(40, 37))  # several tiles
    write_case(tmp_path, "0001-far-north", blocks(9, 40))  # smaller than the tile along one axis
    write_case(tmp_path, "0002-south", np.zeros((16, 16), np.uint8))  # background alone, and a speck of dust
    tifffile.imwrite(tmp_path / "images" / "0002-south.tif", np.eye(16, dtype=np.uint8) * 10)
    write_case(tmp_path, "0003", blocks(12, 12))
    return tmp_path


def perfect(tiles: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """One-hot of the class that the grey value gives away."""
    assert tiles.shape[1:] == (16, 16, 1)
    return np.eye(3, dtype=np.float32)[np.rint(tiles[..., 0] * 2.55).astype(int)]


def evaluate(holdout: Holdout, predict: Predict = perfect, threads: int = 1) -> HoldoutResult:
    return holdout.evaluate(predict, tile=(16, 16), threads=threads)


def test_site_of_origin_is_the_longest_site_that_the_name_ends_with() -> None:
    sites = ("far-north", "north", "south")
    assert site_of_origin("0001-north", sites) == "north"
    assert site_of_origin("0001-far-north", sites) == "far-north"
    assert site_of_origin("0001north", sites) is None
    assert site_of_origin("north", sites) is None
    assert site_of_origin("0001-south-2", sites) is None


def test_perfect_predictor_has_dice_1_wherever_there_is_something_to_find(folder: Path) -> None:
    holdout = Holdout(study(), folder)
    assert holdout.cases == ("0000-north", "0001-far-north", "0002-south", "0003")
    assert holdout.sites == ("north", "far-north", "south", None)
    result = evaluate(holdout)
    np.testing.assert_array_equal(result.dice, [[1, 1], [1, 1], [np.nan, np.nan], [1, 1]])
    np.testing.assert_array_equal(result.iou, result.dice)
    assert result.mean_dice == result.mean_iou == 1.0
    assert result.dice_of_sites["north"] == 1.0
    assert math.isnan(result.dice_of_sites["south"])
    assert result.mean_dice_of_sites == 1.0


def test_dice_of_a_predictor_that_always_says_cell(folder: Path) -> None:
    def cell(tiles: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return np.broadcast_to(np.float32([0.1, 0.8, 0.1]), (*tiles.shape[:-1], 3))

    result = evaluate(Holdout(study(), folder), cell)
    # 0003 is 12 x 12 with 6 x 4 = 24 voxels of cell: tp 24, fp 120, so Dice 48 / 168 and IoU 24 / 144; no debris found.
    np.testing.assert_allclose(result.dice[3], [48 / 168, 0])
    np.testing.assert_allclose(result.iou[3], [24 / 144, 0])
    # There is no cell in 0002, but it was found, and no debris, which was not.
    np.testing.assert_array_equal(result.dice[2], [0, np.nan])
    assert result.dice_of_cases[2] == 0


def test_sigmoid_is_the_best_foreground_class_above_a_half(folder: Path) -> None:
    def foreground(tiles: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        onehot = perfect(tiles)
        # Never above a half where there is background; both above where there is something.
        return np.where(onehot[..., :1] == 1, np.float32(0.5), np.float32(0.6) + onehot[..., 1:] * np.float32(0.3))

    assert evaluate(Holdout(study("sigmoid"), folder), foreground).mean_dice == 1.0


def test_result_does_not_depend_on_threads_or_on_a_fixed_batch(folder: Path) -> None:
    built = study()
    network = build_network(built)
    predict = predictor(built, network, [weight.numpy() for weight in network.initial_weights(1)])
    holdout = Holdout(built, folder)
    alone = evaluate(holdout, predict)
    threaded = evaluate(holdout, predict, threads=3)
    np.testing.assert_array_equal(threaded.dice, alone.dice)
    assert threaded.cases == alone.cases
    fixed = holdout.evaluate(predict, tile=(16, 16), fixed_batch=True, batch_size=3)
    np.testing.assert_allclose(fixed.dice, alone.dice, atol=1e-3)


def test_predictor_is_the_networks_forward_pass(folder: Path) -> None:
    built = study("sigmoid")
    network = build_network(built)
    weights = network.initial_weights(3)
    tiles = np.random.default_rng(0).random((5, 16, 16, 1), np.float32)
    answers = predictor(built, network, [weight.numpy() for weight in weights])(tiles)
    assert answers.shape == (5, 16, 16, 2)
    np.testing.assert_allclose(answers, probabilities(built, network(weights, tf.constant(tiles))), atol=1e-6)


def test_a_study_that_resamples_is_measured_on_the_stored_grid(tmp_path: Path) -> None:
    """At twice the spacing a checkerboard of single pixels is gone: on the coarse grid nothing would be missed."""
    label = np.zeros((16, 16), np.uint8)
    label[::2, ::2] = 1
    label[:4, :4] = 1
    write_case(tmp_path, "0000-north", label)
    coarse = study(classes="background, cell")
    coarse = dataclasses.replace(coarse, preprocessing=dataclasses.replace(coarse.preprocessing, spacing=(2.0, 2.0)))
    holdout = Holdout(coarse, tmp_path)
    case = holdout.load(0)
    assert (case.image.shape, case.label.shape) == ((8, 8, 1), (1, 16, 16))
    every_pixel = holdout.evaluate(
        lambda tiles: np.broadcast_to(np.float32([0, 1]), (*tiles.shape[:-1], 2)), tile=(16, 16)
    )
    foreground = int(label.sum())
    assert every_pixel.mean_dice == pytest.approx(2 * foreground / (foreground + 256))


def test_failure_in_a_case_is_raised(folder: Path) -> None:
    holdout = Holdout(study(), folder)
    (folder / "images" / "0001-far-north.tif").unlink()
    with pytest.raises(DataError, match=r"0001-far-north\.tif"):
        evaluate(holdout, threads=2)


def test_files_that_changed_since_the_start_are_named(folder: Path) -> None:
    holdout = Holdout(study(), folder)
    tifffile.imwrite(folder / "labels" / "0001-far-north.tif", np.zeros((9, 41), np.uint8))
    tifffile.imwrite(folder / "labels" / "0003.tif", np.full((12, 12), 7, np.uint8))
    for case in ("0001-far-north", "0003"):
        with pytest.raises(DataError, match=f"holdout case {case}: "):
            holdout.load(holdout.cases.index(case))


def test_cases_are_kept_in_memory_up_to_a_limit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Holdout(study(), folder).load(3)
    monkeypatch.setattr(server.evaluation.holdout, "_CACHE_BYTES", case.nbytes)
    holdout = Holdout(study(), folder)
    for index in (3, 2):
        holdout.load(index)
    for path in folder.glob("*/000[23]*"):
        path.unlink()
    np.testing.assert_array_equal(holdout.load(3).image, case.image)
    with pytest.raises(DataError, match="0002-south"):
        holdout.load(2)


def test_holdout_that_does_not_fit_the_study_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="expected class indices 0 to 1"):
        Holdout(study(classes="background, cell"), folder)
    with pytest.raises(DataError):
        Holdout(study(), folder / "elsewhere")


def result_of(dice: list[list[float]], sites: list[str | None]) -> HoldoutResult:
    values = np.array(dice)
    cases = tuple(f"{index:02d}" for index in range(len(dice)))
    return HoldoutResult(("cell", "debris"), cases, tuple(sites), values, values / 2)


def test_means_are_over_classes_then_cases_then_sites() -> None:
    nan = math.nan
    result = result_of(
        [[0.5, nan]] * 10 + [[1.0, 0.0], [0.9, 0.7], [nan, nan], [0.0, nan]],
        ["large"] * 10 + ["small"] * 3 + [None],
    )
    # Cases: 10 x 0.5, then 0.5, 0.8, nothing to measure, 0.
    assert result.mean_dice == pytest.approx((5 + 0.5 + 0.8 + 0) / 13)
    assert result.dice_of_sites == pytest.approx({"large": 0.5, "small": 0.65})
    assert result.cases_of_sites == {"large": 10, "small": 3}
    assert result.mean_dice_of_sites == pytest.approx(0.575)
    assert result.mean_dice_of_large_sites == pytest.approx(0.5)
    assert result.dice_of_classes == pytest.approx({"cell": (5 + 1.0 + 0.9 + 0.0) / 13, "debris": 0.35})
    scalars = result.scalars()
    assert list(scalars) == ["dice", "iou", "cases", "dice_of_sites", "dice_of_large_sites", "class", "site", "other"]
    assert scalars["site"]["small"] == pytest.approx({"dice": 0.65, "iou": 0.325, "cases": 3.0})
    assert scalars["class"]["debris"] == pytest.approx({"dice": 0.35, "iou": 0.175})


def test_scalars_leave_out_what_the_holdout_cannot_say() -> None:
    known = result_of([[1.0, 1.0]], ["north"])
    assert list(known.scalars()) == ["dice", "iou", "cases", "dice_of_sites", "class", "site"]
    assert list(result_of([[1.0, 1.0]], [None]).scalars()) == ["dice", "iou", "cases", "class"]


def test_cases_of_no_known_site_are_counted_and_have_figures_of_their_own() -> None:
    scalars = result_of([[1.0, 0.5], [0.5, 0.5], [0.1, 0.3]], ["north", None, None]).scalars()
    assert scalars["cases"] == 3.0
    assert scalars["site"]["north"]["cases"] == 1.0
    # (0.5 + 0.2) / 2; IoU is half of each here.
    assert scalars["other"] == pytest.approx({"dice": 0.35, "iou": 0.175, "cases": 2.0})
    assert math.isnan(result_of([[1.0, 1.0]], ["north"]).mean_dice_of_large_sites)


def test_scalars_are_what_release_managers_take(tmp_path: Path) -> None:
    result = result_of([[0.5, math.nan]], ["north"])
    manager = tff.program.CSVFileReleaseManager(tmp_path / "rounds.csv")
    asyncio.run(manager.release(result.scalars(), 1))
    with (tmp_path / "rounds.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["site/north/dice"]) == 0.5
    assert math.isnan(float(row["class/debris/dice"]))


def test_rows_are_a_case_and_class_each() -> None:
    rows = result_of([[1.0, 0.5], [0.0, 0.25]], ["north", None]).rows()
    assert rows[1] == {"case": "00", "site": "north", "class": "debris", "dice": 0.5, "iou": 0.25}
    assert [(row["case"], row["site"], row["class"]) for row in rows[2:]] == [("01", "", "cell"), ("01", "", "debris")]
