"""A run in words: for every situation, how it stands, who holds it up, and what somebody should do."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from common.study import load_study, parse_study
from server.following import news
from server.simulation.hospitals import example_study
from server.status import (
    complete,
    describe,
    duration,
    holdout_table,
    last_round,
    rounds_table,
    status_table,
    status_text,
    variants_table,
)

NOW = 1_000_000.0
ROOT = Path(__file__).parents[2]


def site(stage: str = "waiting", *, connected: bool = True, batch: int = 0, batches: int = 0, reason: str = "") -> Any:
    return {"connected": connected, "stage": stage, "batch": batch, "batches": batches, "reason": reason}


def status(state: str, sites: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    return {
        "study": "cells",
        "state": state,
        "pid": 1,
        "round": 3,
        "rounds": 8,
        "attempt": 1,
        "kind": "train" if state == "training" else None,
        "deadline_at": NOW + 420,
        "quorum": 2,
        "running": True,
        "sites": {name: site("done") for name in "abc"} | (sites or {}),
        **fields,
    }


def shown(renderable: Any) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(renderable)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_a_run_that_never_started_asks_for_its_coordinator() -> None:
    found = describe({"state": "starting", "sites": {}, "running": False, "study": "cells"})
    assert found.headline == "cells: not started"
    assert found.next_step == "Start the coordinator."


def test_a_starting_coordinator_needs_nothing() -> None:
    assert describe(status("starting")).next_step == "Nothing to do."


def test_an_old_end_is_not_told_of_a_coordinator_that_starts_again() -> None:
    assert describe(status("failed", error="out of space")).headline == "cells: starting"


def test_waiting_names_the_sites_that_are_missing_and_where_they_connect() -> None:
    sites = {"a": site(), "b": site(connected=False), "c": site(connected=False)}
    found = describe(status("waiting for sites", sites, round=0, address="127.0.0.1:8443"))
    assert found.cause == "b and c are not connected; 1 of 3 sites is (the quorum is 2)."
    assert found.next_step == "Run `wardround-site start` at b and c; they reach the coordinator at 127.0.0.1:8443."


def test_a_site_with_another_plan_is_not_asked_to_start_as_it_is() -> None:
    sites = {"a": site(), "b": site(connected=False), "c": site(connected=False) | {"refused_reason": "plan 08"}}
    found = describe(status("waiting for sites", sites, round=0))
    assert found.cause == (
        "b is not connected; c came with another study or version (refused); 1 of 3 sites is connected (the quorum "
        "is 2)."
    )
    assert found.next_step == (
        "Start c with the coordinator's study file and version of Wardround and run `wardround-site start` at b."
    )
    assert "c refused" in status_text(status("training", sites))


def test_in_a_simulation_nobody_is_sent_to_a_hospital() -> None:
    absent = {name: site(connected=False) for name in "abc"}
    for found in (
        describe(status("waiting for sites", absent, round=0, simulated=True)),
        describe(status("waiting for sites", absent, round=1, kind="train", simulated=True)),
        describe(status("training", {"b": site(connected=False)}, simulated=True)),
    ):
        assert "wardround-site" not in found.next_step
    assert "see the log of b" in found.next_step


def test_between_rounds_nobody_is_waited_for() -> None:
    found = describe(status("waiting for sites", round=3))
    assert found.headline == "cells: after round 3 of 8"
    assert found.next_step == "Nothing to do."


def test_the_slowest_site_at_work_holds_a_round_up() -> None:
    sites = {
        "a": site("training", batch=9, batches=12),
        "b": site("training", batch=2, batches=12),
        "c": site("upload"),
    }
    found = describe(status("training", sites), now=NOW)
    assert found.headline == "cells: training, round 3 of 8"
    assert found.cause == "3 sites are still at work, the slowest is b: training, batch 2 of 12."
    assert found.next_step == (
        "Nothing to do: the round closes when all have answered, at the latest at the deadline, in 7 min."
    )


def test_the_only_site_at_work_is_named() -> None:
    found = describe(status("training", {"b": site("download")}), now=NOW)
    assert found.cause == "b is still at work: download."


def test_a_missing_site_does_not_hold_up_a_quorum_beyond_the_deadline() -> None:
    found = describe(status("training", {"b": site(connected=False)}), now=NOW)
    assert found.cause == "b is not connected."
    assert found.next_step == (
        "The quorum allows the round to go on without it at the deadline, in 7 min. "
        "To have it in, run `wardround-site start` at b."
    )


def test_a_site_that_has_answered_may_go() -> None:
    found = describe(status("training", {"a": site("done", connected=False), "b": site("upload")}), now=NOW)
    assert found.cause == "b is still at work: upload."


def test_below_the_quorum_the_sites_that_fail_must_be_seen_to() -> None:
    sites = {"a": site("failed", reason="GPU out of memory."), "b": site(connected=False)}
    found = describe(status("training", sites, attempt=2), now=NOW)
    assert found.headline == "cells: training, round 3 of 8, attempt 2"
    assert found.cause == "a cannot do its part: GPU out of memory; b is not connected."
    assert found.next_step == (
        "Run `wardround-site start` at b and remove the cause at a, whose site log says more: the round needs 2 sites, "
        "1 can answer. What was received is kept; another attempt begins at the deadline, in 7 min."
    )


def test_when_all_have_answered_the_coordinator_is_at_work() -> None:
    assert describe(status("training")).cause == "All sites have answered; the coordinator sums their updates."


@pytest.mark.parametrize(
    ("kind", "headline", "cause"),
    [
        ("evaluate", "cells: validation at the sites, round 3 of 8", "b is still at work: evaluation, batch 1 of 2."),
        (None, "cells: evaluating, round 3 of 8", "The coordinator evaluates the model on its holdout."),
    ],
)
def test_evaluation_at_the_sites_and_on_the_holdout_are_told_apart(kind: str | None, headline: str, cause: str) -> None:
    found = describe(status("evaluating", {"b": site("evaluation", batch=1, batches=2)}, kind=kind), now=NOW)
    assert (found.headline, found.cause) == (headline, cause)


def test_a_failed_run_says_why_and_how_it_goes_on() -> None:
    found = describe(status("failed", running=False, error="disk: no space left; free some"))
    assert found.headline == "cells: failed in round 3 of 8"
    assert found.cause == "disk: no space left; free some"
    assert "start the coordinator again with the same command" in found.next_step


def test_a_run_that_is_damaged_is_sent_to_repair_and_says_no_more_of_the_damage_than_what_and_where() -> None:
    path = "/runs/x/state/000003.tensors"
    for inside in (f"{path}: expected SHA-256", "expected SHA-256"):
        error = (
            f"{path}: damaged ({inside} {'a' * 64}, found {'b' * 64}: the file is torn or was changed; restore it or "
            "run the round again); `wardround repair --run /runs/x --dry-run` says what can be saved"
        )
        found = describe(status("failed", running=False, error=error, run="/runs/x"))
        assert found.cause == f"{path}: damaged (the file is torn or was changed)"
        assert found.next_step.startswith("Run `wardround repair --run /runs/x --dry-run`: it says what is damaged")


def test_a_repaired_run_shows_no_old_failure_and_is_started_again() -> None:
    found = describe(status("repaired", running=False, repair="The run goes on after round 2.", error=""))
    assert found.headline == "cells: repaired"
    assert found.cause == "The run goes on after round 2."
    assert found.next_step == "Start the coordinator again with the same command."
    assert describe(status("repaired")).headline == "cells: starting"


def test_no_deadline_is_promised_for_a_round_that_was_closed_before() -> None:
    closed = {"closed_with": ["a", "b"], "quorum": 2, "needed": 2}
    for sites in ({"b": site("failed", reason="GPU")}, {"b": site(connected=False)}, {"b": site("training")}):
        asked = sites | {"c": {**site(), "asked": False}}
        found = describe(status("training", asked, **closed), now=NOW)
        assert "the round was closed with a and b before, and goes on" in found.next_step
        assert "deadline" not in found.next_step


def test_a_finished_run_whose_version_was_moved_away_publishes_again() -> None:
    found = describe(status("finished", running=False, published=None))
    assert "not here any more" in found.cause
    assert found.next_step.startswith("Start the coordinator again with the same command")


def test_a_stopped_run_goes_on_with_the_same_command() -> None:
    found = describe(status("stopped", running=False))
    assert found.headline == "cells: stopped in round 3 of 8"
    assert "same command" in found.next_step


def test_a_coordinator_that_was_killed_is_not_taken_for_running() -> None:
    found = describe(status("training", running=False))
    assert found.headline == "cells: not running, last seen training in round 3 of 8"
    assert "ended without a word" in found.cause


def test_a_finished_run_says_where_the_model_lies() -> None:
    found = describe(status("finished", running=False, published="runs/x/published/v1"))
    assert found.headline == "cells: finished after 8 rounds"
    assert "runs/x/published/v1" in found.cause
    assert "wardround publish" in describe(status("finished", running=False)).next_step


def test_a_deadline_in_the_past_is_now() -> None:
    assert (
        "go on without it now, at the deadline."
        in describe(status("training", {"b": site(connected=False)}), now=NOW + 1000).next_step
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(-3, "0 s"), (0.2, "1 s"), (59, "59 s"), (60, "1 min"), (4800, "1 h 20 min")]
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_study_adds_quorum_and_the_names_of_sites_that_never_came() -> None:
    found = complete({"state": "starting", "sites": {"north": site("done")}}, parse_study(example_study()))
    assert found["quorum"] == 4
    assert list(found["sites"]) == ["central", "east", "north", "south", "west"]
    assert found["sites"]["north"]["stage"] == "done"
    assert found["state"] == "starting"


def test_the_text_has_the_sites_the_figures_and_the_best_round() -> None:
    text = status_text(
        status(
            "training",
            {"b": site("training", batch=2, batches=12)},
            last={"round": 2, "train_loss": 0.41237, "validation_dice": None, "holdout_dice": 0.7, "seconds": 12.34},
            best={"round": 1, "validation_dice": 0.71},
            notice="round 2 went on without c",
        ),
        now=NOW,
    )
    assert "  sites   a done; b training, batch 2 of 12; c done" in text
    assert "  last    round 2 of 8: training loss 0.412, holdout Dice 0.700, 12.3 s" in text
    assert "  best    round 1, validation Dice 0.710" in text
    assert "  notice  round 2 went on without c" in text


def test_what_took_most_of_a_round_is_said_with_who_answered_last() -> None:
    timings = {"download": 1.0, "training": 40.0, "upload": 2.0, "waiting": 3.0, "aggregation": 4.0, "evaluation": 99.0}
    last = {"round": 1, "seconds": 50.0, "timings": timings, "slowest_site": "north"}
    assert last_round({"last": last, "rounds": 3}).endswith("50.0 s (most of it training, north answered last)")
    last["timings"] = dict.fromkeys(timings, 10.0)
    assert last_round({"last": last, "rounds": 3}).endswith(": 50.0 s")


@pytest.mark.parametrize(("state", "running"), [("finished", False), ("stopped", False), ("training", False)])
def test_nothing_is_said_of_the_sites_once_the_coordinator_has_ended(state: str, running: bool) -> None:
    ended = status(state, {"a": site("training", batch=3, batches=9), "b": site(connected=False)}, running=running)
    for text in (status_text(ended, now=NOW), shown(status_table(ended, now=NOW))):
        assert "batch" not in text and "not connected" not in text
    assert "  sites " not in status_text(ended, now=NOW)


def test_the_readme_shows_the_measured_study() -> None:
    with (ROOT / "docs/results/nuclei-rounds.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    third = next(row for row in rows if row["round"] == "3")
    keys = {"train_loss": "train/loss", "validation_dice": "validation/dice", "holdout_dice": "holdout/dice"}
    last = {"round": 3, "seconds": third["seconds"]} | {name: third[key] for name, key in keys.items()}
    rounds = load_study(ROOT / "deploy/studies/nuclei.yaml").training.rounds
    readme = (ROOT / "README.md").read_text()
    assert f"  last    {last_round({'last': last, 'rounds': rounds})}\n" in readme
    assert f"nuclei: training, round 4 of {rounds}\n" in readme
    assert f"  best    round 3, validation Dice {float(last['validation_dice']):.3f}\n" in readme


def test_what_a_site_says_cannot_steer_the_terminal() -> None:
    hostile = status("training", {"a": site("failed", reason="\x1b[2J\x07[bold]boo")}, notice="\x1b]0;x\x07")
    for text in (status_text(hostile, now=NOW), shown(status_table(hostile, now=NOW))):
        assert "\x1b" not in text and "\x07" not in text
        assert "[bold]boo" in text


def test_lines_tell_each_round_once_and_each_change_of_phase() -> None:
    steps = [
        status("starting", round=0),
        status("waiting for sites", {"a": site(connected=False)}, round=0),
        status("training", round=1),
        status("evaluating", round=1, kind="evaluate"),
        status("waiting for sites", round=1, last={"round": 1, "train_loss": 0.5}),
        status("training", round=2, last={"round": 1, "train_loss": 0.5}),
        status("publishing", last={"round": 2, "train_loss": 0.4}),
        status("finished", running=False, last={"round": 2, "train_loss": 0.4}, published="p"),
    ]
    lines = [line for before, after in zip([{}, *steps], steps, strict=False) for line in news(before, after)]
    assert lines == [
        "cells: starting",
        "cells: waiting for sites",
        "cells: training, round 1 of 8",
        "round 1 of 8: training loss 0.500",
        "round 2 of 8: training loss 0.400",
        "cells: publishing",
        "cells: finished after 8 rounds. The model is published in p.",
    ]


def test_lines_tell_when_a_coordinator_is_killed() -> None:
    assert len(news(status("training"), status("training", running=False))) == 1
    assert news(status("training", running=False), status("training", running=False)) == []


def test_tables_show_what_there_is_and_a_dash_for_the_rest() -> None:
    rounds = shown(rounds_table([{"round": "1", "train/loss": "0.5", "validation/dice": "nan", "sites": "5"}]))
    assert rounds.splitlines()[-1].split() == ["1", "0.500", "–", "–", "5", "–"]
    holdout = shown(
        holdout_table(
            {
                "dice": 0.9,
                "iou": 0.8,
                "cases": 9.0,
                "site": {"b": {"dice": 0.9, "iou": 0.8, "cases": 2}, "a": {"cases": 3}},
                "other": {"dice": 0.7, "iou": 0.6, "cases": 4},
            }
        )
    )
    assert [line.split() for line in holdout.splitlines()[2:]] == [
        ["a", "–", "–", "3"],
        ["b", "0.900", "0.800", "2"],
        ["other", "0.700", "0.600", "4"],
        ["all", "0.900", "0.800", "9"],
    ]
    variants = shown(
        variants_table({"variants": [{"name": "int8", "bytes": 123456, "dice": 0.9, "recommended": True}]})
    )
    assert variants.splitlines()[-1].split() == ["int8", "123,456", "–", "0.9000", "–", "–", "–", "recommended"]
