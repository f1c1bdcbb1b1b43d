"""What investigators and observers ask of a coordinator: how it stands, its figures; to stop, to publish.

Whether the caller's role may make a call is looked at before it comes here (`server.access`); what of the figures the
role is shown says `server.shown`. Each call is recorded with the caller's name before it is answered.
"""

from __future__ import annotations

import asyncio
import collections
import json
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any, Final

import grpc

from common.errors import PublishError, RunFolderError
from common.wire import operation_pb2 as pb
from common.wire import operation_pb2_grpc as rpc
from server.access import Member, abort, member_of
from server.publisher import NewVersion, Publisher
from server.run_folder import RunFolder
from server.shown import figures_for, status_for
from server.status import complete
from server.tables import read_table

_log = logging.getLogger("wardround.coordinator")
_POLL_SECONDS: Final = 0.25
_STOP_SECONDS: Final = 0.1  # so long the answer has to get out
_MOST_CALLS: Final = 60
_WITHIN_SECONDS: Final = 60.0
_MOST_LETTERS: Final = 300


class OperationService(rpc.OperationServicer):
    """The service of one run. Every refusal has a gRPC status and a sentence for whoever asked.

    Parameters
    ----------
    run : whose status and figures.
    publisher : publishes.
    record : called with an event and its details before a call is answered; raises RunFolderError where that cannot be
        recorded.
    stop : called when the coordinator is to end in good order.
    clock : seconds, of calls.
    """

    def __init__(
        self,
        run: RunFolder,
        publisher: Publisher,
        record: Callable[..., None],
        stop: Callable[[], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run = run
        self._publisher = publisher
        self._record = record
        self._stop = stop
        self._clock = clock
        self._calls: dict[str, collections.deque[float]] = {}
        self._publications: set[asyncio.Task[NewVersion]] = set()

    async def Status(self, request: pb.StatusRequest, context: Any) -> AsyncGenerator[pb.StatusReply, None]:
        """See operation.proto."""
        member = await self._asked(context, "status-asked", follow=request.follow)
        before: Mapping[str, Any] = {}
        while True:
            status = status_for(member.role, await self._read(context, self._status))
            if _without_time(status) != _without_time(before):
                before = status
                yield pb.StatusReply(status=json.dumps(status))
            if not request.follow or not status["running"]:
                return
            await asyncio.sleep(_POLL_SECONDS)

    async def Rounds(self, request: pb.RoundsRequest, context: Any) -> AsyncGenerator[pb.RoundsReply, None]:
        """See operation.proto."""
        member = await self._asked(context, "rounds-asked")
        table = await self._read(context, lambda: read_table(self._run.rounds))
        for row in table.rows:
            if int(row["round"]) > request.after:
                yield pb.RoundsReply(figures=figures_for(member.role, row))

    async def Stop(self, request: pb.StopRequest, context: Any) -> pb.StopReply:
        """See operation.proto."""
        if len(request.reason) > _MOST_LETTERS or not request.reason.isprintable():
            await abort(
                context,
                f"reason: expected up to {_MOST_LETTERS} printable letters in one line; shorten it",
                grpc.StatusCode.INVALID_ARGUMENT,
            )
        member = await self._asked(context, "stop-asked", reason=request.reason)
        _log.warning("%s stops the coordinator%s", _name(member), f": {request.reason}" if request.reason else "")
        asyncio.get_running_loop().call_later(_STOP_SECONDS, self._stop)
        return pb.StopReply()

    async def Publish(self, request: pb.PublishRequest, context: Any) -> pb.PublishReply:
        """See operation.proto. Once begun it goes on, whether or not who asked is there still."""
        about = {"round": request.round or "best", "explain": request.explain}
        member = await self._asked(context, "publish-asked", **about)
        _log.info("%s has round %s published", _name(member), about["round"])
        task = asyncio.create_task(self._publisher.publish(request.round or None, explain=request.explain))
        self._publications.add(task)
        task.add_done_callback(self._published)
        try:
            made = await asyncio.shield(task)
        except PublishError as error:
            await abort(context, str(error), grpc.StatusCode.FAILED_PRECONDITION)
        return pb.PublishReply(version=made.version, round=made.round)

    def _published(self, task: asyncio.Task[NewVersion]) -> None:
        self._publications.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            _log.warning("not published: %s", error)
        else:
            _log.info("published %s, of round %d", *task.result())

    def _status(self) -> dict[str, Any]:
        return complete(self._run.read_status(), self._run.read_study())

    async def _asked(self, context: Any, event: str, **details: Any) -> Member:
        """Who asks, once it is recorded; ends the call of who asks too often."""
        member = await member_of(context)
        name, now = _name(member), self._clock()
        calls = self._calls.setdefault(name, collections.deque(maxlen=_MOST_CALLS))
        if len(calls) == _MOST_CALLS and now - calls[0] < _WITHIN_SECONDS:  # else it would fill the log
            await abort(
                context,
                f"{_MOST_CALLS} calls in a minute are too many; wait, or use `wardround watch`, which is one",
                grpc.StatusCode.RESOURCE_EXHAUSTED,
            )
        calls.append(now)
        try:
            self._record(event, member=name, **details)
        except RunFolderError as error:
            _log.error("%s", error)
            await _cannot_answer(context)
        return member

    async def _read(self, context: Any, read: Callable[[], Any]) -> Any:
        try:
            return await asyncio.to_thread(read)
        except RunFolderError as error:
            _log.error("%s", error)
            await _cannot_answer(context)


async def _cannot_answer(context: Any) -> None:
    words = "the coordinator cannot answer now: its operator has to see to its disk"
    await abort(context, words, grpc.StatusCode.UNAVAILABLE)


def _name(member: Member) -> str:
    return f"{member.role} {member.name}"


def _without_time(status: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in status.items() if name != "updated_at"}


def add_operation(server: grpc.aio.Server, service: OperationService) -> None:
    """Has the server answer these calls; before it starts."""
    rpc.add_OperationServicer_to_server(service, server)  # type: ignore[no-untyped-call]
