"""`wardround simulate`, from the study file to the published model."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.system

ROUNDS, SITES = 3, ("east", "north")


def test_a_simulated_study_ends_with_figures_and_a_published_model(undisturbed: Any) -> None:
    setting, result = undisturbed
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    rounds = setting.rows("rounds.csv")
    assert [int(row["round"]) for row in rounds] == [1, 2, 3]
    assert all(float(row["train/loss"]) > 0 and 0 <= float(row["validation/dice"]) <= 1 for row in rounds)
    report = json.loads(setting.run.report.read_text())
    assert report["rounds"] == ROUNDS
    assert 0 <= report["holdout"]["dice"] <= 1
    published = Path(report["publication"]["folder"])
    names = {path.name for path in published.iterdir()}
    assert {variant["file"] for variant in report["publication"]["variants"]} < names
    assert {"manifest.json", "model_card.md"} < names
    assert f"The model lies in {published}" in result.stdout


def test_every_site_has_a_row_a_round_and_kind(undisturbed: Any) -> None:
    setting, _ = undisturbed
    rows = setting.rows("sites.csv")
    found = [(int(row["round"]), row["kind"], row["site"]) for row in rows]
    assert found == [(n, kind, site) for n in (1, 2, 3) for kind in ("train", "evaluate") for site in SITES]
    assert {row["outcome"] for row in rows} == {"included"}
    assert {(row["kind"], row["cases"]) for row in rows} == {("train", "4"), ("evaluate", "1")}  # of five images
    assert all(int(row["bytes_up"]) > 0 for row in rows)


def test_a_round_trains_on_the_weights_that_the_sites_evaluated(undisturbed: Any) -> None:
    """They are downloaded once: for the evaluation of a round, and not again for the training that follows."""
    setting, _ = undisturbed
    down = {(int(row["round"]), row["kind"]): int(row["bytes_down"]) for row in setting.rows("sites.csv")}
    assert down[1, "train"] > 0 and down[1, "evaluate"] > 0
    assert down[2, "train"] == down[3, "train"] == 0


def test_status_says_finished_and_nothing_runs_any_more(undisturbed: Any, wardround: Callable[..., Any]) -> None:
    setting, _ = undisturbed
    status = json.loads(wardround("wardround", "status", "--run", setting.run.path, "--json").stdout)
    assert (status["state"], status["running"], status["round"]) == ("finished", False, ROUNDS)
    assert status["published"] == json.loads(setting.run.report.read_text())["publication"]["folder"]
    assert setting.left_behind() == []


@pytest.mark.parametrize("command", ["simulate", "coordinator"])
def test_a_finished_run_started_again_says_so_and_changes_nothing(
    undisturbed: Any, wardround: Callable[..., Any], command: str, without_tensorflow: Path
) -> None:
    setting, _ = undisturbed
    files = [path for path in setting.run.path.rglob("*") if path.is_file() and not is_log(path)]
    before = {path: path.read_bytes() for path in files}
    data = ["--data", setting.data] if command == "simulate" else []
    started = time.time()
    result = wardround("wardround", command, setting.study, "--run", setting.run.path, *data, first=without_tensorflow)
    assert result.returncode == 0, result.stderr
    assert "tiny is complete already" in result.stdout + result.stderr
    assert {path: path.read_bytes() for path in files} == before
    assert [path.name for path in setting.run.published.iterdir()] == ["v1"]
    assert setting.run.status.stat().st_mtime < started


def is_log(path: Path) -> bool:
    return path.suffix in (".log", ".jsonl")


def test_sites_in_processes_of_their_own_end_in_the_same_weights(
    undisturbed: Any, setting: Callable[[str], Any], tiny_study: str
) -> None:
    apart = setting(tiny_study)
    result = apart.simulate()
    assert result.returncode == 0, result.stdout + result.stderr
    assert list(apart.weights())[-1] == f"{ROUNDS:06d}.tensors"
    assert apart.weights() == undisturbed[0].weights()
    assert apart.left_behind() == []
