"""The run's CSV files: right again after any end of the process that wrote them."""

from __future__ import annotations

import asyncio
import csv
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_federated as tff
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common import failpoints
from common.errors import RunFolderError
from server.tables import RoundTable, Table, read_table


def rows(number: int) -> list[dict[str, Any]]:
    return [{"round": number, "site": site, "reason": 'a "quoted",\nbroken line'} for site in ("east", "north")]


def found(path: Path) -> list[tuple[int, str]]:
    with path.open(newline="") as file:
        return [(int(row["round"]), row["site"]) for row in csv.DictReader(file)]


def expected(*numbers: int) -> list[tuple[int, str]]:
    return [(number, site) for number in numbers for site in ("east", "north")]


def test_the_rows_of_a_round_that_was_cut_off_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "sites.csv"
    first = Table(path)
    for number in (1, 2, 3):
        first.write(number, rows(number))
    again = Table(path)
    again.write(2, rows(2))
    again.write(2, rows(2))  # the round's second call
    again.write(3, rows(3))
    assert found(path) == expected(1, 2, 2, 3)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(torn=st.integers(0, 400))
def test_a_table_torn_anywhere_is_mended_by_the_next_write(tmp_path: Path, torn: int) -> None:
    path = tmp_path / "sites.csv"
    path.unlink(missing_ok=True)
    whole = Table(path)
    whole.write(1, rows(1))
    size = path.stat().st_size
    whole.write(2, rows(2))
    content = path.read_bytes()
    path.write_bytes(content[: max(size, len(content) - torn)])
    Table(path).write(2, rows(2))
    assert found(path) == expected(1, 2)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "content", [b"", b"rou", b"round,si", b"\x00" * 50, b"\xff\xfe\n1,2\n", b"other,columns\n1,2\n"]
)
def test_what_is_no_table_is_set_aside(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "sites.csv"
    path.write_bytes(content)
    Table(path).write(1, rows(1))
    assert found(path) == expected(1)
    assert (tmp_path / "damaged" / "sites.csv").read_bytes() == content


def test_a_column_that_comes_later_is_empty_in_the_rows_before(tmp_path: Path) -> None:
    path = tmp_path / "rounds.csv"
    for table in (Table(path), Table(path)):
        table.write(1, [{"round": 1, "loss": 0.5}])
        table.write(2, [{"round": 2, "loss": 0.4, "dice": 0.7}])
        assert path.read_text().split() == ["round,loss,dice", "1,0.5,", "2,0.4,0.7"]


def test_a_full_disk_is_said_and_leaves_the_table_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sites.csv"
    table = Table(path, ("sites_csv.before", "sites_csv.written"))
    table.write(1, rows(1))
    before = path.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(failpoints, "_actions", failpoints.parse("sites_csv.before=error:ENOSPC"))
        with pytest.raises(RunFolderError, match=r"sites\.csv: cannot be written \(.*No space left"):
            table.write(2, rows(2))
    assert path.read_bytes() == before
    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(RunFolderError, match="No space left"):
            table.write(2, rows(2))
    assert path.read_bytes() == before
    table.write(2, rows(2))
    assert found(path) == expected(1, 2)


def full(descriptor: int) -> None:
    raise OSError(28, "No space left on device")


def test_a_round_s_metrics_are_written_as_tff_writes_them(tmp_path: Path) -> None:
    row = OrderedDict(
        sites=2,
        seconds=1.25,
        train=OrderedDict(loss=np.float32(0.5), examples=np.int64(7)),
        holdout=OrderedDict(dice=float("nan"), case=OrderedDict(b=0.5, a=0.25)),
    )
    asyncio.run(RoundTable(tmp_path / "ours.csv").release(row, 1))
    manager = tff.program.CSVFileReleaseManager(tmp_path / "theirs.csv", key_fieldname="round")
    asyncio.run(manager.release(row, 1))
    assert (tmp_path / "ours.csv").read_bytes() == (tmp_path / "theirs.csv").read_bytes()
    assert not read_table(tmp_path / "ours.csv").torn
