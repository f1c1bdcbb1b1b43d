"""`wardround init`, `invite` and `revoke` as they are called, and what status says of certificates that end."""

from __future__ import annotations

import json
import re
import shutil
import stat
import time
from pathlib import Path
from typing import Any

import pytest

from client.site_status import status_text as site_text
from common.security.audit_check import check_log
from common.security.authorities import trusted_authority
from common.security.certificates import load_identity
from common.security.revocation import RevocationFile
from common.security.tokens import Token
from server.cli import main
from server.invitations import Register
from server.status import status_text

STUDY = """
study: digits
seed: 1
task: {dimensions: 2, channels: 1, classes: [background, cell]}
model: {filters: 4, depth: 2}
preprocessing: {patch: [16, 16]}
training: {rounds: 9}
cohort: {sites: [alpha, beta, gamma], quorum: 2, deadline: 10m}
"""


class Commands:
    """Calls commands in a folder of their own."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str, code: int = 0) -> str:
        """What it said: on standard output, or where it fails on standard error."""
        self._capsys.readouterr()
        found = main(list(arguments))
        said = self._capsys.readouterr()
        assert found == code, said.err
        return said.out if code == 0 else said.err

    def token(self, *arguments: str) -> Token:
        return Token.parse(next(line for line in self(*arguments).splitlines() if line.startswith("wr1")))


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Commands:
    monkeypatch.chdir(tmp_path)
    Path("study.yaml").write_text(STUDY)
    made = Commands(capsys)
    made("init", "study.yaml", "--host", "c.example.org", "--host", "127.0.0.1")
    return made


AUTHORITY, COORDINATOR = Path("identities/authority"), Path("identities/coordinator")


def invited(name: str = "alpha") -> list[Any]:
    register = Register(AUTHORITY)
    try:
        return [each.state(time.time()) for each in register.invitations("site", name)]
    finally:
        register.close()


def test_init_says_what_it_found(command: Commands) -> None:
    assert "Both were here already, and stay as they are" in command("init", "study.yaml")


def test_init_makes_authority_and_coordinator_and_no_key_of_a_site(command: Commands) -> None:
    assert sorted(path.name for path in Path("identities").iterdir()) == ["authority", "coordinator"]
    for path in (AUTHORITY / "ca.key", COORDINATOR / "identity.key", COORDINATOR / "signing.key"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    key = (AUTHORITY / "ca.key").read_bytes()
    said = command("init", "study.yaml")  # again: nothing changes
    assert "wardround invite alpha" in said and (AUTHORITY / "ca.key").read_bytes() == key


def test_init_refuses_what_would_shut_out_sites(command: Commands) -> None:
    assert "run the same command with --renew" in command("init", "study.yaml", "--host", "d.example.org", code=5)
    Path("other.yaml").write_text(STUDY.replace("digits", "letters"))
    assert "is the authority of study 'digits'" in command("init", "other.yaml", "--host", "x", code=5)
    assert "--host: give" in command("init", "study.yaml", "--out", "fresh", code=2)


def test_the_coordinators_identity_is_renewed_in_place_and_keeps_the_list(command: Commands) -> None:
    before = load_identity(COORDINATOR)
    command("revoke", "alpha")
    command("init", "study.yaml", "--renew", "--host", "d.example.org")
    after = load_identity(COORDINATOR)
    assert after.key != before.key and after.authority == before.authority
    command("invite", "beta", "--address", "d.example.org:1")  # the further host is in it, and the old one
    command("invite", "gamma", "--address", "c.example.org:1")
    assert RevocationFile(COORDINATOR, after.authority).current().of("site", "alpha") is not None


def test_an_invitation_says_what_it_is_for(command: Commands) -> None:
    said = command("invite", "alpha", "--hours", "2")
    token = Token.parse(next(line for line in said.splitlines() if line.startswith("wr1")))
    assert (token.study, token.role, token.name, token.address) == ("digits", "site", "alpha", "c.example.org:8444")
    assert 7100 < token.expires - time.time() <= 7200
    assert said.startswith("Invitation of site alpha to study digits, good once, until 20")
    other = json.loads(command("invite", "kim", "--role", "observer", "--json"))
    assert Token.parse(other["token"]).role == "observer"


def test_a_second_invitation_withdraws_the_first(command: Commands) -> None:
    command("invite", "alpha")
    assert "from before is withdrawn" in command("invite", "alpha")
    assert invited() == ["withdrawn", "open"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["alhpa"], 2, "not in the study's cohort (alpha, beta, gamma)"),
        (["al/pha"], 2, "expected up to 63 letters"),
        (["alpha", "--address", "elsewhere:1"], 2, "certificate is for c.example.org, 127.0.0.1"),
        (["alpha", "--address", "nonsense"], 4, "expected host:port"),
        (["alpha", "--ca", "nowhere"], 5, "no authority here; make one with `wardround init`"),
    ],
)
def test_invitations_that_nobody_could_use_are_not_made(
    command: Commands, arguments: list[str], code: int, words: str
) -> None:
    assert words in command("invite", *arguments, code=code)
    assert invited() == []


def test_who_has_certificates_is_not_invited_again(command: Commands) -> None:
    register = Register(AUTHORITY)
    from common.security.pem_files import read_authority
    from common.security.requests import Keys, check_requests

    _, authority, key = read_authority(AUTHORITY)
    checked = check_requests(Keys.new().requests("digits", "site", "alpha"), "digits", "site", "alpha")
    register.add_issued("site", "alpha", checked.certify(authority, key, "site", "alpha"), time.time())
    register.close()
    assert "first `wardround revoke alpha`, then invite it again" in command("invite", "alpha", code=5)
    command("revoke", "alpha")
    command("invite", "alpha")


def test_revoke_needs_no_key_of_the_authority_and_withdraws_invitations(command: Commands) -> None:
    command("invite", "alpha")
    (AUTHORITY / "ca.key").rename("elsewhere")
    said = command("revoke", "alpha", "--reason", "laptop stolen")
    assert "site alpha is shut out of study digits" in said and "1 open invitation withdrawn" in said
    assert "shut out before" not in said
    assert invited() == ["withdrawn"]
    entry = RevocationFile(COORDINATOR, (AUTHORITY / "ca.crt").read_bytes()).current().of("site", "alpha")
    assert entry is not None and entry.reason == "laptop stolen"
    shutil.rmtree(AUTHORITY)  # nor the authority at all
    command("revoke", "beta")
    assert "It was shut out before, on 20" in command("revoke", "beta")


def test_a_name_that_is_nobodys_is_not_revoked(command: Commands) -> None:
    """Else the one who was meant would stay in."""
    assert "there is no such site (the study has alpha, beta, gamma)" in command("revoke", "alhpa", code=2)
    assert "no such observer" in command("revoke", "kim", "--role", "observer", code=2)
    assert not (COORDINATOR / "revoked.json").exists()


def test_all_of_it_is_in_a_log_that_the_coordinator_signed(command: Commands) -> None:
    command("invite", "alpha")
    command("revoke", "alpha")
    checked = check_log(AUTHORITY, trusted_authority(AUTHORITY / "ca.crt"))
    assert [entry.event for entry in checked.entries if entry.event != "head-signed"] == [
        *("authority-made", "coordinator-certified", "invited", "revoked"),
    ]
    assert checked.signed_up_to == len(checked.entries) - 1
    text = (AUTHORITY / "audit.log").read_text()
    token = command.token("invite", "beta")
    assert token.secret.hex() not in text and token.text() not in text


NOW = 1_800_000_000.0
DAYS = 86_400.0


@pytest.mark.parametrize(
    ("left", "words"), [(31, None), (29.5, "ends in 29 days, on "), (0.5, "ends within a day"), (-1, "ended on ")]
)
def test_status_warns_of_certificates_that_end_soon(left: float, words: str | None) -> None:
    status = {
        "study": "digits",
        "state": "training",
        "running": True,
        "certificate_expires": NOW + left * DAYS,
        "sites": {"alpha": {"certificate_expires": NOW + left * DAYS}, "beta": {"certificate_expires": None}},
    }
    said = status_text(status, now=NOW)
    if words is None:
        assert "expires" not in said
        return
    assert re.search(rf"the coordinator's certificate {words}.*: `wardround init STUDY --renew`", said)
    assert re.search(rf"the certificate of alpha {words}.*: there, `wardround-site rotate`", said)
    assert "of beta" not in said
    site = {"study": "digits", "site": "alpha", "state": "training", "identity": "my ids"}
    said = site_text({**site, "certificate_expires": time.time() + left * DAYS})
    assert words in said and "wardround-site rotate --identity 'my ids'" in said
    assert "certificate" not in site_text({**site, "certificate_expires": time.time() + 31 * DAYS})


def test_status_names_who_was_revoked_and_what_to_do() -> None:
    waiting = {"study": "digits", "state": "waiting for sites", "running": True, "quorum": 2}
    sites = {"alpha": {"connected": True}, "beta": {"connected": False, "revoked": True}}
    said = status_text({**waiting, "sites": sites}, now=NOW)
    assert "beta revoked" in said and "beta was revoked" in said
    assert "have beta in again, invite and enrol anew (`wardround invite`)" in said
