"""A study with patient-level privacy through real processes, to the end of its budget."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.privacy.accounting import NoisySteps, epsilon_of

pytestmark = pytest.mark.system

STUDY = """\
study: private
seed: 3
task: {dimensions: 2, channels: 3, classes: [background, cell], labels: instances}
model: {filters: 4, depth: 1, head: sigmoid}
preprocessing: {patch: [32, 32]}
training: {rounds: 9}
cohort: {sites: [east, north], quorum: 2, deadline: 10m}
evaluation: {validation_fraction: 0, holdout: false}
publishing: {variants: [float32], tile: [64, 64]}
privacy: {unit: patient, epsilon: %f, delta: 1e-2, patients_per_step: 2, steps_per_round: 4}
"""


def _epsilon(rounds: int) -> float:
    """Of a site with five images, by hand."""
    return epsilon_of([NoisySteps(2 / 5, 1.0, 4 * rounds)], 1e-2)


def test_the_study_ends_before_the_round_that_would_pass_the_budget_and_publishes_what_it_has(
    setting: Callable[[str], Any], wardround: Callable[..., Any]
) -> None:
    made = setting(STUDY % ((_epsilon(2) + _epsilon(3)) / 2))
    result = made.simulate("--in-process")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = made.rows("rounds.csv")
    assert [int(row["round"]) for row in rows] == [1, 2]
    assert [float(row["epsilon"]) for row in rows] == pytest.approx([_epsilon(1), _epsilon(2)], abs=1e-5)
    assert "train/loss" not in rows[0]
    sites = made.rows("sites.csv")
    assert [(row["outcome"], row["reason"]) for row in sites if row["round"] == "2"] == [("included", "")] * 2
    refused = [row for row in sites if row["round"] == "3"]
    assert "its privacy budget is spent" in {row["reason"] for row in refused}
    assert "included" not in {row["outcome"] for row in refused}
    report = json.loads(made.run.report.read_text())
    published = Path(report["publication"]["folder"])
    manifest = json.loads((published / "manifest.json").read_text())
    for privacy in (report["privacy"], manifest["privacy"]):
        assert (privacy["unit"], privacy["protects"]) == ("patient", "each patient of each site")
        assert list(privacy["sites"].values()) == pytest.approx([_epsilon(2)] * 2, abs=1e-5)
    assert set(report["privacy"]["sites"]) == {"east", "north"}
    assert set(manifest["privacy"]["sites"]) == {site["name"] for site in manifest["sites"]}  # pseudonyms
    cards = "\n".join(path.read_text() for path in published.glob("*.md"))
    assert cards and not re.search(r"\b(east|north)\b", cards)
    assert "each patient of each site" in (published / "model_card.md").read_text()
    status = wardround("wardround", "status", "--run", made.run.path).stdout
    assert "finished after 2 of 9 rounds" in status
    assert "the privacy budget is spent" in status
    assert not list((made.run.path / "sites").glob("*/privacy/*/*.secret"))  # gone with the study's end
    assert made.left_behind() == []
