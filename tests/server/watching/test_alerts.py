"""What somebody is told without having asked: each cause by itself, and nothing where nothing is wrong."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest

from common.watching.alert import Alert
from server.watching.alerts import FINISHED, AlertRules
from server.watching.options import parse_options
from server.watching.snapshot import SnapshotReader, read_snapshot
from tests.server.watching.runs import coordinated, round_row, run_folder, site, status, write_rows


def alerts(tmp_path: Path, *, running: bool = True, rounds: Any = (), **fields: Any) -> dict[str, Alert]:
    """The alerts of a run with this status and these rounds, by key."""
    run = run_folder(tmp_path)
    if rounds:
        write_rows(run.rounds, rounds)
    if running:
        with coordinated(run, **fields):
            found = read_snapshot(run.path).alerts
    else:
        run.write_status(status(**fields))
        found = read_snapshot(run.path).alerts
    return {alert.key: alert for alert in found if alert.code != "disk-low"}  # whatever this machine's disk says


def sites(**others: dict[str, Any]) -> dict[str, Any]:
    return {name: others.get(name) or site() for name in ("east", "north", "south")}


def test_a_round_that_goes_well_alerts_nobody(tmp_path: Path) -> None:
    assert alerts(tmp_path, rounds=[round_row(1), round_row(2)]) == {}


def test_a_site_that_shows_no_progress_or_is_away_is_named(tmp_path: Path) -> None:
    now = time.time()
    found = alerts(
        tmp_path,
        sites=sites(north=site(no_progress_seconds=75), south=site(connected=False, last_seen_at=now - 130)),
    )
    assert found["site-silent:north"].what == "Round 3 waits for north, which shows no progress for 75 s."
    assert "last seen 130 s ago" in found["site-silent:south"].what
    assert found["site-silent:north"].todo.startswith("Nothing, if north's log shows that it is only slow.")
    assert found["site-silent:south"].todo.startswith("See to south;")
    assert {alert.severity for alert in found.values()} == {"warning"}
    assert len(found) == 2


def test_a_first_batch_may_take_longer(tmp_path: Path) -> None:
    """It prepares the cases and the plan's graphs, which takes minutes where images are large and machines slow."""
    fields = {"stage": "training", "batch": 0, "batches": 40}
    assert alerts(tmp_path / "a", sites=sites(north=site(no_progress_seconds=75, **fields))) == {}
    late = alerts(tmp_path / "b", sites=sites(north=site(no_progress_seconds=310, **fields)))
    assert list(late) == ["site-silent:north"]
    second = alerts(tmp_path / "c", sites=sites(north=site(no_progress_seconds=75, **{**fields, "batch": 1})))
    assert list(second) == ["site-silent:north"]


def test_a_line_that_broke_just_now_is_no_alert(tmp_path: Path) -> None:
    assert alerts(tmp_path, sites=sites(south=site(connected=False, last_seen_at=time.time() - 5))) == {}


def test_a_round_below_its_quorum_is_critical(tmp_path: Path) -> None:
    away = site(connected=False, stage="waiting", last_seen_at=time.time())
    found = alerts(tmp_path, state="waiting for sites", attempt=2, sites=sites(north=away, south=away))
    assert found["below-quorum:coordinator"].what == "Round 3, attempt 2, waits below its quorum for north, south."
    assert found["below-quorum:coordinator"].severity == "critical"


def test_sites_have_a_moment_to_dial_when_a_round_begins(tmp_path: Path) -> None:
    away = {name: site(connected=False, stage="waiting", last_seen_at=None) for name in ("east", "north", "south")}
    fields: dict[str, Any] = {"state": "waiting for sites", "sites": away}
    assert alerts(tmp_path / "a", **fields, round_started_at=time.time() - 5) == {}
    late = alerts(tmp_path / "b", **fields, round_started_at=time.time() - 65)
    assert [alert.severity for alert in late.values()] == ["critical", *["warning"] * 3]
    assert late["site-silent:north"].what == "Round 3 waits for north, which has not connected yet."


@pytest.mark.parametrize(("dice", "told"), [(0.66, False), (0.64, True), (float("nan"), False)])
def test_dice_that_fell_further_than_allowed_is_told(tmp_path: Path, dice: float, told: bool) -> None:
    rows = [round_row(1, holdout__dice=0.7), round_row(2, holdout__dice=0.5), round_row(3, holdout__dice=dice)]
    assert ("dice-fell:holdout" in alerts(tmp_path, rounds=rows)) is told


def test_how_far_dice_may_fall_is_the_rule_in_the_run_folder(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    write_rows(run.rounds, [round_row(1, holdout__dice=0.7), round_row(2, holdout__dice=0.6)])
    run.write_status(status())
    reader = SnapshotReader(run.path)
    assert "dice-fell" in {alert.code for alert in reader.read().alerts}
    (run.path / "watching.json").write_text('{"alerts": {"dice_drop": 0.2}}')
    assert "dice-fell" not in {alert.code for alert in reader.read().alerts}


@pytest.mark.parametrize("loss", ["nan", "inf"])
def test_a_loss_that_is_not_finite_is_critical(tmp_path: Path, loss: str) -> None:
    found = alerts(tmp_path, rounds=[round_row(1, train__loss=loss)])
    assert found["loss-not-finite:coordinator"].severity == "critical"
    assert "learning rate" in found["loss-not-finite:coordinator"].todo


def test_a_disk_that_fills_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_folder(tmp_path)
    monkeypatch.setattr("server.watching.snapshot._disk", lambda folder: (int(1.5e9), int(9e9)))
    with coordinated(run):
        found = {alert.code: alert for alert in read_snapshot(run.path).alerts}
    assert found["disk-low"].what == "The run folder's disk has 1.50 GB left."


def test_certificates_near_their_end_are_told_and_an_expired_one_is_critical(tmp_path: Path) -> None:
    now, day = time.time(), 86_400
    found = alerts(
        tmp_path,
        certificate_expires=now + 10.5 * day,
        sites=sites(north=site(certificate_expires=now - day), south=site(certificate_expires=now + 90 * day)),
    )
    assert found["certificate-ending:coordinator"].severity == "warning"
    assert "wardround init STUDY --renew" in found["certificate-ending:coordinator"].todo
    assert found["certificate-ending:north"].severity == "critical"
    assert "wardround-site rotate" in found["certificate-ending:north"].todo
    assert len(found) == 2


@pytest.mark.parametrize("running", [True, False])
def test_a_privacy_budget_near_its_end_is_told_by_site(tmp_path: Path, running: bool) -> None:
    privacy = {"unit": "patient", "epsilon": 7.5, "budget": 8, "sites": {"east": 7.5, "north": 2.0}}
    fields: dict[str, Any] = {"privacy": privacy} | ({} if running else {"state": "stopped"})
    found = alerts(tmp_path, running=running, **fields)
    assert list(found) == ["budget-ending:east"]
    assert found["budget-ending:east"].what == "east has spent epsilon 7.50 of the budget of 8."


def test_a_budget_that_nobody_says_how_much_of_is_spent_alerts_nobody(tmp_path: Path) -> None:
    privacy = {"unit": "patient", "epsilon": 8, "budget": 8, "bound": "upper"}
    assert alerts(tmp_path, privacy=privacy) == {}


def test_a_round_without_figures_and_a_site_left_out_are_told(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    write_rows(run.rounds, [round_row(1), round_row(3, sites=2)])
    rows = [
        {"round": 3, "kind": "train", "site": name, "outcome": outcome}
        for name, outcome in (("east", "included"), ("north", "missing"), ("south", "included"))
    ]
    write_rows(run.sites, rows)
    with coordinated(run):
        found = {alert.code: alert.what for alert in read_snapshot(run.path).alerts}
    assert found["round-skipped"] == "Round 2 left no figures."
    assert found["left-out"] == "Round 3 went on without north."


def test_a_round_that_was_skipped_is_told_while_it_is_the_last(tmp_path: Path) -> None:
    skipped = {"round": 2, "sites": 0, "attempt": 1, "seconds": 60.0}
    found = alerts(tmp_path / "a", rounds=[round_row(1), skipped])
    assert {key: alert.what for key, alert in found.items()} == {"round-skipped:coordinator": "Round 2 was skipped."}
    assert alerts(tmp_path / "b", rounds=[round_row(1), skipped, round_row(3)]) == {}


def test_a_failed_and_a_vanished_coordinator_are_critical(tmp_path: Path) -> None:
    failed = alerts(tmp_path / "a", running=False, state="failed", error="holdout case secret-name: gone")
    assert failed["coordinator-failed:coordinator"].detail == "holdout case secret-name: gone"
    assert "secret-name" not in failed["coordinator-failed:coordinator"].what
    assert list(alerts(tmp_path / "b", running=False)) == ["coordinator-gone:coordinator"]
    assert alerts(tmp_path / "c", running=False, state="stopped") == {}


def test_what_a_site_said_is_a_detail_and_no_part_of_the_sentence(tmp_path: Path) -> None:
    found = alerts(tmp_path, sites=sites(north=site(stage="failed", reason="its data can no longer be read")))
    alert = found["site-failed:north"]
    assert alert.what == "north cannot do its part of round 3."
    assert alert.detail == "its data can no longer be read"
    assert alert.text().startswith("warning: north cannot do its part of round 3 (its data can no longer be read).")


def test_the_most_severe_come_first(tmp_path: Path) -> None:
    found = alerts(
        tmp_path,
        state="waiting for sites",
        sites=sites(north=site(no_progress_seconds=75)),
        rounds=[round_row(1, sites=3)],
    )
    assert [alert.severity for alert in found.values()] == ["critical", "warning"]


def test_every_alert_is_documented_and_no_other() -> None:
    root = Path(__file__).resolve().parents[3]
    sources = [root / "server" / "watching" / "alerts.py", root / "client" / "alerts.py"]
    codes = {code for path in sources for code in re.findall(r'Alert\(\s*"([a-z-]+)"', path.read_text())} | {FINISHED}
    section = (root / "docs" / "watching.md").read_text().split("\n## Alerts\n")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `([a-z-]+)` \|", section, re.MULTILINE)) == codes
    assert len(codes) > 15


def test_the_documented_options_are_the_defaults() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "watching.md").read_text()
    options = parse_options(page.split("```yaml\n")[1].split("```")[0], "docs/watching.md")
    assert options.alerts.rules == AlertRules()
    assert (options.tracking.experiment, options.tracking.artifacts) == ("wardround", True)
    assert options.alerts.webhook and options.tracking.mlflow
