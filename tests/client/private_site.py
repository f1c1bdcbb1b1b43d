"""A site with a few patients, for tests of private training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tifffile

from client.private_dataset import PrivateSiteDataset
from client.registry import Registry
from client.selection import select_cases
from common.imaging.layouts.options import Layout
from common.study import Study, parse_study

TEXT = """
study: private
seed: 11
task: {dimensions: 2, channels: 1, classes: [background, cell]}
model: {filters: 4, depth: 1}
preprocessing: {patch: [16, 16]}
augmentation: [flip]
training:
  rounds: 6
  client_optimizer: {name: sgd, learning_rate: 0.1}
cohort: {sites: [alpha, beta], quorum: 1}
evaluation: {validation_fraction: 0}
privacy: {unit: patient, %s}
"""


def private_study(keys: str = "epsilon: 30, delta: 1e-3, patients_per_step: 2, steps_per_round: 4") -> Study:
    """A study of patient-level privacy with these keys."""
    return parse_study(TEXT % keys)


def write_cases(folder: Path, names: list[str], first: int = 0) -> None:
    """Small images with a square, under these names; with another `first` seed, other images."""
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(names, start=first):
        rng = np.random.default_rng(index)
        label = np.zeros((20, 24), np.uint8)
        label[4:12, 5:15] = 1
        image = (label * 100 + rng.integers(0, 50, label.shape)).astype(np.uint8)
        tifffile.imwrite(folder / "images" / f"{name}.tif", image)
        tifffile.imwrite(folder / "labels" / f"{name}.tif", label)


def private_dataset(study: Study, folder: Path, pattern: str = "", site: str = "alpha") -> PrivateSiteDataset:
    """The data set of the folder's cases; `pattern` finds the patient in a case's name."""
    with Registry(folder / "registry.sqlite") as registry:
        if not registry.data_sets():
            registry.add("own", folder, Layout(patient_pattern=pattern))
        return PrivateSiteDataset(study, site, select_cases(study, ["own"], registry))
