"""`wardround-site predict`, as it is typed: what it writes, says, refuses, and with which exit code it ends."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import highdicom
import imagecodecs
import nibabel
import numpy as np
import pytest
import tifffile
from pydicom.dataset import Dataset

import client.predict
from client.cli import main
from common.errors import DataError, UsageError
from common.imaging.case import Case, Source
from common.imaging.loading import load_case
from common.imaging.readers import read_image, read_label
from common.imaging.sliding_window import predict_tiled
from common.inference.lite import LiteModel, class_indices
from common.inference.published import open_published
from common.study import parse_study
from tests.common.imaging import conftest as imaging
from tests.common.inference.published_version import sign
from tests.signers import AUTHORITIES, coordinator_of, identities, site_of

write_series = imaging.write_series

STUDY = """
study: {name}
task: {{dimensions: {dimensions}, channels: {channels}, classes: [background, {classes}], labels: {labels},
  modalities: [{modalities}]}}
model: {{filters: 2, depth: 1, head: {head}}}
preprocessing: {{patch: {patch}}}
augmentation: [{augmentation}]
training: {{rounds: 1}}
cohort: {{sites: [north]}}
publishing: {{variants: [float32]}}
"""
AFFINE = np.array([[-1.5, 0, 0, 40], [0, 2, 0, -30], [0, 0, 3, 7], [0, 0, 0, 1.0]])


def publish_untrained(folder: Path, **values: object) -> Path:
    from common.models import build_network
    from server.publishing import publish
    from server.publishing.provenance import Provenance

    study = parse_study(STUDY.format(**values))
    weights = [weight.numpy() for weight in build_network(study).initial_weights(3)]
    folder.mkdir()
    provenance = Provenance(signer=coordinator_of(study.name))
    publish(study, weights, None, folder / "v1", details={"round": 1}, provenance=provenance)
    return folder / "v1"


@pytest.fixture(autouse=True)
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hospital trusts the authorities of the studies here."""
    monkeypatch.setenv("WARDROUND_AUTHORITY", str(AUTHORITIES))


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory, tensorflow: None) -> Path:
    """Instances in planes."""
    return publish_untrained(
        tmp_path_factory.mktemp("cells") / "published",
        name="cells", dimensions=2, channels=1, classes="cell", labels="instances", modalities="", head="sigmoid",
        patch=[32, 32], augmentation="flip",
    )  # fmt: skip


@pytest.fixture(scope="module")
def organs(tmp_path_factory: pytest.TempPathFactory, tensorflow: None) -> Path:
    """Two classes in volumes."""
    return publish_untrained(
        tmp_path_factory.mktemp("organs") / "published",
        name="organs", dimensions=3, channels=1, classes="liver, tumour", labels="classes", modalities="",
        head="softmax", patch=[8, 16, 16], augmentation="rotate",
    )  # fmt: skip


@pytest.fixture(scope="module")
def brain(tmp_path_factory: pytest.TempPathFactory, tensorflow: None) -> Path:
    """Two modalities."""
    return publish_untrained(
        tmp_path_factory.mktemp("brain") / "published",
        name="brain", dimensions=3, channels=2, classes="tumour", labels="classes", modalities="T1post, FLAIR",
        head="sigmoid", patch=[4, 16, 16], augmentation="",
    )  # fmt: skip


def plane(path: Path, seed: int = 0, **options: object) -> Path:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 200, (50, 70), np.uint8)
    tifffile.imwrite(path, image, **options)  # type: ignore[arg-type]
    return path


def volume(path: Path, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    nibabel.save(nibabel.Nifti1Image(rng.integers(0, 200, (20, 24, 10)).astype(np.int16), AFFINE), path)
    return path


def expected(model: Path, *images: Path) -> np.ndarray:
    """Computed as a whole: float probabilities of all of the prepared image."""
    published = open_published(model)
    study = published.study
    sources = dict(zip(study.task.modalities or ("",), map(Source, images), strict=True))
    prepared = load_case(Case("a", "", sources, None), study)
    tile = study.publishing.tile
    found = predict_tiled(LiteModel(published.file), prepared.image, tile, study.evaluation.overlap, 1)
    return prepared.grid.restore(class_indices(found, study.model.head)).array[..., 0]


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "measurements.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_tiff_becomes_a_tiff(cells: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = plane(tmp_path / "slide.7.tif", resolution=(20000, 20000), resolutionunit=3)
    out = tmp_path / "out"
    assert (
        main(["predict", str(cells), str(image), "--out", str(out), "--instances", "--overlay", "--threads", "1"]) == 0
    )
    assert {path.name for path in out.iterdir()} == {
        "slide.7_seg.tif", "slide.7_objects.tif", "slide.7_objects.json", "slide.7_overlay.png", "measurements.csv",
    }  # fmt: skip
    label = read_label(out / "slide.7_seg.tif", 2)
    assert np.array_equal(label.array[..., 0], expected(cells, image))
    assert label.spacing == pytest.approx((1.0, 0.5, 0.5))
    objects = read_label(out / "slide.7_objects.tif", 2).array
    masks = json.loads((out / "slide.7_objects.json").read_text())
    assert len(masks["annotations"]) == objects.max()
    assert sum(one["area"] for one in masks["annotations"]) == np.count_nonzero(objects)
    assert imagecodecs.png_decode((out / "slide.7_overlay.png").read_bytes()).ndim == 3
    (row,) = rows(out)
    assert row["case"] == "slide.7"
    assert int(row["objects"]) == objects.max()
    assert int(row["voxels"]) == np.count_nonzero(label.array)
    assert float(row["area_um2"]) == pytest.approx(0.25 * int(row["voxels"]), rel=1e-5)
    printed = capsys.readouterr().out
    assert printed.startswith("slide.7: cell ")
    assert f"  {out / 'slide.7_overlay.png'}\n" in printed


def test_an_ome_tiff_becomes_an_ome_tiff(cells: Path, tmp_path: Path) -> None:
    metadata = {"axes": "YX", "PhysicalSizeX": 0.4, "PhysicalSizeY": 0.4}
    image = plane(tmp_path / "a.ome.tif", ome=True, metadata=metadata)
    assert main(["predict", str(cells), str(image), "--out", str(tmp_path / "out")]) == 0
    assert read_label(tmp_path / "out" / "a_seg.ome.tif", 2).spacing == pytest.approx((1.0, 0.4, 0.4))


@pytest.mark.parametrize("large", [1 << 24, 1])
@pytest.mark.parametrize("size", [1.0, None])
def test_one_micrometre_is_a_pixel_size_where_the_image_states_it(
    cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: float | None, large: int
) -> None:
    predict = client.predict.predict_case
    monkeypatch.setattr("client.predict.predict_case", lambda *a, **options: predict(*a, **options, large=large))
    metadata = {"axes": "YX"} | ({} if size is None else {"PhysicalSizeX": size, "PhysicalSizeY": size})
    image = plane(tmp_path / "a.ome.tif", ome=True, metadata=metadata, tile=(32, 32))
    out = tmp_path / "out"
    assert main(["predict", str(cells), str(image), "--out", str(out), "--instances"]) == 0
    for name in ("a_seg.ome.tif", "a_objects.ome.tif"):
        label = read_label(out / name, 2)
        assert label.spacing == (1.0, 1.0, 1.0)
        assert label.stated == ("nothing" if size is None else "spacing")
        with tifffile.TiffFile(out / name) as written:
            assert ("PhysicalSizeX" in (written.ome_metadata or "")) == (size is not None)
    (row,) = rows(out)
    assert row["area_um2"] == ("" if size is None else f"{int(row['voxels']):.6g}")


def test_large_images_give_the_files_of_small_ones(
    cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies on disk and is found block by block is what is in memory and found at once."""
    from common.inference.object_blocks import BLOCKS, Blocks

    image = plane(tmp_path / "a.tif", tile=(32, 32), resolution=(20000, 20000), resolutionunit=3)
    options = ["--instances", "--threads", "1"]
    assert main(["predict", str(cells), str(image), "--out", str(tmp_path / "small"), *options]) == 0
    predict = client.predict.predict_case
    monkeypatch.setattr("client.predict.predict_case", lambda *a, **options: predict(*a, **options, large=1))
    monkeypatch.setitem(BLOCKS, 2, Blocks((((16, 16), (16, 16)), ((40, 40), (80, 80))), (16, 16), (8, 8)))
    assert main(["predict", str(cells), str(image), "--out", str(tmp_path / "large"), *options]) == 0
    names = sorted(path.name for path in (tmp_path / "small").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "large").iterdir())
    for name in names:
        small, large = (tmp_path / folder / name for folder in ("small", "large"))
        if name.endswith(".tif"):
            assert np.array_equal(tifffile.imread(small), tifffile.imread(large))
            assert tifffile.imread(small).max() > 0
        else:
            assert small.read_bytes() == large.read_bytes()


def test_a_nifti_becomes_a_nifti_and_volumes_are_in_millilitres(organs: Path, tmp_path: Path) -> None:
    image = volume(tmp_path / "scan.nii.gz")
    assert main(["predict", str(organs), str(image), "--out", str(tmp_path / "out"), "--overlay"]) == 0
    label = read_label(tmp_path / "out" / "scan_seg.nii.gz", 3)
    assert np.array_equal(label.array[..., 0], expected(organs, image))
    assert np.array_equal(label.affine, read_image(image, 3).affine)
    measured = rows(tmp_path / "out")
    assert [row["class"] for row in measured] == ["liver", "tumour"]
    for index, row in enumerate(measured, start=1):
        voxels = int(np.count_nonzero(label.array == index))
        assert int(row["voxels"]) == voxels
        assert float(row["volume_ml"]) == pytest.approx(voxels * 9.0 / 1000, rel=1e-5)
        assert row["objects"] == row["area_um2"] == ""


def test_a_dicom_series_becomes_a_dicom_seg(
    organs: Path, tmp_path: Path, write_series: Callable[..., list[Path]]
) -> None:
    voxels = np.random.default_rng(0).integers(0, 900, (9, 20, 24)).astype(np.int16)
    write_series(tmp_path / "CT thorax", voxels, AFFINE)
    out = tmp_path / "out"
    code = "liver=SCT:10200004:Liver, segmented"
    assert main(["predict", str(organs), str(tmp_path / "CT thorax"), "--out", str(out), "--code", code]) == 0
    image = read_image(tmp_path / "CT thorax", 3)
    found = read_label(out / "CT thorax_seg.dcm", 3, grid=image).array[..., 0]
    assert np.array_equal(found, expected(organs, tmp_path / "CT thorax"))
    segmentation = highdicom.seg.segread(out / "CT thorax_seg.dcm")
    first, second = (segmentation.get_segment_description(number) for number in (1, 2))
    assert (first.segment_label, first.segmented_property_type.meaning) == ("liver", "Liver, segmented")
    assert (second.segment_label, second.segmented_property_type.meaning) == ("tumour", "Neoplasm")


def test_modalities_are_found_in_a_session_or_given_by_name(
    brain: Path, tmp_path: Path, write_series: Callable[..., list[Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    study_uid = "1.2.826.0.1.3680043.8.498.1"
    for name, description in (("1", "AX T1 POST"), ("2", "AX FLAIR"), ("3", "MaskTumor"), ("4", "Tumor mask")):
        voxels = np.random.default_rng(len(name)).integers(0, 900, (6, 18, 20)).astype(np.int16)

        def edit(dataset: Dataset, z: int, description: str = description) -> None:
            dataset.SeriesDescription, dataset.StudyInstanceUID, dataset.StudyDate = description, study_uid, "20200102"

        write_series(tmp_path / "session" / name, voxels, AFFINE, edit=edit)
    # Two labels keep a case from being trained on; they are nothing to a prediction.
    assert main(["predict", str(brain), str(tmp_path / "session"), "--out", str(tmp_path / "a"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [entry["input"] for entry in result["written"]] == ["P-7_20200102"]
    images = [tmp_path / "session" / name for name in ("1", "2")]
    found = read_label(tmp_path / "a" / "P-7_20200102_seg.dcm", 3, grid=read_image(images[0], 3)).array[..., 0]
    assert np.array_equal(found, expected(brain, *images))
    named = [f"FLAIR={images[1]}", f"t1POST={images[0]}"]
    assert main(["predict", str(brain), *named, "--out", str(tmp_path / "b")]) == 0
    assert len(list((tmp_path / "b").glob("*_seg.dcm"))) == 1
    capsys.readouterr()
    assert (
        main(["predict", str(brain), str(images[0] / next(os.walk(images[0]))[2][0]), "--out", str(tmp_path / "c")])
        == 3
    )
    assert "T1post, FLAIR: not among its images" in capsys.readouterr().err


def test_a_folder_of_images_is_predicted_and_labels_are_left_alone(
    cells: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in ("images", "labels"):
        (tmp_path / "data" / kind).mkdir(parents=True)
    for seed in range(2):
        plane(tmp_path / "data" / "images" / f"c{seed}.tif", seed)
        (tmp_path / "data" / "labels" / f"c{seed}.tif").write_bytes(b"not an image")
    assert main(["predict", str(cells), str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [entry["input"] for entry in result["written"]] == ["c0", "c1"]
    assert result["written"][0]["files"] == {"segmentation": str(tmp_path / "out" / "c0_seg.tif")}
    assert result["written"][1]["measurements"][0]["class"] == "cell"
    assert result["model"]["variant"] == "float32"
    assert result["failed"] == []
    assert [row["case"] for row in rows(tmp_path / "out")] == ["c0", "c1"]


def test_a_bad_input_does_not_keep_others_from_being_segmented(
    cells: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, torn, deep = plane(tmp_path / "good.tif"), tmp_path / "torn.tif", volume(tmp_path / "deep.nii.gz")
    torn.write_bytes(good.read_bytes()[:900])
    inputs = [str(torn), str(tmp_path / "none.tif"), str(deep), str(good)]
    assert main(["predict", str(cells), *inputs, "--out", str(tmp_path / "out")]) == 3
    printed = capsys.readouterr()
    assert printed.out.startswith("good: cell ")
    assert "error: 3 of 4 inputs could not be segmented:\n" in printed.err
    assert "none.tif: does not exist; correct the path" in printed.err
    assert "  torn: image torn.tif: " in printed.err
    assert "found a volume of 10 slices. This model takes single slices: save each slice as a file" in printed.err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"good_seg.tif", "measurements.csv"}


def test_results_are_replaced_by_force_alone(cells: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = [str(plane(tmp_path / f"{name}.tif", seed)) for seed, name in enumerate("ab")]
    out = str(tmp_path / "out")
    assert main(["predict", str(cells), images[0], "--out", out]) == 0
    before = (tmp_path / "out" / "a_seg.tif").stat().st_mtime_ns
    assert main(["predict", str(cells), *images, "--out", out]) == 2
    assert "a_seg.tif: exists already; give another --out, or --force" in capsys.readouterr().err
    assert not (tmp_path / "out" / "b_seg.tif").exists()
    assert main(["predict", str(cells), *images, "--out", out, "--force"]) == 0
    assert (tmp_path / "out" / "a_seg.tif").stat().st_mtime_ns > before
    assert [row["case"] for row in rows(tmp_path / "out")] == ["a", "b"]


def test_a_result_that_appears_meanwhile_fails_that_input_alone(
    cells: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [str(plane(tmp_path / f"{name}.tif", seed)) for seed, name in enumerate("ab")]
    out = tmp_path / "out"
    predict = client.predict.predict_case

    def meanwhile(*arguments: Any, **options: Any) -> Any:
        (out / "a_seg.tif").write_bytes(b"of somebody else")
        return predict(*arguments, **options)

    monkeypatch.setattr("client.predict.predict_case", meanwhile)
    assert main(["predict", str(cells), *images, "--out", str(out), "--json"]) == 3
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert [entry["input"] for entry in result["written"]] == ["b"]
    assert [entry["input"] for entry in result["failed"]] == ["a"]
    assert "a_seg.tif: exists already" in printed.err
    assert (out / "a_seg.tif").read_bytes() == b"of somebody else"


def test_what_was_written_is_told_though_the_table_cannot_be(
    cells: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path, *arguments: Any) -> None:
        raise UsageError(f"{path}: no table")

    monkeypatch.setattr("client.predict.merge_measurements", refused)
    image = str(plane(tmp_path / "a.tif"))
    assert main(["predict", str(cells), image, "--out", str(tmp_path / "out"), "--json"]) == 2
    result = json.loads(capsys.readouterr().out)
    assert [entry["input"] for entry in result["written"]] == ["a"]
    assert result["measurements"] is None


def test_a_delegate_that_computes_something_else_is_refused_before_any_image_is_read(
    cells: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(LiteModel):
        def __init__(self, path: Path, threads: int = 1, delegate: Path | None = None) -> None:
            super().__init__(path, threads)

        def __call__(self, batch: np.ndarray) -> np.ndarray:
            return 1 - super().__call__(batch)

    monkeypatch.setattr("client.predict.LiteModel", Wrong)
    arguments = ["predict", str(cells), str(plane(tmp_path / "a.tif")), "--out", str(tmp_path / "out")]
    (tmp_path / "gpu.so").write_bytes(b"")
    assert main([*arguments, "--delegate", str(tmp_path / "gpu.so")]) == 9
    assert "differs from its golden answer by" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(arguments) == 0  # nobody asks for the answer where there is no delegate


def test_two_inputs_of_one_name_do_not_replace_each_other(
    cells: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    inputs = [str(plane(tmp_path / "one" / "a.tif")), str(plane(tmp_path / "two" / "A.tif"))]
    assert main(["predict", str(cells), *inputs, "--out", str(tmp_path / "out")]) == 2
    assert "would have one name, A_...; predict each into an --out of its own" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["predict", str(cells), inputs[0], inputs[0], "--out", str(tmp_path / "out")]) == 2
    assert "one/a.tif: given twice" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--variant", "int8"], "--variant int8: v1 has float32; give one of these"),
        (["--instances"], "--instances: the model tells classes apart"),
        (["--mirror"], "--mirror: the model was not trained on mirror images"),
        (["--threads", "0"], "--threads 0: expected at least 1"),
        (["--code", "spleen=SCT:1:Spleen"], "the study's classes are liver, tumour"),
        (["--channel-map", "FLAIR"], "expected 'NAME=PATTERN'"),
        (["--level", "-1"], "level -1"),
        (["--level", "2"], "a.nii.gz is NIfTI, which has no levels; leave --level out"),
        (["--delegate", "nowhere/gpu.so"], "--delegate nowhere/gpu.so: there is no such file"),
    ],
)
def test_options_that_do_not_fit_the_model_are_refused(
    organs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    image = volume(tmp_path / "a.nii.gz")
    assert main(["predict", str(organs), str(image), "--out", str(tmp_path / "out"), *arguments]) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_one_image_after_the_other_goes_into_one_folder(cells: Path, tmp_path: Path) -> None:
    images = [str(plane(tmp_path / f"{name}.tif", seed)) for seed, name in enumerate("abc")]
    out = tmp_path / "out"
    for image in images:
        assert main(["predict", str(cells), image, "--out", str(out)]) == 0
    first = rows(out)
    assert [row["case"] for row in first] == ["a", "b", "c"]
    assert {row["model"] for row in first} == {"cells v1 float32"}
    plane(tmp_path / "b.tif", 7)
    assert main(["predict", str(cells), images[1], "--out", str(out), "--force"]) == 0
    assert [row["case"] for row in rows(out)] == ["a", "c", "b"]
    assert rows(out)[:2] == [first[0], first[2]]
    assert rows(out)[2]["voxels"] != first[1]["voxels"]


def test_a_table_of_somebody_else_is_left_alone(
    cells: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "measurements.csv").write_text("case,class,remark\na,cell,mine\n")
    command = ["predict", str(cells), str(plane(tmp_path / "a.tif")), "--out", str(tmp_path), "--force"]
    assert main(command) == 2
    assert "measurements.csv: no table that rows can be added to (its columns are others)" in capsys.readouterr().err
    assert (tmp_path / "measurements.csv").read_text().endswith("mine\n")
    assert not (tmp_path / "a_seg.tif").exists()


def test_force_leaves_nothing_of_an_earlier_run_beside_the_new_segmentation(cells: Path, tmp_path: Path) -> None:
    image, out = str(plane(tmp_path / "a.tif")), tmp_path / "out"
    plane(tmp_path / "a_explain_b.tif")
    assert main(["predict", str(cells), image, "--out", str(out), "--instances", "--overlay"]) == 0
    other = ["predict", str(cells), str(tmp_path / "a_explain_b.tif"), "--out", str(out), "--overlay"]
    assert main(other) == 0
    for name in ("a_explain_tumour.png", "a_seg.nii.gz", "a_notes.txt"):
        (out / name).write_bytes(b"")
    assert main(["predict", str(cells), image, "--out", str(out), "--force"]) == 0
    assert {path.name for path in out.iterdir()} == {
        "a_seg.tif", "a_notes.txt", "a_explain_b_seg.tif", "a_explain_b_overlay.png", "measurements.csv",
    }  # fmt: skip


def test_a_case_that_fails_while_it_is_replaced_has_no_measurements(
    cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, out = str(plane(tmp_path / "a.tif")), tmp_path / "out"
    assert main(["predict", str(cells), image, "--out", str(out)]) == 0

    def full(*arguments: Any) -> None:
        raise DataError("the disk is full")

    monkeypatch.setattr("client.predict.write_results", full)
    assert main(["predict", str(cells), image, "--out", str(out), "--force"]) == 3
    assert rows(out) == []


def test_where_results_cannot_be_written_is_told_before_any_work(
    cells: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("segmented in vain")

    monkeypatch.setattr("client.predict.predict_case", never)
    image = str(plane(tmp_path / "a.tif"))
    assert main(["predict", str(cells), image, "--out", image]) == 2
    assert f"--out {image}: cannot be made" in capsys.readouterr().err

    def refused(**options: Any) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "closed").mkdir()
    monkeypatch.setattr("client.predict_folder.tempfile.TemporaryFile", refused)
    assert main(["predict", str(cells), image, "--out", str(tmp_path / "closed")]) == 2
    assert "closed: cannot be written to (Permission denied); check its rights" in capsys.readouterr().err


def test_no_empty_folder_stays_where_every_input_fails(cells: Path, tmp_path: Path) -> None:
    (tmp_path / "torn.tif").write_bytes(b"II*\0")
    inputs = [str(tmp_path / "torn.tif"), str(tmp_path / "none.tif")]
    assert main(["predict", str(cells), *inputs, "--out", str(tmp_path / "new" / "out")]) == 3
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    assert main(["predict", str(cells), *inputs, "--out", str(tmp_path / "old")]) == 3
    assert (tmp_path / "old").exists()


def test_headers_that_no_dicom_seg_can_be_made_of_are_told_before_segmenting(
    organs: Path,
    tmp_path: Path,
    write_series: Callable[..., list[Path]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("segmented in vain")

    def edit(dataset: Dataset, z: int) -> None:
        del dataset.FrameOfReferenceUID

    write_series(tmp_path / "ct", np.zeros((4, 20, 24), np.int16), AFFINE, edit=edit)
    monkeypatch.setattr("client.predict.predict_case", never)
    assert main(["predict", str(organs), str(tmp_path / "ct"), "--out", str(tmp_path / "out")]) == 3
    assert "its headers do not serve for a DICOM-SEG (Source images have no Frame Of" in capsys.readouterr().err


def test_advice_is_for_who_predicts(
    organs: Path, cells: Path, tmp_path: Path, write_series: Callable[..., list[Path]],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    write_series(tmp_path / "ct", np.random.default_rng(0).integers(0, 9, (4, 20, 24)).astype(np.int16), AFFINE)
    out = str(tmp_path / "out")
    assert main(["predict", str(organs), str(tmp_path / "ct"), "--out", out]) == 0
    flat = str(plane(tmp_path / "flat.tif"))
    inputs = [str(tmp_path / "out" / "ct_seg.dcm"), flat]
    assert main(["predict", str(organs), *inputs, "--out", out]) == 3
    told = capsys.readouterr().err
    assert "found a segmentation (DICOM-SEG). Give the series of images that it was drawn on." in told
    assert "found a single slice. This model takes volumes: give one NIfTI file" in told
    assert main(["predict", str(cells), flat, "--out", out, "--level", "3"]) == 3
    told += capsys.readouterr().err
    assert "the levels are 0 to 0. Give one of these with --level, or leave --level out." in told
    for word in ("coordinator", "register", "Register", "as a label"):
        assert word not in told


def test_images_of_another_kind_are_noted(
    cells: Path, brain: Path, tmp_path: Path, write_series: Callable[..., list[Path]],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    tifffile.imwrite(tmp_path / "colour.tif", np.zeros((40, 40, 3), np.uint8), photometric="rgb")
    assert main(["predict", str(cells), str(tmp_path / "colour.tif"), "--out", str(tmp_path / "a")]) == 0
    assert capsys.readouterr().err == "note: colour: a colour image, and the model takes grey: its luminance is taken\n"
    voxels = np.random.default_rng(0).integers(0, 900, (6, 18, 20)).astype(np.int16)

    def resonance(dataset: Dataset, z: int) -> None:
        dataset.Modality = "MR"

    write_series(tmp_path / "one", voxels, AFFINE, edit=resonance)
    write_series(tmp_path / "two", voxels, AFFINE)
    named = [f"T1post={tmp_path / 'one'}", f"FLAIR={tmp_path / 'two'}"]
    assert main(["predict", str(brain), *named, "--out", str(tmp_path / "b"), "--json"]) == 0
    printed = capsys.readouterr()
    (note,) = json.loads(printed.out)["notes"]
    assert note["note"] == "its header says CT, and the model was made for FLAIR, which is MR"
    assert printed.err == ""


def test_files_of_other_types_in_a_folder_are_counted(
    cells: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    plane(folder / "a.tif")
    for name in ("b.png", "c.png", "remarks.txt", ".hidden"):
        (folder / name).write_bytes(b"x")
    assert main(["predict", str(cells), str(folder), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err == f"note: {folder}: 3 files left aside (PNG, TXT)\n"


def test_a_stack_without_spacing_is_counted_in_voxels(
    organs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tifffile.imwrite(tmp_path / "stack.tif", np.zeros((9, 20, 24), np.uint8), metadata={"axes": "ZYX"})
    assert main(["predict", str(organs), str(tmp_path / "stack.tif"), "--out", str(tmp_path / "out")]) == 0
    assert " voxels" in capsys.readouterr().out


def test_a_damaged_model_is_not_run(cells: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(cells, tmp_path / "v1")
    with (copy / "model_float32.tflite").open("r+b") as file:
        file.seek(2000)
        file.write(b"\xff")
    assert main(["predict", str(copy), str(plane(tmp_path / "a.tif")), "--out", str(tmp_path / "out")]) == 9
    assert "model_float32.tflite: damaged or changed" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["predict", str(tmp_path / "empty"), str(tmp_path / "a.tif"), "--out", str(tmp_path / "out")]) == 9
    assert "no model that Wardround published" in capsys.readouterr().err


def test_no_tensorflow_is_loaded_and_the_model_may_be_one_file(cells: Path, tmp_path: Path) -> None:
    image = plane(tmp_path / "a.tif")
    script = (
        "import sys; from client.cli import main; code = main(sys.argv[1:]); "
        "sys.exit(code or 'tensorflow' in sys.modules or 'keras' in sys.modules)"
    )
    arguments = ["predict", str(cells / "model_float32.tflite"), str(image), "--out", str(tmp_path / "out")]
    ended = subprocess.run(
        [sys.executable, "-c", script, *arguments, "--mirror"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "out" / "a_seg.tif").exists()
    assert ended.stderr == ""


def test_help_loads_nothing_that_reads_images() -> None:
    script = (
        "import sys\nfrom client.cli import main\ntry: main(['predict', '--help'])\n"
        "except SystemExit: print(sorted({'numpy', 'nibabel', 'ai_edge_litert'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout.endswith("[]\n")
    assert "NAME_seg.tif" in ended.stdout


def test_whose_a_model_is_comes_first(
    cells: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(cells, tmp_path / "v1"))
    for name in ("study.yaml", "model_float32.tflite"):
        (copy / name).write_bytes(b"nothing that may be looked at")
    sign(copy, site_of("cells"))
    command = ["predict", str(copy), str(plane(tmp_path / "a.tif")), "--out", str(tmp_path / "out")]
    assert main(command) == 5
    assert "signed by site 'north', and only a study's coordinator signs its versions" in capsys.readouterr().err
    (copy / "manifest.sig").unlink()
    assert main([*command, "--allow-unsigned"]) == 5
    assert "the manifest says that it was signed" in capsys.readouterr().err
    monkeypatch.delenv("WARDROUND_AUTHORITY")
    image = str(tmp_path / "a.tif")
    assert main(["predict", str(cells), image, "--out", str(tmp_path / "out"), "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)["model"]
    assert found["authority"] is None
    assert found["signed_by"]["certificate_sha256"] in printed.err
    assert "not checked against an authority, and anyone can make such a certificate" in printed.err
    authority = str(identities("organs") / "authority" / "ca.crt")
    assert main(["predict", str(cells), image, "--out", str(tmp_path / "other"), "--authority", authority]) == 5
    assert "was not issued by the authority that is trusted here" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_model_of_before_signatures_runs_where_that_is_allowed(
    cells: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(cells, tmp_path / "v1"))
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["signer"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    (copy / "manifest.sig").unlink()
    command = ["predict", str(copy), str(plane(tmp_path / "a.tif")), "--out", str(tmp_path / "out")]
    assert main(command) == 5
    assert "v1: not signed" in capsys.readouterr().err
    assert main([*command, "--allow-unsigned"]) == 0
    assert "warning: this version is not signed: nobody can tell who made it" in capsys.readouterr().err
