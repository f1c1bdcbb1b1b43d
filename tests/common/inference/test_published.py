"""Opening a published version: the right file, and nothing that is damaged, foreign or too new."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.errors import PublishError, UsageError
from common.inference.published import open_published
from common.inference.version_files import open_weights
from common.study import Study
from tests.common.inference.published_version import write_version


@pytest.fixture
def version(tmp_path: Path, tiny_study: Callable[..., Study]) -> Path:
    files = {"float32": b"big", "float16": b"small", "dynamic_range": b"fast", "int8": b"worse"}
    return write_version(tmp_path / "v3", tiny_study(), files)


def test_the_fastest_recommended_variant_is_taken(version: Path, tiny_study: Callable[..., Study]) -> None:
    model = open_published(version)
    assert (model.variant, model.version, model.recommended) == ("dynamic_range", "v3", True)
    assert model.file == version / "model_dynamic_range.tflite"
    assert model.study == tiny_study()


def test_a_variant_can_be_named_and_a_file_given(version: Path) -> None:
    assert not open_published(version, "int8").recommended
    assert open_published(version / "model_float16.tflite").variant == "float16"
    with pytest.raises(UsageError, match=r"--variant int8: model_float16\.tflite is float16"):
        open_published(version / "model_float16.tflite", "int8")
    with pytest.raises(UsageError, match="v3 has float32, float16, dynamic_range, int8; give one"):
        open_published(version, "broken")


def test_variants_without_a_measured_time_come_last(version: Path) -> None:
    manifest = json.loads((version / "manifest.json").read_text())
    for entry in manifest["variants"][1:]:
        entry["latency_ms"] = None
    (version / "manifest.json").write_text(json.dumps(manifest))
    assert open_published(version).variant == "float32"


@pytest.mark.parametrize("name", ["model_dynamic_range.tflite", "study.yaml"])
def test_a_damaged_file_is_refused(version: Path, name: str) -> None:
    content = (version / name).read_bytes()
    (version / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(PublishError, match=rf"{name}: damaged or changed: its SHA-256 is .* copy the version's folder"):
        open_published(version)


@pytest.mark.parametrize("name", ["/etc/hostname", "../v4/model_int8.tflite", ".hidden", "v3/../x"])
@pytest.mark.parametrize("of", ["variant", "explanation"])
def test_files_outside_the_versions_folder_are_refused(version: Path, name: str, of: str) -> None:
    manifest = json.loads((version / "manifest.json").read_text())
    if of == "variant":
        manifest["variants"][2]["file"] = name
    else:
        manifest["explanation"] = {"file": name, "sha256": "00"}
    (version / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(PublishError, match="names a file outside the version's folder"):
        open_published(version)


def test_weights_are_of_a_folder(version: Path) -> None:
    with pytest.raises(UsageError, match=r"model_float32\.tflite: a file; give the folder"):
        open_weights(version / "model_float32.tflite")


def test_what_is_missing_is_named(version: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no such model"):
        open_published(tmp_path / "v4")
    (version / "model_dynamic_range.tflite").unlink()
    with pytest.raises(PublishError, match="the manifest names this file, which is not there"):
        open_published(version)
    (version / "study.yaml").unlink()
    with pytest.raises(PublishError, match=r"study\.yaml: is not there; copy the version's folder again"):
        open_published(version, "float32")
    (version / "other.tflite").write_bytes(b"x")
    with pytest.raises(PublishError, match="does not name this file"):
        open_published(version / "other.tflite")


@pytest.mark.parametrize("name", ["manifest.json", "weights.tensors", "model_explain.tflite"])
def test_a_file_that_does_not_segment_is_told_from_those_that_do(version: Path, name: str) -> None:
    manifest = json.loads((version / "manifest.json").read_text())
    manifest["explanation"] = {"file": "model_explain.tflite", "sha256": "00"}
    (version / "manifest.json").write_text(json.dumps(manifest))
    if name != "manifest.json":
        (version / name).write_bytes(b"x")
    with pytest.raises(UsageError, match=rf"{name}: no .tflite that segments; give one of model_float32\.tflite, "):
        open_published(version / name)


def test_a_file_that_may_not_be_read_is_a_matter_of_rights(version: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def closed(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.suffix == ".tflite":
            raise PermissionError(13, "Permission denied")
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", closed)
    with pytest.raises(PublishError, match=r"tflite: cannot be read \(Permission denied\); check its rights$"):
        open_published(version)


def test_a_run_folder_names_its_newest_version(tmp_path: Path, tiny_study: Callable[..., Study]) -> None:
    for name in ("v2", "v10"):
        write_version(tmp_path / "run" / "published" / name, tiny_study(), {"float32": b"x"})
    for folder in (tmp_path / "run", tmp_path / "run" / "published"):
        with pytest.raises(UsageError, match=r"holds published versions, and is none itself; give .*/published/v10,"):
            open_published(folder)


def test_what_wardround_did_not_publish_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.tflite").write_bytes(b"x")
    for path in (tmp_path, tmp_path / "model.tflite"):
        with pytest.raises(PublishError, match=r"no model that Wardround published \(manifest\.json is not"):
            open_published(path)
    for text, reason in (("{", "it is not JSON"), ("[1]", "no manifest of a model"), ('{"format": 1}', "lack")):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(PublishError, match=reason):
            open_published(tmp_path)


def test_a_newer_format_asks_for_an_update(tmp_path: Path, tiny_study: Callable[..., Study]) -> None:
    write_version(tmp_path / "v1", tiny_study(), {"float32": b"x"}, format=99, wardround="7.0")
    with pytest.raises(PublishError, match=r"format 99 by Wardround 7\.0, and .* update Wardround"):
        open_published(tmp_path / "v1")


def test_a_signature_is_asked_for_before_anything_is_believed(version: Path) -> None:
    (version / "manifest.json").write_text("{ not even JSON")

    def verify(manifest: bytes, folder: Path) -> None:
        assert (manifest, folder) == (b"{ not even JSON", version)
        raise PublishError("not signed")

    with pytest.raises(PublishError, match="not signed"):
        open_published(version, verify=verify)
