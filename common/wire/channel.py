"""How coordinator and sites reach each other: gRPC over TLS 1.3, with certificates on both sides.

gRPC has no option for the version of TLS. It reads a list of cipher suites for TLS 1.2 from the environment when it is
imported, and never again, so the package `common` sets it first: its only suite needs an RSA certificate, with the
P-256 certificates of a study no TLS 1.2 handshake can succeed, and TLS 1.3, whose suites are fixed, remains. A process
where the list is another would accept TLS 1.2; `server_credentials` refuses to serve then.
"""

from __future__ import annotations

import os
import re
from typing import Final

import grpc

from common import TLS12_SUITES, TLS12_SUITES_VARIABLE
from common.errors import IdentityError, NetworkError, WardroundError
from common.security.certificates import Identity
from common.security.profile import MEMBERS, Role
from common.wire.addresses import Address as Address
from common.wire.addresses import parse_address as parse_address
from common.wire.tensors import MAX_MESSAGE_BYTES

_COMMON_OPTIONS: Final[tuple[tuple[str, int], ...]] = (
    # A little above the largest payload, for the fields around it.
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES + 64 * 1024),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES + 64 * 1024),
    # A ping every 20 s, 10 s to answer: a VPN link that died without a word is noticed in about 30 s.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # The same of the pings by which gRPC measures a line that carries data: it would wait a minute.
    ("grpc.http2.ping_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)

CHANNEL_OPTIONS: Final[tuple[tuple[str, int], ...]] = (
    *_COMMON_OPTIONS,
    # The proxy of a hospital's browsers neither speaks gRPC nor may it see the traffic.
    ("grpc.enable_http_proxy", 0),
    # A coordinator that restarts is found again within seconds; gRPC would wait up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 10_000),
)
"""Options of every channel that a site opens."""

SERVER_OPTIONS: Final[tuple[tuple[str, int], ...]] = (
    *_COMMON_OPTIONS,
    # Below the sites' 20 s: a server hangs up on clients that ping more often than this.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    # What a site may send before it is read. gRPC would measure the link and let each fill tens of megabytes here.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 1024 * 1024),
    # Else two coordinators would share a port, and each would get half of the sites.
    ("grpc.so_reuseport", 0),
)
"""Options of the coordinator's server."""

# A server without TLS; one without TLS 1.3; one that speaks TLS, but not HTTP/2.
_NO_COORDINATOR: Final = r"WRONG_VERSION_NUMBER|ALERT_HANDSHAKE_FAILURE|PROTOCOL_VERSION|missing selected ALPN"

_TROUBLES: Final[tuple[tuple[str, str], ...]] = (
    ("connection refused", "nothing listens there (connection refused)"),
    ("resolving|lookup|domain name not found", "its name is not known here (DNS)"),
    ("timed? ?out|fd shutdown|deadline", "no answer in time"),
    ("no route|unreachable", "there is no way to it from this network"),
    ("handshake read failed|socket closed|reset by peer|broken pipe|goaway", "the connection was closed"),
)


def server_credentials(identity: Identity) -> grpc.ServerCredentials:
    """Credentials of the coordinator's server: only clients with a certificate of the study's authority get in.

    Raises
    ------
    IdentityError
        The identity is a site's, or TLS 1.2 could not be turned off in this process.
    """
    _require_server(identity)
    return grpc.ssl_server_credentials(
        [(identity.key, identity.certificate)], root_certificates=identity.authority, require_client_auth=True
    )


def enrolment_server_credentials(identity: Identity) -> grpc.ServerCredentials:
    """Credentials of a server for those who have no certificate yet: it proves who it is, they need not.

    Raises as `server_credentials`.
    """
    _require_server(identity)
    return grpc.ssl_server_credentials([(identity.key, identity.certificate)])


def _require_server(identity: Identity) -> None:
    if identity.role != "coordinator":
        raise IdentityError(
            f"identity {identity.name!r}: expected the coordinator's, found {_a(identity.role)}'s; give the folder of "
            "the coordinator's identity"
        )
    if os.environ.get(TLS12_SUITES_VARIABLE) != TLS12_SUITES:
        raise IdentityError(
            f"{TLS12_SUITES_VARIABLE}: expected {TLS12_SUITES}, found {os.environ.get(TLS12_SUITES_VARIABLE)}: this "
            "process would accept TLS 1.2; unset the variable where the command is started"
        )


def _a(role: Role) -> str:
    return f"an {role}" if role[0] in "io" else f"a {role}"


def channel_credentials(identity: Identity) -> grpc.ChannelCredentials:
    """Credentials of a member's channel: it proves who it is, and speaks only to a coordinator of its authority.

    Raises IdentityError where the identity is the coordinator's own, which would be refused in the handshake. What the
    other roles may do, the coordinator says at each call.
    """
    if identity.role not in MEMBERS:
        raise IdentityError(
            f"identity {identity.name!r}: expected a site's, found a {identity.role}'s; give the folder of the site's "
            "identity"
        )
    return grpc.ssl_channel_credentials(
        root_certificates=identity.authority, private_key=identity.key, certificate_chain=identity.certificate
    )


def connection_refusal(address: Address, details: str) -> WardroundError | None:
    """Why dialling this address again is of no use, by the details of gRPC's error; None where it may be of use.

    gRPC has one status, UNAVAILABLE, for whatever keeps a connection from being made; only its words tell.
    """
    if refusal := re.search(r"CERTIFICATE_VERIFY_FAILED: ([^;:)]*)", details):
        return IdentityError(
            f"the coordinator at {address} is not the one this site's identity was made for ({refusal[1]}); check the "
            "address, or get a new identity from the study's coordinator"
        )
    if re.search(r"Hostname Verification Check failed|Peer name .* is not in peer certificate", details):
        return NetworkError(
            f"the coordinator at {address} has a certificate that does not name {address.host!r}; correct "
            f"--coordinator, or have the coordinator's certificate made with --host {address.host}"
        )
    if re.search(_NO_COORDINATOR, details):
        return NetworkError(
            f"{address}: something answers there that is no coordinator (it does not speak gRPC over TLS 1.3); "
            "correct --coordinator"
        )
    return None


def connection_trouble(address: Address, details: str) -> str:
    """Why there is no connection to the coordinator now, in words for people, by the details of gRPC's error."""
    if refusal := connection_refusal(address, details):  # in what may be a passing thing, such as a VPN's log-in page
        return str(refusal)
    for pattern, words in _TROUBLES:
        if re.search(pattern, details, re.IGNORECASE):
            return f"the coordinator at {address} cannot be reached: {words}"
    # What the coordinator itself said, or gRPC's words without what it puts before them.
    said = re.sub(r"^failed to connect to all addresses; last error: \w+: (\S+:\d+: )?", "", details.split("\n")[0])
    return f"no connection to the coordinator at {address}: {said[:200]}"
