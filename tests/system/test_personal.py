"""A study whose sites keep their own normalization: what each ends with, what is published, a site that is killed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.inference.lite import LiteModel
from common.inference.version_files import check_files, open_weights
from common.wire.tensors import read_tensors
from tests.system.test_faults import kill_in_training

pytestmark = pytest.mark.system

ROUNDS, SITES = 3, ("east", "north")


@pytest.fixture(scope="module")
def personal_study(tiny_study: str) -> str:
    text = tiny_study.replace("study: tiny", "study: personal").replace(
        "rounds: 3", "rounds: 3, personal: normalization"
    )
    text = text.replace("head: sigmoid", "head: sigmoid, normalization: batch")
    assert text.count("normalization") == 2
    return text


@pytest.fixture(scope="module")
def simulated(setting: Callable[[str], Any], personal_study: str) -> Any:
    """The study with all sites in one process, undisturbed."""
    study = setting(personal_study)
    done = study.simulate("--in-process")
    assert done.returncode == 0, done.stdout + done.stderr
    return study


def own_values(sites: Path) -> dict[str, dict[str, bytes]]:
    """What each site has kept of its own, by site and file."""
    return {
        site: {path.name: path.read_bytes() for path in sorted((sites / site).glob("personal/*/*/*"))} for site in SITES
    }


def test_every_site_keeps_values_of_its_own_a_round(simulated: Any) -> None:
    values = own_values(simulated.run.path / "sites")
    for site in SITES:
        assert list(values[site]) == [f"{number:06d}.tensors" for number in range(1, ROUNDS + 1)]
    for name in values["east"]:
        assert values["east"][name] != values["north"][name]
    last = [read_tensors(next((simulated.run.path / "sites" / site).rglob(f"{ROUNDS:06d}.tensors"))) for site in SITES]
    assert any(np.abs(east - north).max() > 1e-3 for east, north in zip(*last, strict=True))


def test_the_published_model_loads_and_is_not_recommended(simulated: Any) -> None:
    published = simulated.run.published / "v1"
    check_files(published)
    assert all(np.isfinite(weight).all() for weight in open_weights(published).weights)
    variants = json.loads((published / "manifest.json").read_text())["variants"]
    assert [variant["name"] for variant in variants] == ["float32"]
    for variant in variants:
        assert not variant["recommended"]
        found = LiteModel(published / variant["file"])(np.zeros((1, 64, 64, 3), np.float32))
        assert np.isfinite(found).all()


def test_a_site_killed_in_training_and_started_again_goes_on_with_its_values(
    simulated: Any, setting: Callable[[str], Any], personal_study: str
) -> None:
    study = setting(personal_study)
    study.identities(*SITES)
    coordinator = study.coordinator(holdout=True)
    east, north = study.site("east"), study.site("north")
    kill_in_training(study, "north", north, from_round=2)
    study.until(lambda status: not status["sites"]["north"]["connected"], coordinator, east)
    again = study.site("north")
    assert [process.end() for process in (coordinator, east, again)] == [0, 0, 0], coordinator.said()
    assert study.weights() == simulated.weights()
    assert own_values(study.folder / "sites") == own_values(simulated.run.path / "sites")
