"""All metrics of a holdout: measured where the label lies, by site and class, and told as plain numbers."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from rich.console import Console

import server.evaluation.holdout
from common.imaging.case import Case, Source
from common.imaging.sliding_window import Predict
from common.inference.instances import Splitting, instances_of
from common.inference.prediction import predict_case
from common.metrics.calibration import count_calibration
from common.metrics.instances import match_instances
from common.metrics.overlap import count_overlap
from common.metrics.surface import measure_surfaces
from common.study import Study, parse_study
from server.evaluation import DetailedResult, Holdout
from server.evaluation.detailed import CaseDetail
from server.evaluation.tables import tables

STUDY = """
study: cells
task: {{dimensions: {dimensions}, channels: 1, classes: [background, {classes}], labels: {labels}}}
model: {{filters: 2, depth: 1, head: {head}}}
preprocessing: {{intensity: none, {preprocessing} patch: {tile}}}
training: {{rounds: 1}}
cohort: {{sites: [north, south]}}
evaluation: {{overlap: 0.5, {evaluation}}}
"""
TILES = {2: (16, 16), 3: (4, 16, 16)}


def study(
    dimensions: int = 2,
    classes: str = "cell",
    labels: str = "classes",
    head: str = "softmax",
    preprocessing: str = "",
    evaluation: str = "",
) -> Study:
    text = STUDY.format(
        dimensions=dimensions,
        classes=classes,
        labels=labels,
        head=head,
        preprocessing=preprocessing,
        evaluation=evaluation,
        tile=list(TILES[dimensions]),
    )
    return parse_study(text)


def write_case(folder: Path, name: str, image: npt.NDArray[Any], label: npt.NDArray[Any]) -> None:
    for kind, array in (("images", image), ("labels", label)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(folder / kind / f"{name}.tif", array)


def by_grey(confidence: float, classes: int = 2) -> Predict:
    """The class whose number the grey value is, in steps of 100, with this probability."""

    def predict(tiles: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        onehot = np.eye(classes, dtype=np.float32)[np.rint(tiles[..., 0] * 2.55).astype(int)]
        return onehot * np.float32(confidence) + (1 - onehot) * np.float32((1 - confidence) / (classes - 1))

    return predict


def evaluated(built: Study, folder: Path, predict: Predict) -> DetailedResult:
    return Holdout(built, folder).evaluate_in_detail(predict, tile=TILES[built.task.dimensions], threads=2)


def test_figures_of_a_class_that_is_found_too_large(tmp_path: Path) -> None:
    label = np.zeros((20, 20), np.uint8)
    label[4:12, 4:12] = 1
    found = np.zeros((20, 20), np.uint8)
    found[4:12, 4:14] = 100
    write_case(tmp_path, "0000-north", found, label)
    built = study(classes="cell, debris", evaluation="surface_tolerance: 1.5")
    result = evaluated(built, tmp_path, by_grey(0.9, classes=3))
    part = result.of_sites["north"]
    assert part.of_classes["cell"]["precision"] == pytest.approx(64 / 80)
    assert part.of_classes["cell"]["recall"] == 1
    assert part.of_classes["cell"]["hd95"] == pytest.approx(2.0)
    expected = measure_surfaces(found // 100, label, 3, spacing=(1.0, 1.0), tolerance=1.5).overlap.dice()[0]
    assert part.of_classes["cell"]["surface_dice"] == pytest.approx(expected) and 0 < expected < 1
    # 0.9 sure everywhere, right in 384 of 400 pixels.
    assert part.calibration_error == pytest.approx(384 / 400 - 0.9, abs=1e-6)
    assert all(math.isnan(value) for value in part.of_classes["debris"].values())
    assert part.figures == pytest.approx(part.of_classes["cell"])  # what is nowhere is in no mean
    assert part.instances is None


def test_overlap_is_that_of_a_round(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    for site in ("north", "south"):
        label = rng.integers(0, 2, (24, 19)).astype(np.uint8)
        write_case(tmp_path, f"0-{site}", label * 100 * rng.integers(0, 2, label.shape, np.uint8), label)
    holdout, built = Holdout(study(), tmp_path), study()
    detailed = holdout.evaluate_in_detail(by_grey(0.8), tile=TILES[built.task.dimensions])
    plain = holdout.evaluate(by_grey(0.8), tile=(16, 16))
    np.testing.assert_array_equal(detailed.overlap.dice, plain.dice)
    np.testing.assert_array_equal(detailed.overlap.iou, plain.iou)
    assert detailed.scalars()["dice"] == plain.mean_dice
    assert detailed.scalars()["site"]["south"]["iou"] == plain.iou_of_sites["south"]
    assert detailed.scalars()["dice_of_sites"] == plain.mean_dice_of_sites


@pytest.mark.parametrize("axes", ["RAS", "PIL", "SLA"])
def test_distances_are_in_millimetres_however_a_volume_is_stored(axes: str, tmp_path: Path) -> None:
    """A slab that lies one slice of 3 mm too high; in x and y voxels are 1 mm."""
    label, found = (np.zeros((16, 16, 10), np.uint8) for _ in range(2))
    label[3:12, 3:12, 3:6] = 1
    found[3:12, 3:12, 4:7] = 100
    for kind, array in (("images", found), ("labels", label)):
        (tmp_path / kind).mkdir()
        stored = nibabel.Nifti1Image(array, np.diag([1.0, 1.0, 3.0, 1.0]))
        turn = nibabel.orientations.ornt_transform(
            nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(axes)
        )
        nibabel.save(stored.as_reoriented(turn), tmp_path / kind / "0-north.nii.gz")
    result = evaluated(study(3), tmp_path, by_grey(0.9))
    figures = result.all_cases.figures
    assert figures["hd95"] == pytest.approx(3.0)
    assert figures["dice"] == pytest.approx(2 / 3)


def instance_labels(shape: tuple[int, int] = (32, 40)) -> npt.NDArray[np.uint16]:
    label = np.zeros(shape, np.uint16)
    label[2:12, 2:12] = 300
    label[2:12, 20:34] = 7
    label[18:30, 4:16] = 40_000
    return label


def test_objects_keep_their_stored_numbers_and_are_matched(tmp_path: Path) -> None:
    label = instance_labels()
    image = np.where(label > 0, 100, 0).astype(np.uint8)
    image[18:30, 4:16] = 0  # one is missed
    image[24:30, 24:30] = 100  # one is nothing
    write_case(tmp_path, "0-north", image, label)
    built = study(labels="instances", head="sigmoid")
    case = Holdout(built, tmp_path).load(0)
    assert case.instances is not None and np.array_equal(case.instances[0], label)

    def foreground(tiles: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return np.where(tiles > 0.2, np.float32(0.9), np.float32(0.1))

    result = evaluated(built, tmp_path, foreground)
    counts = result.all_cases.instances
    assert counts is not None and (counts.objects, counts.found) == (3, 3)
    assert counts.average_precision().tolist() == [2 / 4] * 9
    assert counts.tp_of_sizes.tolist() == [0, 2, 0, 0]  # discs of 11.3 and 13.4 pixels
    (row,) = result.rows()
    assert (row["objects"], row["found"], row["ap_50"], row["ap_90"]) == (3, 3, 0.5, 0.5)


def test_objects_are_measured_on_the_stored_grid(tmp_path: Path) -> None:
    """More than 255 objects, found at twice the spacing: each comes back to where it was, with a number of its own."""
    label = np.zeros((160, 160), np.uint16)
    for index in range(400):
        y, x = 8 * (index // 20), 8 * (index % 20)
        label[y : y + 6, x : x + 6] = index + 1
    write_case(tmp_path, "0-north", np.where(label > 0, 100, 0).astype(np.uint8), label)
    built = study(labels="instances", head="sigmoid", preprocessing="spacing: [2.0, 2.0],")

    def foreground(tiles: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return (tiles > 0.2).astype(np.float32)

    # Objects of 3 x 3 voxels are below the least size of the default, so they are told apart by components here.
    with pytest.MonkeyPatch.context() as patch:
        splitting = Splitting(method="components", least_size=0)
        patch.setattr(
            server.evaluation.holdout, "instances_of", lambda p, head, spacing: instances_of(p, head, splitting)
        )
        counts = evaluated(built, tmp_path, foreground).all_cases.instances
    assert counts is not None and counts.objects == counts.found == 400
    assert counts.average_precision()[0] == 1.0


@pytest.mark.parametrize("preprocessing", ["spacing: [1.7, 0.6],", "spacing: [3, 2.4], crop: foreground,"])
def test_what_is_measured_are_the_masks_that_predict_writes(tmp_path: Path, preprocessing: str) -> None:
    label = instance_labels((90, 70))
    image = np.where(label > 0, 120, 0) + np.random.default_rng(3).integers(1, 90, label.shape)
    image[:8], image[80:] = 0, 0
    write_case(tmp_path, "0-north", image.astype(np.uint8), label)
    built = study(labels="instances", head="sigmoid", preprocessing=preprocessing)

    class Model:
        """Stands in for LiteRT."""

        input_shape = output_shape = (1, *TILES[2], 1)

        def __call__(self, tiles: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
            return np.clip(tiles * 1.3, 0, 1)

    case = Case("0-north", "", {"": Source(tmp_path / "images" / "0-north.tif")}, None)
    written = predict_case(Model(), built, case)  # type: ignore[arg-type]
    assert written.objects is not None and written.objects.any()
    (measured,) = evaluated(built, tmp_path, Model()).details
    expected = count_overlap(written.classes.array[0, ..., 0], (label > 0).astype(np.uint8), 2)
    assert [part.tolist() for part in dataclasses.astuple(measured.overlap)] == [
        part.tolist() for part in dataclasses.astuple(expected)
    ]
    assert measured.instances is not None
    objects = match_instances(written.objects[0], label.astype(np.int32))
    assert [part.tolist() for part in dataclasses.astuple(measured.instances)] == [
        part.tolist() for part in dataclasses.astuple(objects)
    ]


def test_where_an_image_is_cropped_no_confidence_is_counted(tmp_path: Path) -> None:
    label = np.zeros((40, 40), np.uint8)
    label[12:28, 12:28] = 1
    write_case(tmp_path, "0-north", label * 100, label)
    result = evaluated(study(preprocessing="crop: foreground,"), tmp_path, by_grey(0.9))
    assert result.details[0].calibration.voxels.sum() < 40 * 40
    assert result.all_cases.figures["dice"] == 1


def test_an_answer_that_depends_on_left_and_right_is_evened_out_by_mirroring(tmp_path: Path) -> None:
    write_case(tmp_path, "0-north", np.eye(16, dtype=np.uint8), np.ones((16, 16), np.uint8))

    def left(tiles: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        answers = np.full(tiles.shape, 0.2, np.float32)
        answers[:, :, :8] = 0.6
        return answers

    # 0.6 at the left alone; on both sides the mean of 0.6 and 0.2, which is background.
    for mirror, recall in (("false", 0.5), ("true", 0.0)):
        built = study(head="sigmoid", evaluation=f"mirror: {mirror}")
        assert evaluated(built, tmp_path, left).all_cases.figures["recall"] == recall
        assert Holdout(built, tmp_path).evaluate(left, tile=(16, 16)).mean_iou == recall
        assert Holdout(built, tmp_path).evaluate(left, tile=(16, 16), mirror=False).mean_iou == 0.5


def detail(found: list[list[int]], truth: list[list[int]], *, objects: bool = True) -> CaseDetail:
    prediction, label = np.array(found), np.array(truth)
    return CaseDetail(
        count_overlap(prediction, label, 2),
        measure_surfaces(prediction, label, 2, spacing=(1.0, 1.0), tolerance=1.0),
        count_calibration(np.full(label.shape, 0.75), prediction == label),
        match_instances(prediction, label) if objects else None,
    )


RIGHT = detail([[1, 0], [0, 0]], [[1, 0], [0, 0]])
WRONG = detail([[0, 0], [0, 1]], [[1, 0], [0, 0]])
EMPTY = detail([[0, 0], [0, 0]], [[0, 0], [0, 0]])


def result_of(details: list[CaseDetail], sites: list[str | None]) -> DetailedResult:
    names = tuple(f"{index:02d}" for index in range(len(details)))
    return DetailedResult(("cell",), names, tuple(sites), tuple(details), 1.0)


def test_sites_others_and_large_sites_are_told_apart() -> None:
    result = result_of([RIGHT] * 9 + [WRONG] + [WRONG] * 3 + [RIGHT], ["north"] * 10 + ["south"] * 3 + [None])
    scalars = result.scalars()
    assert scalars["cases"] == 14 and scalars["dice"] == pytest.approx(10 / 14)
    assert {site: part["cases"] for site, part in scalars["site"].items()} == {"north": 10, "south": 3}
    assert scalars["other"]["dice"] == 1.0
    assert scalars["large_sites"]["sites"] == 1
    assert scalars["large_sites"]["dice"] == scalars["dice_of_large_sites"] == pytest.approx(0.9)
    assert scalars["dice_of_sites"] == pytest.approx(0.45)
    # All objects of a site together: 9 found, 1 missed, 1 surplus. Case by case: 9 ones and a zero.
    north = scalars["site"]["north"]["instances"]
    assert north["ap"]["0.50"] == scalars["large_sites"]["ap"]["0.50"] == pytest.approx(9 / 11)
    assert north["ap_of_cases"]["0.50"] == pytest.approx(0.9)
    # Voxels of a site together: 10 x 4, of which 2 are wrong in one case, with a confidence of 0.75.
    assert scalars["site"]["north"]["ece"] == pytest.approx(38 / 40 - 0.75)


def test_a_miss_costs_and_nothing_to_find_does_not() -> None:
    missed = detail([[0, 0], [0, 0]], [[1, 0], [0, 0]])
    figures = result_of([missed, EMPTY], ["north", "north"]).all_cases.figures
    assert (figures["dice"], figures["recall"], figures["surface_dice"]) == (0, 0, 0)
    assert figures["hd95"] == pytest.approx(math.sqrt(8))  # the image's diagonal
    assert math.isnan(figures["precision"])


def test_scalars_are_json_and_have_none_for_nothing() -> None:
    scalars = result_of([EMPTY], [None]).scalars()
    assert (scalars["dice"], scalars["hd95"], scalars["instances"]["ap"]["0.50"]) == (None, None, None)
    assert "site" not in scalars and "other" not in scalars and "large_sites" not in scalars
    assert json.loads(json.dumps(scalars, allow_nan=False)) == scalars
    assert "instances" not in result_of([detail([[0]], [[0]], objects=False)], ["north"]).scalars()


def test_rows_have_every_case_and_blanks_for_nothing() -> None:
    rows = result_of([RIGHT, EMPTY], ["north", None]).rows()
    assert [(row["case"], row["site"], row["class"]) for row in rows] == [("00", "north", "cell"), ("01", "", "cell")]
    assert (rows[0]["dice"], rows[0]["hd95"], rows[0]["ap_50"]) == (1, 0, 1)
    assert (rows[1]["dice"], rows[1]["hd95"], rows[1]["ap_50"], rows[1]["objects"]) == ("", "", "", 0)
    assert rows[0].keys() == rows[1].keys()


def shown(result: DetailedResult) -> str:
    console = Console(width=140, highlight=False)
    with console.capture() as capture:
        for part in tables(result.scalars()):
            console.print(part)
    return capture.get()


def test_tables_have_a_line_a_site_and_the_mean_of_large_ones() -> None:
    text = shown(result_of([RIGHT] * 10 + [WRONG, EMPTY, EMPTY], ["north"] * 10 + ["[south]", "west", None]))
    lines = [line.split() for line in text.splitlines()]
    assert ["north", "1.000", "1.000", "1.000", "1.000", "0.00", "1.000", "0.2500", "10"] in lines
    assert ["west", "–", "–", "–", "–", "–", "–", "0.2500", "1"] in lines
    assert ["north", *["1.000"] * 9, "10"] in lines
    assert any(line[:1] == ["[south]"] for line in lines) and any(line[:1] == ["other"] for line in lines)
    assert "mean of sites with 10 or more" in text and "1 sites" not in text
    assert "tolerance of surface Dice (1)" in text


def test_tables_of_several_classes_have_a_line_for_each(tmp_path: Path) -> None:
    label = np.zeros((20, 20), np.uint8)
    label[4:12, 4:12] = 1
    write_case(tmp_path, "0-north", label * 100, label)
    text = shown(evaluated(study(classes="cell, debris"), tmp_path, by_grey(0.9, classes=3)))
    lines = [line.split() for line in text.splitlines()]
    assert ["north", "cell", "1.000", "1.000", "1.000", "1.000", "0.00", "1.000"] in lines
    assert ["debris", *["–"] * 6] in lines
    assert "average precision" not in text
