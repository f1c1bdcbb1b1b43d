"""A folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from common.disk import cannot_write, of_the_disk
from common.errors import PublishError, WardroundError

_SUFFIX = ".partial"


@contextlib.contextmanager
def appearing_whole(folder: Path, failure: type[WardroundError] = PublishError) -> Iterator[Path]:
    """A folder to write files to that becomes `folder` at the end, and is gone after a failure.

    What an earlier attempt at the same folder left behind when its process was killed is removed; what another process
    is writing now is left alone (each holds a lock on its own).

    Parameters
    ----------
    failure : what is raised where the folder cannot be made or written; RunFolderError, whatever it is, where the disk
        is full, read-only or broken.
    """
    try:
        _remove_left(folder)
        partial, lock = _made(folder)
    except OSError as error:
        raise _cannot_write(folder, error, failure) from error
    try:
        yield partial
        for path in sorted(partial.iterdir()):
            path.chmod(0o644)
            _sync(path)
        partial.chmod(0o755)
        _sync(partial)
        partial.rename(folder)
        _sync(folder.parent)
    except OSError as error:
        raise _cannot_write(folder, error, failure) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def _remove_left(folder: Path) -> None:
    """Removes the partial folders of `folder` that no process holds."""
    pattern = re.compile(
        re.escape(f".{folder.name}.") + r"[a-z0-9_]{8}" + re.escape(_SUFFIX)
    )  # as `mkdtemp` names them
    for left in [path for path in folder.parent.iterdir() if pattern.fullmatch(path.name)]:
        try:
            lock = os.open(left, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # its process has ended meanwhile
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
        except OSError:  # in use, or on a file system without locks, where nobody can tell
            pass
        finally:
            os.close(lock)


def _made(folder: Path) -> tuple[Path, int]:
    """A new partial folder and the descriptor that holds its lock."""
    while True:
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=_SUFFIX))
        try:
            lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # another process took it for left behind, before it was locked
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # likewise
            os.close(lock)
            continue
        except OSError:  # no locks here: nobody removes anything then
            return partial, lock
        if partial.exists():
            return partial, lock
        os.close(lock)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cannot_write(folder: Path, error: OSError, failure: type[WardroundError]) -> WardroundError:
    if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
        return failure(f"{folder}: another process has made it meanwhile; look at what is there, or give another name")
    if of_the_disk(error):
        return cannot_write(folder, error)
    return failure(f"{folder}: cannot be written ({error.strerror}); check its folder and free space")
