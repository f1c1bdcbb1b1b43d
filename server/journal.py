"""The journal: every decision of the coordinator, in SQLite with full sync, before it takes effect.

Attempts of a round, the updates received with their digests, the cohort a round closed with, and the digests of what
was saved; `server.replay` says what follows from it. Each event has a checksum, so that a changed bit is noticed.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from common import failpoints
from common.errors import RunFolderError
from common.wire.tensors import Stored
from server.replay import RunHistory, replay

_SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
    id INTEGER PRIMARY KEY,
    at REAL NOT NULL,
    event TEXT NOT NULL,
    kind TEXT,
    round INTEGER,
    attempt INTEGER,
    site TEXT,
    detail TEXT NOT NULL DEFAULT '{}',
    sum INTEGER
)
"""
_COLUMNS = "at, event, kind, round, attempt, site, detail"
_NAMES = ("at", "event", "kind", "round", "attempt", "site")
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT)
_DISK = (
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_AUTH,
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_NOMEM,
)


class JournalDamagedError(RunFolderError):
    """The file is there, and is no journal any more, or has events that are not as they were written."""


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
            try:
                _check(self._database, path)
                self._database.execute("PRAGMA journal_mode=WAL")
                self._database.execute("PRAGMA synchronous=FULL")
                # Every event goes on to the file that has checksums: a changed bit in the log loses its end silently.
                self._database.execute("PRAGMA wal_autocheckpoint=1")
                self._database.execute(_SCHEMA)
                if "sum" not in _columns(self._database):  # of a version without checksums
                    self._database.execute("ALTER TABLE events ADD COLUMN sum INTEGER")
                self.events()
            except BaseException:
                self._database.close()
                raise
        except sqlite3.Error as error:
            raise _failure(path, error, "opened") from error

    def opened(self, kind: str, number: int, sites: Sequence[str], broadcast: bytes) -> None:
        """A round was opened to these sites with this broadcast."""
        self._append("opened", kind, number, detail={"sites": list(sites), "broadcast": broadcast.hex()})

    def received(
        self,
        kind: str,
        number: int,
        attempt: int,
        site: str,
        stored: Stored,
        *,
        cases: int = 0,
        download: float = 0.0,
        work: float = 0.0,
        upload: float = 0.0,
        epsilon: float | None = None,
    ) -> None:
        """A site's update is on disk; from here on it is included. Times are in seconds."""
        detail = {"sha256": stored.digest.hex(), "bytes": stored.size, "file": stored.path.name, "cases": cases}
        detail |= {"download": round(download, 3), "work": round(work, 3), "upload": round(upload, 3)}
        if epsilon is not None:
            detail["epsilon"] = epsilon
        self._append("received", kind, number, attempt, site, detail)

    def refused(self, kind: str, number: int, attempt: int, site: str, reason: str, digest: bytes) -> None:
        """A site's update is not taken in this attempt; the site is named for it."""
        self._append("refused", kind, number, attempt, site, {"reason": reason, "sha256": digest.hex()})

    def late(self, kind: str, number: int, attempt: int, site: str, reason: str, digest: bytes) -> None:
        """An update came for a round that is closed, or that has one of this site."""
        self._append("late", kind, number, attempt, site, {"reason": reason, "sha256": digest.hex()})

    def spent(self, kind: str, number: int, site: str, epsilon: float) -> None:
        """A site said, with an update of this round that was not taken, what it has spent of its privacy budget."""
        self._append("spent", kind, number, None, site, {"epsilon": epsilon})

    def retried(self, kind: str, number: int, attempt: int, missing: Sequence[str]) -> None:
        """The quorum was not met at the deadline; this attempt waits for these sites."""
        self._append("retried", kind, number, attempt, detail={"missing": list(missing)})

    def closed(self, kind: str, number: int, attempt: int, included: Sequence[str]) -> None:
        """The round is over; these sites are summed, in this order."""
        self._append("closed", kind, number, attempt, detail={"included": list(included)})

    def asked(self, kind: str, number: int, attempt: int, sites: Sequence[str]) -> None:
        """These sites are asked for a secure sum; the number of this attempt is never used again."""
        self._append("asked", kind, number, attempt, detail={"sites": list(sites)})

    def unmasking(self, kind: str, number: int, attempt: int, survivors: Sequence[str]) -> None:
        """The sites are about to be asked to unmask the sum of these; they do so for no other of this round."""
        self._append("unmasking", kind, number, attempt, detail={"survivors": list(survivors)})

    def summed(self, kind: str, number: int, attempt: int, stored: Stored, survivors: Sequence[str], sent: int) -> None:
        """The secure sum of these sites is on disk; `sent` bytes came of each."""
        detail = {"sha256": stored.digest.hex(), "bytes": stored.size, "file": stored.path.name, "sent": sent}
        self._append("summed", kind, number, attempt, detail=detail | {"survivors": list(survivors)})

    def skipped(self, kind: str, number: int, attempt: int, reason: str) -> None:
        """The run goes on without this round, as its sum was lost while it was unmasked."""
        self._append("skipped", kind, number, attempt, detail={"reason": reason})

    def state(self, number: int, stored: Stored) -> None:
        """A round's state is on disk; from here on the run goes on after this round."""
        self._append("state", None, number, detail={"sha256": stored.digest.hex(), "bytes": stored.size})

    def model(self, number: int, stored: Stored) -> None:
        """A round's model is on disk."""
        self._append("model", None, number, detail={"sha256": stored.digest.hex(), "bytes": stored.size})

    def returned(self, number: int) -> None:
        """The run goes on after this round (0: from the beginning), as what was saved later is lost."""
        self._append("returned", None, number)

    def noised(self, number: int, draw: str) -> None:
        """Noise is about to be added to a round's sum; `draw` tells it apart."""
        self._append("noised", "train", number, detail={"draw": draw})

    def ended(self, number: int, reason: str) -> None:
        """The study ends after this round, before its last one."""
        self._append("ended", None, number, detail={"reason": reason})

    def given_up(self, kind: str, number: int, site: str, quorum: int) -> None:
        """A closed round goes on without the lost update of this site; below the quorum it is open again."""
        self._append("given_up", kind, number, None, site, {"quorum": quorum})

    def note(self, event: str, **detail: Any) -> None:
        """Anything else worth keeping: a start, an end, a publication."""
        self._append(event, None, None, detail=detail)

    def events(self, event: str | None = None) -> list[dict[str, Any]]:
        """What was recorded, oldest first, all or of one event."""
        try:
            with self._lock:
                return list(_read(self._database, self._path, event))
        except sqlite3.Error as error:
            raise _failure(self._path, error, "read") from error

    def history(self) -> RunHistory:
        """What follows from the events."""
        return replay(self.events())

    def close(self) -> None:
        """Release the file."""
        with self._lock, suppress(sqlite3.Error):  # every event is on disk; tidying up may fail on a full one
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
            failpoints.hit("journal.before")
            with self._lock:
                _insert(self._database, row)
            failpoints.hit("journal.after")
        except (sqlite3.Error, OSError) as error:
            raise _failure(self._path, error, "written") from error


def read_history(path: Path) -> RunHistory:
    """What follows from a run's journal, for whoever only reads it; an empty history where there is none.

    Raises
    ------
    RunFolderError : it is damaged or cannot be read.
    """
    if not path.exists():
        return RunHistory()
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            return replay(_read(database, path))
    except sqlite3.Error as error:
        raise _failure(path, error, "read") from error


def write_events(path: Path, events: Iterable[dict[str, Any]]) -> None:
    """A new journal of these events, as `events` returns them. Raises RunFolderError."""
    try:
        with closing(sqlite3.connect(path, isolation_level=None)) as database:
            database.execute("PRAGMA synchronous=FULL")
            database.execute(_SCHEMA)
            database.execute("BEGIN")
            for event in events:
                detail = {key: value for key, value in event.items() if key not in _NAMES}
                _insert(database, (*(event[name] for name in _NAMES), json.dumps(detail)))
            database.execute("COMMIT")
    except sqlite3.Error as error:
        raise _failure(path, error, "written") from error


def salvaged(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The events of a damaged journal that can be read and have not changed, oldest first, and how many are lost.

    What is lost at the end nobody can count. `path` may be changed by SQLite: give a copy.
    """
    found: list[dict[str, Any]] = []
    lost = missed = number = 0
    with closing(sqlite3.connect(path)) as database:
        while missed < _GIVE_UP_AFTER:
            number += 1
            try:
                rows = database.execute(f"SELECT {_COLUMNS}, sum FROM events WHERE id = ?", (number,)).fetchall()
                if rows:
                    found.append(_event(rows[0], path))
                    lost, missed = lost + missed, 0
                    continue
            except (sqlite3.Error, RunFolderError, ValueError, OverflowError):
                pass
            missed += 1
    return found, lost


_GIVE_UP_AFTER = 5000  # numbers in a row without an event that can be read: more than a damaged page or ten hold


def _check(database: sqlite3.Connection, path: Path) -> None:
    found = [row[0] for row in database.execute("PRAGMA quick_check(3)")]
    if found != ["ok"]:
        raise _damage(path, "; ".join(map(str, found)).replace("\n", " "))


def _columns(database: sqlite3.Connection) -> list[str]:
    return [row[1] for row in database.execute("PRAGMA table_info(events)")]


def _insert(database: sqlite3.Connection, row: tuple[Any, ...]) -> None:
    database.execute(f"INSERT INTO events ({_COLUMNS}, sum) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (*row, _sum(row)))


def _read(database: sqlite3.Connection, path: Path, event: str | None = None) -> Iterator[dict[str, Any]]:
    known = "sum" if "sum" in _columns(database) else "NULL"
    where, values = (" WHERE event = ?", (event,)) if event else ("", ())
    for row in database.execute(f"SELECT {_COLUMNS}, {known} FROM events{where} ORDER BY id", values).fetchall():
        yield _event(row, path)


def _event(row: tuple[Any, ...], path: Path) -> dict[str, Any]:
    *content, checksum = row
    try:
        if checksum is not None and checksum != _sum(tuple(content)):
            raise ValueError
        return {**dict(zip(_NAMES, content, strict=False)), **json.loads(content[-1])}
    except (ValueError, TypeError):  # a flipped bit makes bytes of a text, too
        raise _damage(path, f"an event {content[1]!r} is not as it was written") from None


def _sum(row: tuple[Any, ...]) -> int:
    return zlib.crc32(json.dumps(row).encode())


def _failure(path: Path, error: sqlite3.Error | OSError, done: str) -> RunFolderError:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the extended codes have their kind in the first byte
    reading = done != "written" and isinstance(error, sqlite3.DatabaseError) and code not in _DISK
    if code in _DAMAGED or (reading and not isinstance(error, sqlite3.ProgrammingError)):
        return _damage(path, str(error))  # a changed bit may make anything of a schema or a text
    todo = "free space, or make the disk writable, and start the coordinator again with the same command"
    return RunFolderError(f"{path}: the journal cannot be {done} ({error}); {todo}")


def _damage(path: Path, what: str) -> JournalDamagedError:
    return JournalDamagedError(
        f"{path}: the journal is damaged ({what}); `wardround repair --run {path.parent} --dry-run` says what can be "
        "saved, `wardround repair` saves it"
    )
