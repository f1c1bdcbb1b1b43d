"""What a run's log says: `log.jsonl` and its older files, filtered, to the end or for as long as somebody follows."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from common.watching.logs import OLDER_FILES

LOG: Final = "log.jsonl"
LEVELS: Final = ("debug", "info", "warning", "error", "critical")
_POLL_SECONDS: Final = 0.25
_SAID_ALREADY: Final = ("time", "level", "logger", "message", "study", "event")

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Wanted:
    """Which lines are shown: from this level on, and of this site or round where given."""

    level: str = "info"
    site: str | None = None
    round: int | None = None

    def __call__(self, entry: Entry) -> bool:
        """Whether an entry is shown."""
        level = str(entry.get("level", "info"))
        return (
            (LEVELS.index(level) if level in LEVELS else 1) >= LEVELS.index(self.level)
            and (self.site is None or entry.get("site") == self.site)
            and (self.round is None or entry.get("round") == self.round)
        )


def read_log(run: Path) -> Iterator[Entry]:
    """All entries, oldest first. What is no whole line is left out."""
    return (entry for path in _files(run) for entry in _of(path))


def follow_log(run: Path, going_on: Callable[[], bool]) -> Iterator[Entry]:
    """All entries, and those to come, until `going_on` says no."""
    yield from (entry for path in _files(run)[:-1] for entry in _of(path))
    path, position, inode = run / LOG, 0, -1
    while True:
        last = not going_on()
        try:
            with path.open("rb") as file:
                found = os.fstat(file.fileno())
                if found.st_ino != inode:
                    if inode >= 0:
                        yield from _rest(run, inode, position)
                    position, inode = 0, found.st_ino
                file.seek(position)
                content = file.read()
        except FileNotFoundError:
            content = b""
        whole = content[: content.rfind(b"\n") + 1]
        yield from _entries(whole.splitlines())
        position += len(whole)
        if last:
            return
        time.sleep(_POLL_SECONDS)


def entry_text(entry: Entry) -> str:
    """An entry as a line for people."""
    more = [f"{name}={_short(value)}" for name, value in entry.items() if name not in _SAID_ALREADY]
    said = f" ({', '.join(more)})" if more else ""
    when = str(entry.get("time", ""))[:19].replace("T", " ")
    return f"{when} {str(entry.get('level', '')).upper():<7} {entry.get('message', '')}{said}"


def _short(value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 40 else f"{text[:16]}…"


def _files(run: Path) -> list[Path]:
    """The log's files, oldest first; the one that is written last."""
    older = [run / f"{LOG}.{number}" for number in range(OLDER_FILES, 0, -1)]
    return [*(path for path in older if path.exists()), run / LOG]


def _of(path: Path) -> Iterator[Entry]:
    try:
        with path.open("rb") as file:
            yield from _entries(file)
    except FileNotFoundError:
        return


def _rest(run: Path, inode: int, position: int) -> Iterator[Entry]:
    """What was written to a file after it was last read, which has another name by now."""
    for path in _files(run)[:-1]:
        try:
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_ino == inode:
                    file.seek(position)
                    yield from _entries(file)
        except FileNotFoundError:
            continue


def _entries(lines: Any) -> Iterator[Entry]:
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            yield entry
