"""The audit log: what a coordinator or a site did, in entries that are chained by hashes and never changed.

A line is one entry, JSON with sorted keys: ``sequence`` (from 1), ``time`` (UTC), ``actor``, ``event``, ``details``,
``previous`` (the hash of the entry before; zeros in the first) and ``hash`` (SHA-256 over all the others). It is on the
disk when `AuditLog.record` returns. What is sent, taken or decided is recorded before it happens: a process that is
killed may have recorded something that it does once more, and records again, but never did what is not in the log.

At the end of a round the head of the chain is signed: an entry ``head-signed``, of which a copy lies in ``audit.head``.
So a log that was cut off, or written anew, does not fit its signed head. Who can also put back an older ``audit.head``
can only be found out by a copy of it that lies elsewhere.

    >>> first = Entry.after(None, "site north", "started", {"study": "nuclei"}, "2026-01-01T00:00:00.000000+00:00")
    >>> second = Entry.after(first, "site north", "stopped", {}, "2026-01-01T00:00:01.000000+00:00")
    >>> Entry.parse(second.line()) == second, second.previous == first.hash
    (True, True)
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import errno
import fcntl
import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from common.disk import cannot_write, is_full
from common.errors import RunFolderError
from common.security.audit_files import HEAD, LOG
from common.security.signing import Signer

HEAD_SIGNED: Final = "head-signed"
REPAIRED: Final = "repaired"

HEAD_PURPOSE: Final = "audit head"
"""What the signature of a head is for (`common.security.signing`)."""

_BEGINNING: Final = "0" * 64
_MOST_BYTES: Final = 2**16  # of a line


class AuditDamagedError(RunFolderError):
    """An audit log was changed, or has a gap."""


@dataclass(frozen=True)
class Entry:
    """One line of a log; see the module."""

    sequence: int
    time: str
    actor: str
    event: str
    details: Mapping[str, Any]
    previous: str
    hash: str

    @staticmethod
    def after(before: Entry | None, actor: str, event: str, details: Mapping[str, Any], time: str) -> Entry:
        """The entry that follows another; None: the first."""
        sequence, previous = (1, _BEGINNING) if before is None else (before.sequence + 1, before.hash)
        return Entry(
            sequence, time, actor, event, details, previous, _hash(sequence, time, actor, event, details, previous)
        )

    @staticmethod
    def parse(line: bytes) -> Entry:
        """An entry from its line, without what ends it. Raises ValueError where it is not exactly as it was written."""
        content = json.loads(line)
        entry = Entry(**content) if isinstance(content, dict) else None
        if entry is None or entry.line() != line or entry.hash != _hash(*_hashed(entry)):
            raise ValueError("it is not as it was written")
        return entry

    def line(self) -> bytes:
        """The entry as it is stored, without what ends its line."""
        return _json({name: getattr(self, name) for name in self.__dataclass_fields__})

    @property
    def when(self) -> datetime.datetime:
        """The time as a value. Raises ValueError where it is none."""
        return datetime.datetime.fromisoformat(self.time)


@dataclass(frozen=True)
class Tail:
    """A log up to its end.

    Attributes
    ----------
    last, signed : the last entry, and the last that signs a head; None where there is none.
    size : bytes of whole lines.
    torn : what lies behind them, of an entry that was being written when its process ended.
    """

    last: Entry | None
    signed: Entry | None
    size: int
    torn: bytes


class Audit:
    """Where events are recorded. This one keeps nothing: for tests and benchmarks, and commands without a folder."""

    def record(self, event: str, **details: Any) -> None:
        """Adds an entry: what is about to happen, with plain values as details.

        Raises
        ------
        RunFolderError : it cannot be written.
        """

    def sign_head(self) -> None:
        """Signs what was recorded so far, where the owner has a key that signs. Raises as `record`."""

    def close(self) -> None:
        """Lets the file go."""


NO_AUDIT: Final = Audit()


class AuditLog(Audit):
    """The audit log in a folder. One process writes at a time; what others have added is read before.

    Parameters
    ----------
    folder : of the run, or of the site's own files; made where missing.
    actor : who records, such as "site north".
    signer : signs the heads; None where the owner has no key that signs.
    make_room : called where the disk is full: removes what can be made again, returns how many bytes that was.

    Raises
    ------
    AuditDamagedError : an entry does not fit the others, or the log does not reach its signed head.
    RunFolderError : it cannot be read or written.
    """

    def __init__(
        self, folder: Path, actor: str, signer: Signer | None = None, make_room: Callable[[], int] = lambda: 0
    ) -> None:
        self._path, self._head = folder / LOG, folder / HEAD
        self._actor = actor
        self._signer = signer
        self._make_room = make_room
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise cannot_write(self._path, error) from error
        self._tail = Tail(None, None, 0, b"")
        try:
            with self._writing():
                check_head(self._tail, read_head(folder), self._path)
                self._keep_head()
        except BaseException:
            os.close(self._file)
            raise

    def record(self, event: str, **details: Any) -> None:
        """See `Audit`."""
        self._with_room(lambda: self._append(event, details))

    def sign_head(self) -> None:
        """See `Audit`."""
        self._with_room(self._sign)

    def _sign(self) -> None:
        last = self._tail.last
        if self._signer is None or last is None:
            return
        if last.event != HEAD_SIGNED:
            signature = self._signer.sign(HEAD_PURPOSE, head_statement(last.sequence, last.hash))
            details = {
                "sequence": last.sequence,
                "head": last.hash,
                "certificate": self._signer.certificate.decode("ascii"),
                "signature": base64.b64encode(signature).decode("ascii"),
            }
            self._append(HEAD_SIGNED, details)
        self._keep_head()

    def _with_room(self, write: Callable[[], None]) -> None:
        """Writes; where the disk is full, makes room and writes once more."""
        try:
            with self._writing():
                write()
        except RunFolderError as error:
            if not is_full(error) or not self._make_room():
                raise
            with self._writing():
                write()

    def close(self) -> None:
        """See `Audit`."""
        with self._lock:
            if self._file >= 0:
                os.close(self._file)
            self._file = -1

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Holds the log, read to its end; a line that is torn there is cut off, which is recorded."""
        with self._lock:
            try:
                _flock(self._file, fcntl.LOCK_EX)
                try:
                    if os.fstat(self._file).st_size != self._tail.size:
                        with self._path.open("rb") as file:
                            self._tail = read_tail(file, self._path, self._tail)
                        if torn := self._tail.torn:
                            check_head(self._tail, read_head(self._path.parent), self._path)
                            os.ftruncate(self._file, self._tail.size)
                            self._tail = Tail(self._tail.last, self._tail.signed, self._tail.size, b"")
                            self._append(REPAIRED, {"bytes": len(torn), "sha256": hashlib.sha256(torn).hexdigest()})
                    yield
                finally:
                    _flock(self._file, fcntl.LOCK_UN)
            except OSError as error:
                raise cannot_write(self._path, error) from error

    def _append(self, event: str, details: Mapping[str, Any]) -> None:
        if self._tail.signed is self._tail.last:
            self._keep_head()  # it may have failed; only while that head is the last entry may its copy be an older one
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
        entry = Entry.after(self._tail.last, self._actor, event, details, now)
        line = entry.line() + b"\n"
        assert len(line) <= _MOST_BYTES, "details are a few plain values"
        size = self._tail.size
        try:
            written = os.write(self._file, line)
            if written != len(line):
                os.write(self._file, line[written:])  # on a full disk this says so
            os.fsync(self._file)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, size)
            raise
        signed = entry if event == HEAD_SIGNED else self._tail.signed
        self._tail = Tail(entry, signed, size + len(line), b"")

    def _keep_head(self) -> None:
        """Has a copy of the newest signed head beside the log."""
        signed, head = self._tail.signed, read_head(self._path.parent)
        if signed is None or head == signed.line():
            return
        check_head(self._tail, head, self._path)
        descriptor, name = tempfile.mkstemp(dir=self._head.parent, prefix=f".{HEAD}.", suffix=".partial")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(signed.line())
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(self._head)
        finally:
            Path(name).unlink(missing_ok=True)


def head_statement(sequence: int, head: str) -> bytes:
    """What is signed of a head."""
    return _json({"sequence": sequence, "head": head})


def read_head(folder: Path) -> bytes | None:
    """The entry in `audit.head`; None where there is none. Raises RunFolderError where it cannot be read."""
    try:
        return (folder / HEAD).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunFolderError(
            f"{folder / HEAD}: cannot be read ({error.strerror or error}); check its rights"
        ) from error


def read_tail(lines: Any, path: Path, known: Tail | None = None) -> Tail:
    """Reads on to the end of a log that is open for reading, from `known` on; checks the chain.

    Raises
    ------
    AuditDamagedError : a line does not fit; its number is named.
    """
    last, signed, size = (None, None, 0) if known is None else (known.last, known.signed, known.size)
    for entry, end in entries(lines, path, last, size):
        if entry is None:
            return Tail(last, signed, size, _rest(lines, size))
        last, size = entry, end
        if entry.event == HEAD_SIGNED:
            signed = entry
    return Tail(last, signed, size, b"")


def entries(lines: Any, path: Path, last: Entry | None = None, size: int = 0) -> Iterator[tuple[Entry | None, int]]:
    """Every entry that follows `last`, with where its line ends; at last None for a line that is torn.

    Raises
    ------
    AuditDamagedError : a line does not fit; its number is named.
    """
    lines.seek(0, os.SEEK_END)
    if lines.tell() < size:
        raise damaged(path, f"it ends before entry {last.sequence if last is not None else 0}, which was in it")
    lines.seek(size)
    while line := lines.readline(_MOST_BYTES + 1):
        number = 1 if last is None else last.sequence + 1
        if not line.endswith(b"\n"):
            if len(line) > _MOST_BYTES:
                raise damaged(path, f"line {number} is too long")
            yield None, size
            return
        try:
            entry = Entry.parse(line[:-1])
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise damaged(path, f"entry {number} is not as it was written") from None
        if entry.sequence != number or entry.previous != (_BEGINNING if last is None else last.hash):
            raise damaged(path, f"entry {number} does not follow the one before: entries were removed or moved")
        last, size = entry, size + len(line)
        yield entry, size


def check_head(tail: Tail, head: bytes | None, path: Path) -> None:
    """The log reaches the signed head beside it, which is its newest.

    A process that was killed between the two may have left the head of the round before.

    Raises
    ------
    AuditDamagedError : otherwise.
    """
    signed = tail.signed
    if head is None:
        if signed is not None and signed is not tail.last:
            raise damaged(path, f"its head was signed at entry {signed.sequence}, and {HEAD} is not there")
        return
    try:
        kept = Entry.parse(head)
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise damaged(path.with_name(HEAD), "it is not as it was written") from None
    end = tail.last.sequence if tail.last is not None else 0
    if kept.sequence > end:
        raise damaged(
            path, f"it ends at entry {end}, and its head was signed at entry {kept.sequence}: entries were removed"
        )
    if signed is None or kept.sequence > signed.sequence:
        raise damaged(path, f"the head that was signed at entry {kept.sequence} is not in it: entries were changed")
    if kept != signed and signed is not tail.last:
        raise damaged(path, f"{HEAD} is not its newest signed head, that of entry {signed.sequence}")


def damaged(path: Path, what: str) -> AuditDamagedError:
    """What to raise where a log is not what was written."""
    return AuditDamagedError(
        f"{path}: the audit log is not what was written: {what}. Keep {LOG} and {HEAD} for whoever looks into it; once "
        "they are moved out of the folder, a new log begins"
    )


def _flock(descriptor: int, operation: int) -> None:
    try:
        fcntl.flock(descriptor, operation)
    except OSError as error:  # a file system without locks is no reason to keep no log
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise


def _rest(lines: Any, size: int) -> bytes:
    lines.seek(size)
    rest: bytes = lines.read(_MOST_BYTES + 1)
    return rest


def _hashed(entry: Entry) -> tuple[int, str, str, str, Mapping[str, Any], str]:
    return entry.sequence, entry.time, entry.actor, entry.event, entry.details, entry.previous


def _hash(sequence: int, time: str, actor: str, event: str, details: Mapping[str, Any], previous: str) -> str:
    content = {
        "sequence": sequence,
        "time": time,
        "actor": actor,
        "event": event,
        "details": details,
        "previous": previous,
    }
    return hashlib.sha256(_json(content)).hexdigest()


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")
