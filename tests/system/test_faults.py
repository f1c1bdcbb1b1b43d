"""Processes that die, and sites that never come: what a study then does, and that its weights do not tell."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from server.journal import Journal
from tests.system.ports import free_port

pytestmark = pytest.mark.system

EVERY_ROW = [(n, kind, site) for n in (1, 2, 3) for kind in ("train", "evaluate") for site in ("east", "north")]


def rows_of_sites(setting: Any) -> list[tuple[int, str, str]]:
    return [(int(row["round"]), row["kind"], row["site"]) for row in setting.rows("sites.csv")]


def test_a_site_killed_in_training_and_started_again_changes_no_bit(
    undisturbed: Any, setting: Callable[[str], Any], tiny_study: str
) -> None:
    study = setting(tiny_study)
    study.identities("east", "north")
    coordinator = study.coordinator(holdout=True)
    east, north = study.site("east"), study.site("north")
    killed_in = kill_in_training(study, "north", north, from_round=2)
    status = study.until(lambda status: not status["sites"]["north"]["connected"], coordinator, east)
    assert (status["round"], status["kind"]) == (killed_in, "train")
    again = study.site("north")
    assert [process.end() for process in (coordinator, east, again)] == [0, 0, 0], coordinator.said()
    assert study.weights() == undisturbed[0].weights()
    assert rows_of_sites(study) == EVERY_ROW
    assert {row["outcome"] for row in study.rows("sites.csv")} == {"included"}


def kill_in_training(study: Any, site: str, process: Any, from_round: int) -> int:
    """Kills the process while its site trains; returns the round."""
    for number in range(from_round, 4):

        def trains(status: dict[str, Any], number: int = number) -> bool:
            at_work = status["kind"] == "train" and status["round"] >= number
            return bool(at_work and status["sites"][site]["stage"] == "training")

        study.until(trains, process)
        process.signal(signal.SIGSTOP)
        time.sleep(1)  # whatever it had sent has arrived
        status = study.status()
        if trains(status):
            process.kill()
            return int(status["round"])
        process.signal(signal.SIGCONT)
    pytest.fail("the site was never caught in training")


def test_a_coordinator_killed_between_rounds_goes_on_where_it_was(
    undisturbed: Any, setting: Callable[[str], Any], tiny_study: str
) -> None:
    study = setting(tiny_study)
    study.identities("east", "north")
    listen = f"127.0.0.1:{free_port()}"
    first = study.coordinator(listen=listen, holdout=True)
    sites = study.site("east", "north")
    # Round 1 is saved, and round 2 is trained but not yet saved: the most that can be lost.
    saved = study.run.state / "000001.tensors"
    study.until(lambda _: saved.exists() and (2, "train", "north") in rows_of_sites(study), first, sites)
    first.kill()
    again = study.coordinator(listen=listen, holdout=True)
    assert [again.end(), sites.end()] == [0, 0], again.said()
    assert study.weights() == undisturbed[0].weights()
    assert [int(row["round"]) for row in study.rows("rounds.csv")] == [1, 2, 3]
    assert rows_of_sites(study) == EVERY_ROW
    trained = [event["round"] for event in Journal(study.run.journal).events("opened") if event["kind"] == "train"]
    assert trained.count(1) == trained.count(3) == 1
    assert [path.name for path in study.run.published.iterdir()] == ["v1"]


@dataclass
class Short:
    """A study of three sites with a quorum of two: one starts at once, one late, one never."""

    study: Any
    below: dict[str, Any]
    said_below: str
    without: dict[str, Any]
    codes: list[int]


@pytest.fixture(scope="module")
def short_of_sites(setting: Callable[[str], Any], short_study: str, wardround: Callable[..., Any]) -> Short:
    text = short_study.replace("sites: [east, north]", "sites: [east, north, south]")
    study = setting(text.replace("deadline: 10m", "deadline: 4s").replace("rounds: 1", "rounds: 2"))
    study.identities("east", "north", "south")
    coordinator = study.coordinator()
    east = study.site("east")
    # A slow machine may need more than two attempts until the first site has loaded and trained.
    below = study.until(lambda status: "1 of the quorum of 2" in status["notice"], coordinator, east)
    said = wardround("wardround", "status", "--run", study.run.path).stdout
    north = study.site("north")
    without = study.until(lambda status: "went on without" in status["notice"], coordinator, east, north)
    return Short(study, below, said, without, [process.end() for process in (coordinator, east, north)])


def test_below_the_quorum_a_round_is_tried_again_and_the_missing_sites_are_named(short_of_sites: Short) -> None:
    below = short_of_sites.below
    assert below["round"] == 1
    assert below["attempt"] >= 2
    assert below["sites"]["east"]["stage"] == "done"  # what was received is kept
    assert below["notice"].endswith(
        f"attempt {below['attempt']} waits for north (not connected), south (not connected)"
    )
    assert "waiting for sites, round 1 of 2, attempt " in short_of_sites.said_below
    assert "north and south are not connected" in short_of_sites.said_below
    assert "wardround-site start` at north and south" in short_of_sites.said_below


def test_a_site_that_comes_late_makes_up_the_quorum_and_the_study_ends(short_of_sites: Short) -> None:
    assert short_of_sites.codes == [0, 0, 0]
    assert [int(row["sites"]) for row in short_of_sites.study.rows("rounds.csv")] == [2, 2]


def test_with_the_quorum_a_round_closes_at_its_deadline_and_says_who_was_missing(short_of_sites: Short) -> None:
    assert short_of_sites.without["notice"] == "round 1 went on without south (not connected)"
    rows = short_of_sites.study.rows("sites.csv")
    assert [(row["round"], row["site"], row["outcome"]) for row in rows] == [
        (number, site, "missing" if site == "south" else "included")
        for number in "12"
        for site in ("east", "north", "south")
    ]
    assert all(float(row["seconds_round"]) >= 4 for row in rows)
    assert all(row["bytes_up"] == "0" for row in rows if row["site"] == "south")
