"""Studies that go on from a published model, sites that join late, and sites that fetch what was published."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.inference.version_files import check_files, open_weights

pytestmark = pytest.mark.system

# So small a rate that the weights stay as they began.
STILL = "training: {rounds: 1, patches_per_epoch: 8, batch_size: 4, client_optimizer: {name: sgd, learning_rate: 1e-9}"


@pytest.fixture(scope="module")
def continued(undisturbed: Any, setting: Callable[[str], Any], tiny_study: str) -> Any:
    """A study that starts from the undisturbed one and hardly moves, simulated with that one's holdout as the old."""
    before, _ = undisturbed
    text = tiny_study.replace("study: tiny", "study: further").replace(
        "training: {rounds: 3, patches_per_epoch: 240, batch_size: 4}", f"{STILL}, start_from: {before.run.path}}}"
    )
    assert "start_from" in text
    study = setting(text)
    done = study.simulate("--in-process", "--old-holdout", str(study.data / "holdout"))
    assert done.returncode == 0, done.stderr
    return study, done


def test_a_study_starts_from_the_weights_of_a_published_version(continued: Any, undisturbed: Any) -> None:
    before = open_weights(undisturbed[0].run.published / "v1")
    after = open_weights(continued[0].run.published / "v1")
    for old, new in zip(before.weights, after.weights, strict=True):
        np.testing.assert_allclose(new, old, atol=1e-6)


def test_report_manifest_and_card_say_what_it_started_from_and_what_that_changed(
    continued: Any, undisturbed: Any
) -> None:
    study, done = continued
    before = open_weights(undisturbed[0].run.published / "v1")
    report = json.loads(study.run.report.read_text())
    version = study.run.published / "v1"
    origin = {"study": "tiny", "version": "v1", "sha256": before.sha256}
    assert report["started_from"] == origin
    assert json.loads((version / "manifest.json").read_text())["details"]["started_from"] == origin
    known = json.loads(undisturbed[0].run.report.read_text())["holdout"]["dice"]
    assert report["continual"]["old"]["before"] == pytest.approx(known, abs=1e-6)
    assert report["continual"]["old"] == report["continual"]["new"]
    assert report["continual"]["forgetting"] == pytest.approx(0, abs=1e-4)
    assert "Before and after the study" in done.stdout
    assert "| old holdout | 3 |" in (version / "model_card.md").read_text()


def test_an_old_holdout_needs_a_study_that_starts_from_a_model(
    setting: Callable[[str], Any], short_study: str, wardround: Callable[..., Any]
) -> None:
    study = setting(short_study)
    done = wardround(
        "wardround", "coordinator", study.study, "--run", study.run.path, "--old-holdout", study.data / "holdout"
    )
    assert done.returncode == 2
    assert "training.start_from" in done.stderr


def test_a_site_that_first_connects_in_a_later_round_takes_part_from_then_on(
    setting: Callable[[str], Any], short_study: str
) -> None:
    text = short_study.replace("sites: [east, north]", "sites: [east, north, south]")
    text = text.replace("deadline: 10m", "deadline: 3s").replace("rounds: 1", "rounds: 60")
    study = setting(text)
    study.identities("east", "north", "south")
    coordinator = study.coordinator()
    others = study.site("east", "north")
    joined = study.until(lambda status: status["round"] >= 3, coordinator, others)["round"]
    late = study.site("south")

    def included(_: Any) -> set[int]:
        if not study.run.sites.exists():
            return set()
        rows = [row for row in study.rows("sites.csv") if row["site"] == "south" and row["outcome"] == "included"]
        return {int(row["round"]) for row in rows}

    study.until(lambda status: len(included(status)) >= 2, coordinator, others, late)
    rounds = sorted(included(None))
    assert rounds[0] >= joined
    assert rounds == list(range(rounds[0], rounds[-1] + 1))


def test_a_finished_study_is_served_until_the_coordinator_is_stopped(
    undisturbed: Any, wardround: Callable[..., Any], tmp_path: Path
) -> None:
    study, _ = undisturbed
    coordinator = study.start(
        "wardround",
        ["coordinator", study.study, "--run", study.run.path, "--listen", "127.0.0.1:0", "--serve"],
        study.folder / "serving.log",
    )
    old = study.status()["address"]
    address = study.until(lambda status: status["address"] != old, coordinator)["address"]
    identity = study.run.identity / "sites" / "north"
    fetched = wardround(
        *("wardround-site", "fetch", "--coordinator", address, "--identity", identity, "--out", tmp_path, "--json")
    )
    assert fetched.returncode == 0, fetched.stderr
    folder = Path(json.loads(fetched.stdout)["folder"])
    check_files(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in (study.run.published / "v1").iterdir()
    }
    # A site that was away at the end is told, and ends.
    study.address = address
    assert study.site("east").end() == 0
    coordinator.signal(signal.SIGTERM)
    assert coordinator.end() == 0
    assert study.run.is_finished()
