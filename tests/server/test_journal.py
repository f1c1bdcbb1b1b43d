"""The journal on disk: what was appended is there whatever happens next, and damage is noticed and can be salvaged."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common import failpoints
from common.errors import RunFolderError
from common.wire.tensors import Stored
from server.journal import Journal, JournalDamagedError, read_history, salvaged, write_events

UPDATE = Stored(Path("000001-train-east-ab.tensors"), b"\xab" * 32, 7)


def filled(path: Path, rounds: int = 1) -> Path:
    journal = Journal(path)
    for number in range(1, rounds + 1):
        journal.opened("train", number, ["east", "north"], b"\x01" * 32)
        journal.received("train", number, 2, "east", UPDATE, cases=5, download=0.25, work=2.0, upload=1.0)
        journal.closed("train", number, 2, ["east"])
        journal.state(number, UPDATE)
    journal.close()
    return path


def test_what_was_recorded_is_there_after_a_restart(tmp_path: Path) -> None:
    path = filled(tmp_path / "journal.sqlite")
    found = Journal(path).history()
    round_ = found.find("train", 1)
    assert round_ is not None
    assert (round_.attempt, round_.closed, found.states) == (2, ("east",), {1: "ab" * 32})
    update = round_.received["east"]
    assert (update.file, update.cases, update.download, update.work, update.upload) == (UPDATE.path.name, 5, 0.25, 2, 1)
    assert read_history(path) == found


def test_a_run_without_a_journal_has_an_empty_history(tmp_path: Path) -> None:
    assert read_history(tmp_path / "journal.sqlite").saved == 0
    assert not (tmp_path / "journal.sqlite").exists()


def test_a_journal_of_a_version_without_checksums_is_continued(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    database = sqlite3.connect(path)
    database.execute(
        "CREATE TABLE events (id INTEGER PRIMARY KEY, at REAL NOT NULL, event TEXT NOT NULL, kind TEXT, round INTEGER, "
        "attempt INTEGER, site TEXT, detail TEXT NOT NULL DEFAULT '{}')"
    )
    database.execute("INSERT INTO events (at, event, detail) VALUES (1.5, 'trained', '{\"rounds\": 3}')")
    database.commit()
    database.close()
    assert read_history(path).trained
    journal = Journal(path)
    journal.note("published", version="v1")
    assert (journal.history().trained, journal.history().published) == (True, "v1")


@pytest.mark.parametrize("damage", ["torn", "overwritten", "no database"])
def test_a_damaged_journal_is_refused_with_the_command_that_repairs(tmp_path: Path, damage: str) -> None:
    path = filled(tmp_path / "journal.sqlite", rounds=200)
    whole = path.read_bytes()
    if damage == "torn":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "overwritten":
        path.write_bytes(whole[:8192] + os.urandom(4096) + whole[12288:])
    else:
        path.write_bytes(b"x" * len(whole))
    with pytest.raises(
        JournalDamagedError, match=f"journal is damaged .*`wardround repair --run {tmp_path} --dry-run`"
    ):
        Journal(path)


@pytest.fixture(scope="module")
def of_a_killed_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """The files that a process leaves that is killed while it has the journal open, and its events."""
    folder = tmp_path_factory.mktemp("journal")
    journal = Journal(folder / "journal.sqlite")
    for number in range(1, 20):
        journal.opened("train", number, ["east", "north"], b"\x01" * 32)
        journal.received("train", number, 2, "east", UPDATE, cases=5, download=0.25, work=2.0, upload=1.0)
    left = {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith("-shm")}
    assert len(left["journal.sqlite-wal"]) > 0
    return left, journal.events()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)
@given(place=st.integers(0, 10**9), bit=st.integers(0, 7))
def test_a_flipped_bit_is_noticed_or_changes_nothing(
    tmp_path: Path, of_a_killed_process: tuple[dict[str, bytes], list[dict[str, Any]]], place: int, bit: int
) -> None:
    left, events = of_a_killed_process
    for file in tmp_path.iterdir():
        file.unlink()
    for name, content in left.items():
        damaged = bytearray(content)
        if name == sorted(left)[place % len(left)]:
            damaged[place // len(left) % len(damaged)] ^= 1 << bit
        (tmp_path / name).write_bytes(damaged)
    try:
        journal = Journal(tmp_path / "journal.sqlite")
    except JournalDamagedError:
        return
    assert journal.events() == events
    journal.close()


def test_what_can_be_read_of_a_damaged_journal_is_salvaged(tmp_path: Path) -> None:
    path = filled(tmp_path / "journal.sqlite", rounds=200)
    events = Journal(path).events()
    whole = path.read_bytes()
    page = len(whole) // 4096 // 2
    path.write_bytes(whole[: page * 4096] + os.urandom(4096) + whole[(page + 1) * 4096 :])
    found, lost = salvaged(path)
    assert len(found) + lost == len(events)
    assert 0 < lost < 40
    assert [event for event in events if event in found] == found
    write_events(tmp_path / "new.sqlite", found)
    assert Journal(tmp_path / "new.sqlite").events() == found


def test_nothing_is_salvaged_of_what_is_no_journal(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    path.write_bytes(b"x" * 9000)
    assert salvaged(path) == ([], 0)


def test_a_full_disk_is_said_in_a_sentence_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(filled(tmp_path / "journal.sqlite"))
    before = journal.events()
    with monkeypatch.context() as patched:
        patched.setattr(failpoints, "_actions", failpoints.parse("journal.before=error:ENOSPC"))
        with pytest.raises(
            RunFolderError, match=r"journal cannot be written \(.*No space left.*\); free space"
        ) as caught:
            journal.note("started")
    assert not isinstance(caught.value, JournalDamagedError)
    assert journal.events() == before
    journal.note("started")


def test_a_read_only_journal_is_no_damaged_one(tmp_path: Path) -> None:
    path = filled(tmp_path / "journal.sqlite")
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA journal_mode=DELETE")
    journal = Journal(path)
    journal._database.execute("PRAGMA query_only=1")
    with pytest.raises(RunFolderError, match="make the disk writable") as caught:
        journal.note("started")
    assert not isinstance(caught.value, JournalDamagedError)
