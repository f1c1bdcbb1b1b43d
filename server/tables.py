"""The run's CSV files, rows by round: written so that a coordinator that was killed leaves them right when it goes on.

A round's rows are written before its state is saved. So whatever a table holds of rounds after the last saved one is of
a round that was cut off; the first write after a start replaces it, and mends a last line that is torn.
"""

from __future__ import annotations

import asyncio
import csv
import io
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tree

from common.wire.partial import disk_hit
from server.run_folder import set_aside, storing, write_atomically
from server.timings import parts_of

Row = Mapping[str, Any]


class Table:
    """A CSV file with a column "round"; new columns are added as they come.

    Parameters
    ----------
    path : the file; it need not exist.
    failpoints : the names of those before and after each write.

    Raises
    ------
    RunFolderError : from `write`: the disk does not take it; the file is as it was before.
    """

    def __init__(self, path: Path, failpoints: tuple[str, str] = ("metrics.before", "metrics.released")) -> None:
        self._path = path
        self._failpoints = failpoints
        self._columns: list[str] | None = None  # None: not looked at yet

    def write(self, number: int, rows: Sequence[Row]) -> None:
        """Adds the rows of this round, after those of the rounds before it."""
        disk_hit(self._failpoints[0], self._path)
        kept: list[Row] | None = None
        if self._columns is None:
            content = read_table(self._path)
            if not content.columns:
                set_aside(self._path, self._path.parent)
            self._columns = content.columns
            earlier = [row for row in content.rows if int(row["round"]) < number]
            kept = earlier if content.torn or len(earlier) != len(content.rows) else None
        added = [name for row in rows for name in row if name not in self._columns]
        if added and self._columns:
            kept = read_table(self._path).rows if kept is None else kept
        self._columns += OrderedDict.fromkeys(added)
        if kept is not None:
            write_table(self._path, self._columns, [*kept, *rows])
        elif rows:
            self._append(_text(self._columns, rows, header=not self._path.exists()))
        disk_hit(self._failpoints[1], self._path)

    def _append(self, text: str) -> None:
        with storing(self._path), self._path.open("ab") as file:
            before = os.fstat(file.fileno()).st_size
            try:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                os.truncate(self._path, before)
                raise


class Content:
    """What a table holds: its columns (none: it has no readable header), whole rows, and whether more is there."""

    def __init__(self, columns: list[str], rows: list[Row], torn: bool) -> None:
        self.columns = columns
        self.rows = rows
        self.torn = torn


def read_table(path: Path) -> Content:
    """The whole rows of a table; what is torn or no row at all is left out. Raises RunFolderError."""
    if not path.exists():
        return Content([], [], False)
    with storing(path):
        text = path.read_bytes().decode(errors="replace")
    try:
        records = list(csv.reader(io.StringIO(text, newline="")))
    except csv.Error:
        records = [line.split(",") for line in text.splitlines()]
    if text and not text.endswith("\n"):
        del records[-1:]
    if not records or "round" not in records[0]:
        return Content([], [], bool(text))
    columns = records[0]
    whole = [record for record in records[1:] if len(record) == len(columns)]
    rows = [row for row in (dict(zip(columns, record, strict=True)) for record in whole) if row["round"].isdecimal()]
    return Content(columns, list(rows), not text.endswith("\n") or len(rows) != len(records) - 1)


def write_table(path: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    """Replaces the table. Raises RunFolderError."""
    write_atomically(path, _text(columns, rows, header=True))


def _text(columns: Sequence[str], rows: Sequence[Row], *, header: bool) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(columns))
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


class RoundTable:
    """A `tff.program.ReleaseManager` of metrics to `rounds.csv`, a row a round; nested names are joined by "/"."""

    def __init__(self, path: Path) -> None:
        self._table = Table(path)

    async def release(self, value: Any, key: int) -> None:
        """Takes one round's metrics."""
        row = OrderedDict[str, Any](round=key)
        for path, leaf in tree.flatten_with_path(value):
            row["/".join(map(str, path))] = np.asarray(leaf).tolist()
        await asyncio.to_thread(self._table.write, key, [row])


class SiteLedger:
    """`sites.csv`, a row a round and site, and what `rounds.csv` says of the cohort.

    Parameters
    ----------
    path : the file; it need not exist.
    epsilon : what the cohort has spent of its privacy budget; None where each site has its own, or there is none.
    """

    def __init__(self, path: Path, epsilon: Callable[[], float] | None = None) -> None:
        self._table = Table(path, ("sites_csv.before", "sites_csv.written"))
        self._summaries: dict[int, OrderedDict[str, Any]] = {}
        self._ended: dict[int, float] = {}  # when the training of a round was over
        self._epsilon = epsilon

    def record(self, call: Any) -> None:
        """A closed round. Raises RunFolderError where it cannot be written."""
        round_, now = call.round, time.monotonic()
        parts = parts_of(call, now)
        if round_.kind.value == "train":
            self._summaries[round_.number] = OrderedDict(
                sites=len(round_.included),
                attempt=round_.attempt,
                seconds=round(now - call.started, 3),
                **parts.columns(),
            )
            self._ended[round_.number] = now
            spent = [answer.epsilon for answer in round_.answers.values() if answer.epsilon is not None]
            if self._epsilon is not None:
                spent = [self._epsilon()]
            if spent:
                self._summaries[round_.number]["epsilon"] = round(max(spent), 6)
        rows: list[Row] = [
            OrderedDict(
                round=round_.number,
                kind=round_.kind.value,
                site=site,
                attempt=round_.attempt,
                outcome="included" if answer.update is not None else ("failed" if answer.reason else "missing"),
                reason=answer.reason,
                cases=answer.cases if call.secure is None else "",  # nobody here knows
                bytes_down=call.bytes_down.get(site, 0),
                bytes_up=answer.update.size if answer.update is not None else 0,
                seconds_download=round(answer.seconds_download, 3),
                seconds_work=round(answer.seconds_work, 3),
                seconds_upload=round(answer.seconds_upload, 3),
                seconds_waiting=round(_waiting(answer, now - call.started - parts.aggregation), 3),
                seconds_aggregation=round(parts.aggregation, 3),
                seconds_round=round(now - call.started, 3),
                **({} if answer.epsilon is None else {"epsilon": round(answer.epsilon, 6)}),
            )
            for site, answer in round_.answers.items()
        ]
        self._table.write(round_.number, rows)

    def summary(self, number: int) -> Row:
        """The first columns of the round's row in `rounds.csv`, asked for once all its evaluations are done."""
        summary = self._summaries.get(number)
        if summary is None:
            return {}
        evaluation = round(time.monotonic() - self._ended[number], 3)
        found: OrderedDict[str, Any] = OrderedDict()
        for name, value in summary.items():
            found[name] = value
            if name == "seconds_aggregation":
                found["seconds_evaluation"] = evaluation
        return found


def _waiting(answer: Any, closed: float) -> float:
    """What is left of the time to a round's closing, beside the site's own parts."""
    if answer.update is None:
        return float(closed)
    return float(max(0.0, closed - answer.seconds_download - answer.seconds_work - answer.seconds_upload))
