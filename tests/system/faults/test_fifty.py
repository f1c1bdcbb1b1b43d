"""Sites that come and go: the study ends. With fifty: `fifty.py`."""

from __future__ import annotations

import pytest

from tests.system.faults.arena import Bench
from tests.system.faults.fifty import run_crowd
from tests.system.faults.studies import light

pytestmark = pytest.mark.system


def test_a_study_ends_though_a_third_of_its_sites_leave_and_return_in_each_round(faults: Bench) -> None:
    scenario = light(sites=10, rounds=4, quorum=5, deadline="5s", batch_seconds=0.1)
    rows = run_crowd(faults, scenario, seed=3, patience=180, leaving=0.3)
    assert [row["round"] for row in rows] == [1, 2, 3, 4]
    assert all(5 <= int(row["sites"]) <= 10 for row in rows)
    assert sum(int(row["left"]) for row in rows) >= 3
    assert sum(int(row["returned"]) for row in rows) >= 1
