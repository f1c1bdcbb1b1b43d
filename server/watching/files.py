"""Files that are read again while somebody writes them: only what changed is read, and the last good content stays."""

from __future__ import annotations

import csv
import functools
import io
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from common.disk import FileStamp, stamp_of

_Value = TypeVar("_Value")
_BEGIN_NUMBERS = frozenset("0123456789+-.niNI")
Row = dict[str, Any]


class Cached(Generic[_Value]):
    """A file's content, parsed again when the file has changed.

    Parameters
    ----------
    path : the file; it need not exist.
    parse : makes the value of the bytes; may raise ValueError, KeyError or TypeError where they are no whole file.
    absent : the value where there is no file.

    Attributes
    ----------
    problem : why the newest content is not what `read` returned; "" where it is.
    """

    def __init__(self, path: Path, parse: Callable[[bytes], _Value], absent: _Value) -> None:
        self._path = path
        self._parse = parse
        self._absent = absent
        self._value = absent
        self._mark: FileStamp | None = None
        self.problem = ""

    def read(self) -> _Value:
        """The newest content that could be read."""
        try:
            with self._path.open("rb") as file:
                mark = stamp_of(os.fstat(file.fileno()))
                if mark == self._mark:
                    return self._value
                self._value, self.problem = self._parse(file.read()), ""
                self._mark = mark
        except FileNotFoundError:
            self._value, self._mark, self.problem = self._absent, None, ""
        except (OSError, ValueError, KeyError, TypeError) as error:  # half written, or not for this user to read
            self.problem = f"{self._path.name}: {_words(error)}"
        return self._value


class CachedTable:
    """The whole rows of a CSV file that grows; what was read is not read again.

    Values that are numbers become numbers, an empty one is None. A last line without its end is left for the next
    reading. `problem` as in `Cached`.

    Parameters
    ----------
    most_bytes : of a longer file the first reading takes the header and so much of the end; None: all.
    most_rows : so many of the newest rows are kept; None: all.
    begin, seen : called before the first row is read, also when all is read anew, and with each row.
    """

    def __init__(
        self,
        path: Path,
        *,
        most_bytes: int | None = None,
        most_rows: int | None = None,
        begin: Callable[[], None] = lambda: None,
        seen: Callable[[Row], None] = lambda row: None,
    ) -> None:
        self._path = path
        self._most_bytes = most_bytes
        self._most_rows = most_rows
        self._begin = begin
        self._seen = seen
        self._columns: list[str] = []
        self._rows: list[Row] = []
        self._inode = -1
        self._position = 0
        self.problem = ""

    def read(self) -> tuple[Row, ...]:
        """The rows so far."""
        try:
            with self._path.open("rb") as file:
                found = os.fstat(file.fileno())
                if found.st_ino != self._inode or found.st_size < self._position:  # replaced, or cut off
                    self._columns, self._rows, self._inode, self._position = [], [], found.st_ino, 0
                    self._begin()
                if not self._position and self._most_bytes is not None and found.st_size > self._most_bytes:
                    self._columns = next(csv.reader([file.readline().decode(errors="replace")]), [])
                    file.seek(found.st_size - self._most_bytes)
                    file.readline()  # of which the beginning is missing
                    self._position = file.tell()
                if found.st_size > self._position:
                    file.seek(self._position)
                    self._add(file.read())
            self.problem = ""
        except FileNotFoundError:
            self._columns, self._rows, self._inode, self._position = [], [], -1, 0
        except (OSError, csv.Error) as error:
            self.problem = f"{self._path.name}: {_words(error)}"
        return tuple(self._rows)

    def _add(self, content: bytes) -> None:
        whole = content[: content.rfind(b"\n") + 1]
        text = whole.decode(errors="replace")
        if text.count('"') % 2:  # a quoted line break: the record goes on in what is not here yet
            return
        for record in csv.reader(io.StringIO(text, newline="")):
            if not self._columns:
                self._columns = record
            elif len(record) == len(self._columns):
                row = zip(self._columns, record, strict=True)
                self._rows.append({name: number_or_text(value) for name, value in row})
                self._seen(self._rows[-1])
        self._position += len(whole)
        if self._most_rows is not None:
            del self._rows[: -self._most_rows]


@functools.lru_cache(maxsize=1 << 14)  # cells repeat each other
def number_or_text(value: str) -> float | int | str | None:
    """A cell's value: None where it is empty; NaN and infinities stay as numbers.

    >>> [number_or_text(text) for text in ("3", "0.5", "", "north", "nan")]
    [3, 0.5, None, 'north', nan]
    """
    if not value:
        return None
    if value[0] not in _BEGIN_NUMBERS:
        return value
    try:
        return int(value) if value.isdecimal() else float(value)
    except ValueError:
        return value


def plain(value: Any) -> Any:
    """The value as JSON knows it: figures that are not finite are None."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def mapping(content: bytes) -> dict[str, Any]:
    """A JSON object. Raises ValueError."""
    value = json.loads(content)
    if not isinstance(value, dict):
        raise ValueError("expected a JSON object")
    return value


def _words(error: Exception) -> str:
    return f"cannot be read ({getattr(error, 'strerror', None) or error})"
