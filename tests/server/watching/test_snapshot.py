"""The one reading of a run folder that page, metrics, alerts and status share."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import RunFolderError
from server.watching import files
from server.watching.snapshot import SnapshotReader, read_snapshot
from tests.server.watching.runs import coordinated, round_row, run_folder, status, write_rows


def test_a_snapshot_holds_all_parts_and_is_json(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    write_rows(run.rounds, [round_row(1), round_row(2, train__loss="nan")])
    write_rows(run.sites, [{"round": 2, "kind": "train", "site": "north", "outcome": "included", "reason": ""}])
    (run.published / "v1").mkdir()
    (run.published / "v1" / "manifest.json").write_text('{"version": "v1"}')
    run.report.write_text('{"best_round": 2}')
    with coordinated(run):
        snapshot = read_snapshot(run.path)
    assert [row["round"] for row in snapshot.rounds] == [1, 2]
    assert {site["name"]: site["stage"] for site in snapshot.sites} == dict.fromkeys(
        ("east", "north", "south"), "training"
    )
    assert {site["name"]: (site["last"] or {}).get("round") for site in snapshot.sites}["north"] == 2
    assert [version["manifest"]["version"] for version in snapshot.versions] == ["v1"]
    said = json.loads(json.dumps(snapshot.as_json(), allow_nan=False))
    assert said["rounds"][1]["train/loss"] is None
    assert said["study"]["cohort"]["quorum"] == 2
    assert [alert["code"] for alert in said["alerts"]][:1] == ["loss-not-finite"]


def test_a_folder_without_a_run_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no run here"):
        read_snapshot(tmp_path)


def test_only_what_changed_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_folder(tmp_path)
    run.write_status(status())
    write_rows(run.rounds, [round_row(number) for number in range(1, 100)])
    reader = SnapshotReader(run.path)
    reader.read()
    read: list[int] = []
    add = files.CachedTable._add
    monkeypatch.setattr(
        files.CachedTable, "_add", lambda self, content: (read.append(len(content)), add(self, content))[1]
    )
    reader.read()
    assert read == []
    line = ",".join(str(value) for value in round_row(100).values()) + "\r\n"
    with run.rounds.open("a", newline="") as file:
        file.write(line)
    assert reader.read().rounds[-1]["round"] == 100
    assert read == [len(line)]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(cuts=st.lists(st.integers(0, 400), max_size=5))
def test_a_table_that_grows_by_any_pieces_is_read_row_by_row(tmp_path: Path, cuts: list[int]) -> None:
    path, whole = tmp_path / "grown.csv", tmp_path / "whole.csv"
    write_rows(whole, [{"round": n, "reason": 'a "quoted",\nbroken line'} for n in range(1, 8)])
    content = whole.read_bytes()
    path.unlink(missing_ok=True)
    path.touch()
    table = files.CachedTable(path)
    for end in [*sorted(min(cut, len(content)) for cut in cuts), len(content)]:
        with path.open("ab") as file:
            file.write(content[path.stat().st_size : end])
        rows = table.read()
        assert [row["round"] for row in rows] == list(range(1, len(rows) + 1))
        assert all(row["reason"] == 'a "quoted",\nbroken line' for row in rows)
    assert len(rows) == 7


def test_a_table_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    write_rows(run.rounds, [round_row(1), round_row(2)])
    reader = SnapshotReader(run.path)
    assert len(reader.read().rounds) == 2
    write_rows(tmp_path / "new.csv", [round_row(1, train__loss=9.0), round_row(2), round_row(3)])
    (tmp_path / "new.csv").replace(run.rounds)
    assert [row["train/loss"] for row in reader.read().rounds] == [9.0, 0.5, 0.5]


@pytest.mark.parametrize("name", ["status.json", "report.json", "audit.head", "watching.json", "study.yaml"])
def test_a_half_written_file_leaves_what_was_read_before(tmp_path: Path, name: str) -> None:
    run = run_folder(tmp_path)
    run.write_status(status())
    run.report.write_text('{"best_round": 2}')
    reader = SnapshotReader(run.path)
    before = reader.read()
    (run.path / name).write_text('{"best_rou')
    after = reader.read()
    assert (after.status["round"], after.report, after.study) == (3, before.report, before.study)
    assert [problem.split(":")[0] for problem in after.problems] == [name]
    assert "unreadable" in {alert.code for alert in after.alerts}


def test_reading_loads_no_tensorflow() -> None:
    code = "import sys, server.watching.snapshot; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_of_many_rows_the_newest_are_kept_and_all_are_counted(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    rows = [
        {"round": number, "kind": "train", "site": "north", "outcome": "included", "bytes_down": 2, "bytes_up": 3}
        for number in range(1, 101)
    ]
    write_rows(run.sites, rows)
    write_rows(run.rounds, [round_row(number, seconds_training=0.5) for number in range(1, 101)])
    reader = SnapshotReader(run.path, most_rows=10)
    for _ in range(2):
        snapshot = reader.read()
        assert [row["round"] for row in snapshot.rounds] == list(range(91, 101))
        assert reader.totals.bytes["north", "up"] == 300
        assert reader.totals.answers["north", "included"] == 100
        assert reader.totals.seconds == {"training": 50.0}
    write_rows(tmp_path / "new.csv", rows[:20])
    (tmp_path / "new.csv").replace(run.sites)
    assert len(reader.read().site_rounds) == 10
    assert reader.totals.bytes["north", "up"] == 60
