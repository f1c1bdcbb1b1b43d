"""Which versions a run has published, and the name of the next."""

from __future__ import annotations

from pathlib import Path

from server.run_folder import RunFolder
from server.versions import newest_version, next_version, published_versions


def write_version(folder: Path, name: str) -> Path:
    version = folder / name
    version.mkdir(parents=True)
    (version / "manifest.json").write_text("{}")
    return version


def test_versions_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for name in ("v10", "v2", "v9"):
        write_version(run.published, name)
    assert list(published_versions(run.published)) == ["v2", "v9", "v10"]
    assert newest_version(run) == run.published / "v10"
    assert next_version(run.published) == "v11"


def test_what_is_no_version_is_left_out_but_its_number_is_taken(tmp_path: Path) -> None:
    write_version(tmp_path, "v1")
    (tmp_path / "v4").mkdir()
    for name in ("v²", "vault", "v", ".v5.abc.partial"):
        write_version(tmp_path, name)
    assert published_versions(tmp_path) == {"v1": tmp_path / "v1"}
    assert next_version(tmp_path) == "v5"


def test_a_run_begins_with_version_1(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    assert (newest_version(run), next_version(run.published)) == (None, "v1")
