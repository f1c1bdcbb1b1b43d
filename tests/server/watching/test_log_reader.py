"""`wardround logs`: the run's log across its files, filtered, followed, in words and as JSON."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from typing import Any

import pytest

from common.watching import logs
from common.watching.logs import about, keep_log
from server.cli import main
from server.watching.log_reader import Wanted, entry_text, follow_log, read_log
from tests.server.watching.runs import run_folder


def entry(message: str, **fields: Any) -> str:
    return json.dumps({"time": "2026-01-02T03:04:05.678+00:00", "level": "info", "message": message} | fields)


def test_files_are_read_from_the_oldest_on_and_torn_lines_left_out(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl.2").write_text(entry("a") + "\n")
    (tmp_path / "log.jsonl.1").write_text(entry("b") + "\n[1]\n")
    (tmp_path / "log.jsonl").write_text(entry("c") + '\n{"time": "2026')
    assert [each["message"] for each in read_log(tmp_path)] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], ["one", "two", "three"]),
        (["--level", "debug"], ["zero", "one", "two", "three"]),
        (["--level", "warning"], ["three"]),
        (["--site", "north"], ["two", "three"]),
        (["--site", "north", "--round", "2"], ["three"]),
    ],
)
def test_the_command_filters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], expected: list[str]
) -> None:
    run = run_folder(tmp_path)
    lines = [
        entry("zero", level="debug"),
        entry("one", round=1),
        entry("two", site="north", round=1),
        entry("three", level="warning", site="north", round=2),
    ]
    (run.path / "log.jsonl").write_text("\n".join(lines) + "\n")
    assert main(["logs", "--run", str(run.path), "--json", *options]) == 0
    assert [json.loads(line)["message"] for line in capsys.readouterr().out.splitlines()] == expected


def test_a_line_for_people_steers_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_folder(tmp_path)
    (run.path / "log.jsonl").write_text(entry("red \x1b[31m\nnext", site="north", sha256="ab" * 32) + "\n")
    assert main(["logs", "--run", str(run.path)]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line == "2026-01-02 03:04:05 INFO    red  [31m next (site=north, sha256=abababababababab…)"


def test_a_run_without_a_log_is_said_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["logs", "--run", str(run_folder(tmp_path).path)]) == 7
    assert "no log here yet" in capsys.readouterr().err
    assert main(["logs", "--run", str(tmp_path / "elsewhere")]) == 7


@pytest.mark.parametrize(
    ("options", "words"), [(["--site", "nroth"], "its sites are"), (["--round", "99"], "the study has rounds 1 to")]
)
def test_a_site_or_round_that_is_not_in_the_study_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    run = run_folder(tmp_path)
    (run.path / "log.jsonl").write_text(entry("one") + "\n")
    assert main(["logs", "--run", str(run.path), *options]) == 2
    assert words in capsys.readouterr().err


def test_who_follows_misses_nothing_when_the_file_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "FILE_BYTES", 3000)
    monkeypatch.setattr("server.watching.log_reader._POLL_SECONDS", 0.001)
    log = logging.getLogger("wardround-test-follow")
    end = keep_log(tmp_path / "log.jsonl", logger=log.name)
    log.debug("event", extra=about(number=0))
    done, written = threading.Event(), threading.Event()
    seen: list[int] = []

    def follow() -> None:
        for each in follow_log(tmp_path, lambda: not done.is_set()):
            seen.append(each["number"])
            written.set()

    thread = threading.Thread(target=follow)
    thread.start()
    for number in range(1, 60):
        written.wait(5)
        written.clear()
        log.debug("event", extra=about(number=number))
    done.set()
    thread.join(20)
    end()
    assert seen == list(range(60))


def test_an_entry_without_its_parts_is_shown_as_far_as_it_goes() -> None:
    assert entry_text({"message": "hello"}).strip().endswith("hello")
    assert Wanted()({"level": "strange"})
