"""Malformed messages are not taken and kill nothing. More of them: `messages.py`."""

from __future__ import annotations

import pytest

from tests.system.faults.arena import Bench
from tests.system.faults.messages import KINDS, SCENARIO, growth, run_messages

pytestmark = pytest.mark.system


def test_malformed_messages_are_not_taken_and_the_study_ends_as_without_them(faults: Bench) -> None:
    result, wrong = run_messages(faults, SCENARIO, count=300, seed=7)
    assert wrong == []
    assert sum(sent.taken for sent in result.sent.values()) == 0
    assert set(result.sent) == set(KINDS)
    assert result.sent["broken updates"].answers["refused"] > 0
    first, last = growth(result.memory)
    assert last < 1.5 * first  # few messages tell little of a leak; `messages.py` sends many
