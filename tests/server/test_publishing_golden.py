"""The golden pair of a published version, and delegates, on which it is most needed."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from common.errors import PublishError
from common.inference.golden import check_golden, load_golden
from common.inference.lite import LiteModel
from common.models import build_network
from common.study import Study, parse_study
from server.publishing import publish
from server.publishing.calibration import made_up_tile

STUDY = """
study: cells
task: {dimensions: 2, channels: 2, classes: [background, cell, nucleus]}
model: {filters: 4, depth: 2}
preprocessing: {patch: [32, 48]}
training: {rounds: 3}
cohort: {sites: [north, south]}
publishing: {variants: [float32, float16, dynamic_range]}
"""

# The smallest library that LiteRT takes for a delegate: it prepares a graph by claiming none of its operations, or
# fails. The layout is that of LiteRT's TfLiteDelegate.
DELEGATE_SOURCE = """
#include <stdint.h>
#include <stdlib.h>
typedef struct delegate {
    void *data; int (*prepare)(void *, struct delegate *);
    void *copy_from; void *copy_to; void *free_buffer; int64_t flags; void *builder;
} delegate;
static int prepare(void *context, delegate *self) { return STATUS; }
delegate *tflite_plugin_create_delegate(char **keys, char **values, size_t count, void (*report)(const char *)) {
    delegate *made = calloc(1, sizeof *made);
    made->prepare = prepare;
    return made;
}
void tflite_plugin_destroy_delegate(delegate *made) { free(made); }
"""


@pytest.fixture(scope="module")
def study() -> Study:
    return parse_study(STUDY)


@pytest.fixture(scope="module")
def version(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "v1"
    publish(study, build_network(study).initial_weights(7), None, folder, details={})
    return folder


@pytest.fixture
def copied(version: Path, tmp_path: Path) -> Path:
    return shutil.copytree(version, tmp_path / "v1")


def compiled(folder: Path, source: str, name: str) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler here to make a delegate's library with")
    library = folder / name
    command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
    subprocess.run(command, input=source, text=True, check=True)
    return library


# The golden pair. --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["float32", "float16", "dynamic_range"])
def test_published_files_answer_their_golden_tile(version: Path, variant: str) -> None:
    model = LiteModel(version / f"model_{variant}.tflite")
    golden = load_golden(version)
    tolerance = json.loads((version / "manifest.json").read_text())["golden"]["tolerance"][variant]
    difference = check_golden(model)
    assert difference == golden.difference(model) <= tolerance
    # The answer is float32's to 1/4096, rounded.
    if variant == "float32":
        assert difference <= 0.5 / 4096
        np.testing.assert_allclose(golden.answer, model(golden.tile[np.newaxis])[0], atol=0.5 / 4096)
    else:
        assert tolerance == pytest.approx(max(2 * difference, 1e-3), rel=0.2)


def test_golden_tile_is_made_up_and_small(version: Path, study: Study) -> None:
    golden = load_golden(version)
    np.testing.assert_array_equal(golden.tile, made_up_tile(study))
    np.testing.assert_allclose(golden.tile.mean((0, 1)), 0, atol=0.02)
    np.testing.assert_allclose(golden.tile.std((0, 1)), 1, atol=0.02)
    size = (version / "golden.npz").stat().st_size
    assert size < 0.5 * (golden.tile.nbytes + golden.answer.nbytes)


def test_made_up_tile_has_the_range_of_the_images(study: Study) -> None:
    images = [np.random.default_rng(seed).uniform(0, (1, 200), (32, 48, 2)).astype(np.float32) for seed in range(3)]
    tile = made_up_tile(study, images)
    np.testing.assert_allclose(tile.mean((0, 1)), [0.5, 100], rtol=0.05)
    np.testing.assert_allclose(tile.std((0, 1)), [12**-0.5, 200 * 12**-0.5], rtol=0.05)


def test_a_file_of_other_weights_does_not_pass(copied: Path, study: Study, tmp_path: Path) -> None:
    other = tmp_path / "other"
    publish(study, build_network(study).initial_weights(8), None, other, details={})
    shutil.copy(other / "model_float32.tflite", copied / "model_float32.tflite")
    with pytest.raises(PublishError, match="differs from its golden answer by"):
        check_golden(LiteModel(copied / "model_float32.tflite"))


def test_damaged_pairs_and_manifests_are_reported(copied: Path) -> None:
    model = LiteModel(copied / "model_float32.tflite")
    content = (copied / "golden.npz").read_bytes()
    (copied / "golden.npz").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(PublishError, match=r"golden\.npz: damaged"):
        check_golden(model)
    (copied / "golden.npz").unlink()
    with pytest.raises(PublishError, match=r"golden\.npz: cannot be read"):
        check_golden(model)
    manifest = json.loads((copied / "manifest.json").read_text())
    del manifest["golden"]
    for text, message in (
        (json.dumps(manifest), "without a golden pair"),
        ("{", "damaged"),
        ("[]", "no manifest of a model"),
    ):
        (copied / "manifest.json").write_text(text)
        with pytest.raises(PublishError, match=message):
            check_golden(model)


def test_a_file_that_the_manifest_does_not_name_has_no_tolerance(copied: Path) -> None:
    (copied / "model_float32.tflite").rename(copied / "renamed.tflite")
    with pytest.raises(PublishError, match=r"no tolerance for renamed\.tflite"):
        check_golden(LiteModel(copied / "renamed.tflite"))


# Delegates. --------------------------------------------------------------------------------------------------------


def test_without_a_delegate_xnnpack_runs_the_model(version: Path) -> None:
    interpreter = LiteModel(version / "model_float32.tflite")._interpreter()
    assert "DELEGATE" in [operation["op_name"] for operation in interpreter._get_ops_details()]


def test_what_a_delegate_does_not_take_is_computed_all_the_same(version: Path, tmp_path: Path) -> None:
    library = compiled(tmp_path, DELEGATE_SOURCE.replace("STATUS", "0"), "delegate.so")
    model = LiteModel(version / "model_float32.tflite", delegate=library)
    assert check_golden(model) < 1e-3
    assert "DELEGATE" in [operation["op_name"] for operation in model._interpreter()._get_ops_details()]


def test_a_delegate_that_refuses_the_model_is_named(version: Path, tmp_path: Path) -> None:
    library = compiled(tmp_path, DELEGATE_SOURCE.replace("STATUS", "1"), "failing.so")
    with pytest.raises(PublishError, match=r"failing\.so: this delegate refuses model_float32\.tflite"):
        LiteModel(version / "model_float32.tflite", delegate=library)


def no_file(folder: Path) -> Path:
    return folder / "missing.so"


def of_another_machine(folder: Path) -> Path:
    """An ELF header of 32-bit ARM."""
    (folder / "arm.so").write_bytes(b"\x7fELF\x01\x01\x01" + bytes(9) + b"\x03\x00\x28\x00\x01\x00\x00\x00" + bytes(28))
    return folder / "arm.so"


def no_library(folder: Path) -> Path:
    (folder / "text.so").write_text("no library\n")
    return folder / "text.so"


def without_its_functions(folder: Path) -> Path:
    return compiled(folder, "int other(void) { return 0; }", "other.so")


def that_makes_none(folder: Path) -> Path:
    source = "void *tflite_plugin_create_delegate() { return 0; } void tflite_plugin_destroy_delegate(void *made) {}"
    return compiled(folder, source, "none.so")


@pytest.mark.parametrize(
    ("library", "reason"),
    [
        (no_file, "there is no such delegate library"),
        (of_another_machine, "cannot be loaded as a delegate"),
        (no_library, "cannot be loaded as a delegate"),
        (without_its_functions, "it lacks tflite_plugin_create_delegate"),
        (that_makes_none, "cannot be loaded as a delegate"),
    ],
)
def test_libraries_that_are_no_delegate_here_are_refused(
    version: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], library: Callable[[Path], Path], reason: str
) -> None:
    path = library(tmp_path)
    with pytest.raises(PublishError, match=reason) as caught:
        LiteModel(version / "model_float32.tflite", delegate=path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "run without a delegate" in str(caught.value)
    assert capfd.readouterr().err == ""
