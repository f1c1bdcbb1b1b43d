"""The run folder: where everything that a study's coordinator writes lies, and the lock that keeps a second one out."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import failpoints
from common.disk import cannot_write, sync_folder
from common.errors import RunFolderError, StudyError
from common.study import Study, load_study

STATUS_FORMAT = 1
COORDINATOR = "coordinator"
"""Who acts, in the audit log of a run."""
_LOCK_SECONDS = 1.0  # `is_locked`, in whoever asks for the status, holds the lock for an instant


class RunFolder:
    """Paths within a run folder; see the README for what each file holds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.study = path / "study.yaml"
        self.rounds = path / "rounds.csv"
        self.sites = path / "sites.csv"
        self.holdout = path / "holdout.csv"
        self.journal = path / "journal.sqlite"
        self.state = path / "state"
        self.start = path / "start"
        self.models = path / "models"
        self.updates = path / "updates"
        self.privacy = path / "privacy"
        self.tensorboard = path / "tensorboard"
        self.published = path / "published"
        self.pending = path / "report.pending.json"
        self.report = path / "report.json"
        self.damaged = path / "damaged"
        self.status = path / "status.json"
        self.identity = path / "identity"
        self.pseudonyms = path / "pseudonyms.key"
        self.log = path / "coordinator.log"

    def prepare(self, study: Study) -> None:
        """Make the folder for this study, or check that it is of this study and may be continued.

        Raises
        ------
        RunFolderError : the folder cannot be written, or holds a run of another study.
        """
        try:
            for folder in (self.path, self.state, self.models, self.updates, self.tensorboard, self.published):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(
                f"{self.path}: the run folder cannot be made ({error.strerror}); choose another --run"
            ) from error
        if self.study.exists():
            try:
                existing = load_study(self.study)
            except StudyError as error:
                raise RunFolderError(f"{self.study}: not a study that this version reads ({error})") from error
            if existing != study:
                raise RunFolderError(
                    f"{self.path}: holds a run of a study that differs from the one given; choose another --run, "
                    f"or start it with {self.study}"
                )
        else:
            write_atomically(self.study, study.to_yaml())

    def read_study(self) -> Study:
        """The study of this run. Raises RunFolderError where this is no run folder."""
        if not self.study.exists():
            raise RunFolderError(f"{self.path}: no run here (no study.yaml); give the folder of a run")
        return load_study(self.study)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run. Raises RunFolderError where another process coordinates it."""
        lock = self.path / "coordinator.lock"
        with storing(lock):
            file = lock.open("w")
        with file:
            end = time.monotonic() + _LOCK_SECONDS
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:
                    if time.monotonic() > end:
                        raise RunFolderError(
                            f"{self.path}: another coordinator runs this study; stop it first, or watch it with "
                            f"`wardround status --run {self.path}`"
                        ) from None
                time.sleep(0.05)
            yield

    def sweep(self) -> None:
        """Remove what a process that was killed was still writing. For whoever holds the run."""
        for path in self.partial_files():
            with storing(path):
                path.unlink(missing_ok=True)

    def partial_files(self) -> list[Path]:
        """Files that were still being written when their process was killed."""
        folders = (self.path, self.state, self.models, self.updates, self.start)
        return sorted(path for folder in folders for path in folder.glob(".*.partial") if path.is_file())

    def is_locked(self) -> bool:
        """Whether a coordinator is running here."""
        try:
            with (self.path / "coordinator.lock").open("r") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # never started, or not for this user to read
            return False
        return False

    def is_finished(self) -> bool:
        """Whether the study was trained and published to its end here, and what was published is here still."""
        with contextlib.suppress(RunFolderError):  # a status that cannot be read says nothing
            status = self.read_status()
            return self.report.exists() and status.get("state") == "finished" and bool(status.get("published"))
        return False

    def write_status(self, status: dict[str, Any]) -> None:
        """Replace `status.json`."""
        text = json.dumps({"format": STATUS_FORMAT, **status}, indent=1)
        write_atomically(self.status, text, durable=False, failpoint="status.before")

    def read_status(self) -> dict[str, Any]:
        """What the coordinator last said of itself, `run`: the folder, and `running`: whether it is alive now.

        `published` is None where the version is not here any more.

        Raises
        ------
        RunFolderError : there is no run here, or the status cannot be read.
        """
        if not self.study.exists() and not self.status.exists():
            raise RunFolderError(f"{self.path}: no run here (no study.yaml); give the folder of a run")
        try:
            status: dict[str, Any] = dict(json.loads(self.status.read_text(encoding="utf-8")))
        except FileNotFoundError:
            status = {"format": STATUS_FORMAT, "state": "starting", "sites": {}}
        except (OSError, ValueError, TypeError) as error:
            raise RunFolderError(
                f"{self.status}: cannot be read ({error}); a coordinator that runs writes it anew, else `wardround "
                f"repair --run {self.path}` sets it aside"
            ) from error
        status |= {"running": self.is_locked(), "run": str(self.path)}
        if status.get("published"):  # a folder that was moved or restored is not where it was written
            folder = self.published / Path(status["published"]).name
            status["published"] = str(folder) if folder.is_dir() else None
        return status


def newest_run(given: Path | None) -> RunFolder:
    """The run in this folder; None: the newest in `runs/`. Raises RunFolderError where there is none there."""
    if given is not None:
        return RunFolder(given)
    written = {
        path.parent: path.stat().st_mtime
        for name in ("study.yaml", "status.json")
        for path in Path("runs").glob(f"*/{name}")
    }
    if not written:
        raise RunFolderError(f"{Path('runs').absolute()}: no runs here; give the folder of a run with --run")
    return RunFolder(max(written, key=lambda path: written[path]))


def write_atomically(path: Path, text: str, *, durable: bool = True, failpoint: str | None = None) -> None:
    """Replace the file: readers see the old text or the new one; durable also after a power cut if asked.

    Raises
    ------
    RunFolderError : the file cannot be written; the old one is as it was, and nothing is left beside it.
    """
    with storing(path):
        if failpoint is not None:
            failpoints.hit(failpoint)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(temporary).unlink()
            raise
        if durable:
            sync_folder(path.parent)


def plainly(error: str) -> str:
    """What an error says of damage in a run folder, for people: each path once, no digests, nothing of blobs."""
    text = re.sub(r"expected SHA-256 [0-9a-f]{64}, found [0-9a-f]{64}: ", "", error)
    text = text.replace("; restore it or run the round again", "")
    path, colon, said = text.partition(": ")
    return path + colon + said.replace(f"{path}: ", "")


@contextlib.contextmanager
def storing(path: Path) -> Iterator[None]:
    """Around what writes or removes `path`: a disk that does not take it is a RunFolderError with the way out."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from error


def free_name(path: Path) -> Path:
    """The path, or one beside it that is not taken."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}.{number}")
    return free


def set_aside(path: Path, run: Path) -> Path | None:
    """Moves a file or folder that is damaged to `damaged/` in the run folder; returns where it lies now.

    None where there was nothing. Raises RunFolderError where it cannot be moved.
    """
    if not path.exists():
        return None
    with storing(path):
        folder = run / "damaged"
        folder.mkdir(exist_ok=True)
        target = free_name(folder / path.name)
        path.replace(target)
    return target
