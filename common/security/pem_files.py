"""Keys and certificates as PEM files: written whole or not at all, read with care for who else can read them."""

from __future__ import annotations

import datetime
import os
import stat
import tempfile
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from common.disk import cannot_write, of_the_disk
from common.errors import IdentityError
from common.security.profile import PrivateKey

AUTHORITY_CERTIFICATE: Final = "ca.crt"
AUTHORITY_KEY: Final = "ca.key"
_GET_IDENTITY: Final = "give the folder that holds the identity, or get one from the coordinator"


def read_authority(folder: Path) -> tuple[bytes, x509.Certificate, ec.EllipticCurvePrivateKey]:
    """PEM, certificate and key of the authority in a folder, fit to sign today.

    Raises
    ------
    IdentityError : a file is missing, unreadable, open to others or expired, or they do not belong together.
    """
    pem, certificate = read_certificate(folder / AUTHORITY_CERTIFICATE)
    _, key = read_key(folder / AUTHORITY_KEY)
    check_key(folder / AUTHORITY_KEY, key, certificate)
    check_dates(folder / AUTHORITY_CERTIFICATE, certificate)
    return pem, certificate, key


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """The certificate as PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def key_pem(key: PrivateKey) -> bytes:
    """The key as PEM (PKCS #8), not encrypted."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def make_folder(folder: Path) -> None:
    """Have the folder, for its owner alone. Raises IdentityError, or RunFolderError where the disk takes no more."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
    except OSError as error:
        if of_the_disk(error):
            raise cannot_write(folder, error) from error
        raise IdentityError(f"{folder}: cannot be made ({error}); check the path and its owner") from error


def write_pem(path: Path, content: bytes, mode: int) -> None:
    """Replace a file whole; it never has more rights than `mode`. Raises as `make_folder`."""
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


def _read(path: Path, *, secret: bool = False, todo: str = _GET_IDENTITY) -> bytes:
    try:
        with path.open("rb") as file:
            if secret:
                _check_mode(path, os.fstat(file.fileno()))
            return file.read()
    except FileNotFoundError as error:
        raise IdentityError(f"{path}: does not exist; {todo}") from error
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


def read_certificate(path: Path) -> tuple[bytes, x509.Certificate]:
    """A certificate and its PEM. Raises IdentityError."""
    pem = _read(path)
    try:
        return pem, x509.load_pem_x509_certificate(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise IdentityError(
            f"{path}: expected a PEM certificate, found something else ({error}); restore it or get a new identity"
        ) from error


def read_certificates(path: Path) -> list[bytes]:
    """The PEM of each certificate in a file, at least one. Raises IdentityError."""
    todo = f"give the study's {AUTHORITY_CERTIFICATE}"
    try:
        return [certificate_pem(one) for one in x509.load_pem_x509_certificates(_read(path, todo=todo))]
    except (ValueError, UnsupportedAlgorithm) as error:
        raise IdentityError(f"{path}: expected certificates in PEM, found something else; {todo}") from error


def read_key(path: Path) -> tuple[bytes, ec.EllipticCurvePrivateKey]:
    """A key for TLS, which must not be open to other users. Raises IdentityError."""
    pem, key = _private_key(path)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise IdentityError(f"{path}: expected an elliptic-curve key, found {type(key).__name__}; get a new identity")
    return pem, key


def read_signing_key(path: Path) -> ed25519.Ed25519PrivateKey:
    """A key that signs, which must not be open to other users. Raises IdentityError."""
    _, key = _private_key(path)
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise IdentityError(f"{path}: expected an Ed25519 key, found {type(key).__name__}; get a new identity")
    return key


def _private_key(path: Path) -> tuple[bytes, object]:
    pem = _read(path, secret=True)
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        # The parser's own message is left out: it must never repeat what the file holds.
        raise IdentityError(
            f"{path}: expected a PEM private key without password, found something else; restore it or get a "
            "new identity"
        ) from error
    return pem, key


def check_key(path: Path, key: PrivateKey, certificate: x509.Certificate) -> None:
    """Raises IdentityError where the key is not that of the certificate."""
    if key.public_key() != certificate.public_key():
        raise IdentityError(
            f"{path}: the key does not fit the certificate beside it; they come from different identities: take both "
            "from one, or get a new identity"
        )


def check_dates(
    where: Path | str,
    certificate: x509.Certificate,
    at: datetime.datetime | None = None,
    todo: str = "get a new identity",
) -> None:
    """Raises IdentityError where the certificate did not hold `at` that time; None: now."""
    now = datetime.datetime.now(datetime.UTC) if at is None else at
    if now > certificate.not_valid_after_utc:
        raise IdentityError(f"{where}: expired on {certificate.not_valid_after_utc:%Y-%m-%d}; {todo}")
    if now < certificate.not_valid_before_utc:
        clock = "this machine's clock says" if at is None else "it was used on"
        raise IdentityError(
            f"{where}: is valid from {certificate.not_valid_before_utc:%Y-%m-%d}, and {clock} {now:%Y-%m-%d}; set the "
            "clock"
        )
