"""What a run's tables say, in the shape that charts and pages need.

A study of 500 rounds and 50 sites has 50,000 rows in `sites.csv`: each is looked at once, as it comes, and of each site
the last one and how often it was in are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from server.timings import ROUND_PARTS
from server.watching.snapshot import RunSnapshot

Row = Mapping[str, Any]
Column = list[float | None]
_Made = TypeVar("_Made")


def number(value: Any) -> float | None:
    """A cell's value as a number; None where it is none, or not finite."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


@dataclass
class Curves:
    """The columns of `rounds.csv` that are numbers, but those of single cases; each is as long as `rounds`."""

    rounds: list[int] = field(default_factory=list)
    columns: dict[str, Column] = field(default_factory=dict)

    def add(self, rows: Iterable[Row]) -> None:
        """Takes rows in."""
        for row in rows:
            self.rounds.append(int(row["round"]))
            for name, value in row.items():
                if name == "round" or name.startswith("holdout/case/") or isinstance(value, str):
                    continue
                column = self.columns.setdefault(name, [])
                column += [None] * (len(self.rounds) - 1 - len(column))
                column.append(number(value))
        for column in self.columns.values():
            column += [None] * (len(self.rounds) - len(column))

    def column(self, name: str) -> Column:
        """A column; all None where there is none of this name."""
        return self.columns.get(name) or [None] * len(self.rounds)

    def last(self, name: str) -> float | None:
        """The newest value there is."""
        return last(self.column(name))

    def best(self, name: str) -> tuple[int, float] | None:
        """Round and value of the highest, the first of several; None where there is none."""
        found = [(value, -place) for place, value in enumerate(self.column(name)) if value is not None]
        if not found:
            return None
        value, place = max(found)
        return self.rounds[-place], value

    def named(self, prefix: str, suffix: str) -> dict[str, Column]:
        """The columns between a beginning and an end, by what is between these."""
        return {
            name[len(prefix) : len(name) - len(suffix)]: column
            for name, column in self.columns.items()
            if name.startswith(prefix) and name.endswith(suffix) and len(name) > len(prefix) + len(suffix)
        }

    def times(self) -> dict[str, Column]:
        """Seconds of each part of a round that was measured."""
        return {part: self.column(f"seconds_{part}") for part in ROUND_PARTS if f"seconds_{part}" in self.columns}

    def seconds(self, place: int) -> float:
        """How long a round took, with all of its parts; without its evaluation where an older version ran it."""
        parts = [value for column in self.times().values() if (value := column[place]) is not None]
        return sum(parts) if parts else self.column("seconds")[place] or 0.0


@dataclass
class SiteRecord:
    """What `sites.csv` says of a site: its last training, and in how many rounds it was, and was not."""

    last: Row = field(default_factory=dict)
    included: int = 0
    left_out: int = 0


class History:
    """The tables of a run's snapshots, one after the other.

    Attributes
    ----------
    curves : of the rounds.
    sites : of each site.
    version : grows whenever one of them does.
    """

    def __init__(self) -> None:
        self.curves = Curves()
        self.sites: dict[str, SiteRecord] = {}
        self.version = 0
        self._derived: dict[Hashable, Any] = {}
        self._rounds = _Followed()
        self._site_rounds = _Followed()

    @staticmethod
    def of(snapshot: RunSnapshot) -> History:
        """That of one snapshot."""
        history = History()
        history.take(snapshot)
        return history

    def take(self, snapshot: RunSnapshot) -> None:
        """Takes in what was added since the last snapshot of the same run."""
        anew, rounds = self._rounds.news(snapshot.rounds)
        if anew:
            self.curves = Curves()
        self.curves.add(rounds)
        site_anew, site_rounds = self._site_rounds.news(snapshot.site_rounds)
        if site_anew:
            self.sites = {}
        for row in site_rounds:
            if row.get("kind") == "train":
                record = self.sites.setdefault(str(row.get("site")), SiteRecord())
                record.last = row
                record.included += row.get("outcome") == "included"
                record.left_out += row.get("outcome") != "included"
        if anew or rounds or site_anew or site_rounds:
            self.version += 1
            self._derived = {}

    def once(self, name: Hashable, make: Callable[[], _Made]) -> _Made:
        """What is made of the tables as they are now: made once, until they change."""
        if name not in self._derived:
            self._derived[name] = make()
        made: _Made = self._derived[name]
        return made


class _Followed:
    """How far a table was taken in that grows at its end, or is replaced by another."""

    def __init__(self) -> None:
        self._first: Row | None = None
        self._length = 0

    def news(self, rows: Sequence[Row]) -> tuple[bool, Sequence[Row]]:
        """Whether all of before is to be forgotten, and the rows since."""
        first = rows[0] if rows else None
        anew = self._length > 0 and (first is not self._first or len(rows) < self._length)
        new = rows if anew else rows[self._length :]
        self._first, self._length = first, len(rows)
        return anew, new


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of what is there; None where nothing is."""
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None


def last(column: Sequence[float | None]) -> float | None:
    """The newest value there is."""
    return next((value for value in reversed(column) if value is not None), None)
