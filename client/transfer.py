"""Broadcasts down, updates up: the tensor format over the two streaming calls."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from common.errors import WireError
from common.wire import federation_pb2 as pb
from common.wire.tensors import CHUNK_BYTES, Array, decode, encode_chunks, encoded_size, specs_of


class BroadcastStore:
    """Downloads broadcasts and keeps the newest in memory: a round on the same weights needs no second download."""

    def __init__(self) -> None:
        self._digest = b""
        self._tensors: list[Array] = []
        self.seconds = 0.0

    def fetch(self, stub: Any, envelope: pb.Envelope, task: pb.Task) -> list[Array]:
        """The tensors of the task's broadcast, scalars not among them.

        Raises
        ------
        WireError : what arrived is not what the task announced.
        grpc.RpcError : the connection broke, or the round is over.
        """
        started = time.monotonic()
        if task.broadcast.sha256 != self._digest:
            self._digest, self._tensors = b"", []
            request = pb.DownloadRequest(envelope=envelope, task=task.name, sha256=task.broadcast.sha256)
            buffer = np.empty(task.broadcast.size, np.uint8)
            digest, position = hashlib.sha256(), 0
            for chunk in stub.Download(request):
                end = position + len(chunk.data)
                if end > buffer.size:
                    raise WireError(f"broadcast: expected {buffer.size} bytes, received more; it is fetched again")
                buffer[position:end] = np.frombuffer(chunk.data, np.uint8)
                digest.update(chunk.data)
                position = end
            if position != buffer.size or digest.digest() != task.broadcast.sha256:
                raise WireError(
                    f"broadcast: {position} of {buffer.size} bytes arrived, or damaged; it is fetched again"
                )
            self._tensors = decode(buffer.data)
            self._digest = task.broadcast.sha256
        self.seconds = time.monotonic() - started
        return self._tensors


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


def upload(stub: Any, header: pb.UploadHeader, tensors: Sequence[Array]) -> pb.UploadReceipt:
    """Sends an update and returns the coordinator's receipt; it is on the coordinator's disk then, or refused.

    Raises
    ------
    WireError : the update arrived damaged, or the receipt is of another study, plan, site or task.
    grpc.RpcError : the connection broke.
    """
    size = encoded_size(specs_of(tensors))
    header.blob.size = size

    def messages() -> Iterator[pb.UploadMessage]:
        yield pb.UploadMessage(header=header)
        digest = hashlib.sha256()
        for chunk in encode_chunks(tensors, CHUNK_BYTES):
            digest.update(chunk)
            yield pb.UploadMessage(data=bytes(chunk))
        yield pb.UploadMessage(blob=pb.Blob(sha256=digest.digest(), size=size))

    receipt: pb.UploadReceipt = stub.Upload(messages())
    if receipt.envelope != header.envelope or receipt.task != header.task:
        raise WireError("receipt: it is of another study, plan, site or task; the update counts as not taken")
    if receipt.again:
        raise WireError(f"update: {receipt.reason}")
    return receipt
