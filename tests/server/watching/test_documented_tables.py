"""docs/watching.md says what every column of rounds.csv and sites.csv is, and of no column that there is not."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from server.rounds import Kind, Round
from server.tables import SiteLedger, read_table

PAGE = Path(__file__).resolve().parents[3] / "docs" / "watching.md"


def documented(table: str) -> set[str]:
    """The columns that the section of a table names."""
    section = PAGE.read_text().split(f"\n### {table}\n")[1].split("\n#")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def ledger_of(tmp_path: Path) -> SiteLedger:
    """A ledger with a round of patient-level privacy."""
    round_ = Round(Kind.TRAIN, 1, ["east"], 1)
    update: Any = SimpleNamespace(size=7)
    round_.received("east", update, cases=4, epsilon=1.0, arrived=1.0)
    ledger = SiteLedger(tmp_path / "sites.csv")
    ledger.record(SimpleNamespace(round=round_, started=0.0, closed_at=2.0, bytes_down={}, secure=None))
    return ledger


def test_the_columns_of_sites_csv_are_documented(tmp_path: Path) -> None:
    ledger_of(tmp_path)
    assert set(read_table(tmp_path / "sites.csv").columns) == documented("sites.csv")


def test_the_columns_of_rounds_csv_are_documented(tmp_path: Path) -> None:
    summary = {"round", *ledger_of(tmp_path).summary(1)}
    assert {name for name in documented("rounds.csv") if "/" not in name} == summary


def test_the_figures_of_rounds_csv_are_documented() -> None:
    """Those of a holdout and of the sites' validation, as `HoldoutResult.scalars` and the program name them."""
    import numpy as np

    from server.evaluation.result import HoldoutResult

    dice = np.full((11, 1), 0.5)
    names = tuple(f"{index}-{'x' if index == 10 else 'east'}" for index in range(11))
    result = HoldoutResult(("cell",), names, (*["east"] * 10, None), dice, dice)
    known = documented("rounds.csv")
    prefixes = tuple(name.split("CLASS")[0].split("SITE")[0].split("CASE")[0].removesuffix("...") for name in known)
    for name, value in result.scalars(each_case=True).items():
        column = f"holdout/{name}" + ("/" if isinstance(value, dict) else "")
        assert column in known or (column.endswith("/") and column in prefixes), column
    assert "validation/dice" in known and "train/" in prefixes
