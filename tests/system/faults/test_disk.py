"""A disk that is full or read-only ends a process clearly, and it goes on once that is mended. More: `disk.py`."""

from __future__ import annotations

import pytest

from tests.system.faults.arena import COORDINATOR, Bench, each
from tests.system.faults.disk import SCENARIO, Error, Trial, may_mount, run_trial

pytestmark = pytest.mark.system


def test_a_failing_disk_is_said_clearly_and_loses_nothing(faults: Bench) -> None:
    full: Error = "full" if may_mount() else "ENOSPC"
    trials = [
        Trial(COORDINATOR, "journal.before", 3, full),
        Trial(COORDINATOR, "update.partial", 1, full),
        Trial(COORDINATOR, "state.before", 1, full),
        Trial(SCENARIO.sites[0], "site.trained", 1, full),
        Trial(COORDINATOR, "model.before", 1, "EROFS"),
    ]
    faults.undisturbed(SCENARIO)
    rows = list(each(lambda trial: run_trial(faults, SCENARIO, trial), trials, parallel=2))
    found = {row["before the write"]: (row["code"], row["said"], row["same"]) for row in rows}
    assert found == {trial.name: (7, "yes", "yes") for trial in trials}
