"""Killed at a failpoint and started again by the same command, a study ends with the same bits. All: `table.py`."""

from __future__ import annotations

import pytest

from common.failpoints import NAMES
from tests.system.faults.arena import COORDINATOR, Bench
from tests.system.faults.studies import SECURE, light
from tests.system.faults.table import Case, cases, expected, run_cases

pytestmark = pytest.mark.system

SCENARIO = light(sites=2, rounds=2)
COORDINATOR_POINTS = [
    ("journal.before", 3),
    ("update.stored", 1),
    ("update.journaled", 2),
    ("round.closed", 1),
    ("round.updated", 2),
    ("state.saved", 1),
    ("model.released", 1),
    ("publish.renamed", 1),
]
SITE_POINTS = [("site.batch", 3), ("site.held", 2), ("site.upload_partial", 1), ("site.receipt", 1)]


@pytest.mark.parametrize(
    ("role", "points"),
    [(COORDINATOR, COORDINATOR_POINTS), (SCENARIO.sites[0], SITE_POINTS)],
    ids=["coordinator", "site"],
)
def test_a_process_killed_at_a_failpoint_and_started_again_changes_no_bit(
    faults: Bench, role: str, points: list[tuple[str, int]]
) -> None:
    rows = list(run_cases(faults, SCENARIO, [Case(role, *point, 0) for point in points], parallel=2))
    assert {row["failpoint"]: row["same"] for row in rows} == {name: "yes" for name, _ in points}


def test_a_study_comes_by_every_failpoint(faults: Bench) -> None:
    missed = [f"{case.role}: {case.name}" for case in cases(faults, SCENARIO) if case.of == 0]
    assert missed == []


def test_a_study_with_secure_sums_that_is_killed_anywhere_goes_on(faults: Bench) -> None:
    """To the same bits, or without the round whose sum its sites have given out."""
    middle = {case.name: Case(case.role, case.name, (case.of + 1) // 2, case.of) for case in cases(faults, SECURE)}
    rows = list(run_cases(faults, SECURE, list(middle.values()), parallel=2))
    assert {row["failpoint"]: row["same"] for row in rows} == {
        name: expected(name) for name in NAMES if name.startswith("secure.")
    }
