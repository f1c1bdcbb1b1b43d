"""`wardround status`, as somebody calls it: in every situation the cause, the site and the next step."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from common.disk import cannot_write
from common.privacy.accounting import BUDGET_SPENT
from server.cli import main
from server.following import news
from server.status import status_table
from server.watching.snapshot import NewestStatus
from tests.server.watching.runs import coordinated, round_row, run_folder, site, status, write_rows

AWAY = {"connected": False, "stage": "waiting", "last_seen_at": None}


def said(tmp_path: Path, capsys: pytest.CaptureFixture[str], *, running: bool = True, **fields: Any) -> dict[str, Any]:
    """What the command says of a run with this status, in words and as JSON."""
    run = run_folder(tmp_path)
    (run.published / "v1").mkdir()
    run.report.write_text("{}")
    if running:
        with coordinated(run, **fields):
            return _asked(run.path, capsys)
    run.write_status(status(**fields))
    return _asked(run.path, capsys)


def _asked(run: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["status", "--run", str(run), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert main(["status", "--run", str(run)]) == 0
    text = capsys.readouterr().out
    assert all(part in text for part in found["description"].values())
    return {
        **found["description"],
        "alerts": [alert["code"] for alert in found["alerts"] if alert["code"] != "disk-low"],
    }


def sites(**others: dict[str, Any]) -> dict[str, Any]:
    return {name: site(**others.get(name, {})) for name in ("east", "north", "south")}


def test_waiting_for_sites(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = {"state": "waiting for sites", "kind": None, "round": 0, "address": "192.0.2.1:8443"}
    found = said(tmp_path, capsys, **fields, sites=sites(north=AWAY, south=AWAY))
    assert found["headline"] == "cells: waiting for sites"
    assert found["cause"] == "north and south are not connected; 1 of 3 sites is (the quorum is 2)."
    assert "run `wardround-site start` at north and south" in found["next_step"].replace("Run", "run")


def test_a_site_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = said(tmp_path, capsys, sites=sites(east={"stage": "done"}, south={"stage": "done"}))
    assert found["headline"] == "cells: training, round 3 of 9"
    assert found["cause"] == "north is still at work: training, batch 3 of 12."
    assert found["next_step"].startswith("Nothing to do: the round closes when all have answered")


def test_a_site_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failed = {"stage": "failed", "reason": "its data can no longer be read"}
    found = said(tmp_path, capsys, sites=sites(north=failed))
    assert "north cannot do its part: its data can no longer be read" in found["cause"]
    assert "remove the cause at north" in found["next_step"]
    assert found["alerts"] == ["site-failed"]


def test_below_the_quorum(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = said(tmp_path, capsys, state="waiting for sites", attempt=2, sites=sites(north=AWAY, south=AWAY))
    assert found["headline"] == "cells: waiting for sites, round 3 of 9, attempt 2"
    assert "north and south are not connected" in found["cause"]
    assert "the round needs 2 sites, 1 can answer" in found["next_step"]
    assert "below-quorum" in found["alerts"]


def test_the_disk_is_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = cannot_write(tmp_path / "run" / "state", OSError(28, "No space left on device"))
    found = said(tmp_path, capsys, running=False, state="failed", error=str(error))
    assert found["headline"] == "cells: failed in round 3 of 9"
    assert "No space left on device" in found["cause"]
    assert found["next_step"].startswith("Free space on the disk of the run folder, then start the coordinator again")
    assert found["alerts"] == ["coordinator-failed"]


def test_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published = str(tmp_path / "run" / "published" / "v1")
    found = said(tmp_path, capsys, running=False, state="finished", published=published, kind=None)
    assert found["headline"] == "cells: finished after 9 rounds"
    assert published in found["cause"]
    assert found["next_step"] == "Read its model_card.md."
    assert found["alerts"] == ["finished"]


def test_a_site_whose_budget_is_spent_is_not_to_be_mended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spent = {"stage": "failed", "reason": BUDGET_SPENT}
    privacy = {"unit": "patient", "epsilon": 8.0, "budget": 8, "delta": 1e-5, "protects": "each patient of each site"}
    found = said(tmp_path, capsys, sites=sites(north=spent), privacy=privacy | {"sites": {"north": 8.0}})
    assert "north cannot do its part: its privacy budget is spent" in found["cause"]
    assert found["next_step"].endswith("Nothing to do: a spent budget stays spent.")
    assert set(found["alerts"]) == {"site-failed", "budget-ending"}


def test_a_study_whose_budget_is_spent_has_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended = {"round": 3, "reason": "the privacy budget is spent at north"}
    published = str(tmp_path / "run" / "published" / "v1")
    found = said(tmp_path, capsys, running=False, state="finished", published=published, ended=ended, kind=None)
    assert found["headline"] == "cells: finished after 3 of 9 rounds"
    assert found["cause"].startswith("It ended early: the privacy budget is spent at north.")


def test_a_sites_certificate_has_expired(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = AWAY | {"certificate_expires": time.time() - 60}
    found = said(tmp_path, capsys, sites=sites(north=gone))
    assert "the certificate of north has expired" in found["cause"]
    assert "invite north again (`wardround invite`)" in found["next_step"]
    assert "certificate-ending" in found["alerts"]


def test_the_coordinators_certificate_has_expired(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = "identities/coordinator/site.crt: expired on 2026-01-01; make the coordinator's identity anew"
    found = said(tmp_path, capsys, running=False, state="failed", error=error)
    assert found["next_step"].startswith("Renew the certificate (`wardround init STUDY --renew`), then start")


def test_the_text_has_the_alerts_that_nothing_else_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_folder(tmp_path)
    write_rows(run.rounds, [round_row(1), round_row(2, holdout__dice=0.4)])
    with coordinated(run, sites=sites(north={"stage": "failed", "reason": "its data can no longer be read"})):
        assert main(["status", "--run", str(run.path)]) == 0
    text = capsys.readouterr().out
    assert "  alerts  warning: Holdout Dice fell to 0.400 in round 2, from 0.700 at its highest." in text
    assert text.count("its data can no longer be read") == 1


def test_watch_shows_batches_attempt_last_seen_and_alerts(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    write_rows(run.rounds, [round_row(1), round_row(2, holdout__dice=0.4)])
    away = AWAY | {"last_seen_at": time.time() - 300}
    with coordinated(run, attempt=2, sites=sites(south=away)):
        now = NewestStatus(run.path).read()
    console = Console(file=io.StringIO(), width=140)
    console.print(status_table(now))
    picture = console.file.getvalue()  # type: ignore[attr-defined]
    assert "round 3 of 9, attempt 2" in picture
    north = next(line for line in picture.splitlines() if line.startswith("north"))
    south = next(line for line in picture.splitlines() if line.startswith("south"))
    assert "3 of 12" in north and north.rstrip().endswith("now")
    assert south.rstrip().endswith("5 min ago")
    assert "south is not connected" in picture
    assert "Holdout Dice fell to 0.400" in picture


def test_lines_tell_an_alert_once(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    write_rows(run.rounds, [round_row(1), round_row(2, holdout__dice=0.4)])
    with coordinated(run):
        now = NewestStatus(run.path).read()
    first = news({}, now)
    assert sum("Holdout Dice fell" in line for line in first) == 1
    assert news(now, now) == []


def test_of_long_tables_the_end_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.watching.snapshot._NEWEST_BYTES", 1000)
    run = run_folder(tmp_path)
    write_rows(run.rounds, [round_row(number, holdout__dice=0.7) for number in range(1, 500)])
    with run.rounds.open("a", newline="") as file:
        file.write(",".join(str(value) for value in round_row(500, holdout__dice=0.1).values()) + "\r\n")
    with coordinated(run):
        alerts = NewestStatus(run.path).read()["alerts"]
    assert [alert["what"] for alert in alerts if alert["code"] == "dice-fell"] == [
        "Holdout Dice fell to 0.100 in round 500, from 0.700 at its highest."
    ]
