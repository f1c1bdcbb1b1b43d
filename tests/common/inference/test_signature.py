"""The signature over a version: whose it must be, and every change to it or beneath it refused."""

from __future__ import annotations

import base64
import datetime
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import IdentityError, PublishError
from common.inference.published import open_published
from common.inference.signature import Checked, check_signature, sign_manifest
from common.inference.version_files import check_files
from common.security.authorities import trusted_authority
from common.security.certificates import ensure_simulation_identities
from common.security.signing import load_signer
from common.study import Study
from tests.common.inference.published_version import sign, write_version
from tests.signers import AUTHORITIES, coordinator_of, identities, site_of


@pytest.fixture
def version(tmp_path: Path, tiny_study: Callable[..., Study]) -> Path:
    folder = write_version(tmp_path / "v3", tiny_study(), {"float32": b"big", "int8": b"small"})
    return sign(folder, coordinator_of("tiny"))


def checked(version: Path, authority: Path | None = AUTHORITIES, *, allow_unsigned: bool = False) -> Checked:
    content = (version / "manifest.json").read_bytes()
    trusted = trusted_authority(authority)
    found = check_signature(content, version, trusted, allow_unsigned=allow_unsigned)
    check_files(version)
    return found


def test_a_signed_version_is_its_coordinators(version: Path) -> None:
    found = checked(version)
    assert found.signed_by is not None
    assert (found.signed_by.role, found.signed_by.study, found.warnings) == ("coordinator", "tiny", [])
    assert found.report() == {
        "signed_by": {
            "role": "coordinator", "name": "coordinator", "certificate_sha256": coordinator_of("tiny").fingerprint,
        },
        "authority": str(AUTHORITIES),
    }  # fmt: skip
    assert open_published(version).variant == "float32"


def test_without_an_authority_nobody_vouches_for_the_signer(version: Path) -> None:
    found = checked(version, None)
    (warning,) = found.warnings
    assert f"(SHA-256 {coordinator_of('tiny').fingerprint}): not checked against an authority" in warning
    assert found.report()["authority"] is None


@pytest.mark.parametrize("file", ["manifest.json", "manifest.sig"])
def test_no_byte_can_be_changed(version: Path, file: str) -> None:
    content = (version / file).read_bytes()
    for position in range(0, len(content), 37):
        (version / file).write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        try:
            found = checked(version)
        except (IdentityError, PublishError):
            continue
        # White space and the like around the very same signature: it still is the coordinator's.
        assert file == "manifest.sig"
        assert found.signed_by is not None
        assert found.signed_by.fingerprint == coordinator_of("tiny").fingerprint
    (version / file).write_bytes(content)
    checked(version)


def test_a_changed_signature_and_a_changed_manifest_are_told(version: Path) -> None:
    signature = json.loads((version / "manifest.sig").read_text())
    value = bytearray(base64.b64decode(signature["signature"]))
    value[7] ^= 1
    (version / "manifest.sig").write_text(
        json.dumps(signature | {"signature": base64.b64encode(bytes(value)).decode()})
    )
    with pytest.raises(IdentityError, match="is not one that coordinator 'coordinator' gave for this content"):
        checked(version)
    (version / "manifest.sig").write_text(json.dumps(signature))
    with (version / "manifest.json").open("a") as file:
        file.write(" ")
    with pytest.raises(IdentityError, match="is not one that coordinator 'coordinator' gave for this content"):
        checked(version)


def test_files_are_as_they_were_signed_or_refused(version: Path) -> None:
    (version / "model_int8.tflite").write_bytes(b"smalL")
    with pytest.raises(PublishError, match=r"model_int8\.tflite: damaged or changed"):
        checked(version)
    (version / "model_int8.tflite").unlink()
    with pytest.raises(PublishError, match=r"model_int8\.tflite is missing"):
        checked(version)
    (version / "model_int8.tflite").write_bytes(b"small")
    (version / "run_me.py").write_bytes(b"")
    with pytest.raises(PublishError, match=r"run_me\.py is not in the manifest"):
        checked(version)


def test_a_coordinator_of_another_study_is_refused(version: Path, tmp_path: Path) -> None:
    ensure_simulation_identities(tmp_path / "other", "tiny", ["north"], ["localhost"])
    sign(version, load_signer(tmp_path / "other" / "coordinator"))
    with pytest.raises(IdentityError, match="was not issued by the authority that is trusted here"):
        checked(version)
    sign(version, coordinator_of("organs"))  # trusted too, for its own study
    with pytest.raises(IdentityError, match="the signer is of study 'organs', the version of 'tiny'"):
        checked(version)


def test_a_site_signs_its_own_personal_model_and_nothing_else(version: Path) -> None:
    sign(version, site_of("tiny"))
    for authority in (AUTHORITIES, None):
        with pytest.raises(IdentityError, match="signed by site 'north', and only a study's coordinator signs"):
            checked(version, authority)
    sign(version, site_of("tiny"), personal={"gain": 0.1})
    assert checked(version).warnings == [
        "a personal model, made and signed by site 'north' for its own images, not by the study"
    ]
    sign(version, coordinator_of("tiny"))
    with pytest.raises(IdentityError, match="only the site that made a personal model signs it"):
        checked(version)


def test_a_signature_of_another_version_or_signer_does_not_pass(version: Path, tmp_path: Path) -> None:
    other = sign(shutil.copytree(version, tmp_path / "v4"), coordinator_of("tiny"), version="v4")
    shutil.copy(other / "manifest.sig", version / "manifest.sig")
    with pytest.raises(IdentityError, match="gave for this content"):
        checked(version)
    sign(version, coordinator_of("tiny"))
    ensure_simulation_identities(tmp_path / "again", "tiny", ["north"], ["localhost"])
    sign_manifest(version, load_signer(tmp_path / "again" / "coordinator"))  # the manifest names the one before
    with pytest.raises(IdentityError, match="not by the signer that the manifest names"):
        checked(version, tmp_path / "again" / "authority" / "ca.crt")


def test_an_expired_certificate_is_refused(version: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Clock:
            return super().now(tz) + datetime.timedelta(days=3 * 365)

    monkeypatch.setattr(datetime, "datetime", Clock)
    for authority in (AUTHORITIES, None):
        with pytest.raises(IdentityError, match=r"expired on 20\d\d-\d\d-\d\d; what"):
            checked(version, authority)


def test_a_signature_that_was_taken_away_is_missed(version: Path) -> None:
    (version / "manifest.sig").unlink()
    for allow_unsigned in (False, True):
        with pytest.raises(IdentityError, match="is not there, and the manifest says that it was signed"):
            checked(version, allow_unsigned=allow_unsigned)


def test_a_version_of_before_signatures_has_to_be_allowed(tmp_path: Path, tiny_study: Callable[..., Study]) -> None:
    version = write_version(tmp_path / "v1", tiny_study(), {"float32": b"x"})
    with pytest.raises(IdentityError, match=r"v1: not signed .* used only with --allow-unsigned"):
        checked(version)
    found = checked(version, allow_unsigned=True)
    assert found.signed_by is None
    assert found.warnings == [
        "this version is not signed: nobody can tell who made it, or whether it was changed since"
    ]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "damaged, no signature can be read"),
        ("[]", "damaged, no signature"),
        ('{"format": 1, "algorithm": "Ed25519"}', "damaged, no signature"),
        ('{"format": 1, "algorithm": "Ed25519", "certificate": "x", "signature": "AA=="}', "expected a PEM cert"),
        ('{"format": 1, "algorithm": "none", "certificate": "x", "signature": ""}', "of format 1 by 'none', expected"),
        ('{"format": 1, "algorithm": "Ed25519", "certificate": "x", "signature": "!"}', "damaged, no signature"),
        ("x" * 70_000, r"damaged, no signature can be read from it \(too large\)"),
    ],
)
def test_malformed_signatures_are_refused(version: Path, text: str, match: str) -> None:
    (version / "manifest.sig").write_text(text)
    with pytest.raises(IdentityError, match=match):
        checked(version, allow_unsigned=True)


def test_an_authority_that_is_none_is_named(version: Path, tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match=r"none\.crt: does not exist"):
        checked(version, tmp_path / "none.crt")
    (tmp_path / "text.crt").write_text("hello")
    with pytest.raises(IdentityError, match=r"text\.crt: expected certificates in PEM"):
        checked(version, tmp_path / "text.crt")
    # A site's certificate is no authority, whatever it is given as.
    with pytest.raises(IdentityError, match="was not issued by the authority"):
        checked(version, identities("tiny") / "sites" / "north" / "identity.crt")
