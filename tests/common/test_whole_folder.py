"""Folders that appear whole: what earlier attempts left goes, what another process writes stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import PublishError
from common.whole_folder import appearing_whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def left_behind(folder: Path, name: str) -> Path:
    """As a killed process leaves it."""
    path = folder / f".{name}.abcd_123.partial"
    path.mkdir()
    (path / "torn").write_bytes(b"x")
    return path


def test_only_this_folders_leftovers_are_removed(tmp_path: Path) -> None:
    for name in ("own[1]", "own1", "own[1].b"):
        left_behind(tmp_path, name)
    with appearing_whole(tmp_path / "own[1]") as partial:
        (partial / "file").write_bytes(b"whole")
    assert names(tmp_path) == [".own1.abcd_123.partial", ".own[1].b.abcd_123.partial", "own[1]"]
    assert names(tmp_path / "own[1]") == ["file"]


def test_two_that_write_the_same_folder_do_not_disturb_each_other(tmp_path: Path) -> None:
    with appearing_whole(tmp_path / "v1") as first:
        (first / "file").write_bytes(b"first")
        with (
            pytest.raises(PublishError, match="v1: another process has made it meanwhile"),
            appearing_whole(tmp_path / "v1") as second,
        ):
            (second / "file").write_bytes(b"second")
            (tmp_path / "v1").mkdir()
            (tmp_path / "v1" / "file").write_bytes(b"third")
        (tmp_path / "v1" / "file").unlink()
    assert (tmp_path / "v1" / "file").read_bytes() == b"first"
    assert names(tmp_path) == ["v1"]
