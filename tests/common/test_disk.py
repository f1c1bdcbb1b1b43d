"""A disk that takes no more: told from a wrong path, in words that are the same everywhere."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from common.disk import cannot_write, file_stamp, is_full
from common.errors import RunFolderError
from common.whole_folder import appearing_whole


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@pytest.mark.parametrize(
    ("number", "words", "full"),
    [
        (errno.ENOSPC, "No space left on device); free space, or make the disk writable, and start again", True),
        (errno.EDQUOT, "Disk quota exceeded); free space, or make the disk writable, and start again", True),
        (errno.EROFS, "Read-only file system); free space, or make the disk writable, and start again", False),
        (errno.EACCES, "Permission denied); check that the folder exists, its owner, and free space", False),
    ],
)
def test_what_cannot_be_written_says_why_and_what_helps(number: int, words: str, full: bool) -> None:
    cause = _error(number)
    with pytest.raises(RunFolderError) as raised:
        raise cannot_write(Path("run"), cause) from cause
    assert str(raised.value).startswith(f"run: cannot be written ({words}")
    assert is_full(raised.value) is full


def test_a_folder_that_appears_whole_has_the_same_words_for_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError) as raised, appearing_whole(tmp_path / "v1"):
        raise _error(errno.ENOSPC)
    assert str(raised.value) == str(cannot_write(tmp_path / "v1", _error(errno.ENOSPC)))


def test_a_stamp_tells_whether_a_file_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert file_stamp(path) is None
    path.write_text("a")
    first = file_stamp(path)
    assert first is not None and file_stamp(path) == first
    path.write_text("bc")
    assert file_stamp(path) != first
    other = tmp_path / "other"
    other.write_text("de")
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    second = file_stamp(path)
    other.replace(path)
    assert file_stamp(path) != second, "the file was replaced by one of the same age and size"
