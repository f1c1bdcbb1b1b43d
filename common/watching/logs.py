"""Logs of processes that serve: a line an event, as text for people or JSON for programs, on a stream and in a file.

What an event is about is said beside its message, so that lines can be told apart by study, round and site:

    _log.warning("the update of %s is refused", site, extra=about(site=site, round=3))

A line of JSON has `time` (UTC), `level`, `logger`, `message`, then the context of the process (`study`), then what the
event is about. Values are plain; line breaks in a message stay within its line.
"""

from __future__ import annotations

import datetime
import json
import logging
import sys
from collections.abc import Callable, Mapping
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, Final, TextIO

FORMATS: Final = ("text", "json")
FILE_BYTES: Final = 10_000_000
OLDER_FILES: Final = 4
Context = Callable[[logging.LogRecord], Mapping[str, Any]]
"""Says what a record is about besides what it says itself."""


def about(**fields: Any) -> dict[str, Any]:
    """What an event is about, as `extra` of a call that logs it."""
    return {"about": fields}


def no_context(record: logging.LogRecord) -> Mapping[str, Any]:
    """Where nothing is known of all records."""
    return {}


class TextFormatter(logging.Formatter):
    """For people: "2026-01-01 12:00:00,000 INFO message"."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")


class JsonFormatter(logging.Formatter):
    """For programs: an object a line; see the module."""

    def __init__(self, context: Context = no_context) -> None:
        super().__init__()
        self._context = context

    def format(self, record: logging.LogRecord) -> str:
        """The record as a line, without what ends it."""
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
        known = {"time": time, "level": record.levelname.lower(), "logger": record.name, "message": record.getMessage()}
        if record.exc_info and record.exc_info[0] is not None:
            known["error"] = record.exc_info[0].__name__
        said = {**self._context(record), **getattr(record, "about", {})}
        return json.dumps(known | {name: value for name, value in said.items() if name not in known}, default=str)


class _Stream(logging.StreamHandler[TextIO]):
    """What `set_up_logs` has added."""


class LogFile(RotatingFileHandler):
    """A file of JSON lines, replaced by a new one when it is full; a disk that does not take a line loses that line."""

    def __init__(self, path: Path, context: Context) -> None:
        super().__init__(path, maxBytes=FILE_BYTES, backupCount=OLDER_FILES, encoding="utf-8", delay=True)
        self.setFormatter(JsonFormatter(context))
        self.setLevel(logging.DEBUG)

    def handleError(self, record: logging.LogRecord) -> None:
        """Silence: what ends the rounds of a full disk is told by them."""


def set_up_logs(
    format: str = "text",
    *,
    stream: TextIO | None = None,
    logger: str = "wardround",
    context: Context = no_context,
) -> None:
    """Has a logger and all below it write to a stream (stderr unless given), from INFO on.

    Parameters
    ----------
    format : one of `FORMATS`.
    logger : its name; "" for all there are.
    context : of lines of JSON.
    """
    target = logging.getLogger(logger)
    for before in [each for each in target.handlers if isinstance(each, _Stream)]:
        target.removeHandler(before)
    handler = _Stream(sys.stderr if stream is None else stream)
    handler.setFormatter(JsonFormatter(context) if format == "json" else TextFormatter())
    handler.setLevel(logging.INFO)
    target.addHandler(handler)
    target.setLevel(logging.INFO)
    if logger:
        target.propagate = False  # TensorFlow Federated gives the root logger a handler


def keep_log(path: Path, *, context: Context = no_context, logger: str = "wardround") -> Callable[[], None]:
    """Has a logger write to a file too, DEBUG included; returns what ends that."""
    handler, target = LogFile(path, context), logging.getLogger(logger)
    before = target.level
    target.addHandler(handler)
    target.setLevel(logging.DEBUG)

    def end() -> None:
        target.removeHandler(handler)
        target.setLevel(before)
        handler.close()

    return end
