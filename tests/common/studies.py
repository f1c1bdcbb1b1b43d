"""A study file for tests to change, and what is said of one that is wrong."""

from __future__ import annotations

import pytest

from common.errors import StudyError
from common.study import parse_study

BASE = """\
study: cells
seed: 3
task:
  dimensions: 2
  channels: 3
  classes: [background, cell]
  labels: instances
model:
  depth: 3
preprocessing:
  patch: [96, 96]
training:
  rounds: 24
  client_optimizer:
    name: adam
    learning_rate: 1e-3
cohort:
  sites: [west, east]
"""
"""Line numbers in tests are those of this text."""


def changed(old: str, new: str) -> str:
    """The study with another text in this place."""
    assert BASE.count(old) == 1, f"{old!r} stands {BASE.count(old)} times in the base study"
    return BASE.replace(old, new)


def problems(text: str) -> list[str]:
    """What is said of a wrong study, line by line."""
    with pytest.raises(StudyError) as caught:
        parse_study(text, source="s.yaml")
    return str(caught.value).splitlines()
