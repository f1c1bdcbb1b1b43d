"""What a run's folder says of itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import RunFolderError
from server.run_folder import RunFolder, plainly, set_aside, write_atomically


def test_the_published_version_of_a_folder_that_was_moved_is_where_it_lies_now(tmp_path: Path) -> None:
    written = RunFolder(tmp_path / "first")
    (written.published / "v2").mkdir(parents=True)
    written.write_status({"state": "finished", "published": str(written.published / "v2")})
    moved = RunFolder(written.path.rename(tmp_path / "moved"))
    assert moved.read_status()["published"] == str(moved.published / "v2")


def test_a_version_that_was_moved_away_is_not_published_here_and_the_run_not_finished(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    (run.published / "v2").mkdir(parents=True)
    run.report.write_text("{}")
    run.write_status({"state": "finished", "published": str(run.published / "v2")})
    assert run.is_finished()
    (run.published / "v2").rename(tmp_path / "elsewhere")
    assert run.read_status()["published"] is None
    assert not run.is_finished()


@pytest.mark.parametrize("garbled", [b"{torn", b"\xff", b"[1]"])
def test_a_status_that_cannot_be_read_leads_to_repair(tmp_path: Path, garbled: bytes) -> None:
    run = RunFolder(tmp_path)
    run.status.write_bytes(garbled)
    with pytest.raises(RunFolderError, match=rf"else `wardround repair --run {tmp_path}` sets it aside"):
        run.read_status()


def test_damage_is_told_with_each_path_once_and_without_digests() -> None:
    error = (
        f"/run/state/000003.tensors: damaged (/run/state/000003.tensors: expected SHA-256 {'a1' * 32}, found "
        f"{'b2' * 32}: the file is torn or was changed; restore it or run the round again)"
    )
    assert plainly(error) == "/run/state/000003.tensors: damaged (the file is torn or was changed)"


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
