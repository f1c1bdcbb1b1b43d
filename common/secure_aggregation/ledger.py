"""Which rounds a site has begun to unmask: the memory that must outlive the process.

A site unmasks a (study, round) once. It writes so, durably, before the first share leaves; from then on it refuses
every other attempt of that round, whatever became of the first.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from common.disk import cannot_write, sync_folder
from common.errors import RunFolderError
from common.secure_aggregation.refusals import UnmaskingBegunError

UNKNOWN_ATTEMPT: Final = -1
"""Stands for the attempt of an entry that was torn before its number."""

_TORN: Final = re.compile(rb'\{"study": (?P<study>"(?:[^"\\]|\\.)*"), "round": (?P<round>\d+),')


class UnmaskLedger(Protocol):
    """Safe to be shared by all attempts that a site takes part in, in any thread."""

    def begun(self, study: str, round: int) -> int | None:
        """The attempt in which unmasking of the round has begun; None where it has not."""

    def begin(self, study: str, round: int, attempt: int, survivors: Sequence[str]) -> None:
        """Record, durably before it returns, that unmasking begins.

        Raises UnmaskingBegunError where it has begun before, in whatever attempt.
        """


class InMemoryLedger:
    """A ledger that is forgotten with the process: for tests, and nothing else."""

    def __init__(self) -> None:
        self._attempts: dict[tuple[str, int], int] = {}
        self._lock = threading.Lock()

    def begun(self, study: str, round: int) -> int | None:
        """As `UnmaskLedger` says."""
        return self._attempts.get((study, round))

    def begin(self, study: str, round: int, attempt: int, survivors: Sequence[str]) -> None:
        """As `UnmaskLedger` says."""
        with self._lock:
            _refuse_second(self._attempts, study, round)
            self._attempts[study, round] = attempt


@dataclass(frozen=True)
class FileLedger:
    """A ledger in a file of JSON lines, one an entry; other processes may use the file at the same time.

    A process that is killed while it writes leaves a torn last line. Its shares were not sent, yet the round counts as
    begun where the line still names it; a line torn before that is dropped. The next `begin` mends the file.

    Parameters
    ----------
    path
        The file; made with the first entry, mode 0600. Its folder must exist.

    Raises
    ------
    RunFolderError
        From every method: the file cannot be read or written, or a line that is not the last is damaged.
    """

    path: Path

    def begun(self, study: str, round: int) -> int | None:
        """As `UnmaskLedger` says."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RunFolderError(f"{self.path}: cannot be read ({error.strerror}); check its owner") from error
        return self._attempts(content).get((study, round))

    def begin(self, study: str, round: int, attempt: int, survivors: Sequence[str]) -> None:
        """As `UnmaskLedger` says."""
        try:
            with self._locked() as descriptor:
                content = _read_all(descriptor)
                attempts = self._attempts(content)
                self._mend(descriptor, content)
                _refuse_second(attempts, study, round)
                _append(descriptor, _line(study, round, attempt, survivors))
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def _mend(self, descriptor: int, content: bytes) -> None:
        """Replace a torn last line by a whole one that says the same, or by nothing."""
        torn = content.rpartition(b"\n")[2]
        if not torn:
            return
        os.ftruncate(descriptor, len(content) - len(torn))
        if entry := _torn_entry(torn):
            _append(descriptor, _line(*entry, UNKNOWN_ATTEMPT, ()))

    def _attempts(self, content: bytes) -> dict[tuple[str, int], int]:
        *lines, torn = content.split(b"\n")
        attempts = {}
        for number, line in enumerate(lines, start=1):
            match _parsed(line):
                case {"study": str(study), "round": int(round), "attempt": int(attempt)}:
                    attempts[study, round] = attempt
                case _:
                    raise RunFolderError(
                        f"{self.path}:{number}: expected an entry of the unmasking ledger, found a damaged line; "
                        "restore the file: without it the site cannot know which rounds it has unmasked"
                    )
        if entry := _torn_entry(torn):
            attempts.setdefault(entry, UNKNOWN_ATTEMPT)
        return attempts

    @contextmanager
    def _locked(self) -> Iterator[int]:
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            sync_folder(self.path.parent)
            yield descriptor
        finally:
            os.close(descriptor)


def _line(study: str, round: int, attempt: int, survivors: Sequence[str]) -> bytes:
    entry = {"study": study, "round": round, "attempt": attempt, "survivors": list(survivors)}
    return json.dumps(entry).encode() + b"\n"


def _append(descriptor: int, line: bytes) -> None:
    while line:
        line = line[os.write(descriptor, line) :]
    os.fsync(descriptor)


def _read_all(descriptor: int) -> bytes:
    with open(descriptor, "rb", closefd=False) as file:
        return file.read()


def _parsed(line: bytes) -> object:
    try:
        parsed: object = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return parsed


def _torn_entry(torn: bytes) -> tuple[str, int] | None:
    """Study and round of a torn line, where both are whole in it."""
    found = _TORN.match(torn)
    if found is None:
        return None
    study = _parsed(found["study"])
    return (study, int(found["round"])) if isinstance(study, str) else None


def _refuse_second(attempts: dict[tuple[str, int], int], study: str, round: int) -> None:
    attempt = attempts.get((study, round))
    if attempt is not None:
        raise begun_refusal(study, round, attempt)


def begun_refusal(study: str, round: int, attempt: int) -> UnmaskingBegunError:
    """What to raise where unmasking has begun in `attempt`."""
    return UnmaskingBegunError(
        f"study {study!r}, round {round}: this site has begun to unmask it (attempt {attempt}) and takes part in no "
        "other attempt; skip the round"
    )
