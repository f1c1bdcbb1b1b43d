"""Sums over all rounds of a run, kept as its tables grow: what was moved, what became of calls, where time went."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from server.timings import ROUND_PARTS


@dataclass
class Totals:
    """Sums over the rows of `rounds.csv` and `sites.csv`.

    Attributes
    ----------
    bytes : by site and direction, "down" or "up".
    answers : calls by site and outcome.
    seconds : of rounds, by part.
    """

    bytes: Counter[tuple[str, str]] = field(default_factory=Counter)
    answers: Counter[tuple[str, str]] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)

    def clear_sites(self) -> None:
        """`sites.csv` is read anew."""
        self.bytes.clear()
        self.answers.clear()

    def clear_rounds(self) -> None:
        """`rounds.csv` is read anew."""
        self.seconds.clear()

    def add_site(self, row: dict[str, Any]) -> None:
        """A row of `sites.csv`."""
        site = str(row.get("site"))
        for direction in ("down", "up"):
            self.bytes[site, direction] += _whole(row.get(f"bytes_{direction}"))
        self.answers[site, str(row.get("outcome"))] += 1

    def add_round(self, row: dict[str, Any]) -> None:
        """A row of `rounds.csv`."""
        for part in ROUND_PARTS:
            if isinstance(seconds := row.get(f"seconds_{part}"), int | float):
                self.seconds[part] = self.seconds.get(part, 0.0) + seconds


def _whole(value: Any) -> int:
    return value if isinstance(value, int) else 0
