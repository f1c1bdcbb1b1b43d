"""The session: what is agreed on, within bounds, and one encoding of it."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ProtocolError
from common.secure_aggregation.refusals import InvalidSessionError, MalformedMessageError, ThresholdTooLowError
from common.secure_aggregation.session import Session, decode_session, default_threshold, small_cohort_warning

SESSION = Session("study", bytes(range(32)), 3, 1, ("a", "b", "c", "d", "é"), 4, 3)


def test_the_default_threshold_is_more_than_two_thirds() -> None:
    assert [default_threshold(sites) for sites in (3, 4, 5, 6, 9, 50)] == [3, 3, 4, 5, 7, 34]


def test_a_cohort_below_five_sites_is_warned_of() -> None:
    assert "3 sites" in str(small_cohort_warning(3)) and "no more than 0 may drop" in str(small_cohort_warning(3))
    assert "no more than 1 may drop" in str(small_cohort_warning(4))
    assert small_cohort_warning(5) is None


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"sites": ("a", "b"), "threshold": 2, "minimum_cohort": 2}, InvalidSessionError),
        ({"sites": tuple(f"{i:02}" for i in range(51)), "threshold": 40}, InvalidSessionError),
        ({"sites": ("b", "a", "c", "d", "e")}, InvalidSessionError),
        ({"sites": ("a", "a", "b", "c", "d")}, InvalidSessionError),
        ({"sites": ("", "a", "b", "c", "d")}, InvalidSessionError),
        ({"sites": ("a", "b", "c", "d", "e" * 65)}, InvalidSessionError),
        ({"sites": ("a", "b", "c", "d", "e\n")}, InvalidSessionError),
        ({"sites": ("a", "b", "c", "d", "\udcff")}, InvalidSessionError),
        ({"study": ""}, InvalidSessionError),
        ({"study": "s" * 257}, InvalidSessionError),
        ({"plan_digest": bytes(31)}, InvalidSessionError),
        ({"round": -1}, InvalidSessionError),
        ({"attempt": 2**64}, InvalidSessionError),
        ({"threshold": 2}, ThresholdTooLowError),
        ({"threshold": 6}, InvalidSessionError),
        ({"minimum_cohort": 1}, InvalidSessionError),
        ({"minimum_cohort": 6}, InvalidSessionError),
    ],
)
def test_a_session_out_of_bounds_is_refused(changed: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        dataclasses.replace(SESSION, **changed)


def test_a_session_comes_back_from_its_bytes() -> None:
    assert decode_session(SESSION.encode()) == SESSION


@given(st.data())
def test_damaged_bytes_of_a_session_are_refused_or_are_another_session(data: st.DataObject) -> None:
    encoded = SESSION.encode()
    if data.draw(st.booleans()):
        with pytest.raises(MalformedMessageError):
            decode_session(encoded[: data.draw(st.integers(0, len(encoded) - 1))])
    else:
        at, other = data.draw(st.integers(0, len(encoded) - 1)), data.draw(st.integers(1, 255))
        damaged = encoded[:at] + bytes([encoded[at] ^ other]) + encoded[at + 1 :]
        try:
            found = decode_session(damaged)
        except ProtocolError:
            return
        assert found.encode() == damaged and found.digest != SESSION.digest
    with pytest.raises(MalformedMessageError):
        decode_session(encoded + b"\0")
