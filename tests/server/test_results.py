"""A study's version is published once, wherever the coordinator is killed at it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common import failpoints
from common.errors import RunFolderError
from common.inference.published import MANIFEST
from common.security.audit import NO_AUDIT
from server import results
from server.coordinator import _is_over
from server.journal import Journal
from server.results import publish_study
from server.run_folder import RunFolder
from server.versions import next_version, published_versions


class Killed(BaseException):
    """The process ends here."""


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path)
    run.published.mkdir()
    run.models.mkdir()
    (run.models / "000003.tensors").write_bytes(b"weights of round 3")
    return run


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is published: the names of versions, by a stand-in for converting and measuring."""
    names: list[str] = []

    def publish_round(study: Any, run: RunFolder, number: int, *rest: Any, announce: Any, **_: Any) -> dict[str, Any]:
        version = next_version(run.published)
        report = {"best_round": number, "publication": {"version": version, "folder": str(run.published / version)}}
        partial = run.published / f".{version}.partial"
        partial.mkdir()
        (partial / MANIFEST).write_text(f"manifest of {version}")
        announce(report, partial)
        if "renamed" in rest:
            raise Killed  # the version is not in its place yet
        partial.rename(run.published / version)
        names.append(version)
        if "report" in rest:
            raise Killed
        return report

    monkeypatch.setattr(results, "publish_round", publish_round)
    return names


def test_a_version_that_was_in_place_before_its_report_is_not_published_again(
    run: RunFolder, published: list[str]
) -> None:
    with pytest.raises(Killed):
        publish_study(None, run, 3, "report", signer=None, audit=NO_AUDIT)  # type: ignore[arg-type]
    assert not run.report.exists()
    report = publish_study(None, run, 3, signer=None, audit=NO_AUDIT)  # type: ignore[arg-type]
    assert published == ["v1"]
    assert json.loads(run.report.read_text()) == report
    assert report["publication"]["folder"] == str(run.published / "v1")


def test_a_version_that_was_not_in_place_yet_is_published_once(run: RunFolder, published: list[str]) -> None:
    with pytest.raises(Killed):
        publish_study(None, run, 3, "renamed", signer=None, audit=NO_AUDIT)  # type: ignore[arg-type]
    (run.published / ".v1.partial" / MANIFEST).unlink()
    (run.published / ".v1.partial").rmdir()  # the next publication does so
    publish_study(None, run, 3, signer=None, audit=NO_AUDIT)  # type: ignore[arg-type]
    assert list(published_versions(run.published)) == published == ["v1"]


def test_other_weights_are_another_version(run: RunFolder, published: list[str]) -> None:
    publish_study(None, run, 3, signer=None, audit=NO_AUDIT)  # type: ignore[arg-type]
    (run.models / "000003.tensors").write_bytes(b"other weights")
    publish_study(None, run, 3, signer=None, audit=NO_AUDIT)  # type: ignore[arg-type]
    assert published == ["v1", "v2"]


def test_a_full_disk_for_the_report_is_said_and_the_version_is_kept(
    run: RunFolder, published: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(failpoints, "_actions", failpoints.parse("report.before=error:ENOSPC"))
        with pytest.raises(RunFolderError, match=r"report\.json: cannot be written"):
            publish_study(None, run, 3, signer=None, audit=NO_AUDIT)  # type: ignore[arg-type]
    publish_study(None, run, 3, signer=None, audit=NO_AUDIT)  # type: ignore[arg-type]
    assert published == ["v1"]


def test_a_study_that_ended_just_before_the_kill_is_over(run: RunFolder) -> None:
    journal = Journal(run.journal)
    journal.note("trained", rounds=3)
    run.report.write_text("{}")
    run.write_status({"state": "publishing", "error": "old"})
    assert not _is_over(run)  # the report may be of `wardround publish`
    journal.note("published", version="v1")
    journal.close()
    (run.published / "v1").mkdir(parents=True)
    (run.published / "v1" / "manifest.json").write_text("{}")
    assert _is_over(run)
    status = run.read_status()
    assert (status["state"], status["published"], status["error"]) == ("finished", str(run.published / "v1"), "")
