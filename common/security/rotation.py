"""How an identity's files are exchanged for new ones as if at once, wherever the process that does it is killed.

The new identity is made in ``next/`` in the folder of the old one, which stays as it is until the new one was tried.
Then ``next`` is renamed to ``switch``: from there on the new one counts, and its files are moved into place one by one.
Whoever loads an identity first completes what was cut off there.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from pathlib import Path
from typing import Final

from common.disk import cannot_write, of_the_disk, sync_folder
from common.errors import IdentityError
from common.failpoints import hit

NEXT: Final = "next"
SWITCH: Final = "switch"


def discard_next(folder: Path) -> None:
    """Removes what a rotation left that was cut off before it counted."""
    shutil.rmtree(folder / NEXT, ignore_errors=True)


def commit_rotation(folder: Path) -> None:
    """The identity in `next` takes the place of the one in the folder. Raises IdentityError, RunFolderError."""
    try:
        (folder / NEXT).rename(folder / SWITCH)
        sync_folder(folder)
    except OSError as error:
        raise cannot_write(folder / SWITCH, error) from error
    complete_rotation(folder)


def complete_rotation(folder: Path) -> None:
    """Moves the files of a new identity that counts already into place; nothing where there is none.

    Raises
    ------
    IdentityError : this user may not do so.
    RunFolderError : the disk does not take it.
    """
    switch = folder / SWITCH
    if not switch.is_dir():
        return
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            if switch.is_dir():  # another process may have completed it meanwhile
                for path in sorted(switch.iterdir()):
                    path.replace(folder / path.name)
                    hit("rotation.half")
                os.fsync(lock)
                switch.rmdir()
        finally:
            os.close(lock)
    except OSError as error:
        if of_the_disk(error):
            raise cannot_write(folder, error) from error
        raise IdentityError(
            f"{folder}: a rotation was cut off here, and this user cannot complete it ({error.strerror}); run "
            f"`wardround-site rotate --identity {folder}` as the user who owns it"
        ) from error
