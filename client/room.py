"""Room on a full disk for what cannot be made again."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from common.disk import is_full
from common.errors import RunFolderError

MakeRoom = Callable[[], int]
"""Removes what can be made again; returns how many bytes that was."""
_T = TypeVar("_T")


def no_room() -> int:
    """There is nothing that could be removed."""
    return 0


def with_room(write: Callable[[], _T], make_room: MakeRoom) -> _T:
    """Writes; where the disk is full, once more with the room that could be made. Raises what `write` raises."""
    try:
        return write()
    except RunFolderError as error:
        if not is_full(error) or not make_room():
            raise
    return write()
