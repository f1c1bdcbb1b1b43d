"""Who may make which call, and who is hung up on: roles, and those who were revoked, at every call of a coordinator.

It is in gRPC's way before any service, so that no call can be forgotten: what `_ROLES` does not name is for sites
alone. What a message says, and whether its sender is the site it speaks for, the services check themselves
(`server.serving.require_site`).

Calls that are open when their owner is revoked end within `_POLL_SECONDS`, with the reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NoReturn

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm

from common.errors import IdentityError, WardroundError
from common.security.profile import Role, owner_of
from common.security.revocation import RevocationFile, RevocationList, Revoked

_log = logging.getLogger("wardround.coordinator")
_POLL_SECONDS: Final = 0.5
_SITES: Final[tuple[Role, ...]] = ("site",)
_ROLES: Final[Mapping[str, tuple[Role, ...]]] = MappingProxyType(
    {
        "/wardround.v1.Federation/Fetch": ("site", "investigator"),
        "/wardround.operation.v1.Operation/Status": ("observer", "investigator"),
        "/wardround.operation.v1.Operation/Rounds": ("observer", "investigator"),
        "/wardround.operation.v1.Operation/Stop": ("investigator",),
        "/wardround.operation.v1.Operation/Publish": ("investigator",),
    }
)
"""Who may make a call, where it is not sites alone."""


@dataclass(frozen=True)
class Member:
    """Whoever makes a call, by the certificate that TLS has verified."""

    role: Role
    name: str
    certificate: x509.Certificate


@dataclass(eq=False)
class _Open:
    """A call under way, and the task in which it is."""

    member: Member
    task: asyncio.Task[Any]
    reason: str = ""


class Access(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Looks at each call of a server, and ends those of who was revoked.

    Parameters
    ----------
    revoked : who was shut out.
    on_revoked : called, in the server's loop, with each owner that is found in the list anew, before its calls end.
    on_denied : called there with who made a call that its role may not make, and the call's name; once for each.

    Attributes
    ----------
    expiries : by site's name, when the certificate ends by which it came last (Unix time).

    Raises
    ------
    IdentityError : the list is damaged, or not signed by the coordinator.
    """

    def __init__(self, revoked: RevocationFile) -> None:
        self._file = revoked
        self._open: set[_Open] = set()
        self._told: dict[tuple[Role, str], float] = {}
        self._said = ""
        self.on_revoked: Callable[[Revoked], None] = lambda entry: None
        self.on_denied: Callable[[Member, str], None] = lambda member, call: None
        self._denied: set[tuple[Role, str, str]] = set()
        self.expiries: dict[str, float] = {}
        self._file.current()

    @staticmethod
    def of(identity: Path, authority: bytes) -> Access:
        """By the list in the folder of the coordinator's identity. Raises as the class."""
        return Access(RevocationFile(identity, authority))

    def newest(self) -> RevocationList:
        """The list as it was last seen."""
        return self._file.newest

    def revoked(self, role: Role, name: str) -> Revoked | None:
        """Why somebody is shut out; None where it is not, or was invited again since."""
        return self._file.newest.of(role, name)

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        """What answers a call, with the look at its caller before it."""
        handler = await continuation(details)
        if handler is None:  # no such call
            return None
        method = str(details.method)
        if handler.response_streaming:
            streaming = handler.stream_stream if handler.request_streaming else handler.unary_stream

            async def stream(request: Any, context: Any) -> AsyncGenerator[Any, None]:
                async with self._entered(context, method), contextlib.aclosing(streaming(request, context)) as messages:
                    async for message in messages:
                        yield message

            make = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else (grpc.unary_stream_rpc_method_handler)
            )
            return make(stream, handler.request_deserializer, handler.response_serializer)
        single = handler.stream_unary if handler.request_streaming else handler.unary_unary

        async def call(request: Any, context: Any) -> Any:
            async with self._entered(context, method):
                return await single(request, context)

        make = (
            grpc.stream_unary_rpc_method_handler if handler.request_streaming else (grpc.unary_unary_rpc_method_handler)
        )
        return make(call, handler.request_deserializer, handler.response_serializer)

    @contextlib.asynccontextmanager
    async def _entered(self, context: Any, method: str) -> AsyncGenerator[None, None]:
        """Around a call: its caller has one of the call's roles, and is not revoked, or is not any more."""
        member, roles = await member_of(context), _ROLES.get(method, _SITES)
        if member.role not in roles:
            self._deny(member, method.rpartition("/")[2])
            await abort(
                context,
                f"the certificate is of {member.role} {member.name!r}, and this is for {' and '.join(roles)} alone",
            )
        if (entry := self._refused(member)) is not None:
            await abort(context, entry.sentence())
        if member.role == "site":
            self.expiries[member.name] = member.certificate.not_valid_after_utc.timestamp()
        task = asyncio.current_task()
        assert task is not None, "gRPC makes a task of each call"
        call = _Open(member, task)
        self._open.add(call)
        try:
            yield
        except asyncio.CancelledError:
            if call.reason:  # by `look`; else the caller has gone
                task.uncancel()
                await abort(context, call.reason)
            raise
        finally:
            self._open.discard(call)

    def _refused(self, member: Member) -> Revoked | None:
        self.look()
        return self._file.newest.refuses(member.certificate)

    def look(self) -> None:
        """Takes over a list that has changed, and hangs up on who is in it."""
        try:
            revoked = self._file.current()
            self._said = ""
        except WardroundError as error:  # the last good list holds
            revoked = self._file.newest
            if str(error) != self._said:
                self._said = str(error)
                _log.error("%s. Until then the list of before holds", error)
        for key, entry in revoked.entries.items():
            if self._told.get(key) != entry.at:
                self._told[key] = entry.at
                if not entry.valid:
                    self._tell(entry)
        for call in list(self._open):
            refused = revoked.refuses(call.member.certificate)
            if refused is not None and not call.reason:
                _log.warning("%s %s was revoked, and is hung up on", call.member.role, call.member.name)
                call.reason = refused.sentence()
                call.task.cancel()

    def _deny(self, member: Member, call: str) -> None:
        """Has it recorded, once: who asks again and again does not fill the log."""
        about = (member.role, member.name, call)
        if about not in self._denied:
            self._denied.add(about)
            try:
                self.on_denied(member, call)
            except WardroundError as error:
                _log.error("%s", error)

    def _tell(self, entry: Revoked) -> None:
        try:
            self.on_revoked(entry)
        except WardroundError as error:  # whatever the disk says, it is hung up on
            _log.error("%s", error)

    async def watch(self) -> None:
        """Looks twice a second, until cancelled."""
        while True:
            self.look()
            await asyncio.sleep(_POLL_SECONDS)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watches meanwhile, in the running loop."""
        task = asyncio.create_task(self.watch())
        try:
            yield
        finally:
            task.cancel()


async def member_of(context: Any) -> Member:
    """Who makes this call; ends it where its certificate is none of a study."""
    try:
        certificate = x509.load_pem_x509_certificate(context.auth_context()["x509_pem_cert"][0])
        return Member(*owner_of(certificate), certificate)
    except (KeyError, IndexError):
        await abort(context, "expected a certificate of this study; found none", grpc.StatusCode.UNAUTHENTICATED)
    except (ValueError, UnsupportedAlgorithm, IdentityError) as error:
        await abort(context, str(error), grpc.StatusCode.UNAUTHENTICATED)


async def abort(context: Any, words: str, status: grpc.StatusCode = grpc.StatusCode.PERMISSION_DENIED) -> NoReturn:
    """Ends a call with these words."""
    await context.abort(status, words)
    raise AssertionError("gRPC ends the call")
