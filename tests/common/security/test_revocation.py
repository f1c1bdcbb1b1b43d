"""Who was shut out: by whatever certificate, at once, and nobody can take it back without the coordinator's key."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from cryptography import x509

from common.errors import IdentityError
from common.security.certificates import ensure_simulation_identities, issue
from common.security.profile import serial_of
from common.security.revocation import REVOKED, RevocationFile, revoke
from common.security.signing import Signer, load_signer, verify


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    ensure_simulation_identities(tmp_path / "ids", "nuclei", ["north", "south"], ["localhost"])
    return tmp_path / "ids"


def file_of(folder: Path) -> RevocationFile:
    return RevocationFile(folder / "coordinator", (folder / "authority" / "ca.crt").read_bytes())


def signer_of(folder: Path, name: str = "coordinator") -> Signer:
    return load_signer(folder / name)


def certificate(folder: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate((folder / "identity.crt").read_bytes())


def test_nobody_is_revoked_where_there_is_no_list(folder: Path) -> None:
    assert file_of(folder).current().refuses(certificate(folder / "sites" / "north")) is None


def test_every_certificate_of_a_name_is_refused_and_no_other(folder: Path) -> None:
    running = file_of(folder)
    assert running.current().number == 0
    revoke(file_of(folder), signer_of(folder), "site", "north", "laptop stolen", 1_800_000_000.0)
    issue(folder / "twin", folder / "authority", "north", "site")  # one that no record has
    issue(folder / "observer", folder / "authority", "north", "observer")
    for name in ("sites/north", "twin"):
        entry = running.current().refuses(certificate(folder / name))
        assert entry is not None
        assert entry.sentence().startswith(
            "the certificate of site 'north' was revoked on 2027-01-15 08:00 UTC (laptop stolen); ask the study's "
            "coordinator for a new invitation"
        )
    for name in ("sites/south", "coordinator", "observer"):
        assert running.current().refuses(certificate(folder / name)) is None


def test_certificates_of_a_new_invitation_hold_until_the_next_revocation(folder: Path) -> None:
    file, signer = file_of(folder), signer_of(folder)
    revoke(file, signer, "site", "north", "", 1.0)
    issue(folder / "new", folder / "authority", "north", "site")
    old, new = certificate(folder / "sites" / "north"), certificate(folder / "new")
    with file.changing(signer) as changing:
        changing.list = changing.list.with_valid("site", "north", (serial_of(new),))
    assert file_of(folder).current().refuses(old) is not None
    assert file_of(folder).current().refuses(new) is None
    revoke(file, signer, "site", "north", "", 2.0)
    assert file_of(folder).current().refuses(new) is not None


def test_what_a_revoked_site_signed_counts_for_nothing(folder: Path) -> None:
    authority = (folder / "authority" / "ca.crt").read_bytes()
    north, south = signer_of(folder, "sites/north"), signer_of(folder, "sites/south")
    revoke(file_of(folder), signer_of(folder), "site", "north", "", 1.0)
    revoked = file_of(folder).current()
    for signer in (north, south):
        signed = {"purpose": "test", "message": b"m", "signature": signer.sign("test", b"m")}
        verify(authority, signer.certificate, **signed)  # type: ignore[arg-type]  # without the list nobody knows
    verify(authority, south.certificate, **signed, revoked=revoked)  # type: ignore[arg-type]
    with pytest.raises(IdentityError, match="do not use what was signed: the certificate of site 'north' was revoked"):
        verify(
            authority,
            north.certificate,
            purpose="test",
            message=b"m",
            signature=north.sign("test", b"m"),
            revoked=revoked,
        )


def test_a_list_that_somebody_changed_is_refused(folder: Path) -> None:
    revoke(file_of(folder), signer_of(folder), "site", "north", "", 1.0)
    path = folder / "coordinator" / REVOKED
    content = json.loads(path.read_text())
    content["revoked"] = []
    path.write_text(json.dumps(content))
    with pytest.raises(IdentityError, match="signature is not one that coordinator"):
        file_of(folder).current()


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"number": 1}', "\xff"])
def test_a_damaged_list_is_refused_with_what_to_do(folder: Path, text: str) -> None:
    (folder / "coordinator" / REVOKED).write_text(text, encoding="latin-1")
    with pytest.raises(IdentityError, match="damaged; restore it from a backup"):
        file_of(folder).current()


def test_a_site_cannot_sign_a_list(folder: Path) -> None:
    revoke(file_of(folder), signer_of(folder, "sites/south"), "site", "north", "", 1.0)
    with pytest.raises(IdentityError, match="signed by site 'south', expected coordinator"):
        file_of(folder).current()


def test_an_older_list_that_was_put_back_is_noticed_by_who_runs(folder: Path, tmp_path: Path) -> None:
    running, path = file_of(folder), folder / "coordinator" / REVOKED
    revoke(running, signer_of(folder), "site", "south", "", 1.0)
    shutil.copy(path, tmp_path / "older")
    revoke(running, signer_of(folder), "site", "north", "", 1.0)
    assert running.current().number == 2
    shutil.copy(tmp_path / "older", path)
    with pytest.raises(IdentityError, match="an older one was put back"):
        running.current()
    assert running.newest.refuses(certificate(folder / "sites" / "north")) is not None
    path.unlink()  # who takes the file away lets nobody in either
    assert running.current().refuses(certificate(folder / "sites" / "north")) is not None


@pytest.mark.parametrize(("name", "reason"), [("", ""), ("no/rth", ""), ("north", "x" * 201), ("north", "two\nlines")])
def test_what_cannot_be_listed_is_refused(folder: Path, name: str, reason: str) -> None:
    with pytest.raises(IdentityError):
        revoke(file_of(folder), signer_of(folder), "site", name, reason, 1.0)
    assert file_of(folder).current().number == 0
