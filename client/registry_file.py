"""The registry's file: SQLite, one file at the site, readable by its owner alone. Text and numbers, never pixels.

Rows are JSON where nothing is searched for in them. Several processes may use the file at once: readers see the state
before or after a writer's transaction (write-ahead log), writers wait for each other.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.errors import RunFolderError

_APPLICATION = 0x57524454  # "WRDT", so that no other program's file is taken for a registry
_VERSION = 1
_WAIT_SECONDS = 30.0
_SCHEMA = (
    """CREATE TABLE data_sets (
        name TEXT PRIMARY KEY, path TEXT NOT NULL, layout TEXT NOT NULL, label_map TEXT, arrangement TEXT NOT NULL,
        findings TEXT NOT NULL, added_at REAL NOT NULL)""",
    """CREATE TABLE cases (
        data_set TEXT NOT NULL REFERENCES data_sets (name) ON DELETE CASCADE, name TEXT NOT NULL,
        patient TEXT NOT NULL, images TEXT NOT NULL, label TEXT, files TEXT NOT NULL,
        PRIMARY KEY (data_set, name))""",
    # `asked` is what the case was examined for: a study's requirements, or nothing in particular.
    """CREATE TABLE examinations (
        data_set TEXT NOT NULL, name TEXT NOT NULL, asked TEXT NOT NULL, facts TEXT, findings TEXT NOT NULL,
        PRIMARY KEY (data_set, name, asked),
        FOREIGN KEY (data_set, name) REFERENCES cases (data_set, name) ON DELETE CASCADE)""",
    f"PRAGMA application_id = {_APPLICATION}",
    f"PRAGMA user_version = {_VERSION}",
)


class RegistryFile:
    """An open registry; safe to use from several threads.

    Raises
    ------
    RunFolderError
        From the constructor and `transaction`: the file cannot be opened or written, is damaged, or is no registry of
        this version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        with self._guarded():
            try:
                os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            except OSError as error:
                raise RunFolderError(
                    f"{path}: the registry cannot be opened ({error.strerror}); choose another --registry, or give "
                    "this user the rights to its folder"
                ) from error
            self._database = sqlite3.connect(path, timeout=_WAIT_SECONDS, isolation_level=None, check_same_thread=False)
            try:
                self._prepare()
                self._close_to_others()
            except BaseException:
                self._database.close()
                raise

    def close(self) -> None:
        """Ends the use of the file."""
        with self._lock:
            self._database.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All of the block's statements or none of them take effect."""
        with self._lock, self._guarded():
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
                self._database.execute("COMMIT")
            except BaseException:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise

    def rows(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        """The result of a query."""
        with self._lock, self._guarded():
            return self._database.execute(statement, values).fetchall()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise RunFolderError(
                f"{self.path}: the registry cannot be used ({error}); see that the disk has space and is no network "
                "drive, and that no other command has held it for long, then try again"
            ) from error
        except sqlite3.DatabaseError as error:
            raise self._damaged(str(error)) from error

    def _damaged(self, reason: str) -> RunFolderError:
        return RunFolderError(
            f"{self.path}: the registry is damaged or no registry ({reason}); move it away and add the data sets again "
            "with `wardround-site data add`: images and labels are not touched by it"
        )

    def damaged(self, error: Exception) -> RunFolderError:
        """What to raise where a row does not hold what was written."""
        return self._damaged(f"{type(error).__name__} in a row")

    def _close_to_others(self) -> None:
        """Only now that the file is known to be a registry: another program's keeps its rights."""
        try:
            for path in (self.path, *(self.path.with_name(self.path.name + end) for end in ("-wal", "-shm"))):
                if path.exists() and path.stat().st_mode & 0o077:
                    path.chmod(0o600)
        except OSError as error:
            raise RunFolderError(
                f"{self.path}: the registry can be read by others, and not be closed to them ({error.strerror}); "
                "choose another --registry"
            ) from error

    def _prepare(self) -> None:
        database = self._database
        database.execute("PRAGMA foreign_keys = ON")
        application, version = self._identity()
        if (application, version) == (0, 0):
            self._refuse_tables()  # before the first change
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("BEGIN IMMEDIATE")
            # Another process may have been first.
            if self._identity() == (0, 0):
                for statement in _SCHEMA:
                    database.execute(statement)
            database.execute("COMMIT")
            application, version = self._identity()
        if application != _APPLICATION:
            raise self._damaged("it is another program's file")
        if version != _VERSION:
            raise RunFolderError(
                f"{self.path}: the registry is of version {version}, this Wardround reads version {_VERSION}; use the "
                "Wardround it was made with, or move it away and add the data sets again"
            )

    def _refuse_tables(self) -> None:
        self._database.execute("BEGIN")  # so that both are read from one state
        try:
            foreign = self._identity() == (0, 0) and self._database.execute("SELECT 1 FROM sqlite_master").fetchone()
        finally:
            self._database.execute("COMMIT")
        if foreign:
            raise self._damaged("it holds another program's tables")

    def _identity(self) -> tuple[int, int]:
        application = self._database.execute("PRAGMA application_id").fetchone()[0]
        return int(application), int(self._database.execute("PRAGMA user_version").fetchone()[0])
