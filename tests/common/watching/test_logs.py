"""Logs: a line an event, text or JSON, correlated; and a file that never harms who writes it."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.watching import logs
from common.watching.logs import about, keep_log, set_up_logs


@pytest.fixture
def log() -> Iterator[logging.Logger]:
    """A logger that nobody else has."""
    logger = logging.getLogger("wardround-test")
    yield logger
    for handler in list(logger.handlers):
        logger.removeHandler(handler)


def test_json_has_what_an_event_is_about_in_one_line(log: logging.Logger) -> None:
    stream = io.StringIO()
    set_up_logs("json", stream=stream, logger=log.name, context=lambda record: {"study": "cells"})
    log.debug("not shown")
    log.warning("two\nlines of %s", "north", extra=about(site="north", round=3, level="mine"))
    (line,) = stream.getvalue().splitlines()
    entry = json.loads(line)
    assert entry.pop("time").endswith("+00:00")
    assert entry == {
        "level": "warning", "logger": log.name, "message": "two\nlines of north", "study": "cells", "site": "north",
        "round": 3,
    }  # fmt: skip


def test_text_is_as_it_was_and_set_up_twice_says_everything_once(log: logging.Logger) -> None:
    stream = io.StringIO()
    set_up_logs(stream=io.StringIO(), logger=log.name)
    set_up_logs(stream=stream, logger=log.name)
    log.info("hello", extra=about(site="north"))
    assert stream.getvalue().endswith(" INFO hello\n")
    assert stream.getvalue().count("hello") == 1


def test_the_file_has_debug_too_and_is_replaced_when_full(
    log: logging.Logger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "FILE_BYTES", 2000)
    stream = io.StringIO()
    set_up_logs(stream=stream, logger=log.name)
    end = keep_log(tmp_path / "log.jsonl", logger=log.name)
    for number in range(150):
        log.debug("event", extra=about(number=number))
    end()
    log.debug("after the end")
    files = sorted(tmp_path.iterdir())
    assert [path.name for path in files] == ["log.jsonl", *(f"log.jsonl.{n}" for n in range(1, 5))]
    assert all(path.stat().st_size <= 2000 for path in files)
    numbers = [json.loads(line)["number"] for path in reversed(files) for line in path.read_text().splitlines()]
    assert numbers == list(range(150 - len(numbers), 150)) and len(numbers) > 30
    assert stream.getvalue() == ""


def test_a_disk_that_takes_no_line_disturbs_nobody(
    log: logging.Logger, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    end = keep_log(tmp_path / "gone" / "log.jsonl", logger=log.name)
    log.warning("said")
    end()
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""
