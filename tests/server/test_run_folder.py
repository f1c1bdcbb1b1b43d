"""What a run's folder says of itself."""

from __future__ import annotations

from pathlib import Path

from server.run_folder import RunFolder


def test_the_published_version_of_a_folder_that_was_moved_is_where_it_lies_now(tmp_path: Path) -> None:
    written = RunFolder(tmp_path / "first")
    written.path.mkdir()
    written.write_status({"state": "finished", "published": str(written.published / "v2")})
    moved = RunFolder(written.path.rename(tmp_path / "moved"))
    assert moved.read_status()["published"] == str(moved.published / "v2")
