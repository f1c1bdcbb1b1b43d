"""`measurements.csv`: what was measured on all cases that were segmented into one folder, by whichever commands."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from common.errors import UsageError
from common.imaging.writers.whole_file import appearing_whole
from common.inference.measurements import COLUMNS, Measurement

MEASUREMENTS = "measurements.csv"
_MODEL = "model"
_HEADER = (*COLUMNS, _MODEL)

Row = dict[str, str]


def read_table(path: Path) -> list[Row]:
    """The rows of a table; none where there is no file.

    Raises
    ------
    UsageError : it is no table of `predict`'s, or cannot be read.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            table = csv.DictReader(file)
            if tuple(table.fieldnames or ()) != _HEADER:
                raise _no_table(path, "its columns are others")
            rows = list(table)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _no_table(path, error.strerror or str(error)) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise _no_table(path, f"it is no CSV in UTF-8: {error}") from error
    if any(None in row or None in row.values() for row in rows):
        raise _no_table(path, "a row has more or fewer columns than the first")
    return rows


def merge_measurements(path: Path, measured: Sequence[Measurement], model: str, outdated: Collection[str] = ()) -> None:
    """Puts measurements into the table, a row a class; it is replaced whole. Other processes wait meanwhile.

    Parameters
    ----------
    measured : whose cases' rows of an earlier time go.
    model : what they are measurements of, for the last column.
    outdated : cases whose rows go too.

    Raises
    ------
    UsageError : as for `read_table`.
    DataError : it cannot be written.
    """
    if not measured and not path.exists():
        return
    gone = {one.case for one in measured} | set(outdated)
    with _locked(path.parent):
        rows = [row for row in read_table(path) if row["case"] not in gone]
        rows.extend(_row(one, model) for one in measured)
        with appearing_whole(path, force=True) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, _HEADER)
            table.writeheader()
            table.writerows(rows)


def _row(one: Measurement, model: str) -> Row:
    texts = {
        key: "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
        for key, value in one.row().items()
    }
    return {**texts, _MODEL: model}


def _no_table(path: Path, reason: str) -> UsageError:
    return UsageError(
        f"{path}: no table that rows can be added to ({reason}); move it away, or give another --out (it is not "
        "replaced, not even with --force)"
    )


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
