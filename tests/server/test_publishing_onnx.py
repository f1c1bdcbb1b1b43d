"""ONNX beside LiteRT: the same answers, by another runtime."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.export.forward import predictor
from common.models import build_network
from common.study import parse_study
from server.publishing import publish
from server.publishing.onnx_export import OnnxModel

STUDY = """
study: cells
task: {dimensions: DIMENSIONS, channels: 2, classes: [background, cell, nucleus]}
model: {filters: 4, depth: 2}
preprocessing: {patch: PATCH}
training: {rounds: 3}
cohort: {sites: [north, south]}
"""


def published(folder: Path, dimensions: int) -> tuple[dict[str, Any], Any]:
    patch = [8, 12, 16][-dimensions:]
    study = parse_study(STUDY.replace("DIMENSIONS", str(dimensions)).replace("PATCH", str(patch)))
    study = replace(study, publishing=replace(study.publishing, variants=("float32", "onnx")))
    weights = build_network(study).initial_weights(7)
    report = publish(study, weights, None, folder, details={})
    return report["variants"][1], predictor(study, build_network(study), weights)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_onnx_file_answers_what_tensorflow_does(tmp_path: Path, dimensions: int) -> None:
    pytest.importorskip("tf2onnx", reason="tf2onnx is optional and not installed here")
    pytest.importorskip("onnxruntime", reason="onnxruntime is optional and not installed here")
    entry, predict = published(tmp_path / "v1", dimensions)
    assert not entry["failed"]
    assert entry["file"] == "model.onnx"
    assert entry["latency_ms"] > 0
    assert not entry["recommended"]  # LiteRT does not read it
    tiles = np.random.default_rng(1).standard_normal((2, *[8, 12, 16][-dimensions:], 2)).astype(np.float32)
    np.testing.assert_allclose(OnnxModel(tmp_path / "v1" / "model.onnx")(tiles), predict(tiles), atol=1e-4)
    manifest = json.loads((tmp_path / "v1" / "manifest.json").read_text())
    assert manifest["golden"]["tolerance"]["onnx"] == 1e-3


def test_without_the_converter_the_variant_fails_and_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    real = importlib.import_module

    def missing(name: str, package: str | None = None) -> Any:
        if name == "tf2onnx":
            raise ImportError("No module named 'tf2onnx'")
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", missing)
    entry, _ = published(tmp_path / "v1", 2)
    assert entry["failed"]
    assert "install tf2onnx, onnx and onnxruntime" in entry["note"]
    assert not (tmp_path / "v1" / "model.onnx").exists()
