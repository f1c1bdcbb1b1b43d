"""Requests for certificates (CSRs): how a site asks without showing its private keys, and what is checked of it.

A request is signed by the key it is for, which proves that whoever sends it holds that key. It names its owner as the
certificate will; the authority writes names itself, and signs nothing that asks for another.

Source: PKCS #10, RFC 2986.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from common.errors import IdentityError
from common.security.certificates import CERTIFICATE, KEY
from common.security.pem_files import (
    AUTHORITY_CERTIFICATE,
    certificate_pem,
    check_dates,
    key_pem,
    make_folder,
    read_key,
    read_signing_key,
    write_pem,
)
from common.security.profile import (
    SIGNING,
    TLS_CLIENT,
    Role,
    is_issued_by,
    issued_certificate,
    owner_of,
    study_of,
    subject_of,
    uri_of,
    uris_of,
    usages_of,
)
from common.security.signing import SIGNING_CERTIFICATE, SIGNING_KEY

_MOST_BYTES: Final = 4096  # of a request; ours have 350


@dataclass(frozen=True)
class Keys:
    """The private keys of an identity; they never leave the machine that made them."""

    tls: ec.EllipticCurvePrivateKey = field(repr=False)
    signing: ed25519.Ed25519PrivateKey = field(repr=False)

    @staticmethod
    def new() -> Keys:
        """Keys that nobody has seen."""
        return Keys(ec.generate_private_key(ec.SECP256R1()), ed25519.Ed25519PrivateKey.generate())

    @staticmethod
    def read(folder: Path) -> Keys:
        """The keys in an identity's folder. Raises IdentityError where they are missing or open to others."""
        return Keys(read_key(folder / KEY)[1], read_signing_key(folder / SIGNING_KEY))

    def write(self, folder: Path) -> None:
        """Writes both, mode 0600, into a folder for its owner alone. Raises IdentityError, RunFolderError."""
        make_folder(folder)
        write_pem(folder / SIGNING_KEY, key_pem(self.signing), 0o600)
        write_pem(folder / KEY, key_pem(self.tls), 0o600)

    def requests(self, study: str, role: Role, name: str) -> Requests:
        """What is sent to have them certified."""
        builder = (
            x509.CertificateSigningRequestBuilder()
            .subject_name(subject_of(role, name))
            .add_extension(
                x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri_of(study, role, name))]), critical=False
            )
        )
        return Requests(
            builder.sign(self.tls, hashes.SHA256()).public_bytes(serialization.Encoding.DER),
            builder.sign(self.signing, None).public_bytes(serialization.Encoding.DER),
        )


@dataclass(frozen=True)
class Requests:
    """Two requests (DER), for the key of TLS and for the one that signs."""

    tls: bytes
    signing: bytes


@dataclass(frozen=True)
class Certified:
    """What comes back (PEM): the authority's certificate, and one for each key."""

    authority: bytes
    tls: bytes
    signing: bytes

    def write(self, folder: Path, before_last: Callable[[], None] = lambda: None) -> None:
        """Beside the keys; `identity.crt`, by which an identity is there at all, last. Raises as `Keys.write`."""
        write_pem(folder / AUTHORITY_CERTIFICATE, self.authority, 0o644)
        write_pem(folder / SIGNING_CERTIFICATE, self.signing, 0o644)
        before_last()
        write_pem(folder / CERTIFICATE, self.tls, 0o644)


@dataclass(frozen=True)
class CheckedRequests:
    """Two public keys whose private ones their sender holds."""

    tls: ec.EllipticCurvePublicKey
    signing: ed25519.Ed25519PublicKey

    def digest(self) -> bytes:
        """What tells one pair of keys from another."""
        digest = hashes.Hash(hashes.SHA256())
        for key in (self.tls, self.signing):
            digest.update(key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo))
        return digest.finalize()

    def certify(
        self, authority: x509.Certificate, key: ec.EllipticCurvePrivateKey, role: Role, name: str
    ) -> tuple[x509.Certificate, x509.Certificate]:
        """Certificates for TLS and for signing, signed by the authority."""
        return (
            issued_certificate(authority, key, self.tls, role, name, TLS_CLIENT),
            issued_certificate(authority, key, self.signing, role, name, SIGNING),
        )


def check_requests(requests: Requests, study: str, role: Role, name: str) -> CheckedRequests:
    """What is asked for, if it is for this owner and was signed by the keys themselves.

    Raises
    ------
    IdentityError : it cannot be read; is for somebody else; for another kind of key; or not signed by its key.
    """
    tls = _request(requests.tls, study, role, name).public_key()
    signing = _request(requests.signing, study, role, name).public_key()
    if not isinstance(tls, ec.EllipticCurvePublicKey) or not isinstance(tls.curve, ec.SECP256R1):
        raise IdentityError("request: expected a P-256 key for TLS, found another kind; use this version of Wardround")
    if not isinstance(signing, ed25519.Ed25519PublicKey):
        raise IdentityError(
            "request: expected an Ed25519 key that signs, found another kind; use this version of Wardround"
        )
    return CheckedRequests(tls, signing)


def _request(der: bytes, study: str, role: Role, name: str) -> x509.CertificateSigningRequest:
    try:
        if len(der) > _MOST_BYTES:
            raise ValueError
        request = x509.load_der_x509_csr(der)
        names = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        subject, uris = request.subject, names.get_values_for_type(x509.UniformResourceIdentifier)
        holds = request.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.ExtensionNotFound, x509.DuplicateExtension) as error:
        raise IdentityError("request: it cannot be read; use this version of Wardround") from error
    if not holds:
        raise IdentityError("request: it is not signed by the key that it is for: whoever sends it may not hold it")
    wanted = uri_of(study, role, name)
    if subject != subject_of(role, name) or uris != [wanted] or len(list(names)) != 1:
        raise IdentityError(f"request: it is not for {role} {name!r} of study {study!r}, who was invited")
    return request


def check_certified(
    certified: Certified, keys: Keys, study: str, role: Role, name: str, trusted: Callable[[x509.Certificate], bool]
) -> datetime.datetime:
    """Until when these hold, if they are what was asked for.

    Parameters
    ----------
    trusted : whether an authority's certificate is the one that this owner trusts.

    Raises
    ------
    IdentityError : they are by another authority, for other keys, of another owner, role, study or usage, or expired.
    """
    try:
        authority, tls, signing = (
            x509.load_pem_x509_certificate(pem) for pem in (certified.authority, certified.tls, certified.signing)
        )
    except (ValueError, UnsupportedAlgorithm) as error:
        raise IdentityError("certificates: what came is none; tell whoever runs the study") from error
    if not trusted(authority):
        raise IdentityError("certificates: they came from another authority than the study's; nothing was kept")
    pairs = ((tls, keys.tls.public_key(), TLS_CLIENT), (signing, keys.signing.public_key(), SIGNING))
    for certificate, key, usage in pairs:
        try:
            good = (
                is_issued_by(certificate, authority)
                and certificate.public_key() == key
                and owner_of(certificate) == (role, name)
                and study_of(authority) == study
                and uris_of(certificate) == [uri_of(study, role, name)]
                and usages_of(certificate) == [usage]
            )
        except (IdentityError, InvalidSignature, ValueError, UnsupportedAlgorithm):
            good = False
        if not good:
            raise IdentityError(
                f"certificates: what came is not for these keys and {role} {name!r} of study {study!r}; nothing was "
                "kept. Tell whoever runs the study"
            )
        check_dates("certificates: what came", certificate)
    return min(tls.not_valid_after_utc, authority.not_valid_after_utc)


def certified_pem(authority: bytes, certificates: tuple[x509.Certificate, x509.Certificate]) -> Certified:
    """As they cross the wire."""
    tls, signing = certificates
    return Certified(authority, certificate_pem(tls), certificate_pem(signing))
