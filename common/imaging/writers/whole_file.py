"""Files that appear whole under their name, or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from common.errors import DataError, UsageError


@contextlib.contextmanager
def appearing_whole(path: Path, force: bool = False) -> Iterator[Path]:
    """Gives a path beside `path`, of the same suffixes, to write to; what is there at the end is moved to `path`.

    Parameters
    ----------
    force : whether a file that is there already is replaced.

    Raises
    ------
    UsageError : `path` exists already, also where it came while the new file was written.
    DataError : it cannot be written.
    """
    _refuse_existing(path, force)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".wardround-", dir=path.parent) as folder:
            partial = Path(folder) / path.name
            yield partial
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            _refuse_existing(path, force)
            partial.replace(path)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error.strerror or error}); check the folder's rights and the disk's space"
        ) from error


def _refuse_existing(path: Path, force: bool) -> None:
    if not force and os.path.lexists(path):
        raise UsageError(f"{path}: exists already; give another --out, or --force to replace it")
