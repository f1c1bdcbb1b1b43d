"""The journal: every decision of the coordinator, in SQLite with full sync, before it takes effect.

Attempts of a round, the updates received with their digests, and the cohort a round closed with; from it follows
exactly what went into each model.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import RunFolderError
from common.wire.tensors import Stored

_SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
    id INTEGER PRIMARY KEY,
    at REAL NOT NULL,
    event TEXT NOT NULL,
    kind TEXT,
    round INTEGER,
    attempt INTEGER,
    site TEXT,
    detail TEXT NOT NULL DEFAULT '{}'
)
"""


class Journal:
    """Append-only; safe to use from several threads.

    Raises
    ------
    RunFolderError : from every method: the file cannot be opened or written, or is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        try:
            self._database = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=FULL")
            self._database.execute(_SCHEMA)
        except sqlite3.Error as error:
            raise RunFolderError(f"{path}: the journal cannot be opened ({error}); restore it from a backup") from error

    def opened(self, kind: str, number: int, sites: Sequence[str], broadcast: bytes) -> None:
        """A round was opened to these sites with this broadcast."""
        self._append("opened", kind, number, detail={"sites": list(sites), "broadcast": broadcast.hex()})

    def received(self, kind: str, number: int, attempt: int, site: str, stored: Stored) -> None:
        """A site's update is on disk; from here on it is included."""
        detail = {"sha256": stored.digest.hex(), "bytes": stored.size, "file": stored.path.name}
        self._append("received", kind, number, attempt, site, detail)

    def acknowledged(self, kind: str, number: int, broadcast: bytes) -> dict[str, dict[str, Any]]:
        """By site, what was received for this round of this broadcast, in this process or one before it."""
        found: dict[str, dict[str, Any]] = {}
        same = False
        for event in self.events():
            if (event["kind"], event["round"]) != (kind, number):
                continue
            if event["event"] == "opened":
                same = event["broadcast"] == broadcast.hex()
            elif event["event"] == "received" and same:
                found[event["site"]] = event
        return found

    def retried(self, kind: str, number: int, attempt: int, missing: Sequence[str]) -> None:
        """The quorum was not met at the deadline; this attempt waits for these sites."""
        self._append("retried", kind, number, attempt, detail={"missing": list(missing)})

    def closed(self, kind: str, number: int, attempt: int, included: Sequence[str]) -> None:
        """The round is over; these sites are summed, in this order."""
        self._append("closed", kind, number, attempt, detail={"included": list(included)})

    def note(self, event: str, **detail: Any) -> None:
        """Anything else worth keeping: a start, an end, a publication."""
        self._append(event, None, None, detail=detail)

    def events(self, event: str | None = None) -> list[dict[str, Any]]:
        """What was recorded, oldest first, all or of one event."""
        query = "SELECT at, event, kind, round, attempt, site, detail FROM events"
        where, values = (" WHERE event = ?", (event,)) if event else ("", ())
        try:
            with self._lock:
                rows = self._database.execute(f"{query}{where} ORDER BY id", values).fetchall()
        except sqlite3.Error as error:
            raise RunFolderError(
                f"{self._path}: the journal cannot be read ({error}); restore it from a backup"
            ) from error
        names = ("at", "event", "kind", "round", "attempt", "site")
        return [{**dict(zip(names, row, strict=False)), **json.loads(row[-1])} for row in rows]

    def close(self) -> None:
        """Release the file."""
        self._database.close()

    def _append(
        self,
        event: str,
        kind: str | None,
        number: int | None,
        attempt: int | None = None,
        site: str | None = None,
        detail: dict[str, Any] | None = None,
    ) -> None:
        row = (time.time(), event, kind, number, attempt, site, json.dumps(detail or {}))
        try:
            with self._lock:
                self._database.execute(
                    "INSERT INTO events (at, event, kind, round, attempt, site, detail) VALUES (?, ?, ?, ?, ?, ?, ?)",
                    row,
                )
        except sqlite3.Error as error:
            raise RunFolderError(
                f"{self._path}: the journal cannot be written ({error}); free space and start the coordinator "
                "again with "
                "the same command"
            ) from error
