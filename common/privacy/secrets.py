"""Secrets from which a round's noise follows: of the operating system, durable before their use, gone afterwards."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from common.disk import sync_folder
from common.errors import RunFolderError
from common.wire.partial import disk_hit

_SECRET_BYTES = 32


class Secrets:
    """The secrets of a run's rounds.

    Parameters
    ----------
    folder : of this study, plan and run alone; made when something is written.
    random : gives so many bytes that nobody can guess.

    Raises
    ------
    RunFolderError : from every method: the folder cannot be read or written, or a secret is torn.
    """

    def __init__(self, folder: Path, random: Callable[[int], bytes] = os.urandom) -> None:
        self._folder = folder
        self._random = random

    def of(self, number: int) -> bytes:
        """The secret of a round: the one that is there, or a new one, durable when this returns."""
        path = self._path(number)
        with _told(path, "kept"):
            if path.exists():
                secret = path.read_bytes()
                if len(secret) == _SECRET_BYTES:
                    return secret
                path.unlink()  # torn: nothing was drawn from it
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            secret = self._random(_SECRET_BYTES)
            partial = path.with_suffix(".partial")
            partial.unlink(missing_ok=True)
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(secret)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            sync_folder(self._folder)
        disk_hit("privacy.secret", path)
        return secret

    def has(self, number: int) -> bool:
        """Whether there is one of this round."""
        return self._path(number).exists()

    def forget(self, up_to: int | None = None) -> None:
        """Removes those of the rounds up to this one; all of them where the study is over."""
        with _told(self._folder, "removed"):
            if not self._folder.exists():
                return
            for path in [*self._folder.glob("*.secret"), *self._folder.glob("*.partial")]:
                if up_to is None or not path.stem.isdigit() or int(path.stem) <= up_to:
                    path.unlink(missing_ok=True)
            if up_to is None:
                with contextlib.suppress(OSError):
                    self._folder.rmdir()

    def _path(self, number: int) -> Path:
        return self._folder / f"{number}.secret"


@contextlib.contextmanager
def _told(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunFolderError(
            f"{path}: cannot be {what} ({error.strerror or error}); check the folder's rights and the disk's space"
        ) from error
