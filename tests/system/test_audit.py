"""The audit logs of real processes: whole however often the coordinator is killed, and the two sides' agree."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.failpoints import VARIABLE
from common.security.audit_check import CheckedLog, check_log
from common.security.authorities import trusted_authority
from server.journal import Journal
from tests.system.ports import free_port

pytestmark = pytest.mark.system

PLACES = ("round.opened", "update.stored", "round.closing", "study.trained", "publish.renamed")


def checked(study: Any, folder: Path) -> CheckedLog:
    return check_log(folder, trusted_authority(study.run.identity / "authority" / "ca.crt"))


def test_a_coordinator_killed_anywhere_ends_with_a_log_that_verifies(
    setting: Callable[[str], Any], short_study: str, wardround: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = setting(short_study)
    study.identities("east", "north")
    listen = f"127.0.0.1:{free_port()}"
    sites = None
    for place in PLACES:
        with monkeypatch.context() as patched:
            patched.setenv(VARIABLE, f"{place}=kill")
            process = study.coordinator(listen=listen)
        sites = sites or study.site("east", "north")
        assert process.end() == -signal.SIGKILL, process.said()
        assert check_log(study.run.path).entries  # no round was closed yet, so that no head need be signed
    assert study.coordinator(listen=listen).end() == 0
    assert sites is not None and sites.end() == 0, sites.said()
    log = checked(study, study.run.path)
    assert log.torn == 0 and log.heads > 0
    recorded: dict[str, set[tuple[Any, ...]]] = {}
    for entry in log.entries:
        about = tuple(str(entry.details.get(name)) for name in ("kind", "round", "site", "sha256"))
        recorded.setdefault(entry.event, set()).add(about)
    for event in Journal(study.run.journal).events("received"):  # nothing was taken that is not in the log
        about = event["kind"], str(event["round"]), event["site"], event["sha256"]
        assert about in recorded["update-received"]
    assert {"study-started", "study-gone-on", "round-closed", "version-published", "study-ended"} <= set(recorded)
    for site in ("east", "north"):
        work = study.folder / "sites" / site
        sent = {
            (entry.details["kind"], str(entry.details["round"]), site, entry.details["sha256"])
            for entry in checked(study, work).entries
            if entry.event == "update-sent"
        }
        assert sent >= {about for about in recorded["update-received"] if about[2] == site}
        summary = wardround("wardround-site", "audit", "summary", work, "--json")
        assert summary.returncode == 0, summary.stderr
        assert json.loads(summary.stdout)["studies"][0]["bytes"] > 0
    assert not list(study.run.path.glob("*.partial"))
    verified = wardround("wardround", "verify", study.run.published / "v1")
    assert verified.returncode == 0, verified.stderr
    assert wardround("wardround", "audit", "verify", study.run.path).returncode == 0
