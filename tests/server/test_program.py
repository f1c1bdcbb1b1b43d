"""Which round's model a study publishes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from server.program import best_after


def chosen(scores: Sequence[float | None]) -> tuple[int, float]:
    """The round that the program goes through these scores with as the best, and its score."""
    program = {"best_round": 0, "best_score": -1.0, "highest": -1.0}
    for number, score in enumerate(scores, start=1):
        program |= best_after(program, number, score)
    return int(program["best_round"]), float(program["best_score"])


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
    assert chosen(scores) == (expected, pytest.approx(scores[expected - 1]))


def test_where_sites_do_not_validate_the_last_round_is_taken() -> None:
    assert chosen([None, None, None]) == (3, -1.0)
