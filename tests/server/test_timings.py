"""Where a round's time went: the parts add up to the whole, whoever was late or came back."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from server.rounds import Kind, Round
from server.tables import SiteLedger, read_table
from server.timings import PARTS, ROUND_PARTS, RoundParts, SiteParts, parts_of

SECONDS = st.floats(0, 1e5)


@given(SECONDS, SECONDS, SECONDS, SECONDS, SECONDS, SECONDS)
def test_the_parts_add_up_to_the_whole(
    download: float, training: float, upload: float, arrived: float, closed: float, aggregation: float
) -> None:
    last = SiteParts("north", download, training, upload, arrived)
    parts = RoundParts.of(closed=closed, ended=closed + aggregation, last=last)
    values = [getattr(parts, part) for part in PARTS]
    assert all(value >= 0 for value in values)
    assert math.isclose(sum(values), closed + aggregation, rel_tol=1e-9, abs_tol=1e-6)


def call_of(**arrivals: float | None) -> Any:
    """A call that began at 100 and closed at 160 with these arrivals; each site trained 20 s and sent for 5 s."""
    round_ = Round(Kind.TRAIN, 1, list(arrivals), 1)
    for site, arrived in arrivals.items():
        if arrived is not None:
            update: Any = SimpleNamespace(size=7)
            round_.received(site, update, cases=4, download=1.0, work=20.0, upload=5.0, arrived=arrived)
    round_.close()
    return SimpleNamespace(round=round_, started=100.0, closed_at=160.0, bytes_down={}, secure=None)


def test_the_round_is_that_of_the_site_that_came_last() -> None:
    parts = parts_of(call_of(east=130.0, north=150.0), now=163.0)
    assert parts == RoundParts(1.0, 20.0, 5.0, 34.0, 3.0, "north")


def test_an_answer_from_before_the_coordinator_was_started_again_takes_no_time_of_this_call() -> None:
    parts = parts_of(call_of(east=100.0), now=161.0)
    assert parts == RoundParts(0.0, 0.0, 0.0, 60.0, 1.0, "east")


def test_a_site_that_never_answered_waits_all_the_time(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("server.tables.time.monotonic", lambda: 163.0)
    ledger = SiteLedger(tmp_path / "sites.csv")
    ledger.record(call_of(east=130.0, south=None))
    east, south = read_table(tmp_path / "sites.csv").rows
    assert (east["seconds_waiting"], east["seconds_aggregation"], east["seconds_round"]) == ("34.0", "3.0", "63.0")
    assert (south["outcome"], south["seconds_waiting"]) == ("missing", "60.0")
    monkeypatch.setattr("server.tables.time.monotonic", lambda: 170.0)
    summary = ledger.summary(1)
    assert summary["seconds_evaluation"] == 7.0
    assert [name for name in summary if name.startswith("seconds_")] == [f"seconds_{part}" for part in ROUND_PARTS]
    assert sum(float(summary[f"seconds_{part}"]) for part in PARTS) == summary["seconds"]
