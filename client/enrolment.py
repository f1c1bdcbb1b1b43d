"""`wardround-site enrol` and `rotate`: how this site gets its identity, and the next one. Its keys never leave it.

Whoever enrols has a token and no certificate yet. What answers at the token's address is believed in two steps, before
anything of the token is sent: it shows the certificate of an authority, whose digest must be the token's; then the
connection is made anew, and TLS checks it against that authority and the host's name.
"""

from __future__ import annotations

import datetime
import hmac
import json
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes

from common.errors import IdentityError, NetworkError, WardroundError
from common.failpoints import hit
from common.security.audit import Audit
from common.security.audit_files import HEAD, LOG
from common.security.certificates import CERTIFICATE, KEY, Identity, load_identity
from common.security.pem_files import AUTHORITY_CERTIFICATE, certificate_pem, check_dates, make_folder, write_pem
from common.security.profile import MEMBERS, Role, fingerprint, is_issued_by, study_of
from common.security.requests import Certified, Keys, check_certified
from common.security.rotation import NEXT, commit_rotation, discard_next
from common.security.signing import SIGNING_CERTIFICATE, SIGNING_KEY
from common.security.tokens import Token
from common.wire import enrolment_pb2 as pb
from common.wire import enrolment_pb2_grpc as rpc
from common.wire.channel import Address, channel_credentials, connection_trouble, parse_address

ENROLLED: Final = "enrolled.json"
_ENROLLING: Final = "enrolling.json"
_OURS: Final = {
    *(AUTHORITY_CERTIFICATE, CERTIFICATE, KEY, SIGNING_CERTIFICATE, SIGNING_KEY),
    *(ENROLLED, _ENROLLING, NEXT, LOG, HEAD),
}
_SECONDS: Final = 30.0
_CLOCK_SECONDS: Final = 86_400  # as far as clocks may differ
_OPTIONS: Final = (("grpc.enable_http_proxy", 0), ("grpc.max_receive_message_length", 64 * 1024))


@dataclass(frozen=True)
class Enrolled:
    """An identity that was got: its folder, whose it is, until when it holds."""

    folder: Path
    study: str
    role: Role
    name: str
    until: datetime.datetime


def enrol(token: Token, folder: Path, audit: Audit) -> Enrolled:
    """Makes keys in `folder`, has them certified by the study that the token is of, and keeps the certificates.

    Cut off at any point, the same call goes on: with the same keys, which get the same certificates.

    Raises
    ------
    IdentityError : the token expired, was used or is refused; whoever answers is not the study's coordinator; what came
        is not for these keys; or the folder holds an identity already.
    NetworkError : nothing answers, or no enrolment.
    RunFolderError : the disk does not take it.
    """
    require_free(folder)
    if time.time() > token.expires + _CLOCK_SECONDS:
        raise IdentityError(
            f"token: it expired on {token.expiry:%Y-%m-%d %H:%M} UTC; ask whoever runs the study for a new one"
        )
    address = parse_address(token.address)
    keys = _keys(token, folder)
    hit("enrolled.keys")
    authority = _authority(address, token)
    requests = keys.requests(token.study, token.role, token.name)
    audit.record("enrolment-asked", study=token.study, coordinator=token.address, authority=token.authority.hex())
    with grpc.secure_channel(
        str(address), grpc.ssl_channel_credentials(root_certificates=authority), options=_OPTIONS
    ) as channel:
        stub = rpc.EnrolmentStub(channel)  # type: ignore[no-untyped-call]
        request = pb.EnrolRequest(
            study=token.study,
            invitation=token.invitation,
            secret=token.secret,
            tls_request=requests.tls,
            signing_request=requests.signing,
        )
        try:
            answer = _call(stub.Enrol, request, address)
        except WardroundError as error:
            audit.record("enrolment-failed", study=token.study, reason=type(error).__name__)
            raise
    hit("enrolled.answer")
    certified = Certified(answer.authority, answer.tls, answer.signing)
    until = check_certified(certified, keys, token.study, token.role, token.name, lambda one: _pinned(one, token))
    renewals = str(Address(address.host, answer.renewals_port)) if answer.renewals_port else ""
    write_pem(folder / ENROLLED, json.dumps({"study": token.study, "renewals": renewals}).encode(), 0o644)
    certified.write(folder, before_last=lambda: hit("enrolled.half"))
    (folder / _ENROLLING).unlink(missing_ok=True)
    audit.record("enrolled", study=token.study, role=token.role, name=token.name, until=until.isoformat())
    return Enrolled(folder, token.study, token.role, token.name, until)


def rotate(folder: Path, at: str | None, audit: Audit) -> Enrolled:
    """Replaces keys and certificates of the identity in `folder` by new ones; the old ones hold until these were tried.

    Parameters
    ----------
    at : where renewals are served; None: where the enrolment said.

    Raises
    ------
    IdentityError : the identity is missing, expired, revoked or the coordinator's; or what came is not for these keys.
    NetworkError : nothing answers, or no renewals.
    RunFolderError : the disk does not take it.
    """
    identity = load_identity(folder)
    if identity.role not in MEMBERS:
        raise IdentityError(f"{folder}: the coordinator's identity is renewed by `wardround init --renew`")
    address = parse_address(at or _renewals(folder))
    study = study_of(x509.load_pem_x509_certificate(identity.authority))
    upcoming = folder / NEXT
    discard_next(folder)
    keys = Keys.new()
    keys.write(upcoming)
    requests = keys.requests(study, identity.role, identity.name)
    audit.record("rotation-asked", study=study, coordinator=str(address))
    request = pb.RenewRequest(tls_request=requests.tls, signing_request=requests.signing)
    answer = _renewal(identity, address, lambda stub: _call(stub.Renew, request, address))
    certified = Certified(answer.authority, answer.tls, answer.signing)
    owner = study, identity.role, identity.name
    until = check_certified(certified, keys, *owner, lambda one: certificate_pem(one) == identity.authority)
    certified.write(upcoming)
    hit("rotation.answer")
    _renewal(load_identity(upcoming), address, lambda stub: _call(stub.Confirm, pb.ConfirmRequest(), address))
    hit("rotation.confirmed")
    commit_rotation(folder)
    audit.record("rotated", study=study, until=until.isoformat())
    return Enrolled(folder, study, identity.role, identity.name, until)


def _renewal(identity: Identity, address: Address, call: Callable[[Any], Any]) -> Any:
    with grpc.secure_channel(str(address), channel_credentials(identity), options=_OPTIONS) as channel:
        return call(rpc.RenewalStub(channel))  # type: ignore[no-untyped-call]


def _renewals(folder: Path) -> str:
    try:
        found = str(json.loads((folder / ENROLLED).read_text(encoding="utf-8"))["renewals"])
    except (OSError, ValueError, KeyError, TypeError):
        found = ""
    if not found:
        raise IdentityError(
            f"{folder}: it does not say where renewals are served; ask whoever runs the study, and give it with --at "
            "HOST:PORT"
        )
    return found


def require_free(folder: Path) -> None:
    """The folder is new, or was begun by an enrolment that was cut off. Raises IdentityError otherwise."""
    if (folder / CERTIFICATE).exists():
        raise IdentityError(
            f"{folder}: {_present(folder)}; nothing was sent. To renew it, run `wardround-site rotate --identity "
            f"{folder}`; to enrol anew, give another --folder"
        )
    try:
        others = sorted(path.name for path in folder.iterdir() if path.name not in _OURS and path.name[0] != ".")
    except FileNotFoundError:
        return
    except OSError as error:
        raise IdentityError(f"{folder}: cannot be read ({error.strerror}); give another --folder") from error
    if others:
        raise IdentityError(
            f"{folder}: holds other files ({', '.join(others[:3])}); an identity has a folder of its own: give a new "
            "--folder"
        )


def _present(folder: Path) -> str:
    try:
        identity = load_identity(folder)
    except IdentityError:
        return "holds an identity already, which is not good as it is"
    return f"holds the identity of {identity.role} {identity.name!r} already, valid until {identity.not_after:%Y-%m-%d}"


def _keys(token: Token, folder: Path) -> Keys:
    """Those of an enrolment by this very token that was cut off, or new ones; on the disk when this returns."""
    marker = folder / _ENROLLING
    try:
        if json.loads(marker.read_text(encoding="utf-8")) == {"invitation": token.invitation.hex()}:
            return Keys.read(folder)
    except (OSError, ValueError, IdentityError):
        pass
    make_folder(folder)
    marker.unlink(missing_ok=True)
    keys = Keys.new()
    keys.write(folder)
    write_pem(marker, json.dumps({"invitation": token.invitation.hex()}).encode(), 0o600)
    return keys


def _pinned(authority: x509.Certificate, token: Token) -> bool:
    return hmac.compare_digest(authority.fingerprint(hashes.SHA256()), token.authority)


def _authority(address: Address, token: Token) -> bytes:
    """The certificate (PEM) of the authority that the token names, from whoever answers there.

    Raises
    ------
    IdentityError : whoever answers is not of that authority. Nothing of the token was sent.
    NetworkError : nothing answers, or no enrolment.
    """
    shown = _server_certificate(address)
    credentials = grpc.ssl_channel_credentials(root_certificates=certificate_pem(shown))
    with grpc.secure_channel(str(address), credentials, options=_OPTIONS) as channel:
        stub = rpc.EnrolmentStub(channel)  # type: ignore[no-untyped-call]
        pem: bytes = _call(stub.Authority, pb.AuthorityRequest(), address).authority
    try:
        authority = x509.load_pem_x509_certificate(pem)
    except (ValueError, UnsupportedAlgorithm):
        authority = shown
    if not _pinned(authority, token) or not is_issued_by(shown, authority):
        raise IdentityError(
            f"{address}: whoever answers there is not the coordinator that the token is from: its certificate "
            f"(SHA-256 {fingerprint(shown)[:16]}…) is not of the authority that the token names (SHA-256 "
            f"{token.authority.hex()[:16]}…). Nothing of the token was sent. A proxy that opens TLS connections does "
            "this: have it let this address through; else tell whoever runs the study"
        )
    if study_of(authority) != token.study:
        raise IdentityError(
            f"token: it says study {token.study!r}, and its authority is that of {study_of(authority)!r}; ask for a "
            "new one"
        )
    check_dates(f"{address}: the study's authority", authority)
    return pem


def _server_certificate(address: Address) -> x509.Certificate:
    """What whoever answers shows of itself, believed by nobody yet."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((address.host, address.port), timeout=_SECONDS) as line,
            context.wrap_socket(line, server_hostname=address.host) as secured,
        ):
            return x509.load_der_x509_certificate(secured.getpeercert(binary_form=True) or b"")
    except (ssl.SSLError, ValueError, UnsupportedAlgorithm) as error:
        raise NetworkError(
            f"{address}: something answers there that is no enrolment of Wardround (it does not speak TLS 1.3); "
            "check the address with whoever runs the study"
        ) from error
    except OSError as error:
        words = connection_trouble(address, "timed out" if isinstance(error, TimeoutError) else _said(error))
        raise NetworkError(
            f"{words}. Check that a firewall lets this machine out to it, and ask whoever runs the study whether "
            "enrolment is open (`wardround enrolment`)"
        ) from error


def _said(error: OSError) -> str:
    return "name resolving" if isinstance(error, socket.gaierror) else str(error.strerror or error)


def _call(method: Any, request: Any, address: Address) -> Any:
    """Calls; what the other side refuses, and what the line does, in words for people."""
    try:
        return method(request, timeout=_SECONDS)
    except grpc.RpcError as error:
        raise _failure(error, address) from error


def _failure(error: Any, address: Address) -> WardroundError:
    code, details = error.code(), error.details() or ""
    if code in (
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    ):
        return IdentityError(f"the coordinator at {address} refuses: {details}")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return NetworkError(
            f"{address}: what answers there does not serve this; check the address and port with whoever runs the study"
        )
    if "Hostname Verification Check failed" in details or "is not in peer certificate" in details:
        return NetworkError(
            f"{address}: the coordinator's certificate does not name {address.host!r}; whoever runs the study has to "
            f"add it (`wardround init --renew --host {address.host}`), or to invite with another --address"
        )
    if "CERTIFICATE_VERIFY_FAILED" in details:
        return IdentityError(
            f"{address}: whoever answers there is not of this study's authority; nothing was sent. Check the address; "
            "a proxy that opens TLS connections does this too"
        )
    if code is grpc.StatusCode.UNAVAILABLE and "operator" in details:
        return NetworkError(f"{address}: {details}")
    return NetworkError(
        f"{connection_trouble(address, details or str(code))}. Try again with the same command; if it recurs, ask "
        "whoever runs the study whether enrolment and renewals are served (`wardround enrolment`)"
    )
