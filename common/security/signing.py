"""Signatures of coordinators and sites: who says so, under whose authority, and for what purpose.

Every identity has a second key, Ed25519, and a certificate for it from the study's authority with the same role, name
and URI as the one for TLS, but another usage. What is signed is not the message alone but ``prefix, length of purpose,
purpose, length of message, message``, so that a signature given for one purpose is worth nothing for another.

    >>> statement("a", b"bc") == statement("ab", b"c")
    False

Source: Ed25519 is RFC 8032.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ed25519

from common.errors import IdentityError
from common.security.pem_files import (
    AUTHORITY_CERTIFICATE,
    certificate_pem,
    check_dates,
    check_key,
    key_pem,
    read_authority,
    read_certificate,
    read_signing_key,
    write_pem,
)
from common.security.profile import (
    SIGNING,
    Role,
    fingerprint,
    is_issued_by,
    issued_certificate,
    owner_of,
    study_of,
    uri_of,
    uris_of,
    usages_of,
)
from common.security.rotation import complete_rotation

SIGNING_CERTIFICATE: Final = "signing.crt"
SIGNING_KEY: Final = "signing.key"
ALGORITHM: Final = "Ed25519"

_PREFIX: Final = b"wardround-signature-1\0"
_ADD_KEYS: Final = (
    "it was made before identities had them: run `wardround certificates` again where the study's authority lies, "
    "which adds them"
)


class Refusal(Protocol):
    """Why a certificate is not good any more (`common.security.revocation.Revoked`)."""

    def sentence(self) -> str:
        """The reason, in words for people."""


class RevokedSigners(Protocol):
    """Who was shut out (`common.security.revocation.RevocationList`)."""

    def refuses(self, certificate: x509.Certificate) -> Refusal | None:
        """Why this certificate counts for nothing any more; None where it does."""


@dataclass(frozen=True)
class Signer:
    """Who signs. `certificate` and `authority` (that of the study's CA) are PEM."""

    certificate: bytes
    authority: bytes
    role: Role
    name: str
    fingerprint: str
    _key: ed25519.Ed25519PrivateKey = field(repr=False)

    def sign(self, purpose: str, message: bytes) -> bytes:
        """The signature of a message, 64 bytes, good for this purpose alone."""
        return self._key.sign(statement(purpose, message))


@dataclass(frozen=True)
class SignedBy:
    """Whose signature was found good.

    Attributes
    ----------
    role, name : of the signer, as its certificate says.
    fingerprint : SHA-256 of that certificate, hexadecimal digits.
    study : of the authority that vouches for the signer; "" where none was asked.
    """

    role: Role
    name: str
    fingerprint: str
    study: str


def statement(purpose: str, message: bytes) -> bytes:
    """What is signed for a message: it holds the purpose too, and tells the two apart."""
    stated = purpose.encode()
    return b"".join((_PREFIX, len(stated).to_bytes(4), stated, len(message).to_bytes(8), message))


def add_signing_key(folder: Path, authority: Path, role: Role, name: str) -> None:
    """Make a key that signs for this role and name, have the authority in its folder sign its certificate, write both.

    Raises
    ------
    IdentityError : the authority is missing, unreadable, expired or open to others; a file cannot be written.
    """
    _, signed_by, authority_key = read_authority(authority)
    key = ed25519.Ed25519PrivateKey.generate()
    certificate = issued_certificate(signed_by, authority_key, key.public_key(), role, name, SIGNING)
    write_pem(folder / SIGNING_KEY, key_pem(key), 0o600)
    write_pem(folder / SIGNING_CERTIFICATE, certificate_pem(certificate), 0o644)


def can_sign(folder: Path) -> bool:
    """Whether the identity in the folder has a key that signs, be it good or not."""
    return (folder / SIGNING_CERTIFICATE).exists() or (folder / SIGNING_KEY).exists()


def load_signer(folder: Path) -> Signer:
    """Who signs by the identity in `folder`.

    Raises
    ------
    IdentityError : the identity has no signing key, or it is unreadable, open to other users, expired, or not of the
        certificate and the authority beside it.
    """
    if not can_sign(folder):
        raise IdentityError(f"{folder}: the identity has no {SIGNING_KEY} and {SIGNING_CERTIFICATE}; {_ADD_KEYS}")
    complete_rotation(folder)
    authority_pem, _ = read_certificate(folder / AUTHORITY_CERTIFICATE)
    pem, certificate = read_certificate(folder / SIGNING_CERTIFICATE)
    key = read_signing_key(folder / SIGNING_KEY)
    check_key(folder / SIGNING_KEY, key, certificate)
    signed_by = check_signer(pem, authority_pem, where=str(folder / SIGNING_CERTIFICATE))
    return Signer(pem, authority_pem, signed_by.role, signed_by.name, signed_by.fingerprint, key)


def signer_in(folder: Path) -> Signer | None:
    """As `load_signer`; None where the identity is one of before there were keys that sign."""
    return load_signer(folder) if can_sign(folder) else None


def issued(certificate_pem: bytes, authority_pem: bytes) -> bool:
    """Whether this authority issued the certificate; False too where one of the two is none."""
    try:
        return is_issued_by(_certificate(certificate_pem, ""), _certificate(authority_pem, ""))
    except IdentityError:
        return False


def check_signer(
    certificate_pem: bytes,
    authority_pem: bytes | None,
    *,
    where: str = "signature",
    role: Role | None = None,
    name: str | None = None,
    at: datetime.datetime | None = None,
    revoked: RevokedSigners | None = None,
) -> SignedBy:
    """Whether a certificate makes its owner a signer: issued by the authority, in its dates, of this role and name.

    Parameters and errors are those of `verify`.
    """
    certificate = _certificate(certificate_pem, where)
    try:
        found_role, found_name = owner_of(certificate)
        uris = uris_of(certificate)
    except IdentityError as error:
        raise IdentityError(f"{where}: {error}") from error
    whose = f"{where}: the certificate of {found_role} {found_name!r}"
    study = ""
    if authority_pem is not None:
        authority = _certificate(authority_pem, f"{where}: the authority")
        if not is_issued_by(certificate, authority):
            raise IdentityError(
                f"{whose} (SHA-256 {fingerprint(certificate)[:16]}…) was not issued by the authority that is trusted "
                f"here (SHA-256 {fingerprint(authority)[:16]}…): it is of another study, or of somebody who poses as "
                "this one; ask the study's coordinator for its ca.crt, and do not use what was signed"
            )
        study = study_of(authority)
        if uris != [uri_of(study, found_role, found_name)]:
            raise IdentityError(
                f"{whose} is not of study {study!r}, whose authority issued it; do not use what it signed"
            )
        check_dates(f"{where}: the authority", authority, at, "what it vouched for has to be signed anew")
    if usages_of(certificate) != [SIGNING]:
        raise IdentityError(f"{whose} is not one to sign with; the signer has to use its {SIGNING_CERTIFICATE}")
    check_dates(whose, certificate, at, "what it signed has to be signed anew by its owner, with a new identity")
    if (role is not None and found_role != role) or (name is not None and found_name != name):
        wanted = " ".join(filter(None, (role, name and repr(name))))
        raise IdentityError(
            f"{where}: signed by {found_role} {found_name!r}, expected {wanted}; do not use it, and tell whoever runs "
            "the study"
        )
    if revoked is not None and (entry := revoked.refuses(certificate)):
        raise IdentityError(f"{where}: do not use what was signed: {entry.sentence()}")
    return SignedBy(found_role, found_name, fingerprint(certificate), study)


def verify(
    authority_pem: bytes | None,
    certificate_pem: bytes,
    *,
    purpose: str,
    message: bytes,
    signature: bytes,
    role: Role | None = None,
    name: str | None = None,
    where: str = "signature",
    at: datetime.datetime | None = None,
    revoked: RevokedSigners | None = None,
) -> SignedBy:
    """Whose signature this is, if it is good in every respect.

    Parameters
    ----------
    authority_pem : the study's CA certificate, as the verifier knows it. None: nobody vouches for the signer; the
        certificate says by itself who it is, and anyone can make such a one.
    certificate_pem : the signer's.
    purpose, message, signature : as in `Signer.sign`.
    role, name : that the signer must have; None: any.
    where : what is signed, the beginning of every error.
    at : when the signature was given, where that is known; the certificates must have held then. None: they must now.
    revoked : who was shut out, where that is known; what they signed counts for nothing, whenever they say they did.

    Raises
    ------
    IdentityError : the certificate was not issued by the authority, is expired, revoked or none to sign with, is of
        another role or name; or the signature is not that of this message for this purpose.
    """
    found = check_signer(certificate_pem, authority_pem, where=where, role=role, name=name, at=at, revoked=revoked)
    try:
        key = _certificate(certificate_pem, where).public_key()
        if not isinstance(key, ed25519.Ed25519PublicKey):
            raise InvalidSignature
        key.verify(signature, statement(purpose, message))
    except (InvalidSignature, ValueError, UnsupportedAlgorithm) as error:
        raise IdentityError(
            f"{where}: the signature is not one that {found.role} {found.name!r} gave for this content; it or what was "
            "signed has been changed: get both again from where they were made"
        ) from error
    return found


def _certificate(pem: bytes, where: str) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise IdentityError(
            f"{where}: expected a PEM certificate, found something else; get it again from where it was made"
        ) from error
