"""What `status.json` says of a round under way, and what becomes of it where it cannot be written."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from common import failpoints
from common.study import parse_study
from server.rounds import Kind, Round, Stage
from server.run_folder import RunFolder
from server.status import describe
from server.status_writer import StatusWriter

STUDY = parse_study(
    """
study: cells
seed: 1
task: {dimensions: 2, channels: 1, classes: [background, cell]}
model: {filters: 4, depth: 2}
preprocessing: {patch: [16, 16]}
training: {rounds: 9}
cohort: {sites: [east, north, south], quorum: 2, deadline: 10m}
"""
)


def written(run: RunFolder, round_: Round, connected: list[str], idle: dict[str, float]) -> dict[str, Any]:
    """The status of this round."""
    writer = StatusWriter(run, STUDY)
    writer.fields["state"] = "training"
    writer.federation = federation(round_, connected, idle)
    writer.write()
    return run.read_status() | {"running": True}


def federation(round_: Round, connected: list[str], idle: dict[str, float]) -> Any:
    """One in this round, as far as a status needs it."""
    return SimpleNamespace(
        call=SimpleNamespace(round=round_, deadline=0.0, started=0.0),
        connections={name: SimpleNamespace(training_cases=1, validation_cases=1) for name in connected},
        plan=SimpleNamespace(digest=b"\x01"),
        notice="",
        rejected={"south": "study 'cells' and plan 0202020202020202"},
        spent={},
        privacy=None,
        begun=True,
        idle_seconds=idle.get,
    )


def round_of_three() -> Round:
    round_ = Round(Kind.TRAIN, 3, STUDY.cohort.sites, 2)
    for site in round_.sites:
        round_.connected(site)
        round_.progressed(site, Stage.TRAINING, 30, 40)
    return round_


def test_a_site_without_progress_is_named_with_how_long(tmp_path: Path) -> None:
    round_ = round_of_three()
    round_.progressed("north", Stage.TRAINING, 31, 40)
    status = written(RunFolder(tmp_path), round_, ["east", "north", "south"], {"north": 75.4})
    assert status["sites"]["north"]["no_progress_seconds"] == 75
    assert status["sites"]["east"]["no_progress_seconds"] is None
    assert "the slowest is north: training, batch 31 of 40, no progress for 75 s." in describe(status).cause


def test_below_the_quorum_the_round_waits_for_sites_by_name(tmp_path: Path) -> None:
    status = written(RunFolder(tmp_path), Round(Kind.TRAIN, 3, STUDY.cohort.sites, 2), ["east"], {})
    assert status["state"] == "waiting for sites"
    found = describe(status)
    assert found.headline == "cells: waiting for sites, round 3 of 9"
    assert "north is not connected" in found.cause


def test_a_closed_cohort_waits_for_its_last_site_and_for_no_other(tmp_path: Path) -> None:
    round_ = Round(Kind.TRAIN, 3, STUDY.cohort.sites, 2)
    round_.fixed = ("east", "north", "south")[:2]
    status = written(RunFolder(tmp_path), round_, ["east", "south"], {})
    assert (status["state"], status["needed"], status["sites"]["south"]["asked"]) == ("waiting for sites", 2, False)
    found = describe(status)
    assert "north is not connected" in found.cause
    assert "south" not in found.cause
    assert found.next_step == (
        "Run `wardround-site start` at north: the round was closed with east and north before, and goes on with all of "
        "them alone, however long that takes."
    )
    status = written(RunFolder(tmp_path), round_, ["east", "north"], {})
    assert "deadline" not in describe(status).next_step


def test_a_coordinator_that_starts_again_and_fails_keeps_the_figures_of_the_rounds_before(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    last, best = {"round": 4, "train_loss": 0.4}, {"round": 3, "validation_dice": 0.8}
    StatusWriter(run, STUDY).write()
    run.write_status({**run.read_status(), "state": "stopped", "last": last, "best": best, "notice": "old"})
    writer = StatusWriter(run, STUDY)
    writer.write()
    status = run.read_status()
    assert (status["last"], status["best"], status["notice"], status["round"]) == (last, best, "", 0)
    writer.set(state="failed", error="disk: full")
    writer.write()
    status = run.read_status()
    assert (status["last"], status["best"], status["round"]) == (last, best, 4)


def test_the_cases_of_a_site_that_left_stay_known(tmp_path: Path) -> None:
    writer = StatusWriter(RunFolder(tmp_path), STUDY)
    for connected in (["east", "north"], []):
        writer.federation = federation(round_of_three(), connected, {})
        writer.write()
    sites = RunFolder(tmp_path).read_status()["sites"]
    assert [sites[name]["training_cases"] for name in ("east", "north", "south")] == [1, 1, 0]


def test_a_site_that_was_sent_away_is_told_from_one_that_never_came(tmp_path: Path) -> None:
    status = written(RunFolder(tmp_path), Round(Kind.TRAIN, 3, STUDY.cohort.sites, 2), ["east"], {})
    reasons = [status["sites"][site]["refused_reason"] for site in ("north", "south")]
    assert reasons == ["", "study 'cells' and plan 0202020202020202"]
    found = describe(status)
    assert "north is not connected; south came with another study or version (refused)" in found.cause
    assert "Start south with the coordinator's study file" in found.next_step
    assert "run `wardround-site start` at north:" in found.next_step


def test_a_status_that_cannot_be_written_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        run = RunFolder(tmp_path)
        writer = StatusWriter(run, STUDY)
        running = asyncio.create_task(writer.run())
        with monkeypatch.context() as patched:
            patched.setattr(failpoints, "_actions", failpoints.parse("status.before=error:ENOSPC"))
            for _ in range(3):
                writer.changed()
                await asyncio.sleep(0.3)
        assert not run.status.exists()
        writer.changed()
        await asyncio.sleep(0.4)
        assert run.status.exists()
        running.cancel()

    asyncio.run(main())
    assert len([line for line in caplog.messages if "cannot be written" in line]) == 1
