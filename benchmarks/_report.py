"""How every benchmark shows its figures: a table on the terminal, the same rows as CSV under `results/`."""

from __future__ import annotations

import csv
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"

Row = Mapping[str, str | int | float]


def report(name: str, rows: Sequence[Row], shown: Mapping[str, str]) -> None:
    """Print the columns of `shown` (a row's key: its heading) and write all of them to `results/<name>.csv`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=["cores", *rows[0]])
        writer.writeheader()
        writer.writerows({"cores": cores(), **row} for row in rows)
    cells = [list(shown.values()), *([_cell(row[key]) for key in shown] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(shown))]
    print(f"\n{cores()} cores, {platform.machine()}, Python {platform.python_version()}\n")
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    print(f"\nwritten to {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


def median(seconds: Sequence[float]) -> float:
    """The median, to a tenth of a millisecond."""
    return round(statistics.median(seconds), 4)


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0))


def _cell(value: str | int | float) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
