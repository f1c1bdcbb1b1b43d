"""A blob that arrives in pieces over several connections, and across restarts of whoever receives it.

The pieces are appended to one file; how long it is says where to go on. What it holds is hashed again before it grows,
and the digest of the whole is known beforehand: bytes that a crash tore or a disk altered are found at the end, where
the file is dropped and the blob asked for again from its beginning.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from types import TracebackType
from typing import Final

from common.disk import cannot_write, sync_folder
from common.errors import WireError
from common.failpoints import hit
from common.wire.tensors import Stored

_BLOCK: Final = 1024 * 1024


class PartialBlob:
    """The blob of this digest and size, as far as it is at `path`; appends to it. Not for two threads at once.

    Leaving the context closes the file and keeps what it holds.

    Parameters
    ----------
    path : the file that grows; made if there is none, and begun anew if it is longer than the blob.
    digest, size : the SHA-256 of the whole (32 bytes), and its number of bytes.

    Raises
    ------
    RunFolderError : from every method: the folder or disk does not take the file, or it cannot be read.

    Example
    -------
    >>> with PartialBlob(folder / "update.upload", digest, size) as blob:  # doctest: +SKIP
    ...     for piece in pieces_from(blob.position):
    ...         blob.write(piece)
    ...     stored = blob.commit(folder / "update.tensors")
    """

    def __init__(self, path: Path, digest: bytes, size: int) -> None:
        self.path = path
        self._digest = digest
        self._size = size
        self._hash = hashlib.sha256()
        self._position = 0
        try:
            self._file = path.open("ab+", buffering=0)  # what was written is there when this process is killed
        except OSError as error:
            raise cannot_write(path, error) from error
        try:
            self._read_what_is_there()
        except OSError as error:
            self._file.close()
            raise cannot_write(path, error) from error

    def _read_what_is_there(self) -> None:
        if os.fstat(self._file.fileno()).st_size > self._size:
            self._file.truncate(0)
        self._file.seek(0)
        while block := self._file.read(_BLOCK):
            self._hash.update(block)
            self._position += len(block)

    @property
    def position(self) -> int:
        """Bytes that are here, which is where the next piece begins."""
        return self._position

    @property
    def whole(self) -> bool:
        """Whether no byte is missing; whether they are the right ones, `commit` tells."""
        return self._position == self._size

    def write(self, piece: bytes) -> None:
        """Appends a piece of any length. Raises WireError, and drops the file, where the blob would be longer."""
        if self._position + len(piece) > self._size:
            self.drop()
            raise WireError(f"{self.path.name}: expected {self._size} bytes, received more; it was not kept")
        view = memoryview(piece)
        try:
            while view:
                written = self._file.write(view)
                self._hash.update(view[:written])
                self._position += written
                view = view[written:]
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def verify(self) -> None:
        """Raises WireError, and drops the file, unless it is the whole blob."""
        if not self.whole:
            raise WireError(
                f"{self.path.name}: expected {self._size} bytes, received {self._position}: it was torn on its way; "
                "send the rest"
            )
        if self._hash.digest() != self._digest:
            self.drop()
            raise WireError(
                f"{self.path.name}: expected SHA-256 {self._digest.hex()}, received {self._hash.hexdigest()}: it was "
                "damaged on its way or on disk; send it again"
            )

    def commit(self, target: Path, *, durable: bool = True) -> Stored:
        """Verifies the blob and puts it in place; `durable`: also if the power fails right after."""
        self.verify()
        try:
            if durable:
                os.fsync(self._file.fileno())
            hit("blob.before_rename")
            self._file.close()
            self.path.replace(target)
            hit("blob.renamed")
            if durable:
                sync_folder(target.parent)
        except OSError as error:
            raise cannot_write(target, error) from error
        return Stored(target, self._digest, self._size)

    def drop(self) -> None:
        """Removes the file."""
        self._file.close()
        self._position = 0
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def close(self) -> None:
        """Keeps what is here."""
        self._file.close()

    def __enter__(self) -> PartialBlob:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def disk_hit(name: str, path: Path) -> None:
    """A failpoint at which the disk may fail, for `path`: its error is raised as that of a write, RunFolderError."""
    try:
        hit(name)
    except OSError as error:
        raise cannot_write(path, error) from error
