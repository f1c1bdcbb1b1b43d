"""The gRPC service: turns what sites send into calls on the `Federation`; checks who speaks for whom by which plan."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc

from common.errors import RunFolderError, WireError
from common.version import VERSION
from common.wire import federation_pb2 as pb
from common.wire import federation_pb2_grpc as rpc
from common.wire.tensors import BlobWriter, Stored, encode_chunks, read_tensors
from server.federation import TAKEN_OVER, Call, Connection, Federation
from server.rounds import Kind, Stage
from server.serving import Published, require_site

_KINDS = {Kind.TRAIN: pb.TRAIN, Kind.EVALUATE: pb.EVALUATE}


class FederationService(rpc.FederationServicer):
    """One study's service. Every refusal has a gRPC status and a sentence that the site shows its operator."""

    def __init__(self, federation: Federation, published: Path) -> None:
        self._federation = federation
        self._published = Published(federation.study, published)
        self._study = federation.study.name
        self._digest = federation.plan.digest

    # --- the calls -----------------------------------------------------------------------------------------------

    async def Attend(
        self, requests: AsyncIterator[pb.SiteMessage], context: Any
    ) -> AsyncIterator[pb.CoordinatorMessage]:
        """Holds a site's control stream for as long as it lasts."""
        first = await anext(aiter(requests), None)
        if first is None:
            return
        await self._check(first.envelope, context)
        if first.WhichOneof("body") != "hello":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "expected hello as the first message")
        connection = Connection(
            first.envelope.site,
            context.peer(),
            training_cases=first.hello.training_cases,
            validation_cases=first.hello.validation_cases,
        )
        welcome = pb.Welcome(version=VERSION, rounds=self._federation.study.training.rounds)
        yield self._message(connection.site, welcome=welcome)
        reading = asyncio.create_task(self._listen(requests, connection, context))
        self._federation.connect(connection)
        try:
            while True:
                item = await connection.outbox.get()
                if item is None:  # the stream broke
                    return
                if item is TAKEN_OVER:
                    await context.abort(
                        grpc.StatusCode.ABORTED,
                        f"another process attends as {connection.site!r}; run one process a site, and stop the other",
                    )
                if isinstance(item, str):
                    yield self._message(connection.site, finished=pb.Finished(reason=item))
                elif isinstance(item, Call) and item is self._federation.call:
                    yield self._message(connection.site, task=_task(item))
        finally:
            reading.cancel()
            self._federation.disconnect(connection)

    async def _listen(self, requests: AsyncIterator[pb.SiteMessage], connection: Connection, context: Any) -> None:
        try:
            async for message in requests:
                await self._check(message.envelope, context)
                body = message.WhichOneof("body")
                if body == "progress" and self._is_current(message.progress.task):
                    progress = message.progress
                    self._federation.progressed(
                        connection.site, _stage(progress.stage), progress.batch, progress.batches
                    )
                elif body == "failure" and self._is_current(message.failure.task):
                    self._federation.failed(connection.site, message.failure.reason[:300])
        finally:
            connection.outbox.put_nowait(None)

    async def Download(self, request: pb.DownloadRequest, context: Any) -> AsyncIterator[pb.Chunk]:
        """Streams the broadcast of the round under way."""
        await self._check(request.envelope, context)
        call = self._federation.call
        if call is None or request.sha256 != call.broadcast.digest:
            await context.abort(
                grpc.StatusCode.NOT_FOUND, "this broadcast belongs to no round under way; wait for a task"
            )
        assert call is not None
        for chunk in encode_chunks(call.broadcast.tensors):
            call.bytes_down[request.envelope.site] = call.bytes_down.get(request.envelope.site, 0) + len(chunk)
            yield pb.Chunk(data=bytes(chunk))

    async def Fetch(self, request: pb.FetchRequest, context: Any) -> AsyncIterator[pb.FetchMessage]:
        """Streams a published version."""
        async with contextlib.aclosing(self._published.fetch(request, context)) as messages:
            async for message in messages:
                yield message

    async def Upload(self, requests: AsyncIterator[pb.UploadMessage], context: Any) -> pb.UploadReceipt:
        """Takes an update; answers when it is on disk, verified, and journaled."""
        started = time.monotonic()
        first = await anext(aiter(requests), None)
        if first is None or first.WhichOneof("body") != "header":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "expected the update's header as the first message")
        assert first is not None
        header = first.header
        await self._check(header.envelope, context)
        site, call = header.envelope.site, self._federation.call
        refusal = self._refusal(header, site, call)
        if refusal is not None or call is None:
            return self._receipt(header, refusal or "")
        try:
            stored = await self._store(requests, call, site)
        except WireError as error:
            return self._receipt(header, str(error), again=True)
        except RunFolderError as error:
            if self._federation.call is not call:  # the next round began by removing what was half here
                return self._receipt(header, "the round closed before this update arrived")
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
            raise
        if self._federation.call is not call or not call.round.wants(site):
            stored.path.unlink(missing_ok=True)
            return self._receipt(header, "the round closed, or another copy came first, before this update arrived")
        try:
            self._federation.received(
                call,
                site,
                stored,
                cases=header.timing.cases,
                download=header.timing.download,
                work=header.timing.work,
                upload=time.monotonic() - started,
            )
        except RunFolderError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        return self._receipt(header, None)

    async def _store(self, requests: AsyncIterator[pb.UploadMessage], call: Call, site: str) -> Stored:
        path = self._federation.update_path(call, site)
        with BlobWriter(path, limit=call.update_size) as writer:
            writing: asyncio.Future[None] = asyncio.ensure_future(asyncio.sleep(0))
            try:
                async for message in requests:
                    await writing  # one chunk is written while the next is received
                    if message.WhichOneof("body") == "data":
                        writing = asyncio.ensure_future(asyncio.to_thread(writer.write, message.data))
                        continue
                    stored = await asyncio.to_thread(writer.commit, message.blob.sha256, message.blob.size)
                    try:
                        await asyncio.to_thread(read_tensors, stored.path, call.plan.sent)
                    except WireError:
                        stored.path.unlink(missing_ok=True)
                        raise
                    return stored
            finally:
                await asyncio.wait([writing])  # the file is not closed under a write
        raise WireError(f"update of {site}: the stream ended before its digest; send it again")

    # --- checks -----------------------------------------------------------------------------------------------------

    async def _check(self, envelope: pb.Envelope, context: Any) -> None:
        """The sender is the site it speaks for, a member of this study, and holds this plan."""
        await require_site(envelope, self._federation.study, context)
        if envelope.study != self._study or envelope.plan_digest != self._digest:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"plan: the coordinator runs study {self._study!r} with plan {self._digest.hex()[:16]}, the site "
                "came with "
                f"{envelope.study!r} and plan {envelope.plan_digest.hex()[:16]}",
            )

    def _is_current(self, name: pb.TaskName) -> bool:
        call = self._federation.call
        return call is not None and name.round == call.round.number and name.kind == _KINDS[call.round.kind]

    def _refusal(self, header: pb.UploadHeader, site: str, call: Call | None) -> str | None:
        if call is None or not self._is_current(header.task):
            return f"round {header.task.round} is closed"
        if not call.round.wants(site):
            return "the update of this round is here already" if not call.round.closed else "the round is closed"
        if header.blob.size != call.update_size:
            return f"an update has {call.update_size} bytes, this one has {header.blob.size}"
        return None

    def _receipt(self, header: pb.UploadHeader, refusal: str | None, *, again: bool = False) -> pb.UploadReceipt:
        return pb.UploadReceipt(
            envelope=self._envelope(header.envelope.site),
            task=header.task,
            accepted=refusal is None,
            reason=refusal or "",
            again=again,
        )

    def _envelope(self, site: str) -> pb.Envelope:
        return pb.Envelope(study=self._study, plan_digest=self._digest, site=site)

    def _message(self, site: str, **body: Any) -> pb.CoordinatorMessage:
        return pb.CoordinatorMessage(envelope=self._envelope(site), **body)


def _task(call: Call) -> pb.Task:
    round_ = call.round
    return pb.Task(
        name=pb.TaskName(kind=_KINDS[round_.kind], round=round_.number, attempt=round_.attempt),
        broadcast=pb.Blob(sha256=call.broadcast.digest, size=call.broadcast.size),
        scalars=call.broadcast.scalars,
    )


def _stage(name: str) -> Stage:
    try:
        stage = Stage(name)
    except ValueError:
        return Stage.ASSIGNED
    return stage if stage not in (Stage.DONE, Stage.FAILED) else Stage.ASSIGNED


async def answer(server: grpc.aio.Server, federation: Federation, published: Path) -> None:
    """From here on sites are answered; `published` holds the versions that they may fetch."""
    service = FederationService(federation, published)
    rpc.add_FederationServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    await server.start()
