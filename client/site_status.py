"""What a site says of itself in its work folder, and the lock by which others see whether it still runs."""

from __future__ import annotations

import fcntl
import json
import logging
import shlex
import shutil
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from client.alerts import site_alerts
from common.disk import is_full
from common.errors import (
    ApprovalError,
    DataError,
    IdentityError,
    NetworkError,
    PlanMismatchError,
    PolicyError,
    PolicyFileError,
    RunFolderError,
    StudyError,
    WardroundError,
)
from common.security.audit import AuditDamagedError
from common.security.expiry import expiry_words
from common.watching.alert import Alert

STOPPED = "stopped"
FAILED = "failed"
FINISHED = "finished"
AGAIN = "Start it again with the same command; it goes on where the study stands."
_NEXT: tuple[tuple[type[BaseException], str], ...] = (
    (StudyError, "Get the coordinator's study file, then start it with that."),
    (DataError, f"Mend the data. {AGAIN}"),
    (NetworkError, "Correct --coordinator, or what answers at that address, then start it again."),
    (IdentityError, "See to this site's identity as the message says, then start it again."),
    (
        PlanMismatchError,
        "Get the coordinator's study file and install its version of Wardround, then start it with these; the same "
        "command would be refused again.",
    ),
    (ApprovalError, "Review the study, approve it if it may run, as the message says, then start the site again."),
    (PolicyError, "Have the study changed, or change this site's policy, then start the site again."),
    (PolicyFileError, "Correct the policy file as the message says, then start the site again."),
    (
        AuditDamagedError,
        "Find out who changed the log, and keep audit.log and audit.head for that. Once both are moved out of the work "
        "folder, start the site again: a new log begins.",
    ),
    (RunFolderError, f"See to the work folder as the message says. {AGAIN}"),
    (WardroundError, f"Remove the cause that the message names. {AGAIN}"),
)
_STAMPED = ("state", "connected")  # `<name>_since` says, as Unix time, when they became what they are
_SAID_OTHERWISE = ("site-failed", "certificate-ending", "budget-ending")  # what `status_text` has lines for
_LOCK_SECONDS = 5.0  # a killed site takes a moment to go, and `wardround-site status` holds the lock for an instant


class SiteStatus:
    """Keeps a site's `status.json`, and holds its work folder from its making until `end`.

    The system releases the lock of a process that ends in whatever way; so a status can be told from what is left of
    one.

    Raises
    ------
    RunFolderError : the folder cannot be made or written, or another site runs with it.
    """

    def __init__(self, folder: Path, study: str, site: str) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(
                f"{folder}: the work folder cannot be made ({error.strerror}); choose another --work"
            ) from error
        self._path = _status_path(folder)
        self._fields: dict[str, Any] = {"study": study, "site": site, "state": "starting"}
        self._writing = threading.Lock()  # what the site does and how its line stands come from two threads
        self._lock: IO[str] | None = None
        try:
            self._lock = _locked(folder)
            self._write()
        except OSError as error:
            raise RunFolderError(
                f"{self._path}: cannot be written ({error.strerror}); choose another --work, or free space"
            ) from error

    def __call__(self, fields: dict[str, Any]) -> None:
        """Takes over these fields; the others stay."""
        with self._writing:
            if self._lock is None:  # whoever works on after the end is not heard any more
                return
            for name in _STAMPED:
                if name in fields and fields[name] != self._fields.get(name):
                    self._fields[f"{name}_since"] = time.time()
            self._fields.update(fields)
            self._try_to_write()

    def end(self, error: BaseException | None = None) -> None:
        """The site has ended, for this reason if it was one; once it has, nothing more happens here."""
        if self._lock is None:
            return
        with self._writing:
            if isinstance(error, Exception) and self._fields["state"] != FINISHED:
                self._fields = _failed(self._fields, error)
            else:
                self._fields = _ended(self._fields)
            try:
                self._write()
            except OSError:  # of a full disk, as a rule, and that is just what is to be read here
                self._write_over()
            self._lock.close()
            self._lock = None

    def __enter__(self) -> SiteStatus:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.end(error)

    def _try_to_write(self) -> None:
        try:
            self._write()
        except OSError as error:  # status is for watching; the site goes on without
            logging.warning("%s: cannot be written (%s)", self._path, error.strerror)

    def _write_over(self) -> None:
        """Writes into the file's own blocks, which are there on a full disk too."""
        try:
            with self._path.open("r+b") as file:
                file.write(json.dumps(self._fields).encode().ljust(self._path.stat().st_size))  # JSON may end in blanks
        except OSError as error:
            logging.warning("%s: cannot be written (%s)", self._path, error.strerror)

    def _write(self) -> None:
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(self._fields))
        partial.replace(self._path)


def read_status(folder: Path) -> dict[str, Any]:
    """What the site of this work folder last said, and `running`: whether it is alive now.

    Of a site that is not, `state` is ``stopped`` or ``failed`` (`last_state` says where, `notice` why, and `next_step`
    what to do), or ``finished``. `disk_free` is of the work folder's disk; `alerts` are those of `client.alerts`.

    Raises
    ------
    RunFolderError : no site was started here, or its status cannot be read.
    """
    path = _status_path(folder)
    try:
        # The lock first: what a site says while it ends is then never taken for what a killed one left.
        running = _is_locked(folder)
        fields: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path}: no status there; give the --work folder of a site that was started") from error
    found = {**(fields if running else _ended(fields)), "running": running, "disk_free": _free(folder)}
    return {**found, "alerts": [asdict(one) for one in site_alerts(found, now=time.time(), disk_free=_free(folder))]}


def status_text(status: dict[str, Any]) -> str:
    """A status of `read_status` in words: what the site does, and what to do where it has stopped."""
    batch = f", batch {status['batch']} of {status['batches']}" if status.get("batches") else ""
    where = f", round {status['round']}{batch}" if "round" in status else ""
    state = status["state"]
    if state in (STOPPED, FAILED):
        state += f", last seen {status['last_state']}"
    lines = [f"{status['site']} in study {status['study']}: {state}{where}"]
    if privacy := status.get("privacy"):
        lines.append(
            f"privacy: epsilon {privacy['epsilon']:.2f} of {privacy['budget']:g} spent in this study, at delta "
            f"{privacy['delta']:g}; it protects {privacy['protects']}"
        )
    if words := expiry_words(status.get("certificate_expires"), time.time()):
        lines.append(
            f"this site's certificate {words}; renew it with `wardround-site rotate --identity "
            f"{shlex.quote(status.get('identity', 'DIR'))}`"
        )
    lines += [Alert(**one).text() for one in status.get("alerts") or () if one["code"] not in _SAID_OTHERWISE]
    if status.get("notice"):
        lines.append(status["notice"])
    if status.get("next_step", lines[-1]) != lines[-1]:
        lines.append(status["next_step"])
    return "\n".join(lines)


def _free(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _ended(fields: dict[str, Any]) -> dict[str, Any]:
    """The last words of a site that runs no more."""
    if fields["state"] in (STOPPED, FAILED, FINISHED):
        return fields
    return {**fields, "state": STOPPED, "last_state": fields["state"], "notice": AGAIN, "next_step": AGAIN}


def _failed(fields: dict[str, Any], error: Exception) -> dict[str, Any]:
    """The last words of a site that this error ended."""
    if isinstance(error, WardroundError):
        reason = str(error)
        todo = next(step for kind, step in _NEXT if isinstance(error, kind))
        if is_full(error):
            todo = f"Free space on the disk of the work folder. {AGAIN}"
    else:
        reason = f"{type(error).__name__}: {error}; this is a defect of Wardround"
        todo = f"Keep its log and report it. {AGAIN}"
    return {**fields, "state": FAILED, "last_state": fields["state"], "notice": reason, "next_step": todo}


def _status_path(folder: Path) -> Path:
    return folder / "status.json"


def _lock_path(folder: Path) -> Path:
    return folder / "site.lock"


def _locked(folder: Path) -> IO[str]:
    """The lock, which whoever holds the file open holds. Raises RunFolderError where another site does."""
    file = _lock_path(folder).open("w")
    end = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > end:
                file.close()
                raise RunFolderError(
                    f"{folder}: another site runs with this work folder; stop it first, or give each its own --work"
                ) from None
        time.sleep(0.05)


def _is_locked(folder: Path) -> bool:
    try:
        with _lock_path(folder).open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False
