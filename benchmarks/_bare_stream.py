"""The floor under a round's cost: the same bytes through bare gRPC streams over mutual TLS, with nothing around them.

One server process and a process a client, as in a study; raw bytes in chunks as the product sends them, no Protocol
Buffers. In mode "bare" the chunks are counted; in mode "durable" both sides take their SHA-256, and the server writes
an upload to a file and syncs it before it answers.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks._processes import Processes, pipe, tell
from common.security.certificates import load_identity
from common.wire.channel import CHANNEL_OPTIONS, SERVER_OPTIONS, Address, channel_credentials, server_credentials
from common.wire.tensors import CHUNK_BYTES

import grpc  # isort: skip  (after the channel, which restricts its TLS)

Mode = Literal["bare", "durable"]


class BareStream:
    """A server and its clients, ready to copy.

    Parameters
    ----------
    started : who starts the processes.
    identities : a folder as `ensure_simulation_identities` makes it.
    sites : the clients' names.
    size : bytes each client downloads, and then uploads.
    folder : where the server writes uploads.
    """

    def __init__(self, started: Processes, identities: Path, sites: list[str], size: int, folder: Path) -> None:
        self._processes = started
        folder.mkdir()
        server = started.start(
            "bare-server", "_bare_stream", "server", identities / "coordinator", size, len(sites), folder
        )
        port = started.line(server)
        self._clients = [
            started.start(f"bare-{site}", "_bare_stream", "client", identities / "sites" / site, size, port)
            for site in sites
        ]
        for client in self._clients:
            started.line(client)
        self._round = 0

    def seconds(self, mode: Mode) -> float:
        """How long all clients together take to download and upload once."""
        self._round += 1
        started = time.monotonic()
        for client in self._clients:
            tell(client, f"{mode} {self._round}")
        for client in self._clients:
            self._processes.line(client)
        return time.monotonic() - started


def _chunks(data: memoryview) -> Iterator[bytes]:
    for start in range(0, len(data), CHUNK_BYTES):
        yield bytes(data[start : start + CHUNK_BYTES])


def _content(size: int) -> memoryview:
    return memoryview(np.full(size, 7, np.uint8).data)


class _Server(grpc.GenericRpcHandler):  # type: ignore[misc]
    def __init__(self, size: int, folder: Path) -> None:
        self._data = _content(size)
        self._folder = folder
        self._lock = threading.Lock()
        self._digested = ""

    def service(self, handler_call_details: Any) -> Any:
        if handler_call_details.method.endswith("/Download"):
            return grpc.unary_stream_rpc_method_handler(self._download)
        return grpc.stream_unary_rpc_method_handler(self._upload)

    def _download(self, request: bytes, context: Any) -> Iterator[bytes]:
        mode, number = request.decode().split()
        with self._lock:
            if mode == "durable" and self._digested != number:  # once a round: all clients get the same bytes
                self._digested = number
                hashlib.sha256(self._data).digest()
        yield from _chunks(self._data)

    def _upload(self, requests: Iterator[bytes], context: Any) -> bytes:
        mode, name = next(requests).decode().split()
        if mode == "bare":
            return str(sum(map(len, requests))).encode()
        digest = hashlib.sha256()
        with (self._folder / name).open("wb") as file:
            for chunk in requests:
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        return digest.digest()


def _serve(options: argparse.Namespace) -> None:
    # A thread for each call that can be open at once.
    server = grpc.server(ThreadPoolExecutor(2 * options.clients), options=SERVER_OPTIONS)
    server.add_generic_rpc_handlers([_Server(options.size, options.folder)])
    port = server.add_secure_port("127.0.0.1:0", server_credentials(load_identity(options.identity)))
    server.start()
    print(port, flush=True)
    sys.stdin.read()  # until the benchmark is over
    server.stop(None)


def _copy(options: argparse.Namespace) -> None:
    identity = load_identity(options.identity)
    data = _content(options.size)
    address = str(Address("127.0.0.1", options.port))
    with grpc.secure_channel(address, channel_credentials(identity), options=CHANNEL_OPTIONS) as channel:
        grpc.channel_ready_future(channel).result()
        download, upload = channel.unary_stream("/bare/Download"), channel.stream_unary("/bare/Upload")
        print("ready", flush=True)
        for line in pipe(sys.stdin):
            mode = line.split()[0]
            digest, received = hashlib.sha256(), 0
            for chunk in download(line.strip().encode()):
                received += len(chunk)
                if mode == "durable":
                    digest.update(chunk)
            assert received == options.size

            def messages(mode: str = mode) -> Iterator[bytes]:
                yield f"{mode} {identity.name}".encode()
                digest = hashlib.sha256()
                for chunk in _chunks(data):
                    if mode == "durable":
                        digest.update(chunk)
                    yield chunk

            upload(messages())
            print("done", flush=True)


def main() -> None:
    """One of the processes that `BareStream` starts."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    roles = parser.add_subparsers(required=True)
    server = roles.add_parser("server")
    server.add_argument("identity", type=Path)
    server.add_argument("size", type=int)
    server.add_argument("clients", type=int)
    server.add_argument("folder", type=Path)
    server.set_defaults(role=_serve)
    client = roles.add_parser("client")
    client.add_argument("identity", type=Path)
    client.add_argument("size", type=int)
    client.add_argument("port", type=int)
    client.set_defaults(role=_copy)
    options = parser.parse_args()
    options.role(options)


if __name__ == "__main__":
    main()
