"""Following a run while it goes on: live in a terminal, or line by line."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.text import Text

from server.status import Status, alert_lines, clean, describe, last_round, status_table


class View(Protocol):
    """Shows a run while it goes on; used in a `with` block."""

    def __enter__(self) -> View:
        """Begins to show."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        """Leaves the last picture standing."""

    def show(self, status: Status) -> None:
        """The status as it is now."""

    def say(self, line: str) -> None:
        """A line that stays."""


def news(before: Status, status: Status) -> list[str]:
    """What to tell somebody who reads lines: the rounds that ended, changes of state, notices."""
    lines = []
    if last_round(status) and last_round(status) != last_round(before):
        lines.append(last_round(status))
    if status.get("notice") and status["notice"] != before.get("notice"):
        lines.append(clean(str(status["notice"])))
    lines += [line for line in alert_lines(status) if line not in alert_lines(before)]
    description = describe(status)
    if not status.get("running", True):
        if before.get("running", True):
            lines.append(f"{description.headline}. {description.cause}")
    elif _phase(status) != _phase(before):
        lines.append(description.headline)
    return lines


def _phase(status: Status) -> str:
    """The state without what changes with every round."""
    state = str(status.get("state", ""))
    between = state == "waiting for sites" and status.get("round") and not status.get("kind")
    return "rounds" if state in ("training", "evaluating") or between else state


class Lines:
    """Plain lines, one a round, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._before: Status = {}

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def show(self, status: Status) -> None:
        """Prints what is new since the last call."""
        for line in news(self._before, status):
            self.say(line)
        self._before = status

    def say(self, line: str) -> None:
        """Prints a line."""
        self._console.print(Text(line), soft_wrap=True)


class Picture:
    """A table that is drawn over itself, four times a second at most."""

    def __init__(self, console: Console) -> None:
        # Without a thread of its own: the owner draws, and may start processes meanwhile.
        self._live = Live(console=console, auto_refresh=False)
        self._drawn = 0.0

    def __enter__(self) -> Picture:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.refresh()
        self._live.stop()

    def show(self, status: Status) -> None:
        """Draws the status unless it was drawn just now."""
        due = time.monotonic() - self._drawn >= 0.25
        self._live.update(status_table(status), refresh=due)
        if due:
            self._drawn = time.monotonic()

    def say(self, line: str) -> None:
        """Prints a line above the table."""
        self._live.console.print(Text(line))


def view(console: Console) -> View:
    """A picture in a terminal, lines elsewhere."""
    return Picture(console) if console.is_terminal and not console.is_dumb_terminal else Lines(console)
