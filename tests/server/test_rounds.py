"""The round's state machine: what closes it, what it keeps, what it ignores."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from common.wire.tensors import Stored
from server.rounds import Kind, Round, Stage

SITES = ("north", "east", "south")
UPDATE = Stored(Path("update"), b"d" * 32, 7)


def _round(quorum: int = 2) -> Round:
    return Round(Kind.TRAIN, 1, SITES, quorum)


def test_a_round_closes_when_every_site_answered() -> None:
    round_ = _round()
    for site in SITES:
        assert not round_.complete
        round_.connected(site)
        round_.received(site, UPDATE)
    assert round_.complete
    assert round_.included == ["east", "north", "south"]


def test_a_failure_is_an_answer_where_the_quorum_is_met_without_it() -> None:
    round_ = _round()
    round_.received("north", UPDATE)
    round_.connected("east")
    round_.failed("east", "its data can no longer be read")
    assert not round_.complete
    round_.received("south", UPDATE)
    assert round_.complete
    assert round_.missing == ["east"]


def test_at_the_deadline_the_quorum_closes_the_round_without_the_rest() -> None:
    round_ = _round()
    round_.received("north", UPDATE)
    round_.received("south", UPDATE)
    assert not round_.complete
    assert round_.deadline()
    assert round_.closed
    assert not round_.wants("east")


def test_below_the_quorum_another_attempt_keeps_what_was_received_and_asks_the_failed_again() -> None:
    round_ = _round()
    round_.received("north", UPDATE)
    round_.connected("east")
    round_.failed("east", "broken")
    assert not round_.deadline()
    assert (round_.attempt, round_.closed) == (2, False)
    assert round_.answers["east"].stage is Stage.WAITING
    assert round_.included == ["north"]
    assert not round_.wants("north")


def test_what_comes_after_the_close_changes_nothing() -> None:
    round_ = _round()
    round_.received("north", UPDATE)
    round_.received("east", UPDATE)
    round_.close()
    round_.received("south", UPDATE)
    round_.failed("south", "late")
    assert round_.included == ["east", "north"]


def test_a_second_update_of_a_site_does_not_replace_the_first() -> None:
    round_ = _round()
    round_.received("north", UPDATE)
    round_.received("north", Stored(Path("other"), b"e" * 32, 7))
    assert round_.answers["north"].update == UPDATE


def test_a_site_outside_the_cohort_is_not_heard() -> None:
    round_ = _round()
    round_.received("elsewhere", UPDATE)
    round_.progressed("elsewhere", Stage.TRAINING, 1, 2)
    assert "elsewhere" not in round_.answers


def test_a_lost_connection_is_shown_and_a_new_one_begins_again() -> None:
    round_ = _round()
    round_.connected("north")
    round_.progressed("north", Stage.TRAINING, 3, 9)
    round_.disconnected("north")
    assert round_.answers["north"].stage is Stage.WAITING
    round_.connected("north")
    assert (round_.answers["north"].stage, round_.answers["north"].batch) == (Stage.ASSIGNED, 0)


def _fixed(*sites: str) -> Round:
    """A round that was closed with these sites before the coordinator was stopped."""
    round_ = _round()
    round_.fixed = sites
    return round_


def test_a_round_that_was_closed_before_closes_with_that_cohort_and_no_other() -> None:
    round_ = _fixed("east", "north")
    round_.received("south", UPDATE)
    assert not round_.wants("south")
    round_.received("north", UPDATE)
    assert round_.missing == ["east"]
    assert not round_.deadline()
    assert not round_.complete
    round_.received("east", UPDATE)
    assert round_.complete
    assert round_.included == ["east", "north"]


def test_a_closed_cohort_above_the_quorum_is_waited_for_to_the_last_site() -> None:
    round_ = _fixed(*sorted(SITES))
    round_.received("north", UPDATE)
    round_.received("east", UPDATE)
    round_.failed("south", "broken")
    assert not round_.complete
    assert not round_.deadline()
    assert round_.wants("south")


def test_a_refused_update_is_an_answer_and_the_site_is_asked_again_in_the_next_attempt() -> None:
    round_ = _round(quorum=3)
    for site in SITES:
        round_.connected(site)
    round_.refused("south", "not finite")
    round_.connected("south")
    round_.progressed("south", Stage.TRAINING, 1, 2)
    assert (round_.answers["south"].stage, round_.answers["south"].reason) == (Stage.FAILED, "not finite")
    assert not round_.deadline()
    round_.connected("south")
    assert round_.answers["south"].stage is Stage.ASSIGNED
    round_.received("south", UPDATE)
    assert (round_.included, round_.answers["south"].reason) == (["south"], "")


_EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["connected", "disconnected", "failed", "refused", "received", "deadline"]),
        st.sampled_from(SITES),
    ),
    max_size=40,
)
_COHORTS = st.none() | st.sets(st.sampled_from(SITES), min_size=1).map(lambda sites: tuple(sorted(sites)))


def _apply(round_: Round, event: str, site: str) -> None:
    if event == "deadline":
        if not round_.closed:
            round_.deadline()
    elif event == "received":
        round_.received(site, UPDATE)
    elif event in ("failed", "refused"):
        getattr(round_, event)(site, "reason")
    else:
        getattr(round_, event)(site)


@given(events=_EVENTS, quorum=st.integers(1, 3), fixed=_COHORTS)
def test_whatever_happens_received_updates_stay_and_a_closed_round_has_its_quorum(
    events: list[tuple[str, str]], quorum: int, fixed: tuple[str, ...] | None
) -> None:
    round_ = _round(quorum)
    round_.fixed = fixed
    asked = SITES if fixed is None else fixed
    received: set[str] = set()
    attempt = 1
    for event, site in events:
        was_closed = round_.closed
        _apply(round_, event, site)
        if event == "received" and not was_closed and site in asked:
            received.add(site)
        assert set(round_.included) == received
        assert round_.included == sorted(round_.included)
        assert sorted(round_.included + round_.missing) == sorted(asked)
        assert round_.attempt - attempt == int(event == "deadline" and not was_closed and not round_.closed)
        attempt = round_.attempt
        if round_.closed or round_.complete:
            assert len(round_.included) >= (quorum if fixed is None else len(fixed))


@given(events=_EVENTS, quorum=st.integers(1, 3), cut=st.integers(0, 40))
def test_a_round_that_was_stopped_and_goes_on_with_what_was_journaled_counts_the_same_updates(
    events: list[tuple[str, str]], quorum: int, cut: int
) -> None:
    whole, before = _round(quorum), _round(quorum)
    for event, site in events[:cut]:
        _apply(whole, event, site)
        _apply(before, event, site)
    again = _round(quorum)
    again.attempt, again.fixed = before.attempt, before.included if before.closed else None
    for site in before.included:
        again.received(site, UPDATE)
    if before.closed:
        assert again.complete
    for event, site in events[cut:]:
        _apply(whole, event, site)
        _apply(again, event, site)
        assert again.included == whole.included
        assert again.attempt == whole.attempt or before.closed
