"""What a holdout's evaluation shows to a sampler: image, truth and prediction on one grid, the stored one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.metrics.overlap import count_overlap
from common.study import parse_study
from server.evaluation.holdout import Holdout
from server.simulation.hospitals import generate_hospitals
from server.watching.samples import Sampler

STUDY = """
study: cells
seed: 1
task: {dimensions: 2, channels: 3, classes: [background, cell], labels: instances}
model: {filters: 4, depth: 2, head: sigmoid}
preprocessing: {patch: [32, 32]SPACING}
training: {rounds: 3}
cohort: {sites: [east, north]}
publishing: {tile: [64, 64]}
"""


@pytest.mark.parametrize("spacing", ["", ", spacing: [2.0, 2.0]"])
def test_the_slices_are_those_that_were_measured(tmp_path: Path, spacing: str) -> None:
    study = parse_study(STUDY.replace("SPACING", spacing))
    generate_hospitals(tmp_path, seed=1, images_per_site={"east": 1, "north": 1}, holdout_per_site=2, size=64)
    holdout = Holdout(study, tmp_path / "holdout")
    sampler = Sampler(holdout.cases, holdout.sites, planar=True)

    def predict(tiles: Any) -> Any:
        return (tiles[..., :1] > 0).astype(np.float32)

    result = holdout.evaluate(predict, tile=(64, 64), threads=2, mirror=False, sampler=sampler)
    taken = sampler.taken(list(result.dice_of_cases))
    assert [case.site for case in taken] == ["east", "north", "east", "north"]
    for case, dice in zip(taken, result.dice_of_cases, strict=True):
        (view,) = case.views
        assert view.image.shape == (*view.truth.shape, 3) and view.truth.shape == view.prediction.shape == (64, 64)
        assert float(count_overlap(view.prediction, view.truth, 2).dice()[0]) == pytest.approx(dice)
        assert case.dice == pytest.approx(dice, abs=1e-4)
        shown = view.image[..., 0] > 0  # what was predicted from the image is where the image shows it
        assert (shown == (view.prediction > 0)).mean() > 0.95
