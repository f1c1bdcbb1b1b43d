"""Wording that messages and reports share: counts, lists that end somewhere, text that does nothing to a terminal."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def counted(number: int, noun: str) -> str:
    """A number with its noun, of which the plural ends in s: "1 case", "2 cases"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def listed(items: Iterable[object], most: int = 5) -> str:
    """The first few of a list, and how many more there are: "a, b and 3 more"."""
    texts = [str(item) for item in items]
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


def printable(text: str) -> str:
    """Without what a file's name could do to a terminal, and what cannot be encoded."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def file_name(path: Path) -> str:
    """The path's last part; bytes that are no UTF-8 as `\\xNN`."""
    return os.fsencode(path.name).decode("utf-8", "backslashreplace")
