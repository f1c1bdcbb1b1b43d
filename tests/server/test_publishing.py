"""Publishing: files that convert, run and compute what their papers say; all of a version, or nothing."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from ai_edge_litert import schema_py_generated as schema

import common.models.lite
import server.publishing
from common.errors import PublishError
from common.models import build_network
from common.models.lite import LiteModel, captured_stderr, class_indices
from common.study import VARIANTS, Study, load_study, parse_study
from server.evaluation import Holdout, predictor
from server.publishing import float_operations, publish

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
    weights = [weight.numpy() for weight in build_network(study).initial_weights(7)]
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


def operations(model: bytes) -> list[tuple[str, list[tuple[int, int]]]]:
    """Name of each operation, with (type, bytes of constant data) of its inputs."""
    names = {code: name for name, code in vars(schema.BuiltinOperator).items() if isinstance(code, int)}
    parsed = schema.Model.GetRootAs(model, 0)
    graph = parsed.Subgraphs(0)
    found = []
    for index in range(graph.OperatorsLength()):
        operator = graph.Operators(index)
        code = parsed.OperatorCodes(operator.OpcodeIndex())
        tensors = [graph.Tensors(number) for number in operator.InputsAsNumpy() if number >= 0]
        inputs = [(tensor.Type(), parsed.Buffers(tensor.Buffer()).DataLength()) for tensor in tensors]
        found.append((names[max(code.BuiltinCode(), code.DeprecatedBuiltinCode())], inputs))
    return found


# What is written. --------------------------------------------------------------------------------------------------


def test_folder_holds_every_variant_and_its_papers(published: Published) -> None:
    names = {f"model_{variant}.tflite" for variant in VARIANTS}
    assert {path.name for path in published.folder.iterdir()} == names | {
        "manifest.json",
        "model_card.md",
        "study.yaml",
    }
    assert list(published.folder.parent.iterdir()) == [published.folder]
    assert load_study(published.folder / "study.yaml") == published.study
    assert published.folder.stat().st_mode & 0o777 == 0o755
    assert published.report["version"] == published.manifest["version"] == "v3"
    assert [entry["name"] for entry in published.report["variants"]] == list(VARIANTS)


def test_manifest_identifies_every_file(published: Published) -> None:
    for entry in published.manifest["variants"]:
        content = (published.folder / entry["file"]).read_bytes()
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
        assert entry["bytes"] == len(content)
    for name, entry in published.manifest["documents"].items():
        content = (published.folder / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def test_manifest_says_how_to_feed_the_files(published: Published) -> None:
    study, preprocessing = published.study, published.manifest["preprocessing"]
    tile = list(study.publishing.tile)
    assert preprocessing["tile"] == tile
    assert preprocessing["intensity"] == "zscore"
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
        result = published.holdout.evaluate(model, tile=tile, fixed_batch=True, batch_size=1)
        assert entry["holdout"] == json.loads(json.dumps(result.scalars()))
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
    for variant in VARIANTS:
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


def test_standardized_kernels_are_constants(flat: Published) -> None:
    found = operations(flat.bytes_of("float32"))
    kernels = [inputs[1][1] for name, inputs in found if name == "CONV_2D"]
    assert len(kernels) == 11  # two a block, 5 blocks, and the head
    assert all(kernels)
    assert {name for name, _ in found} <= {
        "CONV_2D",
        "TRANSPOSE_CONV",
        "MAX_POOL_2D",
        "CONCATENATION",
        "MUL",
        "LOGISTIC",
    }


def test_float16_is_half_the_size(published: Published) -> None:
    # The rest of a file, names and graph, is large beside so small a network.
    weights = 4 * sum(weight.size for weight in published.weights)
    assert len(published.bytes_of("float32")) - len(published.bytes_of("float16")) > 0.4 * weights
    assert published.variant("float16")["ratio_to_float32"] < 1


def test_int8_is_whole_in_2d_and_says_what_stays_float_in_3d(flat: Published, deep: Published) -> None:
    floats, total = float_operations(flat.bytes_of("int8"))
    assert not floats
    assert total >= 18
    assert flat.variant("int8")["note"] == ""
    floats, total = float_operations(deep.bytes_of("int8"))
    assert floats["CONV_3D"] == 13  # 11 as in 2D, and 2 in place of pooling
    assert "CONV_3D (13)" in deep.variant("int8")["note"]
    entry = deep.manifest["variants"][-1]
    assert entry["float_operations"] == dict(floats)
    assert entry["float_share"] == sum(floats.values()) / total
    assert deep.variant("dynamic_range")["note"] == "not smaller than float32"


def test_calibration_takes_images_of_every_site_and_names_them(flat: Published) -> None:
    names = flat.report["calibration"]
    assert names == flat.manifest["calibration"]
    assert len(names) == len(set(names)) == 4
    assert sum(name.endswith("-north") for name in names) == 2
    assert set(names) <= set(flat.holdout.cases)


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
    for name in (".v1.abc.partial", ".v11.abc.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_float32.tflite").write_bytes(b"half")
    publish_again(flat, tmp_path / "v1")
    assert {path.name for path in tmp_path.iterdir()} == {"v1", ".v11.abc.partial"}


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

    monkeypatch.setattr(server.publishing, "predictor", of_other_weights)
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
spec = importlib.util.spec_from_file_location("lite", {common.models.lite.__file__!r})
lite = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lite)
from pathlib import Path
import numpy as np
lite.LiteModel(Path({str(flat.folder / "model_float32.tflite")!r}))(np.zeros((1, 32, 48, 3), np.float32))
assert "tensorflow" not in sys.modules
"""
    root = Path(common.models.lite.__file__).parents[2]
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
