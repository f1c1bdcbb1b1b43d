"""What a disk does that takes no more files, and the words for it; whether a file has changed."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Final

from common.errors import RunFolderError

_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
_DISK: Final = (*_FULL, errno.EROFS, errno.EIO)


def of_the_disk(error: OSError) -> bool:
    """Whether the disk is full, read-only or broken, so that no other path, owner or name would help."""
    return error.errno in _DISK


def is_full(error: BaseException) -> bool:
    """Whether it is, or was raised because of, an error of a disk without space."""
    cause: BaseException | None = error
    while cause is not None and not (isinstance(cause, OSError) and cause.errno in _FULL):
        cause = cause.__cause__
    return cause is not None


def cannot_write(path: Path, error: OSError) -> RunFolderError:
    """What to raise where a file cannot be written."""
    failure = RunFolderError(_words(path, error))
    failure.__cause__ = error
    return failure


def _words(path: Path, error: OSError) -> str:
    what = f"{path}: cannot be written ({error.strerror or error})"
    if not of_the_disk(error):
        return f"{what}; check that the folder exists, its owner, and free space"
    return (
        f"{what}; free space, or make the disk writable, and start again with the same command: what was finished is "
        "kept"
    )


def sync_folder(folder: Path) -> None:
    """Makes durable which files the folder names: a rename survives a power cut only then. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


FileStamp = tuple[int, int, int]
"""Tells a file's contents apart without reading them: time of the last change, size, inode."""


def stamp_of(found: os.stat_result) -> FileStamp:
    """The stamp of a file that was looked at."""
    return found.st_mtime_ns, found.st_size, found.st_ino


def file_stamp(path: Path) -> FileStamp | None:
    """The stamp of a file or folder; None where there is none, or none to be seen."""
    try:
        return stamp_of(path.stat())
    except OSError:
        return None
