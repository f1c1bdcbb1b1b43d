"""The folder of updates: how its files are named, and which of them may go.

An update lies here from its first byte until the state of its round is saved: `<round>-<kind>-<site>-<first 16 hex of
its SHA-256>.upload` while it arrives, `....tensors` when it is whole and verified.
"""

from __future__ import annotations

import re
from pathlib import Path

from server.rounds import Kind

_NAME = re.compile(r"\.?(\d{6,})-(?:train|evaluate)-.+")


def update_name(kind: Kind, number: int, site: str, digest: bytes) -> str:
    """The file's name: no update ever replaces another, and the same one comes to lie where it lay."""
    return f"{number:06d}-{kind.value}-{site}-{digest.hex()[:16]}.tensors"


def round_of(path: Path) -> int | None:
    """The number of the round that an update, or a part of one, is of; None for any other file."""
    found = _NAME.fullmatch(path.name)
    return int(found[1]) if found else None


def remove_finished(folder: Path, number: int) -> list[Path]:
    """Removes what is of this round or one before, parts of uploads too; returns it."""
    removed = [path for path in sorted(folder.iterdir()) if (round_of(path) or number + 1) <= number]
    for path in removed:
        path.unlink(missing_ok=True)
    return removed
