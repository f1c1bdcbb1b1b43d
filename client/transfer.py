"""Broadcasts down, updates up: files over the two streaming calls, from the byte on where the last attempt ended."""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from client.room import MakeRoom, no_room, with_room
from common.disk import cannot_write
from common.errors import RunFolderError, WireError
from common.wire import federation_pb2 as pb
from common.wire.partial import PartialBlob, disk_hit
from common.wire.tensors import (
    CHUNK_BYTES,
    PARTIAL_SUFFIX,
    Array,
    decode,
    read_tensors,
    specs_of,
)

_log = logging.getLogger("wardround.site")
_Step = Callable[[], None]


def _nothing() -> None:
    pass


class BroadcastStore:
    """Downloads broadcasts and keeps the newest on disk: a round on the same weights needs no second download.

    Parameters
    ----------
    folder : of one site; made when something is written. Other files in it are removed.
    make_room : called where the disk is too full for a broadcast, whose download then goes on.

    Attributes
    ----------
    seconds : how long the last `fetch` took.
    received : how many bytes came in it.
    """

    def __init__(self, folder: Path, make_room: MakeRoom = no_room) -> None:
        self.folder = folder
        self._make_room = make_room
        self._digest = b""
        self._tensors: list[Array] = []
        self.seconds = 0.0
        self.received = 0

    def fetch(self, stub: Any, envelope: pb.Envelope, task: pb.Task, step: _Step = _nothing) -> list[Array]:
        """The tensors of the task's broadcast, scalars not among them: views of the file.

        `step()` is called before each piece and may raise to end the download; what is here by then stays.

        Raises
        ------
        WireError : what arrived is not what the task announced. Fetched again, it goes on, or from its beginning where
            bytes were wrong.
        RunFolderError : the folder cannot be read or written.
        grpc.RpcError : the connection broke, or the round is over.
        """
        started = time.monotonic()
        self.received = 0
        if task.broadcast.sha256 != self._digest:
            self._digest, self._tensors = b"", []
            self._tensors = self._stored(task.broadcast)
            if not self._tensors:
                with_room(lambda: self._download(stub, envelope, task, step), self._make_room)
                self._tensors = read_tensors(self._path(task.broadcast))
            self._digest = task.broadcast.sha256
            disk_hit("site.broadcast", self._path(task.broadcast))
        self.seconds = time.monotonic() - started
        return self._tensors

    def clear(self) -> None:
        """Removes what is here; nothing of it is needed any more."""
        self._digest, self._tensors = b"", []
        self._remove_all_but()

    def _stored(self, blob: pb.Blob) -> list[Array]:
        path = self._path(blob)
        if not path.exists():
            return []
        try:
            return read_tensors(path, digest=blob.sha256)
        except WireError as error:  # torn by a power cut, or damaged since
            _log.warning("%s: the broadcast that was kept is damaged, and is fetched again (%s)", path, error)
            return []

    def _download(self, stub: Any, envelope: pb.Envelope, task: pb.Task, step: _Step) -> None:
        path = self._path(task.broadcast)
        partial = path.with_suffix(PARTIAL_SUFFIX)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(path, error) from error
        self._remove_all_but(partial)
        half = task.broadcast.size // 2
        with PartialBlob(partial, task.broadcast.sha256, task.broadcast.size) as blob:
            if not blob.whole:
                request = pb.DownloadRequest(
                    envelope=envelope, task=task.name, sha256=task.broadcast.sha256, offset=blob.position
                )
                call = stub.Download(request)
                try:
                    for chunk in call:
                        step()
                        before = blob.position
                        blob.write(chunk.data)
                        self.received += len(chunk.data)
                        if before <= half < blob.position:
                            disk_hit("site.broadcast_partial", partial)
                finally:
                    call.cancel()
            blob.commit(path, durable=False)  # a file that a power cut tears is found by its digest, and fetched again

    def _remove_all_but(self, *kept: Path) -> None:
        try:
            for path in self.folder.iterdir() if self.folder.exists() else ():
                if path not in kept:
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise cannot_write(self.folder, error) from error

    def _path(self, blob: pb.Blob) -> Path:
        return self.folder / f"{blob.sha256.hex()}.tensors"


def join_scalars(tensors: Sequence[Array], scalars: bytes, expected: Sequence[Any]) -> list[Array]:
    """Puts the scalars of a task back between the tensors, by the plan's order, and checks every type.

    Raises
    ------
    WireError : a tensor or scalar is not of the type the plan says.
    """
    large, small = iter(tensors), iter(decode(scalars))
    joined = [next(large if spec.shape else small, None) for spec in expected]
    found = specs_of([value for value in joined if value is not None])
    if found != tuple(expected):
        raise WireError(
            "broadcast: its tensors are not of the types that the plan says; are both sides of one version?"
        )
    return [value for value in joined if value is not None]


def upload(
    stub: Any,
    header: pb.UploadHeader,
    path: Path,
    *,
    begins: _Step = _nothing,
    asked: Callable[[int], None] = lambda position: None,
    ends: _Step = _nothing,
    step: _Step = _nothing,
) -> pb.UploadReceipt:
    """Sends what the coordinator lacks of the update in a file, and returns its receipt: it is on its disk then, or not
    taken.

    Parameters
    ----------
    header : says which update it is.
    path : the update's blob.
    begins : called when the coordinator asks for bytes: it does not hold the update.
    asked : called after it, with the position of the first byte that is asked for, before any goes out.
    ends : called before the last bytes go out: from here on it may hold it.
    step : called before each piece. An exception of any of the four ends the upload and is raised.

    Raises
    ------
    WireError : the update arrived damaged, or the receipt is of another study, plan, site or task.
    RunFolderError : the file cannot be read.
    grpc.RpcError : the connection broke.
    """
    positions: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    failures: list[BaseException] = []

    def messages() -> Iterator[pb.UploadMessage]:  # read by a thread of gRPC's, where an exception would be lost
        yield pb.UploadMessage(header=header)
        position = positions.get()
        if position is None:
            return
        try:
            for piece in _pieces(path, position, header.blob.size, ends, step):
                yield pb.UploadMessage(data=piece)
            disk_hit("site.uploaded", path)
        except GeneratorExit:
            raise
        except BaseException as error:
            failures.append(error)
            call.cancel()

    call = stub.Upload(messages())
    try:
        receipt = _receipt(call, header, positions, begins, asked)
    finally:
        positions.put(None)
        call.cancel()
        if failures:
            raise failures[0]
    if receipt.envelope != header.envelope or receipt.task != header.task:
        raise WireError("receipt: it is of another study, plan, site or task; the update counts as not taken")
    if receipt.again:
        raise WireError(f"update: {receipt.reason}")
    return receipt


def was_taken(stub: Any, header: pb.UploadHeader, seconds: float | None = None) -> bool:
    """Whether the coordinator has taken this update; nothing of it is sent. `seconds`: how long it may take.

    Raises
    ------
    grpc.RpcError : the connection broke.
    """
    ended: queue.SimpleQueue[None] = queue.SimpleQueue()

    def messages() -> Iterator[pb.UploadMessage]:
        yield pb.UploadMessage(header=header)
        ended.get()

    call = stub.Upload(messages(), timeout=seconds)
    try:
        for reply in call:
            return bool(reply.receipt.accepted)  # of a position, which asks for bytes: no
        return False
    finally:
        ended.put(None)
        call.cancel()


def _receipt(
    replies: Any,
    header: pb.UploadHeader,
    positions: queue.SimpleQueue[int | None],
    begins: _Step,
    asked: Callable[[int], None],
) -> pb.UploadReceipt:
    for reply in replies:
        if reply.WhichOneof("body") == "receipt":
            receipt: pb.UploadReceipt = reply.receipt
            return receipt
        if reply.position >= header.blob.size:
            raise WireError(f"update: of its {header.blob.size} bytes the coordinator asked for byte {reply.position}")
        begins()
        asked(reply.position)
        positions.put(reply.position)
    raise WireError("update: the coordinator ended the upload without a receipt")


def _pieces(path: Path, position: int, size: int, ends: _Step, step: _Step) -> Iterator[bytes]:
    """The bytes of a file from a position on; one piece is in memory at a time."""
    half = size // 2
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(position)
            while position < size:
                step()
                piece = file.read(CHUNK_BYTES)
                if not piece:
                    raise RunFolderError(f"{path}: the update is shorter than it was; check the disk")
                begin, position = position, position + len(piece)
                if position >= size:
                    ends()
                yield piece
                if begin <= half < position:
                    disk_hit("site.upload_partial", path)
    except OSError as error:
        raise RunFolderError(f"{path}: the update cannot be read ({error}); check the folder and the disk") from error
