"""`wardround-site fetch`: brings a published version from the coordinator to this site, which dials out as for a study.

The version appears whole or not at all, and only if every file is as its manifest says.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from common.errors import (
    IdentityError,
    NetworkError,
    PublishError,
    RunFolderError,
    UsageError,
    WardroundError,
    WireError,
)
from common.inference.published import MANIFEST, Verify, is_plain_name
from common.inference.version_files import check_files
from common.security.certificates import Identity
from common.whole_folder import appearing_whole
from common.wire import federation_pb2 as pb
from common.wire import federation_pb2_grpc as rpc
from common.wire.channel import (
    CHANNEL_OPTIONS,
    Address,
    channel_credentials,
    connection_refusal,
    connection_trouble,
)
from common.wire.tensors import BlobWriter

_TRIES = 3
_SPARE_BYTES = 2**20  # what a file system needs beside the files themselves


@dataclass(frozen=True)
class Fetched:
    """A version at this site: its folder, what it is of, its size; `was_here`: nothing had to be fetched."""

    folder: Path
    study: str
    version: str
    size: int
    was_here: bool


def fetch(
    address: Address,
    identity: Identity,
    out: Path,
    *,
    study: str = "",
    version: str = "",
    verify: Verify,
    allow: Callable[[str], None] = lambda study: None,
) -> Fetched:
    """Bring a published version to the folder `out`/<version>.

    Parameters
    ----------
    study : refuse another one; "" takes what the coordinator serves.
    version : such as "v3"; "" for the newest.
    verify : checks whose it is; nothing is kept where it raises.
    allow : called with the study that the coordinator announces, before anything is kept; raises where this site does
        not want its models.

    Raises
    ------
    NetworkError : the coordinator cannot be reached, or the line broke.
    IdentityError : the coordinator refuses this site, or is not the one that this site's identity is for; or what it
        sends is not signed by it.
    UsageError : the coordinator has another study, or no such version; or another version of that name is there.
    PublishError : nothing is published yet, or the version is damaged where it comes from.
    RunFolderError : the disk is full, or the folder cannot be written.
    WireError : it arrived damaged, several times.
    """
    request = pb.FetchRequest(envelope=pb.Envelope(study=study, site=identity.name), version=version)
    with grpc.secure_channel(str(address), channel_credentials(identity), options=CHANNEL_OPTIONS) as channel:
        stub = rpc.FederationStub(channel)  # type: ignore[no-untyped-call]
        for tried in range(1, _TRIES + 1):
            try:
                return _receive(stub.Fetch(request), out, study, version, verify, allow)
            except grpc.RpcError as error:
                raise _failure(address, error) from error
            except WireError:
                if tried == _TRIES:
                    raise
    raise AssertionError("unreachable")


def _receive(stream: Any, out: Path, study: str, wanted: str, verify: Verify, allow: Callable[[str], None]) -> Fetched:
    messages = iter(stream)
    try:
        head = next(messages, None)
        if head is None or head.WhichOneof("body") != "version":
            raise WireError("the coordinator's answer does not begin with what it will send; is it of this version?")
        version = head.version
        _check_head(version, study, wanted)
        allow(version.study)
        folder = out / version.version
        size = sum(entry.blob.size for entry in version.files)
        if folder.exists():
            _require_same(folder, version.files[0].blob.sha256, verify)
            _check_names(folder / MANIFEST, version)
            return Fetched(folder, version.study, version.version, size, was_here=True)
        _make_room(out, size)
        with appearing_whole(folder, RunFolderError) as partial:
            pieces = _pieces(messages)
            rest = b""
            for entry in version.files:
                rest = _write(partial / entry.name, entry.blob, rest, pieces)
            if rest or next(pieces, b""):
                raise WireError(f"{version.version}: more arrived than was announced; it was not kept")
            _check_signature(partial, folder, verify)
            check_files(partial)
            _check_names(partial / MANIFEST, version)
        return Fetched(folder, version.study, version.version, size, was_here=False)
    finally:
        stream.cancel()


def _check_head(version: pb.PublishedVersion, study: str, wanted: str) -> None:
    if study not in ("", version.study) or wanted not in ("", version.version):
        raise PublishError(
            f"the coordinator announces {version.study!r} {version.version!r}, which is not what was asked for; check "
            "--coordinator, and do not use what it sends"
        )
    names = [entry.name for entry in version.files]
    wrong = [name for name in (version.version, *names) if not is_plain_name(name)]
    if wrong or not names or names[0] != MANIFEST or len(set(names)) != len(names):
        raise PublishError(f"the coordinator announces files that are no published version's ({names}); do not use it")


def _require_same(folder: Path, digest: bytes, verify: Verify) -> None:
    """What is there already is this very version, undamaged."""
    manifest = folder / MANIFEST
    try:
        found = hashlib.sha256(manifest.read_bytes()).digest() if manifest.is_file() else b""
    except OSError as error:
        raise PublishError(
            f"{manifest}: cannot be read ({error.strerror or error}); correct its rights, or give another --out"
        ) from error
    if found != digest:
        raise UsageError(
            f"{folder}: exists already and is of another study or run, or its manifest is damaged; give another --out, "
            f"or delete or move away {folder}, then fetch again"
        )
    _check_signature(folder, folder, verify)
    check_files(folder, f"delete or move away {folder}, then fetch again")  # what is there is never written over


def _check_signature(partial: Path, folder: Path, verify: Verify) -> None:
    """The version that lies in `partial` and is to become `folder` is signed by whom it should be."""
    try:
        verify((partial / MANIFEST).read_bytes(), partial)
    except IdentityError as error:
        raise IdentityError(str(error).replace(str(partial), str(folder))) from error


def _check_names(manifest: Path, version: pb.PublishedVersion) -> None:
    """The manifest, which was checked to be one, is of the study and version that were announced."""
    content = json.loads(manifest.read_bytes())
    found = content.get("study"), content.get("version")
    if found != (version.study, version.version):
        raise PublishError(
            f"the manifest is of study and version {found}, the coordinator announced {version.study!r} "
            f"{version.version!r}; it was not kept: tell whoever runs the study"
        )


def _make_room(out: Path, size: int) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out).free
    except OSError as error:
        raise RunFolderError(f"{out}: cannot be made ({error.strerror}); give another --out") from error
    needed = size + _SPARE_BYTES
    if free < needed:
        raise RunFolderError(
            f"{out}: the disk has {free / 1e6:.1f} MB left, the version needs {needed / 1e6:.1f} MB; free space, or "
            "give another --out"
        )


def _pieces(messages: Iterator[Any]) -> Iterator[bytes]:
    for message in messages:
        if message.WhichOneof("body") == "data":
            yield message.data


def _write(path: Path, blob: pb.Blob, rest: bytes, pieces: Iterator[bytes]) -> bytes:
    """Writes one file from what is left of the last piece, and more of them; returns what is of the next file."""
    with BlobWriter(path, limit=blob.size) as writer:
        missing = blob.size
        while missing:
            piece = rest or next(pieces, b"")
            if not piece:
                break  # `commit` says how much arrived
            writer.write(piece[:missing])
            rest = piece[missing:]
            missing -= min(missing, len(piece))
        writer.commit(blob.sha256, blob.size)
    return rest


def _failure(address: Address, error: Any) -> WardroundError:
    """What gRPC's error means to who wants to fetch."""
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.NOT_FOUND:
        return UsageError(f"{details}; correct --study, --version or --coordinator")
    if code in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.DATA_LOSS):
        return PublishError(f"the coordinator at {address}: {details}")
    if code in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED):
        return IdentityError(f"the coordinator at {address} refuses this site: {details}")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return NetworkError(
            f"{address}: something answers there that is no coordinator, or one of a version that published models "
            "cannot be fetched from; check --coordinator, or copy the version's folder"
        )
    refused = connection_refusal(address, details)
    trouble = connection_trouble(address, details or str(code))
    return refused or NetworkError(
        f"{trouble}; fetch again when it runs (after a study, its coordinator serves with --serve)"
    )
