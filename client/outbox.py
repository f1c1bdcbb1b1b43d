"""The site's finished update, on its own disk until the coordinator has answered it.

An update may have taken hours. It is written, durable, before anything of it is sent, so that a site that is killed or
cut off sends it and does not train again. There is one at a time: a task of another key comes only where nobody waits
for the older one any more.

Two files, of which the second makes the first count::

    update.tensors   the update, as it is sent
    update.json      the task that it answers, its digest, and what is sent beside it
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.room import MakeRoom, no_room, with_room
from common.errors import RunFolderError, WireError
from common.secure_aggregation.study_session import broadcast_digest
from common.wire import federation_pb2 as pb
from common.wire.partial import disk_hit
from common.wire.tensors import PARTIAL_SUFFIX, Array, BlobWriter, read_tensors, write_tensors

_log = logging.getLogger("wardround.site")


@dataclass(frozen=True)
class TaskKey:
    """What decides the bits of an update: two tasks of one key have the same answer, whatever their attempt.

    Attributes
    ----------
    kind, number : "train" or "evaluate", and the round.
    broadcast, scalars : SHA-256 of the large tensors and of the scalars' blob, as hexadecimal digits.
    """

    kind: str
    number: int
    broadcast: str
    scalars: str

    @property
    def weights(self) -> bytes:
        """What the update is computed from, as sites that sum securely agree on it."""
        return broadcast_digest(bytes.fromhex(self.broadcast), bytes.fromhex(self.scalars))

    @staticmethod
    def of(kind: str, task: pb.Task) -> TaskKey:
        """The key of a task of this kind."""
        scalars = hashlib.sha256(task.scalars).hexdigest()
        return TaskKey(kind, task.name.round, task.broadcast.sha256.hex(), scalars)


@dataclass(frozen=True)
class PendingUpdate:
    """An update that is on this disk.

    Attributes
    ----------
    key : of the task that it answers.
    path, sha256, size : its blob.
    cases : how many it was computed on.
    download, work : seconds spent for it.
    kept : what a `Keeper` holds for it (`Keeper.held`), as hexadecimal digits; they belong together.
    """

    key: TaskKey
    path: Path
    sha256: bytes
    size: int
    cases: int
    download: float
    work: float
    kept: str


class Outbox:
    """Holds one pending update; used by one process at a time.

    All methods raise RunFolderError where the folder cannot be read or written.

    Parameters
    ----------
    folder : of this study, plan and run alone; made when something is written.
    make_room : called where the disk is too full for an update, which is then written once more.
    """

    def __init__(self, folder: Path, make_room: MakeRoom = no_room) -> None:
        self._folder = folder
        self._make_room = make_room
        self._tensors = folder / "update.tensors"
        self._about = folder / "update.json"
        self._pending: PendingUpdate | None = None
        self._read = False

    def pending(self) -> PendingUpdate | None:
        """The update that waits for an answer; one that is torn or damaged is removed and counts as none."""
        if not self._read:
            with self._told("read"):
                for path in self._folder.glob(f".*{PARTIAL_SUFFIX}"):
                    path.unlink(missing_ok=True)
            self._pending = self._load()
            self._read = True
            if self._pending is None:
                self.release()
        return self._pending

    def hold(
        self, key: TaskKey, update: Sequence[Array], *, cases: int, download: float, work: float, kept: bytes
    ) -> PendingUpdate:
        """Writes an update, in the place of one that was here; it is durable when this returns."""
        about = {
            "key": [key.kind, key.number, key.broadcast, key.scalars],
            "cases": cases,
            "download": download,
            "work": work,
            "kept": kept.hex(),
        }
        self._pending = with_room(lambda: self._write(update, about), self._make_room)
        self._read = True
        disk_hit("site.held", self._tensors)
        return self._pending

    def _write(self, update: Sequence[Array], about: dict[str, Any]) -> PendingUpdate:
        with self._told("written"):
            self._folder.mkdir(parents=True, exist_ok=True)
        self.release()
        disk_hit("site.trained", self._tensors)
        stored = write_tensors(self._tensors, update)
        whole = about | {"sha256": stored.digest.hex(), "size": stored.size}
        with BlobWriter(self._about) as writer:
            writer.write(json.dumps(whole).encode())
            writer.commit(writer.digest, writer.size)
        return _parsed(whole, self._tensors)

    def release(self) -> None:
        """The update was answered, or nobody waits for it: removes it."""
        with self._told("written"):
            self._about.unlink(missing_ok=True)
            self._tensors.unlink(missing_ok=True)
        self._pending = None

    def _load(self) -> PendingUpdate | None:
        try:
            with self._told("read"):
                about = json.loads(self._about.read_text()) if self._about.exists() else None
            if about is None:
                return None
            pending = _parsed(about, self._tensors)
            read_tensors(self._tensors, digest=pending.sha256)
        except (ValueError, KeyError, TypeError, AttributeError, WireError) as error:
            _log.warning("%s: the update there cannot be used; its round is done again (%s)", self._folder, error)
            return None
        return pending

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunFolderError(
                f"{self._folder}: the update that waits to be sent cannot be {what} ({error.strerror or error}); check "
                "the folder's rights and the disk's space, or give another --work"
            ) from error


def _parsed(about: dict[str, Any], path: Path) -> PendingUpdate:
    kind, number, broadcast, scalars = about["key"]
    return PendingUpdate(
        TaskKey(str(kind), int(number), str(broadcast), str(scalars)),
        path,
        bytes.fromhex(about["sha256"]),
        int(about["size"]),
        int(about["cases"]),
        float(about["download"]),
        float(about["work"]),
        str(about["kept"]),
    )
