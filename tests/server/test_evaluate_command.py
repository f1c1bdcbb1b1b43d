"""`wardround evaluate` on a published version: tables, JSON and CSV by LiteRT alone; failures say what to do."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile

from common.models import build_network
from common.study import Study, parse_study
from server.cli import main
from server.publishing import publish
from server.run_folder import RunFolder

STUDY = """
study: cells
task: {dimensions: 2, channels: 1, classes: [background, cell], labels: instances}
model: {filters: 2, depth: 1, head: sigmoid}
preprocessing: {patch: [16, 16]}
training: {rounds: 1}
cohort: {sites: [north, south]}
publishing: {variants: [float32, float16]}
"""


@pytest.fixture(scope="module")
def study() -> Study:
    return parse_study(STUDY)


@pytest.fixture(scope="module")
def holdout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(3)
    for name in ("a-north", "b-north", "c-south"):
        label = np.zeros((24, 20), np.uint16)
        label[3:12, 4:11], label[15:22, 4:16] = 5, 900
        for kind, array in (("images", (label > 0) * 90 + rng.integers(0, 99, label.shape)), ("labels", label)):
            (folder / kind).mkdir(exist_ok=True)
            tifffile.imwrite(folder / kind / f"{name}.tif", array.astype(np.uint16 if kind == "labels" else np.uint8))
    return folder


@pytest.fixture(scope="module")
def run(study: Study, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run that published its initial weights, of which nothing is to be expected but figures."""
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "first")
    folder.prepare(study)
    weights = [weight.numpy() for weight in build_network(study).initial_weights(1)]
    publish(study, weights, None, folder.published / "v1", details={})
    return folder


def test_a_version_is_evaluated_without_tensorflow(run: RunFolder, holdout: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom server.cli import main\nassert main(sys.argv[1:]) == 0\n"
        "print(sorted({'tensorflow', 'tensorflow_federated', 'grpc'} & set(sys.modules)))"
    )
    arguments = [
        "evaluate",
        "--allow-unsigned",
        run.published / "v1",
        "--holdout",
        holdout,
        "--csv",
        tmp_path / "cases.csv",
    ]
    found = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert lines[0] == "cells v1, float32" and lines[-1] == "[]"
    for heading in ("Holdout", "Objects: average precision", "Objects: F1"):
        assert any(line.startswith(heading) for line in lines)
    assert sum(line.split()[:1] == ["south"] for line in lines) == 3
    with (tmp_path / "cases.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["site"], row["objects"]) for row in rows] == [
        ("a-north", "north", "2"),
        ("b-north", "north", "2"),
        ("c-south", "south", "2"),
    ]


def test_a_run_stands_for_its_newest_version_and_its_own_holdout(
    run: RunFolder,
    holdout: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = RunFolder(tmp_path / "runs" / "copy")
    shutil.copytree(run.path, copy.path)
    shutil.copytree(holdout, copy.path / "hospitals" / "holdout")
    shutil.copytree(copy.published / "v1", copy.published / "v10")
    shutil.copytree(copy.published / "v1", copy.published / "v9")
    (copy.published / "v10" / "manifest.json").write_text(
        (copy.published / "v1" / "manifest.json").read_text().replace('"version": "v1"', '"version": "v10"')
    )
    monkeypatch.chdir(tmp_path)
    told = []
    for arguments in ([copy.path], ["--run", copy.path], [], [copy.published / "v10"]):
        assert main(["evaluate", "--allow-unsigned", *map(str, arguments), "--json", "--variant", "float16"]) == 0
        told.append(json.loads(capsys.readouterr().out))
    assert (told[0]["version"], told[0]["variant"]) == ("v10", "float16")
    assert told[0]["holdout"]["cases"] == 3 and 0 <= told[0]["holdout"]["ece"] <= 1
    assert all(result == told[0] for result in told)


def test_a_file_stands_for_its_own_variant(run: RunFolder, holdout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run.published / "v1" / "model_float16.tflite"
    assert main(["evaluate", "--allow-unsigned", str(file), "--holdout", str(holdout), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["variant"] == "float16"


def test_failures_say_what_to_do(
    run: RunFolder, holdout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    version = run.published / "v1"
    moved = tmp_path / "moved"
    shutil.copytree(version, moved)
    damaged = tmp_path / "damaged"
    shutil.copytree(version, damaged)
    (damaged / "model_float32.tflite").write_bytes(b"torn")
    for arguments, code, said in (
        ([version, "--run", run.path], 2, "leave one of them out"),
        ([moved], 2, "--holdout"),
        ([version], 2, "--holdout"),
        ([version, "--holdout", tmp_path / "nowhere"], 3, "does not exist"),
        ([version, "--holdout", holdout, "--variant", "int8"], 2, "float32"),
        ([version, "--holdout", holdout, "--csv", tmp_path / "no" / "cases.csv"], 2, "--csv"),
        ([run.path, "--holdout", holdout, "--round", "1", "--variant", "float32"], 2, "--variant"),
        ([damaged, "--holdout", holdout], 9, "damaged"),
        ([tmp_path / "elsewhere", "--holdout", holdout], 7, "no run here"),
    ):
        found = main(["evaluate", "--allow-unsigned", *map(str, arguments)])
        output = capsys.readouterr()
        assert (found, output.out) == (code, ""), output.err
        assert "error: " in output.err and said in output.err


def test_a_version_that_nobody_signed_is_evaluated_only_where_that_is_wanted(
    run: RunFolder, holdout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["evaluate", str(run.published / "v1"), "--holdout", str(holdout), "--json"]
    assert main(given) == 5
    assert "not signed (manifest.sig is not in it)" in capsys.readouterr().err
    assert main([*given, "--allow-unsigned"]) == 0
    assert "warning: " in capsys.readouterr().err
