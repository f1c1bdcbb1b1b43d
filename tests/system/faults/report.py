"""Where the figures of the fault runs go: a table on the terminal, and with `--write-docs` docs/faults.md and a CSV."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "faults.md"
RESULTS = ROOT / "docs" / "results"

Row = Mapping[str, str | int | float]


def parser(description: str | None) -> argparse.ArgumentParser:
    """A command line with the options that every command here has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--write-docs", action="store_true", help="write the table into docs/faults.md, and a CSV")
    made.add_argument("--folder", type=Path, help="where runs are made (default: a temporary folder)")
    made.add_argument("--go-on", action="store_true", help="keep the rows of the CSV that passed, and run the others")
    made.add_argument("--keep", action="store_true", help="keep the folders of runs that passed, too")
    return made


def passed(name: str) -> list[dict[str, str]]:
    """The rows of the CSV that an earlier run wrote and that passed; whole numbers and others are text here."""
    path = RESULTS / f"faults-{name}.csv"
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["same"] == "yes"]


def report(
    name: str,
    rows: Sequence[Row],
    summary: str,
    *,
    write_docs: bool,
    shown: Sequence[str] = (),
    page: Sequence[Row] = (),
) -> None:
    """Prints `summary` and the columns `shown` (all, if none are named) of the rows; with `write_docs` also `write`."""
    print(f"\n{_plain(rows, list(shown or (rows[0] if rows else ())))}\n\n{summary}", flush=True)
    if write_docs:
        write(name, rows, summary, shown=shown, page=page)


def write(name: str, rows: Sequence[Row], summary: str, *, shown: Sequence[str] = (), page: Sequence[Row] = ()) -> None:
    """Puts them into the page and a CSV; a long run does so as it goes, so that what it found outlives it.

    The CSV has the rows, whole; the page has the columns `shown`, or the rows of `page` where there are too many.
    """
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"faults-{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    columns = list(shown or (rows[0] if rows else ()))
    table = _markdown(page, list(page[0])) if page else _markdown(rows, columns)
    _fill(name, f"\n{summary}\n\n{table}\n")


def _cell(value: str | int | float) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _plain(rows: Sequence[Row], columns: Sequence[str]) -> str:
    cells = [list(columns), *([_cell(row[column]) for column in columns] for row in rows)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


def _markdown(rows: Sequence[Row], columns: Sequence[str]) -> str:
    numeric = [bool(rows) and all(isinstance(row[column], (int, float)) for row in rows) for column in columns]
    lines = [list(columns), ["---:" if right else "---" for right in numeric]]
    lines += [[_cell(row[column]).replace("|", "\\|") for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _fill(name: str, text: str) -> None:
    """Puts the text between the page's two marks of this name."""
    page = PAGE.read_text(encoding="utf-8")
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{PAGE}: the marks of {name!r} are missing; put them back")
    PAGE.write_text(before + begin + text + "\n" + end + after, encoding="utf-8")
