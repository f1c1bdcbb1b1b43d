"""The site's finished update on a disk without space: worth more than prepared cases, and not worth a second try."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.outbox import Outbox, PendingUpdate, TaskKey
from common import failpoints
from common.errors import RunFolderError
from common.wire.tensors import read_tensors

KEY = TaskKey("train", 1, "00" * 32, "01" * 32)
UPDATE: Sequence[Any] = [np.arange(1000, dtype=np.float32)]


class Cache:
    """Fills the disk until it is emptied, and perhaps longer."""

    def __init__(self, patch: pytest.MonkeyPatch, action: str, *, holds: int = 1, helps: bool = True) -> None:
        self._patch, self._holds, self._helps = patch, holds, helps
        self.emptied = 0
        patch.setattr(failpoints, "_actions", failpoints.parse(action))

    def make_room(self) -> int:
        self.emptied += 1
        if self._helps:
            self._patch.setattr(failpoints, "_actions", {})
        return self._holds


def _hold(folder: Path, cache: Cache) -> PendingUpdate:
    return Outbox(folder, cache.make_room).hold(KEY, UPDATE, cases=3, download=0.5, work=60.0, kept=b"\x02")


@pytest.mark.parametrize("place", ["site.trained", "blob.before_rename", "blob.before_rename@2", "blob.renamed@2"])
def test_an_update_that_finds_no_space_is_written_with_the_room_that_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setattr(failpoints, "_counts", {})
    cache = Cache(monkeypatch, f"{place}=error:ENOSPC")
    held = _hold(tmp_path, cache)
    assert cache.emptied == 1
    np.testing.assert_array_equal(read_tensors(held.path, digest=held.sha256)[0], UPDATE[0])
    assert Outbox(tmp_path).pending() == held  # also after a restart
    assert sorted(path.name for path in tmp_path.iterdir()) == ["update.json", "update.tensors"]


@pytest.mark.parametrize(
    ("action", "holds", "helps", "emptied"),
    [("ENOSPC", 1, False, 1), ("ENOSPC", 0, True, 1), ("EROFS", 1, True, 0)],
    ids=["still full", "nothing to remove", "read-only"],
)
def test_where_no_room_can_be_made_or_would_help_the_site_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str, holds: int, helps: bool, emptied: int
) -> None:
    monkeypatch.setattr(failpoints, "_counts", {})
    cache = Cache(monkeypatch, f"blob.before_rename=error:{action}", holds=holds, helps=helps)
    with pytest.raises(RunFolderError, match="cannot be written"):
        _hold(tmp_path, cache)
    assert cache.emptied == emptied
