"""Studies under random faults, by seed, end with the same bits. More: `schedules.py`."""

from __future__ import annotations

import pytest

from tests.system.faults.arena import Bench, each
from tests.system.faults.schedules import SCENARIO, draw, run_schedule

pytestmark = pytest.mark.system


def test_studies_under_random_faults_end_with_the_same_bits(faults: Bench) -> None:
    faults.undisturbed(SCENARIO)
    rows = list(each(lambda seed: run_schedule(faults, SCENARIO, seed), range(1, 7), parallel=2))
    assert {row["seed"]: row["same"] for row in rows} == dict.fromkeys(range(1, 7), "yes")
    assert sum(int(row["kills"]) for row in rows) >= 6


def test_a_schedule_follows_from_its_seed() -> None:
    assert str(draw(5, SCENARIO)) == str(draw(5, SCENARIO))
    assert len({str(draw(seed, SCENARIO)) for seed in range(50)}) == 50
