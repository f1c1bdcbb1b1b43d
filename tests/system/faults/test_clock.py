"""A process whose clock is hours off takes part like any other."""

from __future__ import annotations

import pytest

from tests.system.faults.arena import COORDINATOR, Bench, each, judge
from tests.system.faults.studies import light

pytestmark = pytest.mark.system

SCENARIO = light(sites=2, rounds=2)


def test_clocks_that_are_hours_off_change_nothing(faults: Bench) -> None:
    faults.undisturbed(SCENARIO)

    def run(clocks: dict[str, int]) -> list[str]:
        with faults.arena(SCENARIO) as arena:
            arena.environment = {role: {"FAULTS_CLOCK_HOURS": str(hours)} for role, hours in clocks.items()}
            return judge(arena, arena.run_to_end).wrong

    assert list(each(run, [{COORDINATOR: 9, "site-00": -9}, {COORDINATOR: -9, "site-00": 9}], parallel=2)) == [[], []]
