"""Downloads and uploads that break anywhere, any number of times: on real files, over calls that break as told."""

from __future__ import annotations

import hashlib
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.transfer import BroadcastStore, upload
from common import failpoints
from common.errors import RunFolderError, WireError
from common.wire import federation_pb2 as pb
from common.wire.tensors import CHUNK_BYTES, encode_chunks

TENSOR = np.arange(300, dtype=np.float32)
BLOB = b"".join(encode_chunks([TENSOR]))
ENVELOPE = pb.Envelope(study="digits", plan_digest=b"\x07" * 32, site="alpha")
TASK = pb.Task(
    name=pb.TaskName(kind=pb.TRAIN, round=1, attempt=1),
    broadcast=pb.Blob(sha256=hashlib.sha256(BLOB).digest(), size=len(BLOB)),
)


class Broken(Exception):
    """The line."""


class Replies:
    """What a call gives back; it can be cancelled, as a call can."""

    def __init__(self, replies: Iterator[Any]) -> None:
        self._replies = replies

    def __iter__(self) -> Iterator[Any]:
        return self._replies

    def cancel(self) -> None:
        """Nothing more is read."""


class Line:
    """A coordinator on a line that breaks after the bytes given, one after the other; afterwards it holds.

    An upload's pieces are read by another thread, as gRPC does. What arrived is kept, as the coordinator does.
    """

    def __init__(self, breaks: list[int], piece: int = 100) -> None:
        self._breaks = list(breaks)
        self._piece = piece
        self.sent = 0
        self.held = b""

    def Download(self, request: pb.DownloadRequest) -> Replies:
        def chunks() -> Iterator[pb.Chunk]:
            rest = BLOB[request.offset :]
            whole = len(rest)
            if self._breaks:
                rest = rest[: self._breaks.pop(0)]
            for begin in range(0, len(rest), self._piece):
                data = rest[begin : begin + self._piece]
                self.sent += len(data)
                yield pb.Chunk(data=data)
            if len(rest) < whole:
                raise Broken

        return Replies(chunks())

    def Upload(self, messages: Iterator[pb.UploadMessage]) -> Replies:
        def replies() -> Iterator[pb.UploadReply]:
            header = next(messages).header
            left = self._breaks.pop(0) if self._breaks else None
            yield pb.UploadReply(position=len(self.held))
            received: list[bytes] = []

            def read() -> None:
                for message in messages:
                    received.append(message.data)
                    if left is not None and sum(map(len, received)) > left:
                        return

            reader = threading.Thread(target=read)
            reader.start()
            reader.join()
            self.sent += sum(map(len, received))
            self.held += b"".join(received)[:left]
            if len(self.held) < header.blob.size:
                raise Broken
            yield pb.UploadReply(
                receipt=pb.UploadReceipt(envelope=header.envelope, task=header.task, accepted=self.held == BLOB)
            )

        return Replies(replies())


breaks = st.lists(st.integers(0, len(BLOB)), max_size=6)


@given(breaks=breaks, piece=st.integers(1, 400), restarts=st.booleans())
@settings(deadline=None)
def test_whatever_breaks_a_download_it_ends_whole_and_no_byte_comes_twice(
    breaks: list[int], piece: int, restarts: bool
) -> None:
    with tempfile.TemporaryDirectory() as name:
        line, store = Line(breaks, piece), BroadcastStore(Path(name) / "broadcast")
        for _ in range(len(breaks) + 1):
            try:
                tensors = store.fetch(line, ENVELOPE, TASK)
                break
            except Broken:
                store = BroadcastStore(Path(name) / "broadcast") if restarts else store
        np.testing.assert_array_equal(tensors[0], TENSOR)
        assert line.sent == len(BLOB)
        assert len(list((Path(name) / "broadcast").iterdir())) == 1


def test_a_broadcast_that_fills_the_disk_goes_on_with_the_room_that_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failpoints, "_actions", failpoints.parse("site.broadcast_partial=error:ENOSPC"))

    def make_room() -> int:
        monkeypatch.setattr(failpoints, "_actions", {})
        return 1

    line = Line([])
    (tensor,) = BroadcastStore(tmp_path, make_room).fetch(line, ENVELOPE, TASK)
    np.testing.assert_array_equal(tensor, TENSOR)
    assert line.sent == len(BLOB)


@given(breaks=st.lists(st.integers(0, len(BLOB) - 1), max_size=6))
@settings(deadline=None)
def test_whatever_breaks_an_upload_it_ends_whole(breaks: list[int]) -> None:
    with tempfile.TemporaryDirectory() as name:
        path, line = Path(name) / "update.tensors", Line(breaks)
        path.write_bytes(BLOB)
        said: list[str] = []
        for _ in range(len(breaks) + 1):
            try:
                receipt = upload(
                    line, _header(), path, begins=lambda: said.append("begins"), ends=lambda: said.append("ends")
                )
                break
            except Broken:
                pass
        assert receipt.accepted
        assert said[-2:] == ["begins", "ends"]


def test_an_update_is_sent_in_pieces_of_which_one_is_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "update.tensors"
    size = 4 * CHUNK_BYTES + 1
    path.write_bytes(bytes(size))
    header = _header()
    header.blob.size = size
    pieces: list[int] = []

    class Coordinator(Line):
        def Upload(self, messages: Iterator[pb.UploadMessage]) -> Replies:
            def replies() -> Iterator[pb.UploadReply]:
                next(messages)
                yield pb.UploadReply(position=3)
                pieces.extend(len(message.data) for message in messages)
                yield pb.UploadReply(receipt=pb.UploadReceipt(envelope=ENVELOPE, task=TASK.name, accepted=True))

            return Replies(replies())

    assert upload(Coordinator([]), header, path).accepted
    assert pieces == [CHUNK_BYTES] * 3 + [CHUNK_BYTES - 2]


@pytest.mark.parametrize("when", ["begins", "ends", "step"])
def test_an_exception_of_whoever_is_told_ends_the_upload_and_is_raised(tmp_path: Path, when: str) -> None:
    path = tmp_path / "update.tensors"
    path.write_bytes(BLOB)

    def full() -> None:
        raise RunFolderError("the disk is full")

    with pytest.raises(RunFolderError, match="the disk is full"):
        upload(Line([]), _header(), path, **{when: full})


def test_an_update_that_is_gone_or_shorter_is_an_error_of_the_work_folder(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="cannot be read"):
        upload(Line([]), _header(), tmp_path / "none")
    (tmp_path / "short").write_bytes(BLOB[:-1])
    with pytest.raises(RunFolderError, match="shorter"):
        upload(Line([]), _header(), tmp_path / "short")


def test_a_coordinator_that_says_nothing_has_not_taken_the_update(tmp_path: Path) -> None:
    path = tmp_path / "update.tensors"
    path.write_bytes(BLOB)

    class Silent:
        def Upload(self, messages: Iterator[pb.UploadMessage]) -> Replies:
            return Replies(iter(()))

    with pytest.raises(WireError, match="without a receipt"):
        upload(Silent(), _header(), path)


def _header() -> pb.UploadHeader:
    blob = pb.Blob(sha256=hashlib.sha256(BLOB).digest(), size=len(BLOB))
    return pb.UploadHeader(envelope=ENVELOPE, task=TASK.name, blob=blob)
