"""The ledger: a round is begun once, on disk, whatever is torn and whoever else writes."""

import multiprocessing
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import RunFolderError
from common.secure_aggregation.ledger import UNKNOWN_ATTEMPT, FileLedger, InMemoryLedger, UnmaskLedger
from common.secure_aggregation.refusals import UnmaskingBegunError

LINE = b'{"study": "s \\" t\\u00e9", "round": 12, "attempt": 3, "survivors": ["a", "b"]}\n'
STUDY = 's " té'


@pytest.fixture(params=["memory", "file"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> UnmaskLedger:
    return InMemoryLedger() if request.param == "memory" else FileLedger(tmp_path / "ledger.jsonl")


def test_a_round_is_begun_once(ledger: UnmaskLedger) -> None:
    assert ledger.begun("s", 1) is None
    ledger.begin("s", 1, 4, ["a"])
    assert ledger.begun("s", 1) == 4
    for attempt in (4, 5):
        with pytest.raises(UnmaskingBegunError, match="attempt 4"):
            ledger.begin("s", 1, attempt, ["a"])
    ledger.begin("s", 2, 0, ["a"])
    ledger.begin("t", 1, 0, ["a"])
    assert (ledger.begun("s", 1), ledger.begun("s", 2), ledger.begun("t", 1), ledger.begun("t", 2)) == (4, 0, 0, None)


def test_of_many_threads_one_begins(ledger: UnmaskLedger) -> None:
    begun: list[int] = []

    def begin(attempt: int) -> None:
        try:
            ledger.begin("s", 1, attempt, [])
        except UnmaskingBegunError:
            return
        begun.append(attempt)

    threads = [threading.Thread(target=begin, args=(attempt,)) for attempt in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert begun == [ledger.begun("s", 1)]


def test_known_bytes(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    FileLedger(path).begin(STUDY, 12, 3, ["a", "b"])
    assert path.read_bytes() == LINE
    assert path.stat().st_mode & 0o777 == 0o600
    assert FileLedger(path).begun(STUDY, 12) == 3


@pytest.mark.parametrize("kept", range(len(LINE)))
def test_a_torn_last_line_counts_as_begun_where_it_names_the_round(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "ledger.jsonl"
    whole = LINE.replace(b"12", b"11")
    path.write_bytes(whole + LINE[:kept])
    ledger = FileLedger(path)
    named = kept >= LINE.index(b', "attempt"') + 1
    assert ledger.begun(STUDY, 12) == (UNKNOWN_ATTEMPT if named else None)
    assert ledger.begun(STUDY, 11) == 3 and ledger.begun(STUDY, 1) is None
    ledger.begin(STUDY, 13, 0, [])  # mends the file
    assert path.read_bytes().startswith(whole) and path.read_bytes().count(b"\n") == 2 + named
    assert (ledger.begun(STUDY, 12), ledger.begun(STUDY, 13)) == (UNKNOWN_ATTEMPT if named else None, 0)
    if named:
        with pytest.raises(UnmaskingBegunError):
            ledger.begin(STUDY, 12, 9, [])


@pytest.mark.parametrize(
    "line", [b"", b"{}", b"[]", b"null", b'{"study": 1, "round": 1, "attempt": 1}', b"\xff", LINE[:40]]
)
def test_a_damaged_line_that_is_not_the_last_stops_everything(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(line + b"\n" + LINE)
    for step in (lambda: FileLedger(path).begun("s", 1), lambda: FileLedger(path).begin("s", 1, 0, [])):
        with pytest.raises(RunFolderError, match=r"ledger\.jsonl:1: "):
            step()


def test_a_ledger_that_cannot_be_read_or_written_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "ledger.jsonl"
    folder.mkdir()
    with pytest.raises(RunFolderError):
        FileLedger(folder).begun("s", 1)
    with pytest.raises(RunFolderError):
        FileLedger(folder).begin("s", 1, 0, [])


def _begin(path: Path, attempt: int) -> bool:
    try:
        FileLedger(path).begin("s", 1, attempt, [])
    except UnmaskingBegunError:
        return False
    return True


def test_of_two_processes_one_begins(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    # Not forked: this process may have threads of TensorFlow and gRPC, whose locks a fork would keep for ever.
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        results = pool.starmap(_begin, [(path, attempt) for attempt in range(6)])
    assert sum(results) == 1 and path.read_bytes().count(b"\n") == 1


def test_the_entry_is_synced_before_begin_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger.jsonl"
    synced: list[bytes] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        fsync(descriptor)
        synced.append(path.read_bytes())

    monkeypatch.setattr(os, "fsync", watched)
    FileLedger(path).begin(STUDY, 12, 3, ["a", "b"])
    assert synced[-1] == LINE and len(synced) == 2  # the folder first, for the file's name


@settings(max_examples=30)
@given(st.text(st.characters(exclude_categories=["C"]), min_size=1, max_size=9), st.integers(0, 2**64 - 1))
def test_any_study_and_round_is_found_again(tmp_path_factory: pytest.TempPathFactory, study: str, round: int) -> None:
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    FileLedger(path).begin(study, round, 1, [])
    assert FileLedger(path).begun(study, round) == 1
    path.write_bytes(path.read_bytes().partition(b' "attempt"')[0])
    assert FileLedger(path).begun(study, round) == UNKNOWN_ATTEMPT
