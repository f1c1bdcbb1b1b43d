"""What needs no round and no TensorFlow: the address that a coordinator holds, and serving what a run has published."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import logging
import math
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from common.errors import NetworkError, WardroundError
from common.inference.published import MANIFEST, SIGNATURE
from common.inference.version_files import listed_files
from common.security.audit import NO_AUDIT, Audit, AuditLog
from common.security.certificates import Identity, load_identity, peer_name
from common.security.profile import Role
from common.security.signing import signer_in
from common.study import Study
from common.version import VERSION
from common.wire import federation_pb2 as pb
from common.wire import federation_pb2_grpc as rpc
from common.wire.channel import SERVER_OPTIONS, Address, parse_address, server_credentials
from common.wire.tensors import CHUNK_BYTES
from server.access import Access, Member
from server.journal import read_history
from server.operation import OperationService, add_operation
from server.publisher import Publisher
from server.replay import RunHistory
from server.run_folder import COORDINATOR, RunFolder
from server.versions import published_versions

_log = logging.getLogger("wardround.coordinator")
_FIRST_SECONDS = 60.0


def bind(address: Address, identity: Identity, access: Access) -> tuple[grpc.aio.Server, int]:
    """A server that holds the address but does not answer yet; returns it and its port.

    Parameters
    ----------
    access : looks at each call.

    Raises
    ------
    NetworkError : the port is in use or not allowed.
    """
    logging.getLogger("grpc._cython.cygrpc").addFilter(_unreadable)
    server = grpc.aio.server(options=SERVER_OPTIONS, interceptors=[access])
    return server, open_port(server, address, server_credentials(identity))


def open_port(
    server: grpc.aio.Server, address: Address, credentials: grpc.ServerCredentials, option: str = "--listen"
) -> int:
    """Has the server hold an address; returns its port. Raises NetworkError, which names the option to change."""
    try:
        return int(server.add_secure_port(str(address), credentials))
    except RuntimeError as error:
        raise NetworkError(
            f"{address}: cannot listen there; the port may be in use. Choose another with {option}, or stop "
            "the program "
            f"that holds it (`ss -ltnp 'sport = :{address.port}'` names it)"
        ) from error


class _Unreadable(logging.Filter):
    """Says once that a message came which is none; gRPC would log a traceback for each, as long as the disk lasts."""

    def __init__(self) -> None:
        super().__init__()
        self._said = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether gRPC logs the record itself."""
        error = record.exc_info[1] if record.exc_info else None
        if not isinstance(error, DecodeError):
            return True
        if not self._said:
            self._said = True
            _log.warning("a message came that no version of Wardround sends; it, and those like it, are refused")
        return False


_unreadable = _Unreadable()


def denied(audit: Audit, member: Member, call: str) -> None:
    """Somebody made a call that its role may not make: recorded."""
    _log.warning("%s %s may not call %s, and was refused", member.role, member.name, call)
    audit.record("call-denied", member=f"{member.role} {member.name}", call=call)


async def serve(study: Study, run: RunFolder, listen: str, identity: Path, publisher: Publisher) -> int:
    """Lets sites fetch what a finished run has published, until somebody stops this process; returns 0 then.

    Sites that were away when the study ended, and dial still, are told that it is over.

    Raises
    ------
    NetworkError, IdentityError : it cannot listen.
    """
    address = parse_address(listen)
    loaded = load_identity(identity)
    access = Access.of(identity, loaded.authority)
    server, port = bind(address, loaded, access)
    audit = AuditLog(run.path, COORDINATOR, signer_in(identity))
    access.on_revoked = lambda entry: audit.record("member-shut-out", member=f"{entry.role} {entry.name}")
    service = FinishedService(study, run.published, run.journal, audit)
    rpc.add_FederationServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    stopped = asyncio.Event()
    access.on_denied = functools.partial(denied, audit)
    add_operation(server, OperationService(run, publisher, audit.record, stopped.set))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    await server.start()
    run.write_status({**run.read_status(), "address": f"{address.host}:{port}"})
    _log.info("serving what %s has published on %s port %d, until stopped", study.name, address.host, port)
    with access.watching():
        await stopped.wait()
    publisher.stop()
    await server.stop(grace=1.0)
    audit.sign_head()
    audit.close()
    return 0


async def require_site(envelope: pb.Envelope, study: Study, context: Any, roles: tuple[Role, ...] = ("site",)) -> None:
    """Ends the call unless the sender is the site it speaks for, and a member of the study.

    Parameters
    ----------
    roles : whose certificate may come; who is no site speaks for itself, and is in no cohort.
    """
    certificates = context.auth_context().get("x509_pem_cert", [])
    try:
        role, name = peer_name(certificates[0]) if certificates else ("", "")
    except WardroundError as error:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
        raise
    if role not in roles or name != envelope.site:
        await context.abort(
            grpc.StatusCode.PERMISSION_DENIED,
            f"the certificate is of {f'{role} {name!r}' if role else 'nobody'}, the message speaks for "
            f"{envelope.site!r}; start the site with its own identity",
        )
    if role == "site" and envelope.site not in study.cohort.sites:
        await context.abort(
            grpc.StatusCode.PERMISSION_DENIED, f"{envelope.site!r} is not in the cohort of study {study.name!r}"
        )


class Malformed(Exception):
    """A message that no site of this version sends; the words say what is wrong with it."""


async def first_of(requests: AsyncIterator[Any], context: Any) -> Any:
    """The first message of a stream; ends the call where none comes in good time."""
    try:
        async with asyncio.timeout(_FIRST_SECONDS):
            first = await anext(aiter(requests), None)
    except TimeoutError:
        first = None
    if first is None:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the stream ended, or waited, before its first message")
    return first


def header_fault(header: pb.UploadHeader, study: Study) -> str:
    """What is wrong with what a site says of its update; "" if nothing is."""
    timing = header.timing
    if header.task.kind not in (pb.TRAIN, pb.EVALUATE):
        return f"task: expected kind {pb.TRAIN} or {pb.EVALUATE}, found {header.task.kind}"
    if not 1 <= header.task.round <= study.training.rounds:
        return f"task: expected a round from 1 to {study.training.rounds}, found {header.task.round}"
    if len(header.blob.sha256) != 32 or len(header.broadcast_sha256) != 32:
        return "expected the SHA-256 of the update and of the broadcast, 32 bytes each"
    if not 0 < header.blob.size < 2**62:
        return f"expected an update of at least a byte, found one of {header.blob.size}"
    if not all(math.isfinite(seconds) and seconds >= 0 for seconds in (timing.download, timing.work)):
        return "timing: expected seconds of 0 or more"
    secure = study.secure_aggregation.required
    if secure and (timing.cases or timing.download or timing.work):
        return "timing: expected nothing, as the study has secure aggregation"
    private = study.privacy.unit == "patient" and header.task.kind == pb.TRAIN and not secure
    if header.HasField("privacy") != private:
        return f"privacy: expected {'what the site has spent of its budget' if private else 'nothing, as none is kept'}"
    if private and not (math.isfinite(header.privacy.epsilon) and header.privacy.epsilon > 0):
        return "privacy: expected an epsilon above 0"
    return ""


def receipt_of(header: pb.UploadHeader, refusal: str, *, again: bool = False) -> pb.UploadReceipt:
    """The receipt of an update; it is accepted where there is no reason against it."""
    return pb.UploadReceipt(
        envelope=header.envelope, task=header.task, accepted=not refusal, reason=refusal, again=again
    )


class Published:
    """The published versions of a run, for sites to fetch.

    Parameters
    ----------
    study : of the run.
    folder : holds a folder a version.
    record : called with an event and its details before a version is sent.
    """

    def __init__(self, study: Study, folder: Path, record: Callable[..., None] = NO_AUDIT.record) -> None:
        self._study = study
        self._folder = folder
        self._record = record

    async def fetch(self, request: pb.FetchRequest, context: Any) -> AsyncGenerator[pb.FetchMessage, None]:
        """Streams a version: what it consists of, then the files' bytes, one after the other.

        A study's name and a version that are empty mean the one served here, and the newest. No plan is asked for: who
        fetches trains nothing. Refusals: NOT_FOUND for another study or a version that does not exist,
        FAILED_PRECONDITION where nothing is published yet, DATA_LOSS where the version's files are not all there.
        """
        await require_site(request.envelope, self._study, context, ("site", "investigator"))
        if request.envelope.study not in ("", self._study.name):
            await context.abort(
                grpc.StatusCode.NOT_FOUND,
                f"the coordinator runs study {self._study.name!r}, not {request.envelope.study!r}",
            )
        versions = await asyncio.to_thread(published_versions, self._folder)
        if not versions:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"study {self._study.name!r} has published nothing yet; fetch again when it is over",
            )
        wanted = request.version or next(reversed(versions))
        if wanted not in versions:
            await context.abort(
                grpc.StatusCode.NOT_FOUND,
                f"study {self._study.name!r} has no version {wanted!r}; there is {', '.join(versions)}",
            )
        folder = versions[wanted]
        try:
            files = await asyncio.to_thread(_files_of, folder)
            size, manifest = sum(entry.blob.size for entry in files), files[0].blob.sha256.hex()
            self._record("version-sent", site=request.envelope.site, version=wanted, bytes=size, manifest=manifest)
            yield pb.FetchMessage(version=pb.PublishedVersion(study=self._study.name, version=wanted, files=files))
            for entry in files:
                with (folder / entry.name).open("rb") as file:
                    while data := await asyncio.to_thread(file.read, CHUNK_BYTES):
                        yield pb.FetchMessage(data=data)
        except (OSError, WardroundError):
            _log.exception("version %s cannot be sent", wanted)
            await context.abort(
                grpc.StatusCode.DATA_LOSS, f"version {wanted!r} is damaged at the coordinator; its log says more"
            )
        _log.info("%s fetched version %s", request.envelope.site, wanted)


def _files_of(folder: Path) -> list[pb.PublishedFile]:
    """The manifest, by which the others are checked, its signature, and what it lists."""
    manifest = (folder / MANIFEST).read_bytes()
    digests = {MANIFEST: hashlib.sha256(manifest).hexdigest()}
    if (folder / SIGNATURE).exists():  # not in versions of before they were signed
        digests[SIGNATURE] = hashlib.sha256((folder / SIGNATURE).read_bytes()).hexdigest()
    digests |= listed_files(manifest)
    return [
        pb.PublishedFile(name=name, blob=pb.Blob(sha256=bytes.fromhex(digest), size=(folder / name).stat().st_size))
        for name, digest in digests.items()
    ]


class FinishedService(rpc.FederationServicer):
    """A study that is over: its published versions can be fetched, and sites that come late hear how it ended for them.

    Parameters
    ----------
    study : of the run.
    published : holds a folder a version.
    journal : of the run; it says which updates were received.
    audit : where it is recorded who fetches what.
    """

    def __init__(self, study: Study, published: Path, journal: Path, audit: Audit = NO_AUDIT) -> None:
        self._study = study
        self._published = Published(study, published, audit.record)
        self._journal = journal

    async def Fetch(self, request: pb.FetchRequest, context: Any) -> AsyncIterator[pb.FetchMessage]:
        """See `Published.fetch`."""
        async with contextlib.aclosing(self._published.fetch(request, context)) as messages:
            async for message in messages:
                yield message

    async def Attend(
        self, requests: AsyncIterator[pb.SiteMessage], context: Any
    ) -> AsyncIterator[pb.CoordinatorMessage]:
        """Tells the site that the study is over."""
        first = await first_of(requests, context)
        await self._check(first.envelope, context)
        # The envelope is the site's own: there is no plan any more that could differ.
        yield pb.CoordinatorMessage(
            envelope=first.envelope, welcome=pb.Welcome(version=VERSION, rounds=self._study.training.rounds)
        )
        reason = f"study {self._study.name} is complete after {self._study.training.rounds} rounds"
        yield pb.CoordinatorMessage(envelope=first.envelope, finished=pb.Finished(reason=reason))

    async def Upload(self, requests: AsyncIterator[pb.UploadMessage], context: Any) -> AsyncIterator[pb.UploadReply]:
        """Tells the site whether its last update was taken; takes none."""
        header = (await first_of(requests, context)).header
        await self._check(header.envelope, context)
        fault = header_fault(header, self._study)
        if fault:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, fault)
        history = await asyncio.to_thread(read_history, self._journal)
        kind = "train" if header.task.kind == pb.TRAIN else "evaluate"
        taken = was_received(history, kind, header.task.round, header.envelope.site, header)
        yield pb.UploadReply(receipt=receipt_of(header, "" if taken else f"round {header.task.round} is closed"))

    async def Download(self, request: pb.DownloadRequest, context: Any) -> AsyncIterator[pb.Chunk]:
        """There is no broadcast any more."""
        await self._check(request.envelope, context)
        await context.abort(grpc.StatusCode.NOT_FOUND, "the study is over")
        yield pb.Chunk()  # never; it makes this a stream

    async def _check(self, envelope: pb.Envelope, context: Any) -> None:
        await require_site(envelope, self._study, context)
        if envelope.study != self._study.name:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"plan: the coordinator ran study {self._study.name!r}, the site came with {envelope.study!r}",
            )


def was_received(history: RunHistory, kind: str, number: int, site: str, header: pb.UploadHeader) -> bool:
    """Whether the journal says that this very update entered, or will enter, the sum of its round."""
    known = history.find(kind, number, header.broadcast_sha256.hex())
    received = known.received.get(site) if known is not None else None
    return received is not None and received.sha256 == header.blob.sha256.hex()
