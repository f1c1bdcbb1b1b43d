"""Which round's model a study publishes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from server.program import is_no_worse


def chosen(scores: Sequence[float]) -> int:
    """The round, from 1, that the program's rule chooses."""
    best, highest = 0, -1.0
    for number, score in enumerate(scores, start=1):
        if is_no_worse(score, highest):
            best, highest = number, max(highest, score)
    return best


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.5, 0.8, 0.7], 2),
        ([0.8821, 0.8812, 0.8820, 0.8817], 4),
        ([0.8821, 0.8790], 1),
        # Each is hardly worse than the one before, the last is much worse than the highest.
        ([0.8900, 0.8895, 0.8886, 0.8879, 0.8872], 2),
        ([0.0, 0.0], 2),
    ],
)
def test_of_rounds_that_differ_by_chance_the_last_is_taken(scores: Sequence[float], expected: int) -> None:
    assert chosen(scores) == expected
