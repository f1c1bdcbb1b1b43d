"""The gRPC service: turns what sites send into calls on the `Federation`; checks who speaks for whom by which plan."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc

from common.errors import RunFolderError
from common.failpoints import hit
from common.version import VERSION
from common.watching.logs import about
from common.wire import federation_pb2 as pb
from common.wire import federation_pb2_grpc as rpc
from common.wire.tensors import encode_chunks
from common.wording import printable
from server.calls import SecureAsk
from server.federation import TAKEN_OVER, Call, Connection, Federation, Pause
from server.intake import Intake, NotYet, Offer, Superseded, Verdict
from server.rounds import Kind, Stage
from server.serving import Malformed, Published, first_of, header_fault, receipt_of, require_site

_log = logging.getLogger("wardround.coordinator")
_KINDS = {Kind.TRAIN: pb.TRAIN, Kind.EVALUATE: pb.EVALUATE}
_KIND_OF = {number: kind for kind, number in _KINDS.items()}
_STAGES = {stage.value: stage for stage in (Stage.DOWNLOAD, Stage.TRAINING, Stage.EVALUATION, Stage.UPLOAD)}
_MOST_LETTERS = 300  # of a reason or a version; a site's own are shorter
_MOST_PROCESS_BYTES = 64
_MOST_STEP_BYTES = 64 * 1024  # of secure aggregation: a site's largest holds a share for each other site
_MOST_WARNINGS = 10  # of another plan, a site: one that comes with ever new ones does not fill the log


Calling = Callable[["FederationService", Any, Any], AsyncGenerator[Any, None]]


def _disk_failure_said(method: Calling) -> Calling:
    """A call whose audit log or journal cannot be written ends: the site hears why, and the coordinator ends too."""

    @functools.wraps(method)
    async def calling(self: FederationService, request: Any, context: Any) -> AsyncGenerator[Any, None]:
        try:
            async with contextlib.aclosing(method(self, request, context)) as messages:
                async for message in messages:
                    yield message
        except RunFolderError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))

    return calling


class FederationService(rpc.FederationServicer):
    """One study's service. Every refusal has a gRPC status and a sentence that the site shows its operator."""

    def __init__(self, federation: Federation, published: Path) -> None:
        self._federation = federation
        self._published = Published(federation.study, published, federation.record)
        self._study = federation.study.name
        self._digest = federation.plan.digest
        self._intake = Intake(federation)
        self._warned: dict[str, set[str]] = {}

    # --- the calls -----------------------------------------------------------------------------------------------

    @_disk_failure_said
    async def Attend(
        self, requests: AsyncIterator[pb.SiteMessage], context: Any
    ) -> AsyncGenerator[pb.CoordinatorMessage, None]:
        """Holds a site's control stream for as long as it lasts."""
        first = await first_of(requests, context)
        await self._check(first.envelope, context)
        hello = first.hello
        if first.WhichOneof("body") != "hello":
            await _abort_malformed(context, "expected hello as the first message")
        if len(hello.version) > _MOST_LETTERS or len(hello.process) > _MOST_PROCESS_BYTES:
            await _abort_malformed(context, "hello: its version or process is too long")
        connection = Connection(
            first.envelope.site,
            context.peer(),
            process=hello.process,
            training_cases=hello.training_cases,
            validation_cases=hello.validation_cases,
        )
        welcome = pb.Welcome(version=VERSION, rounds=self._federation.study.training.rounds)
        yield self._message(connection.site, welcome=welcome)
        self._federation.connect(connection)
        reading = asyncio.create_task(self._listen(requests, connection, context))
        try:
            while True:
                item = await connection.outbox.get()
                if item is None:  # the stream broke
                    return
                if item is TAKEN_OVER:
                    await self._end_older(connection, context)
                if isinstance(item, Pause):
                    yield self._message(connection.site, pausing=pb.Pausing(reason=item.reason))
                elif isinstance(item, str):
                    yield self._message(connection.site, finished=pb.Finished(reason=item))
                elif isinstance(item, Call) and item is self._federation.call:
                    yield self._message(connection.site, task=_task(item))
                elif isinstance(item, SecureAsk) and item.call is self._federation.call:
                    yield self._message(connection.site, secure=_secure_step(item))
        finally:
            reading.cancel()
            self._federation.disconnect(connection)

    async def _end_older(self, connection: Connection, context: Any) -> None:
        newer = self._federation.connections.get(connection.site)
        if newer is not None and newer.process and newer.process == connection.process:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the site has come back on another line")
        await context.abort(
            grpc.StatusCode.ABORTED,
            f"another process attends as {connection.site!r}; run one process a site, and stop the other",
        )

    async def _listen(self, requests: AsyncIterator[pb.SiteMessage], connection: Connection, context: Any) -> None:
        site = connection.site
        try:
            async for message in requests:
                await self._check(message.envelope, context)
                fault = _fault(message)
                if fault:
                    await _abort_malformed(context, fault)
                if message.WhichOneof("body") == "leaving":
                    said = printable(message.leaving.reason)
                    _log.info("%s is stopped at its hospital: %s", site, said, extra=about(site=site))
                    self._federation.left(site, message.leaving.reason)
                    return
                if self._federation.connections.get(site) is not connection:
                    continue  # what a line that was taken over still brings
                if message.WhichOneof("body") == "progress" and self._is_current(message.progress.task):
                    progress = message.progress
                    self._federation.progressed(site, _STAGES[progress.stage], progress.batch, progress.batches)
                elif message.WhichOneof("body") == "failure" and self._is_current(message.failure.task):
                    self._federation.failed(site, message.failure.reason)
                elif message.WhichOneof("body") == "secure" and self._is_current(message.secure.task):
                    self._federation.secure_step(site, message.secure.task.attempt, message.secure.content)
        except RunFolderError:  # the coordinator ends with it
            return
        finally:
            connection.outbox.put_nowait(None)

    @_disk_failure_said
    async def Download(self, request: pb.DownloadRequest, context: Any) -> AsyncGenerator[pb.Chunk, None]:
        """Streams the broadcast of the round under way, from the byte on that the site asks for."""
        await self._check(request.envelope, context)
        site, call = request.envelope.site, self._federation.call
        if call is None or request.sha256 != call.broadcast.digest:
            await _abort_gone(context)
        assert call is not None
        if request.offset > call.broadcast.size:
            await context.abort(
                grpc.StatusCode.OUT_OF_RANGE,
                f"the broadcast has {call.broadcast.size} bytes, it was asked for from byte {request.offset} on",
            )
        about = {"bytes": call.broadcast.size - request.offset, "sha256": request.sha256.hex()}
        self._federation.record("broadcast-sent", call, site=site, **about)
        position = 0
        for chunk in encode_chunks(call.broadcast.tensors):
            begin, position = position, position + len(chunk)
            if position <= request.offset:
                continue
            if self._federation.call is not call:
                await _abort_gone(context)
            rest = bytes(chunk[max(0, request.offset - begin) :])
            call.bytes_down[site] = call.bytes_down.get(site, 0) + len(rest)
            yield pb.Chunk(data=rest)
            self._federation.touched(site)

    @_disk_failure_said
    async def Fetch(self, request: pb.FetchRequest, context: Any) -> AsyncGenerator[pb.FetchMessage, None]:
        """Streams a published version."""
        async with contextlib.aclosing(self._published.fetch(request, context)) as messages:
            async for message in messages:
                yield message

    @_disk_failure_said
    async def Upload(
        self, requests: AsyncIterator[pb.UploadMessage], context: Any
    ) -> AsyncGenerator[pb.UploadReply, None]:
        """Takes an update; the receipt is sent when it is on disk, verified, and journaled."""
        first = await first_of(requests, context)
        header = first.header
        if first.WhichOneof("body") != "header":
            await _abort_malformed(context, "expected the update's header as the first message")
        await self._check(header.envelope, context)
        fault = header_fault(header, self._federation.study)
        if fault:
            await _abort_malformed(context, fault)
        positions: asyncio.Queue[int] = asyncio.Queue()
        taking = asyncio.create_task(self._intake.take(_offer(header), _pieces(requests), positions.put))
        asking = asyncio.create_task(positions.get())
        try:
            await asyncio.wait([taking, asking], return_when=asyncio.FIRST_COMPLETED)
            if not positions.empty() or asking.done():
                yield pb.UploadReply(position=await asking)
            verdict = await taking
        except Malformed as error:
            await _abort_malformed(context, str(error))
            raise
        except Superseded:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "a newer upload of this site goes on with this update")
            raise
        except NotYet:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the coordinator has only just started; come again")
            raise
        finally:
            asking.cancel()
            taking.cancel()
        yield pb.UploadReply(receipt=self._receipt(header, verdict))
        hit("receipt.sent")

    # --- checks -----------------------------------------------------------------------------------------------------

    async def _check(self, envelope: pb.Envelope, context: Any) -> None:
        """The sender is the site it speaks for, a member of this study, and holds this plan."""
        await require_site(envelope, self._federation.study, context)
        if envelope.study != self._study or envelope.plan_digest != self._digest:
            self._reject(envelope)
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"plan: the coordinator runs study {self._study!r} with plan {self._digest.hex()[:16]}, the site "
                "came with "
                f"{envelope.study!r} and plan {envelope.plan_digest.hex()[:16]}",
            )

    def _reject(self, envelope: pb.Envelope) -> None:
        """Tells the coordinator's operator, who does not see what the site is told."""
        site, study = envelope.site, printable(envelope.study[:_MOST_LETTERS])
        reason = f"study {study!r} and plan {envelope.plan_digest.hex()[:16]}"
        self._federation.reject(site, reason)
        warned = self._warned.setdefault(site, set())
        if reason not in warned and len(warned) < _MOST_WARNINGS:
            warned.add(reason)
            _log.warning(
                "%s came with another plan: %s, the coordinator runs study %r with plan %s; start the site with the "
                "coordinator's study file and the same version of Wardround",
                site,
                reason,
                self._study,
                self._digest.hex()[:16],
                extra=about(site=site),
            )

    def _is_current(self, name: pb.TaskName) -> bool:
        call = self._federation.call
        return call is not None and name.round == call.round.number and name.kind == _KINDS[call.round.kind]

    def _receipt(self, header: pb.UploadHeader, verdict: Verdict) -> pb.UploadReceipt:
        return receipt_of(header, verdict.refusal, again=verdict.again)

    def _envelope(self, site: str) -> pb.Envelope:
        return pb.Envelope(study=self._study, plan_digest=self._digest, site=site)

    def _message(self, site: str, **body: Any) -> pb.CoordinatorMessage:
        return pb.CoordinatorMessage(envelope=self._envelope(site), **body)


def _secure_step(ask: SecureAsk) -> pb.SecureStep:
    round_ = ask.call.round
    name = pb.TaskName(kind=_KINDS[round_.kind], round=round_.number, attempt=ask.attempt)
    return pb.SecureStep(task=name, session=ask.session, content=ask.content)


def _task(call: Call) -> pb.Task:
    round_ = call.round
    return pb.Task(
        name=pb.TaskName(kind=_KINDS[round_.kind], round=round_.number, attempt=round_.attempt),
        broadcast=pb.Blob(sha256=call.broadcast.digest, size=call.broadcast.size),
        scalars=call.broadcast.scalars,
    )


def _offer(header: pb.UploadHeader) -> Offer:
    return Offer(
        site=header.envelope.site,
        kind=_KIND_OF[header.task.kind],
        number=header.task.round,
        attempt=header.task.attempt,
        sha256=header.blob.sha256,
        size=header.blob.size,
        broadcast=header.broadcast_sha256,
        cases=header.timing.cases,
        download=header.timing.download,
        work=header.timing.work,
        epsilon=header.privacy.epsilon if header.HasField("privacy") else None,
    )


async def _pieces(requests: AsyncIterator[pb.UploadMessage]) -> AsyncIterator[bytes]:
    async for message in requests:
        if message.WhichOneof("body") != "data" or not message.data:
            raise Malformed("expected a piece of the update, with at least one byte")
        yield message.data


def _fault(message: pb.SiteMessage) -> str:
    """What is wrong with a later message of a control stream; "" if nothing is."""
    body = message.WhichOneof("body")
    if body == "progress":
        progress = message.progress
        if progress.stage not in _STAGES:
            return f"progress: expected a stage among {', '.join(_STAGES)}, found another one"
        if progress.batch > progress.batches:
            return f"progress: batch {progress.batch} of {progress.batches}"
        return ""
    if body in ("failure", "leaving"):
        letters = len(getattr(message, body).reason)
        return "" if letters <= _MOST_LETTERS else f"{body}: a reason of {letters} letters, at most {_MOST_LETTERS}"
    if body == "secure":
        if message.secure.session:
            return "secure: a session, which the coordinator alone proposes"
        size = len(message.secure.content)
        return "" if size <= _MOST_STEP_BYTES else f"secure: a step of {size} bytes, at most {_MOST_STEP_BYTES}"
    return f"expected progress, failure, leaving or secure, found {body or 'nothing'}"


async def _abort_malformed(context: Any, words: str) -> None:
    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, words)


async def _abort_gone(context: Any) -> None:
    await context.abort(grpc.StatusCode.NOT_FOUND, "this broadcast belongs to no round under way; wait for a task")


async def answer(server: grpc.aio.Server, federation: Federation, published: Path) -> None:
    """From here on sites are answered; `published` holds the versions that they may fetch."""
    service = FederationService(federation, published)
    rpc.add_FederationServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    await server.start()
