"""Who gets to see a run's page: tokens, certificates, roles, and everything that must be refused."""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import stat
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from common.errors import IdentityError, UsageError
from common.security.certificates import CERTIFICATE, KEY, issue, load_identity
from common.security.revocation import RevocationFile, revoke
from common.security.signing import load_signer
from common.wording import printable
from server.cli import main
from server.dashboard.access import COOKIE, Access
from server.dashboard.app import Dashboard
from server.dashboard.setup import prepare
from server.dashboard.tokens import FILE, PageTokens, expiry
from tests.common.webpage.pages import client_of
from tests.server.dashboard.runs import WrittenRun

HOSTS = ("127.0.0.1",)
NOW = 1_800_000_000.0


@pytest.fixture
def run(tmp_path: Path) -> WrittenRun:
    written = WrittenRun(tmp_path / "run")
    written.samples()
    return written


def made(run: WrittenRun, role: Any = "observer", expires: float | None = None) -> str:
    _, text = PageTokens(run.folder.path).make(role, "kim", time.time() + 3600 if expires is None else expires)
    return text


def guarded(run: WrittenRun) -> Any:
    return Dashboard(run.folder, Access(PageTokens(run.folder.path)), HOSTS).served()


# Tokens. -----------------------------------------------------------------------------------------------------------


def test_a_token_is_kept_as_a_digest_that_only_its_owner_reads(run: WrittenRun) -> None:
    text = made(run)
    path = run.folder.path / FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert text not in path.read_text() and text.removeprefix("wrp_") not in path.read_text()
    assert PageTokens(run.folder.path).find(text, time.time()) is not None
    assert PageTokens(run.folder.path).find(text + "x", time.time()) is None


def test_a_token_ends_when_it_expires_or_is_revoked(run: WrittenRun) -> None:
    tokens = PageTokens(run.folder.path)
    token, text = tokens.make("investigator", "kim", NOW + 60)
    assert tokens.find(text, NOW) == token and tokens.find(text, NOW + 60) is None
    PageTokens(run.folder.path).revoke(token.id, NOW + 1)  # by another process
    assert tokens.find(text, NOW + 2) is None
    with pytest.raises(UsageError, match="no such token"):
        tokens.revoke("ffff", NOW)


def test_tokens_that_others_can_read_let_nobody_in(run: WrittenRun) -> None:
    text = made(run)
    (run.folder.path / FILE).chmod(0o644)
    with pytest.raises(IdentityError, match="chmod 600"):
        PageTokens(run.folder.path).find(text, time.time())


def test_damaged_tokens_let_nobody_in_and_say_what_to_do(run: WrittenRun) -> None:
    made(run)
    path = run.folder.path / FILE
    for content in ('{"format": 1, "tokens": [{}]}', "x", '{"format": 2, "tokens": []}', "[]"):
        path.write_text(content)
        with pytest.raises(IdentityError, match="make new ones"):
            PageTokens(run.folder.path).all()


@pytest.mark.parametrize(
    ("text", "until"),
    [("12h", NOW + 12 * 3600), ("30d", NOW + 30 * 86_400), ("2027-02-01", 1_801_526_400.0)],
)
def test_expiries_are_hours_days_or_a_day(text: str, until: float) -> None:
    assert expiry(text, NOW) == until


@pytest.mark.parametrize("text", ["", "12", "0d", "-1d", "1e3d", "400d", "2020-01-01", "2027-13-01", "99999h", "1m"])
def test_other_expiries_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected hours or days"):
        expiry(text, NOW)


def test_the_command_makes_lists_and_revokes(run: WrittenRun, capsys: pytest.CaptureFixture[str]) -> None:
    folder = ["--run", str(run.folder.path)]
    assert main(["page", "token", *folder, "--role", "observer", "--name", "kim", "--expires", "2h", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["token"].startswith("wrp_") and 0 < found["expires"] - time.time() <= 7200
    assert main(["page", "token", *folder, "--list"]) == 0
    shown = capsys.readouterr().out
    assert "kim" in shown and "holds" in shown and found["token"] not in shown
    assert main(["page", "token", *folder, "--revoke", found["id"]]) == 0
    assert "revoked" in capsys.readouterr().out
    assert main(["page", "token", *folder]) == 2
    assert main(["page", "token", *folder, "--role", "observer", "--name", "k/m"]) == 2


# Logging in. -------------------------------------------------------------------------------------------------------

CLOSED = ("/events", "/figures.json", "/rounds.csv", "/samples/6/0/0/image.png", "/nothing")


def test_nobody_sees_anything_without_a_login(run: WrittenRun) -> None:
    async def scenario() -> None:
        async with client_of(guarded(run)) as client:
            first = await client.get("/", allow_redirects=False)
            assert (first.status, first.headers["Location"]) == (303, "/login")
            assert run.study.name not in await first.text()
            for path in CLOSED:
                answer = await client.get(path)
                assert answer.status == 401, path
                assert "cells" not in await answer.text()
            page = await (await client.get("/login")).text()
            assert 'type="password"' in page and "cells" not in page

    asyncio.run(scenario())


def test_a_token_logs_in_by_a_cookie_that_scripts_and_other_sites_do_not_get(run: WrittenRun) -> None:
    text = made(run, "investigator")

    async def scenario() -> None:
        async with client_of(guarded(run)) as client:
            answer = await client.post("/login", data={"token": f" {text}\n"}, allow_redirects=False)
            assert (answer.status, answer.headers["Location"]) == (303, "/")
            cookie = answer.headers["Set-Cookie"]
            assert "HttpOnly" in cookie and "SameSite=Strict" in cookie and text not in cookie
            assert "cells" in await (await client.get("/")).text()
            assert (await client.get("/samples/6/0/0/image.png")).content_type == "image/png"
            assert "round" in await (await client.get("/rounds.csv")).text()
            assert (await client.post("/logout", allow_redirects=False)).status == 303
            assert (await client.get("/figures.json")).status == 401

    asyncio.run(scenario())


@pytest.mark.parametrize("token", ["", "wrp_", "x" * 1000, "wrp_" + "A" * 43, "\0", "ä"])
def test_other_words_do_not_log_in(run: WrittenRun, token: str) -> None:
    made(run)

    async def scenario() -> None:
        async with client_of(guarded(run)) as client:
            answer = await client.post("/login", data={"token": token}, allow_redirects=False)
            assert answer.status == 403 and "Set-Cookie" not in answer.headers
            assert "mistyped, has expired, or was revoked" in await answer.text()
            assert (await client.post("/login", data={"other": "x"})).status == 403
            assert (await client.post("/login", json={"token": 1})).status == 403
            cookies = {"Cookie": f"{COOKIE}={token.encode().hex()}"}
            assert (await client.get("/figures.json", headers=cookies)).status == 401

    asyncio.run(scenario())


def test_who_is_revoked_is_out_at_once_and_an_open_page_ends(run: WrittenRun) -> None:
    text = made(run)
    tokens = PageTokens(run.folder.path)

    async def scenario() -> None:
        async with client_of(guarded(run)) as client:
            await client.post("/login", data={"token": text})
            stream = await client.get("/events")
            assert stream.status == 200
            tokens.revoke(tokens.all()[0].id, time.time())
            assert (await client.get("/figures.json")).status == 401
            async with asyncio.timeout(30):
                while line := await stream.content.readline():
                    if line == b"event: ended\n":
                        break
            assert line == b"event: ended\n"

    asyncio.run(scenario())


def test_an_expired_token_ends_its_login(run: WrittenRun, monkeypatch: pytest.MonkeyPatch) -> None:
    text = made(run)

    async def scenario() -> None:
        async with client_of(guarded(run)) as client:
            await client.post("/login", data={"token": text})
            assert (await client.get("/figures.json")).status == 200
            later = SimpleNamespace(time=lambda: time.time() + 3601)
            monkeypatch.setattr("server.dashboard.access.time", later)
            assert (await client.get("/figures.json")).status == 401

    asyncio.run(scenario())


def test_an_observer_gets_no_pictures_no_table_and_no_numbers_of_sites(run: WrittenRun) -> None:
    text = made(run, "observer")

    async def scenario() -> None:
        async with client_of(guarded(run)) as client:
            await client.post("/login", data={"token": text})
            page = await (await client.get("/")).text()
            assert "Cases</th><th" not in page and "batch " not in page and "19 + 5" not in page
            assert "observer kim" in page and 'data-picture="truth"' not in page
            assert (await client.get("/samples/6/0/0/image.png")).status == 403
            assert (await client.get("/rounds.csv")).status == 403
            assert (await client.get("/figures.json")).status == 200

    asyncio.run(scenario())


# Beyond loopback. --------------------------------------------------------------------------------------------------


def served(run: WrittenRun) -> Any:
    run.identities()
    return prepare(run.folder, "0.0.0.0:8443")


def client_context(identity: Path | None, run: WrittenRun) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=run.folder.identity / "coordinator" / "ca.crt")
    if identity is not None:
        context.load_cert_chain(identity / CERTIFICATE, identity / KEY)
    return context


def test_beyond_loopback_tls_and_a_login_are_asked_for(run: WrittenRun) -> None:
    page = served(run)
    assert page.tls is not None and page.tls.minimum_version == ssl.TLSVersion.TLSv1_3

    async def scenario() -> None:
        async with client_of(page.app, page.tls) as client:
            answer = await client.get("/", ssl=client_context(None, run), allow_redirects=False)
            assert answer.status == 303
            for path in CLOSED:
                assert (await client.get(path, ssl=client_context(None, run))).status == 401
            text = made(run)
            done = await client.post(
                "/login", data={"token": text}, ssl=client_context(None, run), allow_redirects=False
            )
            assert done.status == 303 and "Secure" in done.headers["Set-Cookie"]

    asyncio.run(scenario())


def test_without_the_coordinators_identity_nothing_is_served_beyond_loopback(run: WrittenRun) -> None:
    with pytest.raises(IdentityError):
        prepare(run.folder, "0.0.0.0:8443")
    run.identities()
    with pytest.raises(UsageError, match="give the coordinator's"):
        prepare(run.folder, "0.0.0.0:8443", identity=run.folder.identity / "sites" / "east")


@pytest.mark.parametrize("role", ["investigator", "observer", "site"])
def test_a_certificate_of_the_study_is_a_login_until_it_is_revoked(run: WrittenRun, role: Any) -> None:
    page = served(run)
    authority, name = run.folder.identity / "authority", "east" if role == "site" else "kim"
    folder = run.folder.identity / "member"
    issue(folder, authority, name, role)
    coordinator = run.folder.identity / "coordinator"

    async def scenario() -> None:
        async with client_of(page.app, page.tls) as client:
            context = client_context(folder, run)
            text = await (await client.get("/", ssl=context)).text()
            assert f"{role} {name}" in text
            assert ("20 + 6" in text) is (role != "observer")  # of east
            assert ("23 + 5" in text) is (role == "investigator")  # of west
            expected = 200 if role == "investigator" else 403
            assert (await client.get("/rounds.csv", ssl=context)).status == expected
            revoked = RevocationFile(coordinator, load_identity(coordinator).authority)
            revoke(revoked, load_signer(coordinator), role, name, "laptop stolen", time.time())
            assert (await client.get("/figures.json", ssl=context)).status == 401

    asyncio.run(scenario())


def test_a_certificate_of_another_study_or_of_the_coordinator_is_none(run: WrittenRun, tmp_path: Path) -> None:
    page = served(run)
    other = WrittenRun(tmp_path / "other", name="other")
    other.identities()
    stranger = tmp_path / "stranger"
    issue(stranger, other.folder.identity / "authority", "kim", "investigator")

    async def scenario() -> None:
        async with client_of(page.app, page.tls) as client:
            with pytest.raises(Exception, match=r"(?i)ssl|disconnected|reset|closed"):
                await client.get("/figures.json", ssl=client_context(stranger, run))

    asyncio.run(scenario())


def test_a_name_that_is_not_the_certificates_is_refused(run: WrittenRun) -> None:
    page = served(run)

    async def scenario() -> None:
        async with client_of(page.app, page.tls) as client:
            answer = await client.get("/login", ssl=client_context(None, run), headers={"Host": "evil.example"})
            assert answer.status == 421

    asyncio.run(scenario())


def test_nothing_of_the_machine_is_in_what_an_observer_gets(run: WrittenRun) -> None:
    text = made(run, "observer")
    run.status("failed", error=f"{run.folder.path}/state: cannot be written")

    async def scenario() -> None:
        async with client_of(guarded(run)) as client:
            await client.post("/login", data={"token": text})
            for path in ("/", "/figures.json"):
                body = await (await client.get(path)).text()
                assert str(run.folder.path) not in body and "cannot be written" not in body
                assert printable(os.uname().nodename) not in body

    asyncio.run(scenario())
