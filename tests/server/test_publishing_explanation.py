"""Publishing what explains a model: only where the study wants it, checked, listed, and no reason to lose a version."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import server.publishing.explanation
from common.inference.version_files import check_files, listed_files
from common.models import build_network
from common.study import Study, parse_study
from server.publishing import publish


@pytest.fixture
def study(tiny_study: Callable[..., Study]) -> Study:
    study = tiny_study(head="sigmoid")
    return dataclasses.replace(
        study, publishing=dataclasses.replace(study.publishing, variants=("float32",), explain=True)
    )


def published(study: Study, folder: Path) -> dict[str, Any]:
    weights = [weight.numpy() for weight in build_network(study).initial_weights(2)]
    return publish(study, weights, None, folder, details={"round": 1})


def test_the_file_is_listed_with_its_digest(tensorflow: None, study: Study, tmp_path: Path) -> None:
    report = published(study, tmp_path / "v1")
    content = (tmp_path / "v1" / "model_explain.tflite").read_bytes()
    assert report["explanation"] == {
        "file": "model_explain.tflite", "bytes": len(content), "failed": False, "note": "",
    }  # fmt: skip
    manifest = (tmp_path / "v1" / "manifest.json").read_bytes()
    assert listed_files(manifest)["model_explain.tflite"] == hashlib.sha256(content).hexdigest()
    assert json.loads(manifest)["explanation"]["bytes"] == len(content)
    check_files(tmp_path / "v1")


def test_wrong_maps_are_not_published_but_the_version_is(
    tensorflow: None,
    study: Study,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    right = server.publishing.explanation.tensorflow_explanation

    def other(*arguments: Any) -> Any:
        answer = right(*arguments)
        answer[..., -1] = 1 + answer[..., -1] * np.float32(1.01)
        return answer

    monkeypatch.setattr(server.publishing.explanation, "tensorflow_explanation", other)
    with caplog.at_level(logging.WARNING, "wardround.publishing"):
        report = published(study, tmp_path / "v1")
    assert report["explanation"]["failed"]
    assert "differ from TensorFlow's" in report["explanation"]["note"]
    assert "what explains the model is not published: the converted gradients differ" in caplog.text
    assert json.loads((tmp_path / "v1" / "manifest.json").read_text())["explanation"] is None
    assert not (tmp_path / "v1" / "model_explain.tflite").exists()
    assert (
        "There is no file for explanations: the converted gradients" in (tmp_path / "v1" / "model_card.md").read_text()
    )
    check_files(tmp_path / "v1")


def test_the_key_is_no_part_of_the_digest_of_studies_without_it(study: Study) -> None:
    without = dataclasses.replace(study, publishing=dataclasses.replace(study.publishing, explain=False))
    assert "explain" not in without.canonical()
    assert "explain" in study.canonical()
    assert parse_study(study.to_yaml()).publishing.explain
