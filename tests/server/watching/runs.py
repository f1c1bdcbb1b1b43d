"""Run folders made by hand, for tests of what reads them."""

from __future__ import annotations

import contextlib
import csv
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.study import parse_study
from server.run_folder import RunFolder

STUDY = """
study: cells
seed: 1
task: {dimensions: 2, channels: 1, classes: [background, cell]}
model: {filters: 4, depth: 2}
preprocessing: {patch: [16, 16]}
training: {rounds: 9}
cohort: {sites: [east, north, south], quorum: 2, deadline: 10m}
"""


def run_folder(path: Path, study: str = STUDY) -> RunFolder:
    """An empty run of the study."""
    run = RunFolder(path / "run")
    run.prepare(parse_study(study))
    return run


@contextlib.contextmanager
def coordinated(run: RunFolder, **fields: Any) -> Iterator[None]:
    """A coordinator seems to run here, with this status; by default it trains in round 3."""
    run.write_status(status(**fields))
    with run.locked():
        yield


def status(**fields: Any) -> dict[str, Any]:
    """What a coordinator writes that trains in round 3, all sites at work."""
    known = {"study": "cells", "pid": 1, "state": "training", "kind": "train", "round": 3, "rounds": 9, "attempt": 1}
    known |= {"quorum": 2, "needed": 2, "deadline_at": time.time() + 300, "notice": "", "error": ""}
    return known | {"sites": {name: site() for name in ("east", "north", "south")}} | fields


def site(**fields: Any) -> dict[str, Any]:
    """What the status says of a site that trains."""
    known = {"connected": True, "stage": "training", "batch": 3, "batches": 12, "reason": "", "asked": True}
    return known | {"last_seen_at": time.time(), "training_cases": 20, "validation_cases": 5} | fields


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A CSV file of these rows."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


def round_row(number: int, **fields: Any) -> dict[str, Any]:
    """A row of `rounds.csv`; names in `fields` have "/" as "__"."""
    row: dict[str, Any] = {"round": number, "sites": 3, "attempt": 1, "seconds": 60.0, "train/loss": 0.5}
    row |= {"validation/dice": 0.6, "holdout/dice": 0.7}
    return row | {name.replace("__", "/"): value for name, value in fields.items()}
