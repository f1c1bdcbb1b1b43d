"""A site enrols, takes part, is revoked while it is connected, and comes back: by the commands that people use."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.security.audit_check import check_log
from tests.system.ports import free_port

pytestmark = pytest.mark.system


def test_a_connected_site_is_cut_off_when_it_is_revoked_and_comes_back_by_a_new_invitation(
    setting: Callable[[str], Any], short_study: str, wardround: Callable[..., Any], tmp_path: Path
) -> None:
    made = setting(short_study)
    identities = ["--identities", made.run.identity]

    def done(name: str, *arguments: Any, code: int = 0) -> str:
        result = wardround(name, *arguments)
        assert result.returncode == code, result.stderr
        return str(result.stdout if code == 0 else result.stderr)

    def enrolled(folder: Path) -> Path:
        token = next(
            line for line in done("wardround", "invite", "east", *identities).splitlines() if line[:3] == "wr1"
        )
        assert "Enrolled as site east in study short" in done("wardround-site", "enrol", token, "--folder", folder)
        return folder

    port = free_port()
    done(
        "wardround",
        "init",
        made.study,
        "--out",
        made.run.identity,
        "--host",
        "127.0.0.1",
        "--enrolment",
        f"127.0.0.1:{port}",
    )
    serving = made.start(
        "wardround",
        ["enrolment", *identities, "--listen", f"127.0.0.1:{port}", "--renewals", f"127.0.0.1:{free_port()}"],
        made.folder / "enrolment.log",
    )
    made.until(lambda _: "open invitations" in serving.said(), serving)
    coordinator = made.coordinator()

    site = made.site("east", identity=enrolled(tmp_path / "first"))
    made.until(lambda status: status["sites"]["east"]["connected"], coordinator, site)
    done("wardround-site", "rotate", "--identity", tmp_path / "first")  # meanwhile it stays connected by the old one
    assert made.status()["sites"]["east"]["connected"]

    assert "is shut out of study short" in done(
        "wardround", "revoke", "east", "--run", made.run.path, "--reason", "a test"
    )
    assert site.end() == 5
    assert "certificate of site 'east' was revoked on" in site.said() and "(a test)" in site.said()
    assert "ask the study's coordinator for a new invitation" in site.said()
    status = made.until(lambda status: not status["sites"]["east"]["connected"], coordinator)
    assert status["sites"]["east"]["revoked"]
    assert "east was revoked" in done("wardround", "status", "--run", made.run.path)

    again = made.site("east", identity=tmp_path / "first")  # also by the certificate that it has rotated to
    assert again.end() == 5

    back = made.site("east", identity=enrolled(tmp_path / "second"))
    made.until(lambda status: status["sites"]["east"]["connected"], coordinator, back)
    back.signal(signal.SIGTERM)
    assert back.end() == 143
    events = [entry.event for entry in check_log(made.run.path).entries]
    assert "member-shut-out" in events and "revoked" in events
    events = [
        entry.event for entry in check_log(made.run.identity / "authority").entries if entry.event != "head-signed"
    ]
    assert events == [
        *("authority-made", "coordinator-certified", "invited", "enrolled", "renewed", "rotated"),
        *("revoked", "invited", "enrolled"),
    ]
