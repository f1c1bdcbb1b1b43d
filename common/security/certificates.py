"""Certificates: who is the coordinator, who is which site, and the folders that hold these identities.

A study has its own certificate authority, which signs one certificate for the coordinator and one for each site. Keys
are P-256 (gRPC's TLS does not take Ed25519 certificates). A certificate says who its owner is three times: in the
common name (for people), in the organizational unit (the role), and in a URI that also binds it to the study
(``wardround://<study>/site/<name>`` or ``wardround://<study>/coordinator``; likewise ``investigator/<name>`` and
``observer/<name>``). Extended key usage keeps the roles apart
in TLS itself: a site's certificate cannot pass for the coordinator's, nor the coordinator's for a site's.

An identity folder (mode 0700) holds ``ca.crt``, ``identity.crt`` and ``identity.key`` (mode 0600), and a second pair,
``signing.crt`` and ``signing.key``, for what its owner signs (`common.security.signing`); all PEM. An authority folder
holds ``ca.crt`` and ``ca.key`` (mode 0600). Certificates are written last: where one lies, its key is whole.

Source: the profile of X.509 certificates is RFC 5280, its use for naming TLS peers RFC 9525.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from common.disk import cannot_write, of_the_disk
from common.errors import IdentityError, RunFolderError, UsageError
from common.security.pem_files import (
    AUTHORITY_CERTIFICATE,
    AUTHORITY_KEY,
    certificate_pem,
    check_dates,
    check_key,
    key_pem,
    make_folder,
    read_authority,
    read_certificate,
    read_key,
    write_pem,
)
from common.security.profile import (
    MEMBERS,
    NAME,
    TLS_CLIENT,
    TLS_SERVER,
    Role,
    authority_certificate,
    host_name,
    is_issued_by,
    issued_certificate,
    owner_of,
    study_of,
)
from common.security.rotation import complete_rotation
from common.security.signing import SIGNING_CERTIFICATE, add_signing_key

CERTIFICATE: Final = "identity.crt"
KEY: Final = "identity.key"

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

    @property
    def run(self) -> bytes:
        """What tells runs of a study apart, 32 bytes: the authority that signed the certificates of both sides."""
        return x509.load_pem_x509_certificate(self.authority).fingerprint(hashes.SHA256())


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
    certificate = authority_certificate(study, key)
    make_folder(folder)
    write_pem(folder / AUTHORITY_KEY, key_pem(key), 0o600)
    write_pem(folder / AUTHORITY_CERTIFICATE, certificate_pem(certificate), 0o644)


def issue(folder: Path, authority: Path, name: str, role: Role, hosts: Sequence[str] = ()) -> None:
    """Make a key for TLS and one that signs, have the authority in `authority` sign their certificates, write all four.

    Parameters
    ----------
    folder
        The identity's folder; created where missing, mode 0700.
    authority
        A folder made by `create_authority`.
    name
        The common name: up to 63 letters, digits, ``.``, ``_`` and ``-``, the first a letter or digit.
    role
        ``"coordinator"`` (a TLS server) or one of `MEMBERS` (TLS clients).
    hosts
        DNS names and IP addresses at which sites reach the coordinator; needed for it, not allowed for a site.

    Raises
    ------
    IdentityError
        A name, role or host is not as above; `folder` already holds an identity; the authority is missing, unreadable,
        expired or open to others; a file cannot be written.
    """
    if role != "coordinator" and role not in MEMBERS:
        raise IdentityError(f"identity {name!r}: expected the role coordinator or one of {MEMBERS}, found {role!r}")
    if not NAME.fullmatch(name):
        raise IdentityError(
            f"identity {name!r}: expected up to 63 letters, digits, '.', '_' and '-', beginning with a letter or "
            "digit; choose another name"
        )
    if (role == "coordinator") != bool(hosts):
        raise IdentityError(
            f"identity {name!r}: expected host names for a coordinator, and none for others; found role {role} with "
            f"{len(hosts)} host names"
        )
    if (folder / CERTIFICATE).exists():
        raise IdentityError(f"{folder}: already holds an identity; move it away first, or choose another folder")
    names = [host_name(host) for host in hosts]
    authority_pem, signed_by, authority_key = read_authority(authority)
    key = ec.generate_private_key(ec.SECP256R1())
    usage = TLS_SERVER if role == "coordinator" else TLS_CLIENT
    certificate = issued_certificate(signed_by, authority_key, key.public_key(), role, name, usage, names)
    make_folder(folder)
    write_pem(folder / AUTHORITY_CERTIFICATE, authority_pem, 0o644)
    add_signing_key(folder, authority, role, name)
    write_pem(folder / KEY, key_pem(key), 0o600)
    write_pem(folder / CERTIFICATE, certificate_pem(certificate), 0o644)


def load_identity(folder: Path) -> Identity:
    """The identity in `folder`, checked as far as it can be without the peer.

    Raises
    ------
    IdentityError
        A file is missing or unreadable; the key can be read by other users; the key does not fit the certificate; the
        certificate is expired, not yet valid, or not signed by ``ca.crt``; it does not say who its owner is.
    """
    complete_rotation(folder)
    authority_pem, authority = read_certificate(folder / AUTHORITY_CERTIFICATE)
    certificate_pem, certificate = read_certificate(folder / CERTIFICATE)
    key_pem, key = read_key(folder / KEY)
    check_key(folder / KEY, key, certificate)
    if not is_issued_by(certificate, authority):
        raise IdentityError(
            f"{folder / CERTIFICATE}: was not signed by {AUTHORITY_CERTIFICATE} beside it; the files come from "
            "different sets: take all three from one, or get a new identity"
        )
    for path, checked in ((folder / AUTHORITY_CERTIFICATE, authority), (folder / CERTIFICATE, certificate)):
        check_dates(path, checked)
    try:
        role, name = owner_of(certificate)
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
    return owner_of(certificate)


def ensure_simulation_identities(folder: Path, study: str, sites: Sequence[str], hosts: Sequence[str]) -> None:
    """Have ``authority``, ``coordinator`` and ``sites/<name>`` under `folder`; what is there already stays as it is.

    Identities of before there were signing keys get theirs, where the authority's key is there to sign.

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
        wanted = [host_name(host) for host in hosts]
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
    _, certificate = read_certificate(authority / AUTHORITY_CERTIFICATE)
    if study_of(certificate) != study:
        raise IdentityError(
            f"{authority}: expected the authority of study {study!r}, found that of {study_of(certificate)!r}; delete "
            f"{folder}, if no site holds an identity of it, or choose another folder"
        )
    if (folder / "coordinator" / CERTIFICATE).exists():
        _check_hosts(folder / "coordinator", wanted)
    else:
        issue(folder / "coordinator", authority, "coordinator", "coordinator", hosts)
    for site in sites:
        if not (folder / "sites" / site / CERTIFICATE).exists():
            issue(folder / "sites" / site, authority, site, "site")
    if (authority / AUTHORITY_KEY).exists():
        for identity in (folder / "coordinator", *(folder / "sites" / site for site in sites)):
            if not (identity / SIGNING_CERTIFICATE).exists():
                add_signing_key(identity, authority, *owner_of(read_certificate(identity / CERTIFICATE)[1]))


def _check_hosts(folder: Path, wanted: Sequence[x509.GeneralName]) -> None:
    """Raises IdentityError where the certificate in the folder does not name one of these hosts."""
    _, certificate = read_certificate(folder / CERTIFICATE)
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
