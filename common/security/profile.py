"""What the certificates of a study say and allow: whose they are, what they may be used for, how long they hold.

Source: the profile of X.509 certificates is RFC 5280; the usage of keys that sign documents, RFC 9336.
"""

from __future__ import annotations

import datetime
import ipaddress
import re
from collections.abc import Sequence
from typing import Final, Literal, get_args
from urllib.parse import quote

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import IdentityError

Role = Literal["coordinator", "site", "investigator", "observer"]
"""What a certificate's owner may do: a site trains; an investigator starts, stops, publishes and fetches; an observer
reads metrics."""
PublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey
PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey

MEMBERS: Final[tuple[Role, ...]] = ("site", "investigator", "observer")
"""The roles of those who dial the coordinator; each is invited by name."""
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
"""Names of coordinators and sites; also a folder's name, and part of a URI."""
TLS_SERVER: Final = ExtendedKeyUsageOID.SERVER_AUTH
TLS_CLIENT: Final = ExtendedKeyUsageOID.CLIENT_AUTH
SIGNING: Final = x509.ObjectIdentifier("1.3.6.1.5.5.7.3.36")
"""The usage of RFC 9336, id-kp-documentSigning: a key that signs cannot speak in TLS, nor the other way round."""

_UNREADABLE: Final = (
    ValueError,
    x509.ExtensionNotFound,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)
"""What an extension is read with of a certificate that anybody may have made up."""

_VALIDITY: Final = datetime.timedelta(days=2 * 365)
_AUTHORITY_VALIDITY: Final = datetime.timedelta(days=10 * 365)  # what it vouches for is renewed meanwhile
_CLOCK_DIFFERENCE: Final = datetime.timedelta(days=1)  # hospitals' clocks differ


def authority_certificate(study: str, key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    """The certificate of a study's authority, signed by its own key."""
    subject = subject_of("authority", study)
    return (
        _builder(subject, subject, key.public_key(), key.public_key(), validity=_AUTHORITY_VALIDITY)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(authority=True), critical=True)
        .sign(key, hashes.SHA256())
    )


def issued_certificate(
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    key: PublicKey,
    role: Role,
    name: str,
    usage: x509.ObjectIdentifier,
    hosts: Sequence[x509.GeneralName] = (),
) -> x509.Certificate:
    """A certificate for somebody's key, signed by the authority; it names its owner, and the hosts of a server.

    It does not outlive the authority's, so that the earlier end of both is its own.
    """
    uri = x509.UniformResourceIdentifier(uri_of(study_of(authority), role, name))
    return (
        _builder(
            subject_of(role, name),
            authority.subject,
            key,
            authority_key.public_key(),
            latest=authority.not_valid_after_utc,
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(x509.SubjectAlternativeName([*hosts, uri]), critical=False)
        .sign(authority_key, hashes.SHA256())
    )


def is_issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether the authority is one, and signed the certificate itself."""
    try:
        certificate.verify_directly_issued_by(authority)
        return authority.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm, *_UNREADABLE):
        return False


def usages_of(certificate: x509.Certificate) -> list[x509.ObjectIdentifier]:
    """What the certificate's key may be used for; nothing where it does not say."""
    try:
        return list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except _UNREADABLE:
        return []


def uris_of(certificate: x509.Certificate) -> list[str]:
    """The URIs that name the certificate's owner. Raises IdentityError where it has none that can be read."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except _UNREADABLE as error:
        raise IdentityError("certificate: it carries no URI; use one that Wardround issued") from error
    return names.get_values_for_type(x509.UniformResourceIdentifier)


def hosts_of(certificate: x509.Certificate) -> list[str]:
    """The DNS names and IP addresses of a server's certificate; nothing where it has none that can be read."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except _UNREADABLE:
        return []
    return [str(name.value) for name in names if isinstance(name, x509.DNSName | x509.IPAddress)]


def fingerprint(certificate: x509.Certificate) -> str:
    """The SHA-256 of the certificate (DER), in hexadecimal digits, as `openssl x509 -fingerprint -sha256` has it."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def subject_of(role: str, name: str) -> x509.Name:
    """A certificate's subject: the role as its unit, the name (of an authority, its study's) as its common name."""
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Wardround"),
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role),
            x509.NameAttribute(NameOID.COMMON_NAME, name),
        ]
    )


def uri_of(study: str, role: Role, name: str) -> str:
    """The URI that binds a name and role to a study."""
    owner = "coordinator" if role == "coordinator" else f"{role}/{quote(name, safe='')}"
    return f"wardround://{quote(study, safe='')}/{owner}"


def role_of(word: str) -> Role | None:
    """The role of this name; None where there is none."""
    return next((role for role in get_args(Role) if role == word), None)


def serial_of(certificate: x509.Certificate) -> str:
    """The serial number, in hexadecimal digits, as `openssl x509 -serial` has it but in small letters."""
    return f"{certificate.serial_number:x}"


def _or(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def host_name(host: str) -> x509.GeneralName:
    """A DNS name or IP address as certificates name it. Raises IdentityError where it is neither."""
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
    key: PublicKey,
    issuer_key: ec.EllipticCurvePublicKey,
    latest: datetime.datetime | None = None,
    validity: datetime.timedelta = _VALIDITY,
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    end = now + validity
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


def study_of(authority: x509.Certificate) -> str:
    """The study whose authority this is. Raises IdentityError where it does not say."""
    return _attribute(authority, NameOID.COMMON_NAME)


def _attribute(certificate: x509.Certificate, oid: x509.ObjectIdentifier) -> str:
    values = certificate.subject.get_attributes_for_oid(oid)
    if len(values) != 1 or not isinstance(values[0].value, str):
        raise IdentityError("certificate: it does not say whose it is; use one that Wardround issued")
    return values[0].value


def owner_of(certificate: x509.Certificate) -> tuple[Role, str]:
    """Role and name of the certificate's owner. Raises IdentityError where Wardround would not have issued it."""
    name = _attribute(certificate, NameOID.COMMON_NAME)
    unit = _attribute(certificate, NameOID.ORGANIZATIONAL_UNIT_NAME)
    role = role_of(unit)
    if role is None:
        raise IdentityError(
            f"certificate of {name!r}: expected the role coordinator, {_or(MEMBERS)}, found {unit!r}; use one that "
            "Wardround issued"
        )
    if not NAME.fullmatch(name):
        raise IdentityError(f"certificate of {name!r}: expected a name of letters, digits, '.', '_' and '-' only")
    ending = uri_of("", role, name).removeprefix("wardround://")
    uris = uris_of(certificate)
    if not any(re.fullmatch(rf"wardround://[^/]+{re.escape(ending)}", uri) for uri in uris):
        raise IdentityError(f"certificate of {name!r}: expected a URI that ends in {ending}, found {', '.join(uris)}")
    return role, name
