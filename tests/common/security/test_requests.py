"""Requests for certificates: only for one's own keys and name, and what comes back is looked at."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from common.errors import IdentityError
from common.security.certificates import create_authority, load_identity
from common.security.pem_files import read_authority
from common.security.profile import subject_of, uri_of
from common.security.requests import Certified, Keys, Requests, certified_pem, check_certified, check_requests
from common.security.signing import load_signer


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    create_authority(tmp_path / "authority", "nuclei")
    return tmp_path / "authority"


def certified(folder: Path, keys: Keys, role: str = "site", name: str = "north", study: str = "nuclei") -> Certified:
    pem, certificate, key = read_authority(folder)
    checked = check_requests(keys.requests(study, role, name), study, role, name)  # type: ignore[arg-type]
    return certified_pem(pem, checked.certify(certificate, key, role, name))  # type: ignore[arg-type]


def request(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey, name: str = "north", *more: str) -> bytes:
    uris = [uri_of("nuclei", "site", name), *more]
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri) for uri in uris])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject_of("site", name))
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.add_extension(names, False).sign(key, algorithm).public_bytes(serialization.Encoding.DER)


@pytest.mark.parametrize("role", ["site", "investigator", "observer"])
def test_keys_become_an_identity_without_leaving_their_folder(authority: Path, tmp_path: Path, role: str) -> None:
    keys, folder = Keys.new(), tmp_path / "north"
    keys.write(folder)
    with pytest.raises(IdentityError, match=r"identity\.crt|ca\.crt"):
        load_identity(folder)  # without certificates there is no identity
    answer = certified(authority, keys, role)
    end = check_certified(answer, keys, "nuclei", role, "north", lambda found: True)  # type: ignore[arg-type]
    answer.write(folder)
    identity, signer = load_identity(folder), load_signer(folder)
    assert (identity.role, identity.name, identity.not_after) == (role, "north", end)
    assert (signer.role, signer.name) == (role, "north")
    for file in folder.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == (0o600 if file.suffix == ".key" else 0o644)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert b"PRIVATE" not in answer.authority + answer.tls + answer.signing
    requests = keys.requests("nuclei", role, "north")  # type: ignore[arg-type]
    secret = keys.tls.private_numbers().private_value.to_bytes(32)
    assert secret not in requests.tls and keys.signing.private_bytes_raw() not in requests.signing


@pytest.mark.parametrize(
    ("study", "role", "name"),
    [("nuclei", "site", "south"), ("nuclei", "observer", "north"), ("other", "site", "north")],
)
def test_a_request_for_somebody_else_is_refused(study: str, role: str, name: str) -> None:
    with pytest.raises(IdentityError, match="not for site 'north' of study 'nuclei'"):
        check_requests(Keys.new().requests(study, role, name), "nuclei", "site", "north")  # type: ignore[arg-type]


def test_a_request_for_more_than_its_owner_is_refused() -> None:
    keys = Keys.new()
    good = keys.requests("nuclei", "site", "north")
    more = request(keys.tls, "north", "wardround://nuclei/coordinator")
    with pytest.raises(IdentityError, match="not for site 'north'"):
        check_requests(Requests(more, good.signing), "nuclei", "site", "north")
    with pytest.raises(IdentityError, match="not for site 'north'"):
        check_requests(Requests(good.tls, request(keys.signing, "south")), "nuclei", "site", "north")


def test_a_request_must_be_signed_by_its_own_key() -> None:
    """Else whoever sees a key's public half could have it certified as his."""
    keys = Keys.new()
    good = keys.requests("nuclei", "site", "north")
    for index, part in enumerate((good.tls, good.signing)):
        changed = part[:-1] + bytes([part[-1] ^ 1])
        pair = [good.tls, good.signing]
        pair[index] = changed
        with pytest.raises(IdentityError, match=r"not signed by the key|cannot be read"):
            check_requests(Requests(*pair), "nuclei", "site", "north")


@pytest.mark.parametrize("junk", [b"", b"junk", b"0" * 5000])
def test_junk_is_refused_with_words(junk: bytes) -> None:
    good = Keys.new().requests("nuclei", "site", "north")
    with pytest.raises(IdentityError, match="request: it cannot be read"):
        check_requests(Requests(junk, good.signing), "nuclei", "site", "north")
    with pytest.raises(IdentityError, match="request: it cannot be read"):
        check_requests(Requests(good.tls, junk), "nuclei", "site", "north")


def test_other_kinds_of_keys_are_refused() -> None:
    good = Keys.new().requests("nuclei", "site", "north")
    other_curve = request(ec.generate_private_key(ec.SECP384R1()))
    with pytest.raises(IdentityError, match="P-256"):
        check_requests(Requests(other_curve, good.signing), "nuclei", "site", "north")
    with pytest.raises(IdentityError, match="P-256"):
        check_requests(Requests(good.signing, good.signing), "nuclei", "site", "north")
    with pytest.raises(IdentityError, match="Ed25519"):
        check_requests(Requests(good.tls, good.tls), "nuclei", "site", "north")


def test_certificates_that_are_not_what_was_asked_for_are_refused(authority: Path, tmp_path: Path) -> None:
    keys = Keys.new()
    good = certified(authority, keys)
    create_authority(tmp_path / "other", "nuclei")
    others = [
        certified(authority, Keys.new()),  # of other keys
        certified(authority, keys, name="south"),
        certified(authority, keys, role="observer"),
        certified(tmp_path / "other", keys),  # by another authority, which does not come along
    ]
    for other in others:
        for mixed in (
            Certified(good.authority, other.tls, good.signing),
            Certified(good.authority, good.tls, other.signing),
        ):
            with pytest.raises(IdentityError, match="not for these keys"):
                check_certified(mixed, keys, "nuclei", "site", "north", lambda found: True)
    with pytest.raises(IdentityError, match="not for these keys"):
        check_certified(
            Certified(good.authority, good.signing, good.tls), keys, "nuclei", "site", "north", lambda found: True
        )
    with pytest.raises(IdentityError, match="another authority"):
        check_certified(good, keys, "nuclei", "site", "north", lambda found: False)
    with pytest.raises(IdentityError, match="what came is none"):
        check_certified(Certified(b"junk", good.tls, good.signing), keys, "nuclei", "site", "north", lambda found: True)
