"""Certificates: who is the coordinator, who is which site, and the folders that hold these identities.

A study has its own certificate authority, which signs one certificate for the coordinator and one for each site. Keys
are P-256 (gRPC's TLS does not take Ed25519 certificates). A certificate says who its owner is three times: in the
common name (for people), in the organizational unit (the role), and in a URI that also binds it to the study
(``wardround://<study>/site/<name>`` or ``wardround://<study>/coordinator``). Extended key usage keeps the roles apart
in TLS itself: a site's certificate cannot pass for the coordinator's, nor the coordinator's for a site's.

An identity folder (mode 0700) holds ``ca.crt``, ``identity.crt`` and ``identity.key`` (mode 0600), all PEM; an
authority folder holds ``ca.crt`` and ``ca.key`` (mode 0600). Certificates are written last: where one
lies, its key is whole.

Source: the profile of X.509 certificates is RFC 5280, its use for naming TLS peers RFC 9525.
"""

from __future__ import annotations

import datetime
import functools
import ipaddress
import os
import re
import stat
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal
from urllib.parse import quote

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.disk import cannot_write, of_the_disk
from common.errors import IdentityError, RunFolderError, UsageError

Role = Literal["coordinator", "site"]

AUTHORITY_CERTIFICATE: Final = "ca.crt"
AUTHORITY_KEY: Final = "ca.key"
CERTIFICATE: Final = "identity.crt"
KEY: Final = "identity.key"

_VALIDITY: Final = datetime.timedelta(days=2 * 365)
_CLOCK_DIFFERENCE: Final = datetime.timedelta(days=1)  # hospitals' clocks differ
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")  # also a folder's name, and part of a URI
_MAX_COMMON_NAME: Final = 64  # RFC 5280, ub-common-name


@dataclass(frozen=True)
class Identity:
    """Who a process is, ready for TLS: PEM bytes that were checked to belong together.

    `certificate`, `key` and `authority` (the study's CA certificate) are PEM; `not_after` is the moment, in UTC, at
    which the certificate or the authority expires, whichever is first. The key is left out of ``repr``.
    """

    certificate: bytes
    key: bytes = field(repr=False)
    authority: bytes
    name: str
    role: Role
    not_after: datetime.datetime


def create_authority(folder: Path, study: str) -> None:
    """Make the certificate authority of `study` in `folder` (created where missing, mode 0700).

    Raises IdentityError when the folder already holds an authority, since a second one would shut out every site, when
    `study` is not 1 to 64 printable characters, or when the folder cannot be written.
    """
    if not study.isprintable() or not 1 <= len(study) <= _MAX_COMMON_NAME:
        raise IdentityError(
            f"study {study!r}: expected a name of 1 to {_MAX_COMMON_NAME} printable characters; rename the study"
        )
    if (folder / AUTHORITY_CERTIFICATE).exists():
        raise IdentityError(
            f"{folder}: already holds an authority; a new one would shut out every site that it made a "
            "certificate for. Use it, or "
            "choose another folder"
        )
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _subject("authority", study)
    certificate = (
        _builder(subject, subject, key.public_key(), key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(authority=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    _make_folder(folder)
    _write(folder / AUTHORITY_KEY, _key_pem(key), 0o600)
    _write(folder / AUTHORITY_CERTIFICATE, _certificate_pem(certificate), 0o644)


def issue(folder: Path, authority: Path, name: str, role: Role, hosts: Sequence[str] = ()) -> None:
    """Make a key, have the authority in folder `authority` sign its certificate, and write both to `folder`.

    Parameters
    ----------
    folder
        The identity's folder; created where missing, mode 0700.
    authority
        A folder made by `create_authority`.
    name
        The common name: up to 63 letters, digits, ``.``, ``_`` and ``-``, the first a letter or digit.
    role
        ``"coordinator"`` (a TLS server) or ``"site"`` (a TLS client).
    hosts
        DNS names and IP addresses at which sites reach the coordinator; needed for it, not allowed for a site.

    Raises
    ------
    IdentityError
        A name, role or host is not as above; `folder` already holds an identity; the authority is missing, unreadable,
        expired or open to others; a file cannot be written.
    """
    if role not in ("coordinator", "site"):
        raise IdentityError(f"identity {name!r}: expected the role coordinator or site, found {role!r}")
    if not _NAME.fullmatch(name):
        raise IdentityError(
            f"identity {name!r}: expected up to 63 letters, digits, '.', '_' and '-', beginning with a letter or "
            "digit; choose another name"
        )
    if (role == "coordinator") != bool(hosts):
        raise IdentityError(
            f"identity {name!r}: expected host names for a coordinator, and none for a site; found role {role} with "
            f"{len(hosts)} host names"
        )
    if (folder / CERTIFICATE).exists():
        raise IdentityError(f"{folder}: already holds an identity; move it away first, or choose another folder")
    names = [_host(host) for host in hosts]
    authority_pem, authority_certificate = _read_certificate(authority / AUTHORITY_CERTIFICATE)
    _, authority_key = _read_key(authority / AUTHORITY_KEY)
    _check_key(authority / AUTHORITY_KEY, authority_key, authority_certificate)
    _check_dates(authority / AUTHORITY_CERTIFICATE, authority_certificate)
    uri = x509.UniformResourceIdentifier(_uri(_study(authority_certificate), role, name))
    usage = ExtendedKeyUsageOID.SERVER_AUTH if role == "coordinator" else ExtendedKeyUsageOID.CLIENT_AUTH
    key = ec.generate_private_key(ec.SECP256R1())
    # Not beyond the authority's own end, so that `not_after` of the identity is the date that counts.
    certificate = (
        _builder(
            _subject(role, name),
            authority_certificate.subject,
            key.public_key(),
            authority_key.public_key(),
            latest=authority_certificate.not_valid_after_utc,
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(x509.SubjectAlternativeName([*names, uri]), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    _make_folder(folder)
    _write(folder / AUTHORITY_CERTIFICATE, authority_pem, 0o644)
    _write(folder / KEY, _key_pem(key), 0o600)
    _write(folder / CERTIFICATE, _certificate_pem(certificate), 0o644)


def load_identity(folder: Path) -> Identity:
    """The identity in `folder`, checked as far as it can be without the peer.

    Raises
    ------
    IdentityError
        A file is missing or unreadable; the key can be read by other users; the key does not fit the certificate; the
        certificate is expired, not yet valid, or not signed by ``ca.crt``; it does not say who its owner is.
    """
    authority_pem, authority = _read_certificate(folder / AUTHORITY_CERTIFICATE)
    certificate_pem, certificate = _read_certificate(folder / CERTIFICATE)
    key_pem, key = _read_key(folder / KEY)
    _check_key(folder / KEY, key, certificate)
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm) as error:
        raise IdentityError(
            f"{folder / CERTIFICATE}: was not signed by {AUTHORITY_CERTIFICATE} beside it; the files come from "
            "different sets: take all three from one, or get a new identity"
        ) from error
    for path, checked in ((folder / AUTHORITY_CERTIFICATE, authority), (folder / CERTIFICATE, certificate)):
        _check_dates(path, checked)
    try:
        role, name = _owner(certificate)
    except IdentityError as error:
        raise IdentityError(f"{folder / CERTIFICATE}: {error}") from error
    not_after = min(certificate.not_valid_after_utc, authority.not_valid_after_utc)
    return Identity(certificate_pem, key_pem, authority_pem, name, role, not_after)


@functools.lru_cache(maxsize=256)
def peer_name(pem_certificate: bytes) -> tuple[Role, str]:
    """Role and name of a certificate's owner, from its PEM (gRPC: ``auth_context()["x509_pem_cert"][0]``).

    The certificate must have been verified by TLS already; here it is only read. Raises IdentityError where it is not a
    certificate that `issue` could have made.
    """
    try:
        certificate = x509.load_pem_x509_certificate(pem_certificate)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise IdentityError(f"peer's certificate: cannot be read ({error}); the peer needs a new identity") from error
    return _owner(certificate)


def ensure_simulation_identities(folder: Path, study: str, sites: Sequence[str], hosts: Sequence[str]) -> None:
    """Have ``authority``, ``coordinator`` and ``sites/<name>`` under `folder`; what is there already stays as it is.

    For simulations only: in a real study the authority's key and the sites' keys never share a machine.

    Raises
    ------
    UsageError
        One of `hosts` is no DNS name or IP address.
    RunFolderError
        `folder` cannot be made, or its disk takes no more.
    IdentityError
        As `create_authority` and `issue` raise it; or the authority is that of another study, or the coordinator's
        certificate that is there already does not name all `hosts`.
    """
    try:
        wanted = [_host(host) for host in hosts]
    except IdentityError as error:
        raise UsageError(str(error)) from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if of_the_disk(error):
            raise cannot_write(folder, error) from error
        raise RunFolderError(f"{folder}: cannot be made ({error.strerror}); choose another folder") from error
    authority = folder / "authority"
    if not (authority / AUTHORITY_CERTIFICATE).exists():
        create_authority(authority, study)
    _, certificate = _read_certificate(authority / AUTHORITY_CERTIFICATE)
    if _study(certificate) != study:
        raise IdentityError(
            f"{authority}: expected the authority of study {study!r}, found that of {_study(certificate)!r}; delete "
            f"{folder} or choose another run folder"
        )
    if (folder / "coordinator" / CERTIFICATE).exists():
        _check_hosts(folder / "coordinator", wanted)
    else:
        issue(folder / "coordinator", authority, "coordinator", "coordinator", hosts)
    for site in sites:
        if not (folder / "sites" / site / CERTIFICATE).exists():
            issue(folder / "sites" / site, authority, site, "site")


def _check_hosts(folder: Path, wanted: Sequence[x509.GeneralName]) -> None:
    """Raises IdentityError where the certificate in the folder does not name one of these hosts."""
    _, certificate = _read_certificate(folder / CERTIFICATE)
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension):
        names = x509.SubjectAlternativeName([])
    present = {str(name.value).lower() for name in names}
    if missing := [str(name.value) for name in wanted if str(name.value).lower() not in present]:
        raise IdentityError(
            f"{folder}: the coordinator's certificate there is not for {', '.join(missing)}; move {folder} away and "
            "run again, and a new one is made; the sites' stay good"
        )


def _subject(role: str, name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Wardround"),
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role),
            x509.NameAttribute(NameOID.COMMON_NAME, name),
        ]
    )


def _uri(study: str, role: Role, name: str) -> str:
    owner = "coordinator" if role == "coordinator" else f"site/{quote(name, safe='')}"
    return f"wardround://{quote(study, safe='')}/{owner}"


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not re.fullmatch(r"(?=.{1,253}$)[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*", host):
        raise IdentityError(f"host {host!r}: expected a DNS name or an IP address, without port; correct it")
    return x509.DNSName(host)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePublicKey,
    latest: datetime.datetime | None = None,
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    end = now + _VALIDITY
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_DIFFERENCE)
        .not_valid_after(end if latest is None else min(end, latest))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _certificate_pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
    except OSError as error:
        if of_the_disk(error):
            raise cannot_write(folder, error) from error
        raise IdentityError(f"{folder}: cannot be made ({error}); check the path and its owner") from error


def _write(path: Path, content: bytes, mode: int) -> None:
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600 from the start
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(mode)
            Path(name).replace(path)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as error:
        if of_the_disk(error):
            raise cannot_write(path, error) from error
        raise IdentityError(f"{path}: cannot be written ({error}); check the folder's owner and free space") from error


def _read(path: Path, *, secret: bool = False) -> bytes:
    try:
        with path.open("rb") as file:
            if secret:
                _check_mode(path, os.fstat(file.fileno()))
            return file.read()
    except FileNotFoundError as error:
        raise IdentityError(
            f"{path}: does not exist; give the folder that holds the identity, or get one from the coordinator"
        ) from error
    except OSError as error:
        raise IdentityError(f"{path}: cannot be read ({error}); run as the user who owns it") from error


def _check_mode(path: Path, status: os.stat_result) -> None:
    # As PostgreSQL does: container platforms mount secrets as root's, readable by the group of the service.
    forbidden = 0o027 if status.st_uid == 0 and os.geteuid() != 0 else 0o077
    if status.st_mode & forbidden:
        mode = stat.S_IMODE(status.st_mode)
        raise IdentityError(
            f"{path}: the private key has mode {mode:04o} and is open to other users; run `chmod 600 {path}`, and "
            "get a new identity if others may have read it"
        )


def _read_certificate(path: Path) -> tuple[bytes, x509.Certificate]:
    pem = _read(path)
    try:
        return pem, x509.load_pem_x509_certificate(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise IdentityError(
            f"{path}: expected a PEM certificate, found something else ({error}); restore it or get a new identity"
        ) from error


def _read_key(path: Path) -> tuple[bytes, ec.EllipticCurvePrivateKey]:
    pem = _read(path, secret=True)
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        # The parser's own message is left out: it must never repeat what the file holds.
        raise IdentityError(
            f"{path}: expected a PEM private key without password, found something else; restore it or get a "
            "new identity"
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise IdentityError(f"{path}: expected an elliptic-curve key, found {type(key).__name__}; get a new identity")
    return pem, key


def _check_key(path: Path, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
    if key.public_key() != certificate.public_key():
        raise IdentityError(
            f"{path}: the key does not fit the certificate beside it; they come from different identities: take both "
            "from one, or get a new identity"
        )


def _check_dates(path: Path, certificate: x509.Certificate) -> None:
    now = datetime.datetime.now(datetime.UTC)
    if now > certificate.not_valid_after_utc:
        raise IdentityError(f"{path}: expired on {certificate.not_valid_after_utc:%Y-%m-%d}; get a new identity")
    if now < certificate.not_valid_before_utc:
        raise IdentityError(
            f"{path}: is valid from {certificate.not_valid_before_utc:%Y-%m-%d}, and this machine's clock says "
            f"{now:%Y-%m-%d}; set the clock"
        )


def _study(authority: x509.Certificate) -> str:
    return _attribute(authority, NameOID.COMMON_NAME)


def _attribute(certificate: x509.Certificate, oid: x509.ObjectIdentifier) -> str:
    values = certificate.subject.get_attributes_for_oid(oid)
    if len(values) != 1 or not isinstance(values[0].value, str):
        raise IdentityError("certificate: it does not say whose it is; use one that Wardround issued")
    return values[0].value


def _owner(certificate: x509.Certificate) -> tuple[Role, str]:
    name = _attribute(certificate, NameOID.COMMON_NAME)
    unit = _attribute(certificate, NameOID.ORGANIZATIONAL_UNIT_NAME)
    role: Role
    if unit == "site":
        role = "site"
    elif unit == "coordinator":
        role = "coordinator"
    else:
        raise IdentityError(f"certificate of {name!r}: expected the role coordinator or site, found {unit!r}")
    if not _NAME.fullmatch(name):
        raise IdentityError(f"certificate of {name!r}: expected a name of letters, digits, '.', '_' and '-' only")
    ending = _uri("", role, name).removeprefix("wardround://")
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension) as error:
        raise IdentityError(f"certificate of {name!r}: it carries no URI; use one that Wardround issued") from error
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if not any(re.fullmatch(rf"wardround://[^/]+{re.escape(ending)}", uri) for uri in uris):
        raise IdentityError(f"certificate of {name!r}: expected a URI that ends in {ending}, found {', '.join(uris)}")
    return role, name
