"""A site behind a line that breaks ends with the same bits, and sends little again. All faults: `network.py`."""

from __future__ import annotations

import pytest

from tests.system.faults.arena import Bench, each
from tests.system.faults.network import SCENARIO, TRIALS, baseline, run_trial

pytestmark = pytest.mark.system

NAMES = [
    "reset at 50% of the update",
    "cut at 50% of the broadcast",
    "corrupt at 50% of the update",
    "half-close at 50% of the broadcast",
    "reset after every 40% of the update",
]
RESUMED = 0.4
"""Of a transfer, what may be sent again for each break in its middle: what was on the line, and a handshake."""


def test_broken_lines_change_no_bit_and_transfers_go_on_where_they_broke(faults: Bench) -> None:
    faults.undisturbed(SCENARIO)
    good = baseline(faults, SCENARIO)
    rows = {row["fault"]: row for row in each(lambda name: run_trial(faults, SCENARIO, TRIALS[name], good), NAMES, 2)}
    assert {name: row["same"] for name, row in rows.items()} == dict.fromkeys(NAMES, "yes")
    assert all(int(row["breaks"]) >= 1 for row in rows.values())
    again = {name: float(row["of a transfer"]) / int(row["breaks"]) for name, row in rows.items()}
    assert max(again.values()) <= RESUMED, again
