"""What charts and tables are made of, whatever the size of the study."""

from __future__ import annotations

import doctest
import html
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import server.dashboard.figures
from server.cli import main
from server.dashboard.figures import MOST_BARS, MOST_POINTS, figures, lines
from server.dashboard.history import Curves, History
from server.dashboard.pictures import Pictures, picture
from server.dashboard.sections import MOST_ROWS, content
from server.dashboard.viewer import LOCAL, Viewer
from server.watching.snapshot import SnapshotReader
from tests.server.dashboard.runs import PRIVACY, SECURE, WrittenRun


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WrittenRun]:
    yield WrittenRun(tmp_path_factory.mktemp("large") / "run", sites=50, rounds=500, done=500)


def test_the_examples_are_right() -> None:
    assert doctest.testmod(server.dashboard.figures).failed == 0


def test_a_large_study_is_thinned_and_keeps_its_ends(large: WrittenRun) -> None:
    history = History.of(SnapshotReader(large.folder.path).read())
    drawn = figures(history)
    quality = drawn["quality"]["data"][0]
    assert len(quality["x"]) <= MOST_POINTS and quality["x"][-1] == 500
    assert len(drawn["time"]["data"][0]["x"]) <= MOST_BARS
    origins = drawn["origin-dice"]["data"]
    assert len(origins) == 1 and origins[0]["type"] == "heatmap" and len(origins[0]["y"]) == 50
    assert len(json.dumps(drawn)) < 400_000


def test_the_parts_of_a_round_keep_their_sum_when_they_are_thinned(large: WrittenRun) -> None:
    history = History.of(SnapshotReader(large.folder.path).read())
    curves = history.curves
    bars = {trace["name"]: trace["y"] for trace in figures(history)["time"]["data"]}
    assert list(bars) == ["download", "training", "upload", "waiting", "aggregation", "evaluation"]
    step = 500 // len(bars["training"]) + (500 % len(bars["training"]) > 0)
    assert sum(parts[0] for parts in bars.values()) == pytest.approx(
        sum(curves.seconds(place) for place in range(step)) / step, abs=0.05
    )


def test_tables_of_a_large_study_stay_short(large: WrittenRun) -> None:
    snapshot = SnapshotReader(large.folder.path).read()
    page = content(snapshot, History.of(snapshot), LOCAL, Pictures())
    assert len(page["quality"]["rounds"]) <= MOST_ROWS and page["quality"]["rounds"][0]["round"] == 500
    assert len(page["quality"]["origins"]) == 50 and len(page["cohort"]["rows"]) == 50


def test_history_takes_in_only_what_was_added(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "run", done=3)
    reader, history = SnapshotReader(run.folder.path), History()
    history.take(reader.read())
    version = history.version
    history.take(reader.read())
    assert history.version == version and history.curves.rounds == [1, 2, 3]
    run.end_round()
    history.take(reader.read())
    assert history.version > version and history.curves.rounds == [1, 2, 3, 4]
    assert {record.included for record in history.sites.values()} == {4}


def test_history_forgets_rounds_that_were_taken_back(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "run", done=5)
    reader, history = SnapshotReader(run.folder.path), History()
    history.take(reader.read())
    for path in (run.folder.rounds, run.folder.sites):  # as after `wardround repair`: another file in its place
        lines = [line for line in path.read_text().splitlines() if not line.startswith(("4,", "5,"))]
        path.unlink()
        path.write_text("\n".join(lines) + "\n")
    history.take(reader.read())
    assert history.curves.rounds == [1, 2, 3]
    assert {record.included for record in history.sites.values()} == {3}


def test_columns_that_come_later_stand_at_their_rounds(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "run", done=0)
    run.folder.rounds.write_text("round,train/loss,epsilon\n1,0.5,\n2,nan,0.3\n")
    curves = History.of(SnapshotReader(run.folder.path).read()).curves
    assert curves.column("train/loss") == [0.5, None]
    assert curves.column("epsilon") == [None, 0.3]
    assert curves.column("holdout/dice") == [None, None] and curves.best("holdout/dice") is None


def test_a_run_before_its_first_round_has_a_page(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "run", done=0)
    run.folder.status.unlink()
    snapshot = SnapshotReader(run.folder.path).read()
    page = content(snapshot, History.of(snapshot), LOCAL, Pictures())
    assert page["now"]["state"] == "not started" and page["quality"]["rounds"] == []
    assert figures(History.of(snapshot))["quality"]["data"] == []


@pytest.mark.parametrize(
    ("sections", "spent", "seen"),
    [
        ("", "no differential privacy", "each site's own update."),
        (PRIVACY, "at least <strong>0.00</strong> of 8", "each site's own update, with the noise in it."),
        (SECURE, "no differential privacy", "sums over 4 sites or more, and no site's own update"),
        (f"{PRIVACY}\n{SECURE}", "at most <strong>8.00</strong> of 8", "and no site's own update"),
    ],
)
def test_the_privacy_of_a_study_is_told_from_its_beginning(
    tmp_path: Path, sections: str, spent: str, seen: str
) -> None:
    run = WrittenRun(tmp_path / "run", done=0, sections=sections)
    run.folder.status.unlink()
    assert main(["report", str(run.folder.path)]) == 0
    text = html.unescape((run.folder.path / "report.html").read_text())
    told = text[text.index('<section id="privacy"') :].partition("</section>")[0]
    assert spent in told and seen in told
    assert "data-chart" not in text.partition("<script")[0]  # nothing is drawn before there is a round


def test_each_state_has_its_word(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "run")

    def shown() -> tuple[str, str]:
        snapshot = SnapshotReader(run.folder.path).read()
        now = content(snapshot, History.of(snapshot), LOCAL, Pictures())["now"]
        return now["state"], now["chip"]

    assert shown() == ("not running", "error")
    with run.folder.locked():
        assert shown() == ("training", "busy")
    for state, chip in (("failed", "error"), ("stopped", "warning")):
        run.status(state, error="the disk is full")
        assert shown() == (state, chip)
    run.finish()
    assert shown() == ("finished", "good")


def test_nobody_is_told_to_start_a_site_of_a_simulation(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "run")
    run.status(simulated=True, sites={"west": {"connected": False, "stage": "waiting"}})
    with run.folder.locked():
        snapshot = SnapshotReader(run.folder.path).read()
        rows = content(snapshot, History.of(snapshot), LOCAL, Pictures())["cohort"]["rows"]
    assert {row["waits"] for row in rows if row["site"] == "west"} == {"its site to dial in: the simulation starts it"}


def test_those_in_trouble_come_first_and_say_what_they_wait_for(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "run")
    run.status(
        sites={
            "west": {"connected": False, "stage": "waiting", "last_seen_at": time.time() - 300},
            "south": {"stage": "failed", "reason": "its data can no longer be read"},
            "east": {"stage": "done"},
            "north": {"revoked": True, "stage": "waiting", "connected": False},
        }
    )
    with run.folder.locked():
        snapshot = SnapshotReader(run.folder.path).read()
        cohort = content(snapshot, History.of(snapshot), LOCAL, Pictures())["cohort"]
    rows = {row["site"]: row for row in cohort["rows"]}
    assert [row["site"] for row in cohort["rows"]] == ["north", "south", "west", "central", "east"]
    assert rows["south"]["waits"] == "its data can no longer be read"
    assert rows["west"]["waits"] == "its site to dial in: `wardround-site start` there"
    assert rows["north"]["waits"] == "a new invitation: `wardround invite north`"
    assert rows["east"]["waits"] == "the other sites"
    assert rows["west"]["seen"] < time.time() - 200


@pytest.mark.parametrize(
    ("viewer", "own", "others"),
    [
        (LOCAL, True, True),
        (Viewer("site", "east", "certificate"), True, False),
        (Viewer("observer", "kim", "token"), False, False),
    ],
)
def test_a_role_sees_no_more_numbers_than_it_may(tmp_path: Path, viewer: Viewer, own: bool, others: bool) -> None:
    run = WrittenRun(tmp_path / "run")
    privacy = {"unit": "patient", "protects": "each patient", "epsilon": 3.0, "budget": 8.0, "delta": 1e-5}
    privacy |= {"noise_multiplier": 1.1, "clip_norm": 1.0, "sites": {"east": 2.5, "west": 3.0}}
    run.status(sites={"east": {"epsilon": 2.5}, "west": {"epsilon": 3.0}}, privacy=privacy, notice="of /srv/run")
    with run.folder.locked():
        snapshot = SnapshotReader(run.folder.path).read()
        page = content(snapshot, History.of(snapshot), viewer, Pictures())
    rows = {row["site"]: row for row in page["cohort"]["rows"]}
    for site, seen in (("east", own), ("west", others)):
        row = rows[site]
        assert (row["cases"] is not None, row["batches"] > 0, row["epsilon"] is not None) == (seen,) * 3, site
        assert (row["seconds"] is not None, row["expires"] is not None, row["included"] is not None) == (seen,) * 3
        origins = {each["name"]: each["cases"] for each in page["quality"]["origins"]}
        assert (origins[site] is not None) is seen
        assert (site in page["privacy"]["sites"]) is seen
    said = json.dumps({name: page[name] for name in ("now", "alerts", "cohort", "privacy")}, default=str)
    assert ("/srv/run" in said) is viewer.sees_all
    assert (str(run.folder.path) in said) is False
    if not viewer.sees_all:
        assert "batch" not in page["now"]["cause"] or "batch 0" not in page["now"]["cause"]


def test_pictures_are_found_by_number_and_never_by_path(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "run", dimensions=3)
    run.samples()
    shown = Pictures.of(run.folder.path).shown(embedded=True)
    assert [case["heights"] for case in shown["cases"]] == [[2, 4, 6], [2, 4, 6]]
    assert shown["cases"][0]["slices"][0]["truth"].startswith("data:image/png;base64,")
    found = picture(run.folder.path, 6, 1, 2, "prediction")
    assert found is not None and found.read_bytes().startswith(b"\x89PNG")
    for numbers in (
        (7, 0, 0, "image"),
        (6, 2, 0, "image"),
        (6, 0, 3, "image"),
        (6, 0, 0, "index"),
        (6, 0, 0, "__class__"),
    ):
        assert picture(run.folder.path, *numbers) is None


@pytest.mark.parametrize(("done", "step"), [(3, 1), (30, None)])
def test_an_axis_of_few_rounds_has_a_tick_a_round(tmp_path: Path, done: int, step: int | None) -> None:
    run = WrittenRun(tmp_path / "run", rounds=40, done=done)
    drawn = figures(History.of(SnapshotReader(run.folder.path).read()))
    assert drawn["quality"]["layout"]["xaxis"].get("dtick") == step


def test_a_chart_without_a_value_says_so_instead_of_drawing_axes() -> None:
    drawn = lines([1, 2], {"holdout": [None, None]}, "Dice")
    assert drawn["data"] == []
    assert drawn["layout"]["annotations"][0]["text"] == "nothing measured"
    assert not drawn["layout"]["xaxis"]["visible"]


def test_a_round_of_an_older_version_has_its_time_without_parts() -> None:
    curves = Curves([1, 2], {"seconds": [40.0, 50.0], "seconds_training": [None, 30.0], "seconds_upload": [None, 12.0]})
    assert [curves.seconds(place) for place in range(2)] == [40.0, 42.0]
