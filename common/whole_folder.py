"""A folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from common.errors import PublishError, WardroundError


@contextlib.contextmanager
def appearing_whole(folder: Path, failure: type[WardroundError] = PublishError) -> Iterator[Path]:
    """A folder to write files to that becomes `folder` at the end, and is gone after a failure.

    What an earlier attempt at the same folder left behind when its process was killed is removed.

    Parameters
    ----------
    failure : what is raised where the disk does not take it.
    """
    prefix, suffix = f".{folder.name}.", ".partial"
    try:
        for left in folder.parent.glob(f"{prefix}*{suffix}"):
            shutil.rmtree(left)
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=prefix, suffix=suffix))
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


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cannot_write(folder: Path, error: OSError, failure: type[WardroundError]) -> WardroundError:
    return failure(f"{folder}: cannot be written ({error.strerror}); check its folder and free space")
