"""What a run's folder says of itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import RunFolderError
from server.run_folder import RunFolder, set_aside, write_atomically


def test_the_published_version_of_a_folder_that_was_moved_is_where_it_lies_now(tmp_path: Path) -> None:
    written = RunFolder(tmp_path / "first")
    written.path.mkdir()
    written.write_status({"state": "finished", "published": str(written.published / "v2")})
    moved = RunFolder(written.path.rename(tmp_path / "moved"))
    assert moved.read_status()["published"] == str(moved.published / "v2")


def test_a_file_that_cannot_be_written_stays_as_it_was_and_leaves_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.json"
    write_atomically(path, "old")
    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(RunFolderError, match=r"report\.json: cannot be written \(No space left.*\); free space"):
            write_atomically(path, "new")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


def full(descriptor: int) -> None:
    raise OSError(28, "No space left on device")


def test_what_a_killed_process_was_writing_is_swept_away_and_nothing_else(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for folder in (run.state, run.models, run.updates):
        folder.mkdir()
        (folder / ".000001.tensors.abc.partial").write_text("half")
        (folder / "000001.tensors").write_text("whole")
    (run.path / ".status.json.abc.partial").write_text("half")
    (run.updates / "000001-train-east-ab.upload").write_text("half")
    run.sweep()
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        "000001-train-east-ab.upload",
        *["000001.tensors"] * 3,
    ]


def test_a_run_with_a_status_that_cannot_be_read_is_not_taken_for_finished(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.report.write_text("{}")
    run.status.write_text("{torn")
    assert not run.is_finished()


def test_what_is_set_aside_replaces_nothing(tmp_path: Path) -> None:
    for content in ("one", "two"):
        (tmp_path / "file").write_text(content)
        set_aside(tmp_path / "file", tmp_path)
    assert set_aside(tmp_path / "file", tmp_path) is None
    assert [path.read_text() for path in sorted((tmp_path / "damaged").iterdir())] == ["one", "two"]
