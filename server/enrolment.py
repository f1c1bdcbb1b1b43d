"""`wardround enrolment`: the process that has the authority's key, and serves invitations and renewals, nothing else.

It is a process of its own, so that the key that makes members is never in the one that talks to everybody, and can be
taken away when nobody is to be enrolled. Two ports: on one, where nobody has a certificate yet, `Enrolment` alone is
served; on the other, over mutual TLS, `Renewal` alone.
"""

from __future__ import annotations

import asyncio
import collections
import ipaddress
import logging
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import grpc
from cryptography import x509

from common.errors import IdentityError, WardroundError
from common.security.audit import AuditLog
from common.security.certificates import Identity, load_identity
from common.security.profile import MEMBERS, owner_of
from common.security.requests import Certified, Requests
from common.security.revocation import RevocationFile
from common.security.signing import load_signer
from common.wire import enrolment_pb2 as pb
from common.wire import enrolment_pb2_grpc as rpc
from common.wire.channel import Address, enrolment_server_credentials, parse_address, server_credentials
from server.access import Member, abort, member_of
from server.invitations import Issuer, Refused
from server.run_folder import COORDINATOR
from server.serving import open_port

_log = logging.getLogger("wardround.enrolment")

_OPTIONS: Final = (
    ("grpc.max_receive_message_length", 32 * 1024),  # a request has 1 KB; who sends more is nobody's site
    ("grpc.max_send_message_length", 64 * 1024),
    ("grpc.so_reuseport", 0),
    ("grpc.max_connection_age_ms", 60_000),
)
_MOST_AT_ONCE: Final = 16
_MOST_FAILURES: Final = 10
_WITHIN_SECONDS: Final = 60.0
_MOST_NETWORKS: Final = 4096
_MOST_RECORDED: Final = 30  # guesses an hour: who guesses for weeks does not fill the disk
_HOUR: Final = 3600.0


@dataclass(frozen=True)
class Ports:
    """Where a running service is: the ports of `Enrolment` and `Renewal`."""

    enrolment: int
    renewals: int


class Attempts:
    """Who failed how often of late: ten times a minute from one network, and it has to wait."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures: collections.OrderedDict[str, collections.deque[float]] = collections.OrderedDict()

    def blocked(self, peer: str) -> bool:
        """Whether whoever is at this address has to wait."""
        failures = self._failures.get(_network(peer))
        return failures is not None and len(failures) == _MOST_FAILURES and self._recent(failures[0])

    def failed(self, peer: str) -> None:
        """A request came from there that was refused."""
        network = _network(peer)
        failures = self._failures.pop(network, None) or collections.deque(maxlen=_MOST_FAILURES)
        failures.append(self._clock())
        self._failures[network] = failures  # at the end: the network that failed longest ago is forgotten first
        while len(self._failures) > _MOST_NETWORKS:
            self._failures.popitem(last=False)

    def _recent(self, at: float) -> bool:
        return self._clock() - at < _WITHIN_SECONDS


def _network(peer: str) -> str:
    """The address, of an IPv6 host its /64, of gRPC's word for a peer."""
    host = host_of(peer)
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    return host if address.version == 4 else str(ipaddress.ip_network((address, 64), strict=False))


def host_of(peer: str) -> str:
    """The host in gRPC's word for a peer, such as ``ipv4:192.0.2.1:40000`` or ``ipv6:%5B::1%5D:40000``."""
    rest = peer.partition(":")[2] or peer
    return rest.rpartition(":")[0].replace("%5B", "").replace("%5D", "").strip("[]") or rest


class EnrolmentService(rpc.EnrolmentServicer):
    """Who was invited gets certificates."""

    def __init__(self, issuer: Issuer, renewals_port: int, attempts: Attempts | None = None) -> None:
        self._issuer = issuer
        self._renewals_port = renewals_port
        self._attempts = attempts or Attempts()
        self._recorded: collections.deque[float] = collections.deque(maxlen=_MOST_RECORDED)

    async def Authority(self, request: pb.AuthorityRequest, context: Any) -> pb.AuthorityReply:
        """Public: the certificate of the study's authority."""
        return pb.AuthorityReply(authority=self._issuer.authority_pem)

    async def Enrol(self, request: pb.EnrolRequest, context: Any) -> pb.Certificates:
        """See `Issuer.enrol`. A refusal says why to who has the secret, and to everybody else always the same."""
        peer = context.peer()
        if self._attempts.blocked(peer):
            await abort(
                context,
                "too many attempts from this network; wait a minute, then try again",
                grpc.StatusCode.RESOURCE_EXHAUSTED,
            )
        requests = Requests(request.tls_request, request.signing_request)
        try:
            certified = await _in_thread(
                context, self._issuer.enrol, request.study, request.invitation, request.secret, requests
            )
        except Refused as error:
            self._attempts.failed(peer)
            _log.warning("enrolment refused to %s (%s): %s", error.owner or "somebody unknown", host_of(peer), error)
            if error.owner or self._is_to_be_recorded():
                await _in_thread(context, self._issuer.refused, error, host_of(peer))
            await abort(context, str(error))
        owner = owner_of(x509.load_pem_x509_certificate(certified.tls))
        _log.info("%s %s enrolled (%s)", *owner, host_of(peer))
        return _message(certified, self._renewals_port)

    def _is_to_be_recorded(self) -> bool:
        now = time.monotonic()
        if len(self._recorded) == _MOST_RECORDED and now - self._recorded[0] < _HOUR:
            return False
        self._recorded.append(now)
        return True


class RenewalService(rpc.RenewalServicer):
    """Who has a certificate gets the next one. Roles: site, investigator, observer, each for itself alone."""

    def __init__(self, issuer: Issuer) -> None:
        self._issuer = issuer

    async def Renew(self, request: pb.RenewRequest, context: Any) -> pb.Certificates:
        """See `Issuer.renew`."""
        member = await self._member(context)
        requests = Requests(request.tls_request, request.signing_request)
        try:
            certified = await _in_thread(
                context, self._issuer.renew, member.certificate, member.role, member.name, requests
            )
        except Refused as error:
            await self._refuse(context, error)
        _log.info("%s %s renewed its certificates", member.role, member.name)
        return _message(certified, 0)

    async def Confirm(self, request: pb.ConfirmRequest, context: Any) -> pb.ConfirmReply:
        """The caller's certificate works."""
        member = await self._member(context)
        try:
            await _in_thread(context, self._issuer.confirmed, member.certificate, f"{member.role} {member.name}")
        except Refused as error:
            await self._refuse(context, error)
        return pb.ConfirmReply(not_after=member.certificate.not_valid_after_utc.isoformat())

    async def _member(self, context: Any) -> Member:
        member = await member_of(context)
        if member.role not in MEMBERS:
            await abort(context, f"a {member.role}'s certificate is not renewed here")
        return member

    async def _refuse(self, context: Any, error: Refused) -> NoReturn:
        _log.warning("renewal refused to %s: %s", error.owner, error)
        await _in_thread(context, self._issuer.refused, error, host_of(context.peer()))
        await abort(context, str(error))


async def _in_thread(context: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """The disk is slow; what is wrong with the coordinator's own files is for its log, not for who asks."""
    try:
        return await asyncio.to_thread(function, *arguments)
    except WardroundError as error:
        _log.error("%s", error)
        await abort(
            context, "the coordinator cannot answer now: its operator has to see to it", grpc.StatusCode.UNAVAILABLE
        )


def _message(certified: Certified, port: int) -> pb.Certificates:
    return pb.Certificates(
        authority=certified.authority, tls=certified.tls, signing=certified.signing, renewals_port=port
    )


class EnrolmentServer:
    """Both services on their ports, in the running loop."""

    def __init__(self, issuer: Issuer, identity: Identity, attempts: Attempts | None = None) -> None:
        self._issuer = issuer
        self._identity = identity
        self._attempts = attempts
        self._servers: list[grpc.aio.Server] = []

    async def start(self, listen: Address, renewals: Address) -> Ports:
        """Answers from here on. Raises NetworkError, IdentityError."""
        one, other = (
            grpc.aio.server(options=_OPTIONS, maximum_concurrent_rpcs=_MOST_AT_ONCE) for _ in ("enrolment", "renewals")
        )
        port = open_port(one, listen, enrolment_server_credentials(self._identity), "--listen")
        renewals_port = open_port(other, renewals, server_credentials(self._identity), "--renewals")
        enrolment = EnrolmentService(self._issuer, renewals_port, self._attempts)
        rpc.add_EnrolmentServicer_to_server(enrolment, one)  # type: ignore[no-untyped-call]
        rpc.add_RenewalServicer_to_server(RenewalService(self._issuer), other)  # type: ignore[no-untyped-call]
        self._servers = [one, other]
        for server in self._servers:
            await server.start()
        return Ports(port, renewals_port)

    async def stop(self, grace: float = 1.0) -> None:
        """Ends."""
        await asyncio.gather(*(server.stop(grace) for server in self._servers))


def serve_enrolment(authority: Path, identity: Path, listen: str, renewals: str) -> int:
    """Serves until it is stopped; returns the exit code.

    Raises
    ------
    IdentityError : authority or identity is missing, unreadable, expired or open to others; or of two studies.
    NetworkError : it cannot listen.
    RunFolderError : register or audit log cannot be written.
    """
    loaded, signer = load_identity(identity), load_signer(identity)
    audit = AuditLog(authority, COORDINATOR, signer)
    try:
        issuer = Issuer(authority, RevocationFile(identity, loaded.authority), signer, audit)
        if issuer.authority_pem != loaded.authority:
            raise IdentityError(
                f"{identity}: the identity is not of the authority in {authority}; give both of one study"
            )
        server = EnrolmentServer(issuer, loaded)
        return asyncio.run(_until_stopped(server, issuer, parse_address(listen), parse_address(renewals)))
    finally:
        audit.sign_head()
        audit.close()


async def _until_stopped(server: EnrolmentServer, issuer: Issuer, listen: Address, renewals: Address) -> int:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    ports = await server.start(listen, renewals)
    now = time.time()
    waiting = [f"{one.role} {one.name}" for one in issuer.register.invitations() if one.state(now) == "open"]
    _log.info("study %s: enrolment on %s port %d, renewals on port %d", issuer.study, listen.host, *_both(ports))
    _log.info("open invitations: %s", ", ".join(waiting) or "none; make one with `wardround invite`")
    await stopped.wait()
    _log.info("stopped; nobody can enrol or renew until it is started again")
    await server.stop()
    return 0


def _both(ports: Ports) -> tuple[int, int]:
    return ports.enrolment, ports.renewals
