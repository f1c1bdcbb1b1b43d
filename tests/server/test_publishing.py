"""Publishing: files that convert, run and compute what their papers say; all of a version, or nothing."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
import pytest
import tifffile

import common.inference.lite
import server.publishing.conversion
from common.errors import PublishError, UsageError
from common.export.forward import predictor
from common.inference.lite import LiteModel, captured_stderr, class_indices
from common.inference.published import open_published
from common.models import build_network
from common.study import DEFAULT_VARIANTS, Study, load_study, parse_study
from common.wire.tensors import read_tensors
from server.evaluation import Holdout
from server.publishing import publish
from server.publishing.contents import contents_of

STUDY_2D = """
study: cells
task: {dimensions: 2, channels: 3, classes: [background, cell]}
model: {filters: 4, depth: 2, head: sigmoid}
preprocessing: {patch: [32, 32]}
training: {rounds: 3}
cohort: {sites: [north, south]}
publishing: {tile: [32, 48], calibration_images: 4}
"""
STUDY_3D = """
study: organs
task: {dimensions: 3, channels: 1, classes: [background, liver, spleen]}
model: {filters: 4, depth: 2, head: softmax}
preprocessing: {patch: [8, 16, 16]}
training: {rounds: 3}
cohort: {sites: [north, south]}
"""


def write_holdout(folder: Path, study: Study) -> Path:
    """Six noisy images of bright blocks, three a site; sizes above and below the tile."""
    rng = np.random.default_rng(5)
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    for index in range(6):
        shape = (40 - 4 * index, 50 + index) if study.task.dimensions == 2 else (6 + index, 20, 17)
        label = np.zeros(shape, np.uint8)
        label[tuple(slice(size // 4, size // 2) for size in shape)] = 1
        label[tuple(slice(size // 2, 3 * size // 4) for size in shape)] = len(study.task.classes) - 1
        image = np.clip(label * 60 + 60 + rng.normal(size=shape) * 15, 0, 255).astype(np.uint8)
        name = f"{index:04d}-{('north', 'south')[index % 2]}"
        if study.task.dimensions == 2:
            tifffile.imwrite(folder / "images" / f"{name}.tif", np.stack([image] * 3, -1), photometric="rgb")
            tifffile.imwrite(folder / "labels" / f"{name}.tif", label)
        else:
            for kind, array in (("images", image), ("labels", label)):
                nibabel.save(nibabel.Nifti1Image(array.T, np.eye(4)), folder / kind / f"{name}.nii.gz")
    return folder


@dataclass
class Published:
    study: Study
    weights: list[npt.NDArray[np.float32]]
    holdout: Holdout
    folder: Path
    report: dict[str, Any]
    manifest: dict[str, Any]
    messages: list[str]

    def variant(self, name: str) -> dict[str, Any]:
        return next(entry for entry in self.report["variants"] if entry["name"] == name)

    def bytes_of(self, name: str) -> bytes:
        return (self.folder / f"model_{name}.tflite").read_bytes()


def published_of(text: str, folder: Path) -> Published:
    study = parse_study(text)
    rng = np.random.default_rng(7)
    # Biases that are not 0, as trained ones: else the converter leaves them out.
    weights = [
        weight.numpy() + (0.1 * rng.standard_normal(weight.shape).astype(np.float32) if weight.ndim == 1 else 0)
        for weight in build_network(study).initial_weights(7)
    ]
    holdout = Holdout(study, write_holdout(folder / "holdout", study))
    (folder / "published").mkdir()
    target = folder / "published" / "v3"
    messages: list[str] = []
    details = {"round": 2, "validation_dice": np.float32(0.5), "left_out": float("nan")}
    report = publish(study, weights, holdout, target, details=details, progress=messages.append)
    return Published(
        study, weights, holdout, target, report, json.loads((target / "manifest.json").read_text()), messages
    )


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return published_of(STUDY_2D, tmp_path_factory.mktemp("flat"))


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return published_of(STUDY_3D, tmp_path_factory.mktemp("deep"))


@pytest.fixture(scope="module", params=["flat", "deep"])
def published(request: pytest.FixtureRequest) -> Published:
    result: Published = request.getfixturevalue(request.param)
    return result


# What is written. --------------------------------------------------------------------------------------------------


def test_folder_holds_every_variant_and_its_papers(published: Published) -> None:
    names = {f"model_{variant}.tflite" for variant in DEFAULT_VARIANTS}
    assert {path.name for path in published.folder.iterdir()} == names | {
        "manifest.json",
        "model_card.md",
        "study.yaml",
        "weights.tensors",
        "golden.npz",
        "sbom.json",
    }
    assert list(published.folder.parent.iterdir()) == [published.folder]
    assert load_study(published.folder / "study.yaml") == published.study
    assert published.folder.stat().st_mode & 0o777 == 0o755
    assert published.report["version"] == published.manifest["version"] == "v3"
    assert [entry["name"] for entry in published.report["variants"]] == list(DEFAULT_VARIANTS)


def test_manifest_identifies_every_file(published: Published) -> None:
    for entry in published.manifest["variants"]:
        content = (published.folder / entry["file"]).read_bytes()
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
        assert entry["bytes"] == len(content)
    for name, entry in published.manifest["documents"].items():
        content = (published.folder / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    for entry in (published.manifest["weights"], published.manifest["golden"]):
        content = (published.folder / entry["file"]).read_bytes()
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
        assert entry["bytes"] == len(content)


def test_weights_are_published_in_the_networks_order(published: Published) -> None:
    network = build_network(published.study)
    stored = read_tensors(published.folder / "weights.tensors")
    assert [array.shape for array in stored] == [spec.shape for spec in network.specs]
    for found, expected in zip(stored, published.weights, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_manifest_says_how_to_feed_the_files(published: Published) -> None:
    study, preprocessing = published.study, published.manifest["preprocessing"]
    tile = list(study.publishing.tile)
    assert preprocessing["tile"] == tile
    assert preprocessing["intensity"] == "zscore"
    assert preprocessing["missing_modality"] == "error"
    for key in ("modalities", "spacing", "window", "crop"):
        assert key in preprocessing
    assert preprocessing["classes"] == list(study.task.classes)
    assert preprocessing["head"] == study.model.head
    for entry in published.manifest["variants"]:
        assert entry["input"] == {"shape": [1, *tile, study.task.channels], "dtype": "float32"}
        assert entry["output"] == {"shape": [1, *tile, len(preprocessing["outputs"])], "dtype": "float32"}
    assert published.manifest["study"] == study.name
    assert published.manifest["details"] == {"round": 2, "validation_dice": 0.5, "left_out": None}


def test_holdout_figures_are_those_of_exactly_that_file(published: Published) -> None:
    tile = published.study.publishing.tile
    reference = published.manifest["variants"][0]["dice"]
    for entry, figures in zip(published.manifest["variants"], published.report["variants"], strict=True):
        model = LiteModel(published.folder / entry["file"])
        measured = published.holdout.evaluate_in_detail(model, tile=tile, fixed_batch=True, batch_size=1)
        result = measured.overlap
        figures_of_file = measured if entry["name"] == "float32" else result
        assert entry["holdout"] == json.loads(json.dumps(figures_of_file.scalars()))
        assert entry["dice"] == figures["dice"] == result.mean_dice
        assert figures["dice_lost"] == reference - result.mean_dice
        assert figures["recommended"] == (figures["dice_lost"] <= published.study.publishing.allowed_dice_loss)
        assert figures["dice_of_large_sites"] is None  # three images a site
        assert figures["latency_ms"] > 0
        assert not figures["failed"]
    assert published.manifest["holdout"] == {"cases": 6, "sites": {"north": 3, "south": 3}}


def test_model_card_tells_sites_variants_and_limits(published: Published) -> None:
    card = (published.folder / "model_card.md").read_text()
    for heading in ("Intended use", "Data", "Training", "Files", "Holdout Dice", "Limits"):
        assert f"\n## {heading}\n" in card
    north = published.manifest["variants"][0]["holdout"]["site"]["north"]["dice"]
    assert f"| site north | 3 | {north:.4f} |" in card
    assert "model_int8.tflite" in card
    assert "- round: 2\n- validation dice: 0.5\n" in card
    assert "left out" not in card  # a figure that does not exist


def test_progress_names_each_step(flat: Published) -> None:
    for variant in DEFAULT_VARIANTS:
        assert f"converting to {variant}" in flat.messages
        assert f"evaluating {variant} on 6 holdout images" in flat.messages


# What the files compute. -------------------------------------------------------------------------------------------


def test_float_variants_answer_what_tensorflow_does(published: Published) -> None:
    study = published.study
    predict = predictor(study, build_network(study), published.weights)
    shape = (2, *study.publishing.tile, study.task.channels)
    tiles = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    expected = predict(tiles)
    for name, tolerance in (("float32", 1e-4), ("float16", 2e-2), ("dynamic_range", 0.1)):
        answers = LiteModel(published.folder / f"model_{name}.tflite")(tiles)
        np.testing.assert_allclose(answers, expected, atol=tolerance)


def test_kernels_are_constants_and_nothing_is_computed_twice(flat: Published, deep: Published) -> None:
    contents = contents_of(flat.bytes_of("float32"))
    # 11 convolutions, two a block and the head; two halvings, and for each doubling a convolution and a joining; the
    # head's probabilities. No standardization of kernels and no gain after the activations.
    assert contents.operations == 11 + 2 + 2 + 2 + 1
    assert contents.unfolded == {}
    contents = contents_of(deep.bytes_of("float32"))
    assert contents.unfolded == {}
    # 13 convolutions, the two halvings among them. All but the head see three slices at once: one operation pads, two
    # cut out and one joins; the halvings cut out three, from slices laid out in pairs. A doubling is two convolutions
    # and their joining, then the joining with what was skipped.
    joined = 12
    assert contents.float_operations["CONV_2D"] == 13
    assert contents.float_operations["TRANSPOSE_CONV"] == 4
    assert contents.float_operations["CONCATENATION"] == joined + 4
    assert contents.float_operations["PAD"] == joined
    assert set(contents.float_operations) <= {
        "CONV_2D",
        "TRANSPOSE_CONV",
        "CONCATENATION",
        "PAD",
        "STRIDED_SLICE",
        "RESHAPE",
        "SOFTMAX",
    }


def test_float16_is_half_the_size(published: Published) -> None:
    # The rest of a file, names and graph, is large beside so small a network.
    wide = contents_of(published.bytes_of("float32")).weight_bytes["FLOAT32"]
    half = contents_of(published.bytes_of("float16")).weight_bytes["FLOAT16"]
    assert half == pytest.approx(wide / 2, rel=0.01)
    assert published.variant("float16")["ratio_to_float32"] < 1


def test_quantized_files_are_quantized(published: Published) -> None:
    for name in DEFAULT_VARIANTS:
        contents = contents_of(published.bytes_of(name))
        entry = next(entry for entry in published.manifest["variants"] if entry["name"] == name)
        assert contents.volumetric == {}
        assert entry["weight_bytes"] == contents.weight_bytes
        assert entry["narrow_weight_share"] == contents.narrow_share
        assert name == "dynamic_range" or entry["note"] == ""
    assert contents_of(published.bytes_of("float32")).narrow_share == 0
    assert contents_of(published.bytes_of("float16")).narrow_share == 1
    whole = contents_of(published.bytes_of("int8"))
    assert whole.narrow_share == 1
    assert set(whole.weight_bytes) == {"INT8"}
    assert whole.float_operations == {}


def test_dynamic_range_says_how_much_it_leaves_wide(published: Published) -> None:
    # Kernels below 1024 numbers are left as they are: most of a network as small as this.
    share = published.variant("dynamic_range")["note"].removeprefix("only ").partition("%")[0]
    contents = contents_of(published.bytes_of("dynamic_range"))
    assert set(contents.weight_bytes) == {"INT8", "FLOAT32"}
    assert 0.5 < contents.narrow_share < 0.9
    assert share == f"{contents.narrow_share * 100:.0f}"


def test_variant_that_nothing_quantizes_is_reported(
    flat: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_float32(study: Study, network: Any, weights: Any, variant: str, tiles: Any) -> bytes:
        return flat.bytes_of("float32")

    monkeypatch.setattr(server.publishing.conversion, "convert", as_float32)
    report = publish_again(flat, tmp_path / "v1", variants="[float32, dynamic_range]", holdout=None)
    entry = report["variants"][1]
    assert entry["failed"] and not entry["recommended"]
    assert entry["note"].startswith("all weights of the converted model are still 32-bit numbers")
    assert not (tmp_path / "v1" / "model_dynamic_range.tflite").exists()


def test_calibration_takes_images_of_every_site(flat: Published) -> None:
    names = flat.report["calibration"]
    assert len(names) == len(set(names)) == 4
    assert sum(name.endswith("-north") for name in names) == 2
    assert set(names) <= set(flat.holdout.cases)


def test_nothing_published_names_an_image_of_the_holdout(flat: Published) -> None:
    assert flat.manifest["calibration_images"] == 4
    texts = [path.read_text() for path in flat.folder.iterdir() if path.suffix in (".json", ".md", ".yaml")]
    assert not [name for name in flat.holdout.cases for text in texts if name in text]


# What goes wrong. --------------------------------------------------------------------------------------------------


def publish_again(flat: Published, folder: Path, **changes: Any) -> dict[str, Any]:
    study = parse_study(STUDY_2D.replace("calibration_images: 4", f"variants: {changes.pop('variants', '[float32]')}"))
    arguments = {"details": {}, **changes}
    return publish(
        study,
        arguments.pop("weights", flat.weights),
        arguments.pop("holdout", flat.holdout),
        folder,
        **arguments,
    )


@pytest.mark.parametrize("step", ["converting", "measuring", "evaluating", "writing"])
def test_interrupted_publish_leaves_nothing(flat: Published, tmp_path: Path, step: str) -> None:
    def interrupt(message: str) -> None:
        if message.startswith(step):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish_again(flat, tmp_path / "v1", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_remains_of_a_killed_publish_are_removed(flat: Published, tmp_path: Path) -> None:
    for name in (".v1.abcd_123.partial", ".v11.abcd_123.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_float32.tflite").write_bytes(b"half")
    publish_again(flat, tmp_path / "v1")
    assert {path.name for path in tmp_path.iterdir()} == {"v1", ".v11.abcd_123.partial"}


def test_existing_version_is_not_touched(flat: Published) -> None:
    before = (flat.folder / "manifest.json").read_bytes()
    with pytest.raises(PublishError, match="exists already"):
        publish_again(flat, flat.folder)
    assert (flat.folder / "manifest.json").read_bytes() == before


def test_missing_parent_is_reported(flat: Published, tmp_path: Path) -> None:
    with pytest.raises(PublishError, match="cannot be written"):
        publish_again(flat, tmp_path / "nowhere" / "v1")


def test_float32_that_does_not_compute_is_refused(
    flat: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PublishError, match="not finite"):
        publish_again(flat, tmp_path / "v1", weights=[weight * np.nan for weight in flat.weights])

    def of_other_weights(study: Study, network: Any, weights: Any) -> Callable[..., Any]:
        return predictor(study, network, network.initial_weights(8))

    monkeypatch.setattr(server.publishing.conversion, "predictor", of_other_weights)
    with pytest.raises(PublishError, match="differs from TensorFlow"):
        publish_again(flat, tmp_path / "v1")
    assert list(tmp_path.iterdir()) == []


def test_variant_that_does_not_convert_is_reported_and_the_others_are_published(
    flat: Published, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Without images there is nothing to calibrate on.
    report = publish_again(flat, tmp_path / "v1", variants="[float32, float16, int8]", holdout=None)
    plain, half, quantized = report["variants"]
    assert plain["recommended"] and not plain["failed"]
    assert plain["dice"] is None
    assert not half["recommended"] and half["note"] == "not measured on a holdout"
    assert quantized["failed"] and quantized["file"] is None and not quantized["recommended"]
    assert quantized["note"] == "it needs holdout images to calibrate on, and there is no holdout"
    warnings = [record.getMessage() for record in caplog.records if record.name == "wardround.publishing"]
    assert warnings == [f"variant int8 is not published: {quantized['note']}"]
    assert report["calibration"] == []
    assert not (tmp_path / "v1" / "model_int8.tflite").exists()
    manifest = json.loads((tmp_path / "v1" / "manifest.json").read_text())
    assert manifest["variants"][2]["failed"]
    card = (tmp_path / "v1" / "model_card.md").read_text()
    assert "nobody has measured" in card
    assert f"- int8: {quantized['note']}.\n" in card


def test_a_model_without_its_sites_normalization_is_not_recommended(tmp_path: Path) -> None:
    text = STUDY_2D.replace("head: sigmoid", "head: sigmoid, normalization: batch")
    text = text.replace("{rounds: 3}", "{rounds: 3, personal: normalization}")
    study = parse_study(text.replace("calibration_images: 4", "variants: [float32]"))
    weights = [weight.numpy() for weight in build_network(study).initial_weights(7)]
    report = publish(study, weights, None, tmp_path / "v1", details={})
    (plain,) = report["variants"]
    assert not plain["recommended"] and not plain["failed"]
    assert plain["note"].startswith("needs a site's own normalization before use")
    assert json.loads((tmp_path / "v1" / "manifest.json").read_text())["model"]["works_alone"] is False
    card = (tmp_path / "v1" / "model_card.md").read_text()
    assert "None is recommended" in card and "Do not use it as it is" in card and "Recommended are" not in card
    with pytest.raises(UsageError, match="recommends no variant"):
        open_published(tmp_path / "v1")


def test_nothing_published_names_a_folder_of_the_coordinator(
    flat: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path) -> LiteModel:
        if "float16" in path.name:
            raise PublishError(f"{path}: cannot be loaded")
        return LiteModel(path)

    monkeypatch.setattr(server.publishing.conversion, "opened", broken)
    study = replace(
        flat.study,
        training=replace(flat.study.training, start_from=str(tmp_path / "before")),
        model=replace(flat.study.model, encoder_weights=str(tmp_path / "encoder")),
        publishing=replace(flat.study.publishing, variants=("float32", "float16")),
    )
    report = publish(study, flat.weights, None, tmp_path / "v1", details={})
    assert report["variants"][1]["note"] == "model_float16.tflite: cannot be loaded"
    assert not [path.name for path in (tmp_path / "v1").iterdir() if str(tmp_path).encode() in path.read_bytes()]
    published = open_published(tmp_path / "v1").study
    assert published.training.start_from is None and published.model.encoder_weights is None


# Running a file. ---------------------------------------------------------------------------------------------------


def test_lite_model_gives_the_same_bits_in_every_thread(flat: Published) -> None:
    model = LiteModel(flat.folder / "model_int8.tflite")
    tiles = np.random.default_rng(2).standard_normal((3, 32, 48, 3)).astype(np.float32)
    expected = model(tiles)
    with ThreadPoolExecutor(3) as executor:
        for answers in executor.map(model, [tiles] * 12):
            np.testing.assert_array_equal(answers, expected)


def test_lite_model_refuses_other_shapes_and_damaged_files(flat: Published, tmp_path: Path) -> None:
    model = LiteModel(flat.folder / "model_float32.tflite")
    with pytest.raises(ValueError, match="expected tiles of shape"):
        model(np.zeros((1, 32, 32, 3), np.float32))
    (tmp_path / "model.tflite").write_bytes(flat.bytes_of("float32")[:1000])
    for name in ("model.tflite", "missing.tflite"):
        with pytest.raises(PublishError, match=name):
            LiteModel(tmp_path / name)


def test_lite_model_is_silent_and_loads_no_tensorflow(flat: Published) -> None:
    # The module is loaded from its file, apart from its package.
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("lite", {common.inference.lite.__file__!r})
lite = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lite)
from pathlib import Path
import numpy as np
lite.LiteModel(Path({str(flat.folder / "model_float32.tflite")!r}))(np.zeros((1, 32, 48, 3), np.float32))
assert "tensorflow" not in sys.modules
"""
    root = Path(common.inference.lite.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_captured_stderr_takes_what_libraries_write_and_gives_it_back(capfd: pytest.CaptureFixture[str]) -> None:
    with captured_stderr() as file:
        os.write(2, b"from a library\n")
        file.seek(0)
        assert file.read() == b"from a library\n"
    os.write(2, b"from the program\n")
    assert capfd.readouterr().err == "from the program\n"


def test_class_indices_of_both_heads() -> None:
    probabilities = np.float32([[0.2, 0.5, 0.3], [0.4, 0.4, 0.2], [0.1, 0.6, 0.9]])
    np.testing.assert_array_equal(class_indices(probabilities, "softmax"), [1, 0, 2])
    # 0.5 is not above a half, so the first is background.
    np.testing.assert_array_equal(class_indices(probabilities, "sigmoid"), [0, 0, 3])
