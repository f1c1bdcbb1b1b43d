"""A hospital's own page: what it says of a work folder, and that it writes nothing and listens to nobody else."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from client.cli import main
from client.site_page.app import SECTIONS, SitePage
from client.site_status import SiteStatus
from common.security.audit import AuditLog
from common.security.audit_files import LOG
from tests.common.webpage.pages import client_of, events

SHA = "ab" * 32


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """The work folder of a site that took part in two rounds."""
    folder = tmp_path / "work"
    folder.mkdir()
    log = AuditLog(folder, "site north", None)
    log.record("started", study="cells", plan="cd" * 32, training_cases=19, validation_cases=5)
    log.record("dialled")
    log.record("connected")
    for number in (1, 2):
        sent = {"round": number, "kind": "train", "sha256": SHA}
        log.record("update-sent", **sent, contents="weights", cases=19, bytes=486_000, progress_messages=4)
        log.record("update-answered", **sent, accepted=number == 1)
    log.close()
    return folder


def shown(work: Path) -> str:
    async def scenario() -> str:
        async with client_of(SitePage(work, None).app()) as client:
            answer = await client.get("/")
            assert answer.status == 200
            return await answer.text()

    return asyncio.run(scenario())


def files(folder: Path) -> dict[str, Any]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(folder.iterdir())}


def test_it_says_what_the_site_does_and_what_left(work: Path) -> None:
    with SiteStatus(work, "cells", "north") as status:
        status({"state": "training", "round": 3, "batch": 4, "batches": 8, "certificate_expires": 4e9})
        text = shown(work)
    assert "Site north" in text and "batch 4 of 8" in text and "Training, round 3" in text
    assert "2 updates, 972 kB in all" in text and SHA[:12] in text
    assert "<dd>19<small>" in text and "<dd>5<small>" in text
    assert "images and labels, whole or in part" in text
    assert "no study runs without an approval" in text


def test_it_only_reads(work: Path) -> None:
    with SiteStatus(work, "cells", "north"):
        before = files(work)
        shown(work)
        assert files(work) == before


def test_a_site_that_stopped_says_what_to_do(work: Path) -> None:
    with SiteStatus(work, "cells", "north") as status:
        status({"state": "training", "round": 2})
    text = shown(work)
    assert "Stopped, last seen training" in text and "Start it again with the same command" in text


def test_a_log_that_was_changed_is_not_relied_on(work: Path) -> None:
    log = work / LOG
    log.write_bytes(log.read_bytes().replace(b"486000", b"486001", 1))
    text = shown(work)
    assert "The log cannot be relied on:" in text and ">whole<" not in text


def test_a_folder_where_no_site_was_started_is_told(tmp_path: Path) -> None:
    text = shown(tmp_path)
    assert "No site was started here" in text and "there is no log here yet" in text


def test_what_others_wrote_into_the_folder_is_escaped(work: Path) -> None:
    with SiteStatus(work, "<script>alert(1)</script>", "north") as status:
        status({"notice": "<img src=x>"})
        text = shown(work)
    assert "<script>alert" not in text and "<img src=x>" not in text


def test_what_was_sent_is_told_at_once_and_the_progress_of_batches_later(work: Path) -> None:
    page = SitePage(work, None)
    with SiteStatus(work, "cells", "north") as status:
        before = page.stamp()
        status({"batch": 3})
        progress = page.stamp()
    assert progress[0] == before[0] and progress[1] != before[1]
    with (work / LOG).open("ab") as log:
        log.write(b"{}")
    assert page.stamp()[0] != before[0]


def test_an_open_page_follows(work: Path) -> None:
    async def scenario() -> None:
        with SiteStatus(work, "cells", "north") as status:
            async with client_of(SitePage(work, None).app()) as client, client.get("/events") as stream:
                first = [
                    json.loads(data)["part"] for name, data in await events(stream, len(SECTIONS)) if name == "part"
                ]
                assert first == list(SECTIONS)
                status({"state": "upload", "round": 7})
                async with asyncio.timeout(30):
                    while "Upload, round 7" not in "".join(data for _, data in await events(stream, 1)):
                        pass

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--listen", "0.0.0.0:8081"], 2, "SSH tunnel"),
        (["--listen", "hospital.example.org:8081"], 2, "a site's page is for its own machine"),
        (["--listen", "8081"], 4, "expected host:port"),
    ],
)
def test_it_is_served_on_this_machine_alone(
    work: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    assert main(["page", "--work", str(work), *arguments]) == code
    assert words in capsys.readouterr().err


def test_a_missing_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["page", "--work", str(tmp_path / "none")]) == 7
    assert "the folder does not exist" in capsys.readouterr().err
