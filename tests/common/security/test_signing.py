"""Signatures: good for one message, one purpose, one study's signer; every other use is refused with its reason."""

from __future__ import annotations

import base64
import datetime
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from hypothesis import given
from hypothesis import strategies as st

from common.errors import IdentityError
from common.security.certificates import ensure_simulation_identities, load_identity
from common.security.profile import SIGNING, issued_certificate, subject_of, uri_of
from common.security.signing import Signer, load_signer, statement, verify

HOSTS = ("localhost",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study's identities: authority, coordinator, sites/north, sites/south."""
    folder = tmp_path_factory.mktemp("identities")
    ensure_simulation_identities(folder, "nuclei", ["north", "south"], HOSTS)
    return folder


@pytest.fixture
def authority(folder: Path) -> bytes:
    return (folder / "authority" / "ca.crt").read_bytes()


@pytest.fixture
def north(folder: Path) -> Signer:
    return load_signer(folder / "sites" / "north")


def test_an_identity_has_a_private_ed25519_key_beside_the_one_for_tls(folder: Path) -> None:
    site = folder / "sites" / "north"
    assert sorted(path.name for path in site.iterdir()) == [
        "ca.crt", "identity.crt", "identity.key", "signing.crt", "signing.key",
    ]  # fmt: skip
    assert (site / "signing.key").stat().st_mode & 0o777 == 0o600
    pem = (site / "signing.key").read_bytes()
    assert isinstance(serialization.load_pem_private_key(pem, None), ed25519.Ed25519PrivateKey)
    mine = x509.load_pem_x509_certificate((site / "signing.crt").read_bytes())
    tls = x509.load_pem_x509_certificate((site / "identity.crt").read_bytes())
    assert mine.subject == tls.subject
    assert list(mine.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [SIGNING]
    assert "PRIVATE" not in repr(load_signer(site))
    assert "Ed25519PrivateKey" not in repr(load_signer(site))


def test_a_signature_says_who_gave_it(folder: Path, authority: bytes, north: Signer) -> None:
    signature = north.sign("test", b"message")
    found = verify(
        authority, north.certificate, purpose="test", message=b"message", signature=signature, role="site", name="north"
    )
    assert (found.role, found.name, found.study, found.fingerprint) == ("site", "north", "nuclei", north.fingerprint)
    nobody = verify(None, north.certificate, purpose="test", message=b"message", signature=signature)
    assert (nobody.name, nobody.study) == ("north", "")


def test_openssl_verifies_the_same_signature(north: Signer, tmp_path: Path) -> None:
    certificate = x509.load_pem_x509_certificate(north.certificate)
    key = certificate.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    stated = b"wardround-signature-1\0" + b"\0\0\0\4test" + b"\0\0\0\0\0\0\0\7message"
    for name, content in (("key", key), ("message", stated), ("signature", north.sign("test", b"message"))):
        (tmp_path / name).write_bytes(content)
    command = "openssl pkeyutl -verify -pubin -inkey key -rawin -in message -sigfile signature"
    ran = subprocess.run(command.split(), cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@given(st.text(max_size=8), st.binary(max_size=8), st.text(max_size=8), st.binary(max_size=8))
def test_statements_are_equal_only_for_the_same_purpose_and_message(
    purpose: str, message: bytes, other_purpose: str, other: bytes
) -> None:
    same = statement(purpose, message) == statement(other_purpose, other)
    assert same == ((purpose, message) == (other_purpose, other))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"message": b"messagE"}, "is not one that site 'north' gave for this content; it or what was signed"),
        ({"purpose": "other"}, "is not one that site 'north' gave"),
        ({"signature": b"\0" * 64}, "is not one that site 'north' gave"),
        ({"signature": b""}, "is not one that site 'north' gave"),
        ({"role": "coordinator"}, "signed by site 'north', expected coordinator; do not use it"),
        ({"name": "south"}, "signed by site 'north', expected 'south'"),
    ],
)
def test_a_signature_is_good_for_nothing_else(
    authority: bytes, north: Signer, changes: dict[str, object], match: str
) -> None:
    given = {"purpose": "test", "message": b"message", "signature": north.sign("test", b"message")} | changes
    with pytest.raises(IdentityError, match=match):
        verify(authority, north.certificate, **given)  # type: ignore[arg-type]


def test_a_signer_of_another_study_is_refused(folder: Path, authority: bytes, tmp_path: Path) -> None:
    ensure_simulation_identities(tmp_path, "nuclei", ["north"], HOSTS)  # of the very same name
    stranger = load_signer(tmp_path / "sites" / "north")
    with pytest.raises(IdentityError, match="was not issued by the authority that is trusted here"):
        verify(
            authority,
            stranger.certificate,
            purpose="test",
            message=b"m",
            signature=stranger.sign("test", b"m"),
        )


def test_keys_for_tls_do_not_sign_and_sites_issue_nothing(folder: Path, authority: bytes) -> None:
    site = folder / "sites" / "north"
    tls = load_identity(site)
    key = serialization.load_pem_private_key(tls.key, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    with pytest.raises(IdentityError, match="is not one to sign with"):
        verify(authority, tls.certificate, purpose="p", message=b"m", signature=b"\0" * 64)
    own = ed25519.Ed25519PrivateKey.generate()
    # A site that plays the authority: its certificate for "the coordinator" is signed by its own key.
    forged = issued_certificate(
        x509.load_pem_x509_certificate(tls.certificate), key, own.public_key(), "coordinator", "coordinator", SIGNING
    ).public_bytes(serialization.Encoding.PEM)
    signature = own.sign(statement("p", b"m"))
    for trusted in (authority, tls.certificate):
        with pytest.raises(IdentityError, match="was not issued by the authority"):
            verify(trusted, forged, purpose="p", message=b"m", signature=signature)


def test_an_expired_certificate_is_refused_but_for_what_it_signed_in_its_time(
    authority: bytes, north: Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    signed_on = datetime.datetime.now(datetime.UTC)

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Clock:
            return super().now(tz) + datetime.timedelta(days=3 * 365)

    def check(at: datetime.datetime | None) -> None:
        signature = north.sign("test", b"m")
        verify(authority, north.certificate, purpose="test", message=b"m", signature=signature, at=at)

    monkeypatch.setattr(datetime, "datetime", Clock)
    with pytest.raises(IdentityError, match=r"expired on 20\d\d-\d\d-\d\d; what .* has to be signed anew"):
        check(None)
    check(signed_on)


def test_an_identity_of_before_speaks_tls_and_says_how_to_sign(tmp_path: Path) -> None:
    ensure_simulation_identities(tmp_path, "nuclei", ["north"], HOSTS)
    site = tmp_path / "sites" / "north"
    for name in ("signing.crt", "signing.key"):
        (site / name).unlink()
    assert load_identity(site).name == "north"
    with pytest.raises(IdentityError, match=r"has no signing\.key and signing\.crt; .* run `wardround certificates`"):
        load_signer(site)
    before = (site / "identity.key").read_bytes()
    ensure_simulation_identities(tmp_path, "nuclei", ["north"], HOSTS)
    assert load_signer(site).name == "north"
    assert (site / "identity.key").read_bytes() == before
    (site / "signing.key").unlink()
    (site / "signing.crt").unlink()
    (tmp_path / "authority" / "ca.key").unlink()  # kept offline by now
    ensure_simulation_identities(tmp_path, "nuclei", ["north"], HOSTS)
    assert not (site / "signing.crt").exists()


def test_damaged_signing_files_say_what_is_wrong(tmp_path: Path) -> None:
    ensure_simulation_identities(tmp_path, "nuclei", ["north", "south"], HOSTS)
    north, south = tmp_path / "sites" / "north", tmp_path / "sites" / "south"
    key = (north / "signing.key").read_bytes()
    (north / "signing.key").chmod(0o644)
    with pytest.raises(IdentityError, match=r"signing\.key: the private key has mode 0644"):
        load_signer(north)
    (north / "signing.key").chmod(0o600)
    (north / "signing.key").write_bytes((south / "signing.key").read_bytes())
    with pytest.raises(IdentityError, match=r"signing\.key: the key does not fit the certificate"):
        load_signer(north)
    (north / "signing.key").write_bytes((north / "identity.key").read_bytes())
    with pytest.raises(IdentityError, match=r"signing\.key: expected an Ed25519 key"):
        load_signer(north)
    (north / "signing.key").write_bytes(key)
    (north / "signing.crt").write_bytes((north / "identity.crt").read_bytes())
    with pytest.raises(IdentityError, match=r"signing\.key: the key does not fit"):
        load_signer(north)
    (north / "signing.crt").unlink()
    with pytest.raises(IdentityError, match=r"signing\.crt: does not exist"):
        load_signer(north)


def made_up(names: bytes | None = None, usages: bytes | None = None) -> bytes:
    """A certificate as anybody can make one, with these bytes (DER) as its names or usages."""
    signer = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    uri = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri_of("nuclei", "site", "north"))])
    usage = x509.ExtendedKeyUsage([SIGNING])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject_of("site", "north"))
        .issuer_name(subject_of("authority", "nuclei"))
        .public_key(ed25519.Ed25519PrivateKey.generate().public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.UnrecognizedExtension(uri.oid, names) if names else uri, critical=False)
        .add_extension(x509.UnrecognizedExtension(usage.oid, usages) if usages else usage, critical=False)
        .sign(signer, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM)


@pytest.mark.parametrize(
    "parts",
    [
        {"names": bytes.fromhex("3004a3023000")},  # x400Address, a kind of name that is not supported
        {"names": b"\x30\x03\x01"},
        {"usages": bytes.fromhex("3004a3023000")},
        {"usages": b"\x30\x03\x01"},
    ],
)
def test_a_made_up_certificate_is_refused_in_words(authority: bytes, parts: dict[str, bytes]) -> None:
    for trusted in (None, authority):
        with pytest.raises(IdentityError, match=r"^signature: "):
            verify(trusted, made_up(**parts), purpose="test", message=b"", signature=b"")


def test_a_made_up_key_is_refused_in_words() -> None:
    der = x509.load_pem_x509_certificate(made_up()).public_bytes(serialization.Encoding.DER)
    of_no_algorithm = der.replace(bytes.fromhex("06032b6570"), bytes.fromhex("06032b657f"), 1)
    pem = b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(of_no_algorithm) + b"-----END CERTIFICATE-----\n"
    with pytest.raises(IdentityError, match=r"^signature: the signature is not one that site 'north' gave"):
        verify(None, pem, purpose="test", message=b"", signature=b"")
