"""Which site a line of the log is of, where one process hosts several: its name at the beginning of the line."""

from __future__ import annotations

import contextvars
import logging
from collections.abc import Callable

_site: contextvars.ContextVar[str] = contextvars.ContextVar("site", default="")


class NamesSite(logging.Filter):
    """Puts the name of the site before each message of the thread that works for it, unless it begins so."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Changes the record; lets all pass."""
        site = _site.get()
        if site and not (said := record.getMessage()).startswith(f"{site}:"):
            record.msg, record.args = f"{site}: {said}", None
        return True


def works_for(site: str) -> None:
    """This thread, and those that it starts by `of_this_site`, work for the site."""
    _site.set(site)


def of_this_site(target: Callable[[], None]) -> Callable[[], None]:
    """What to give a new thread, so that its messages name the site of the thread that starts it."""
    context = contextvars.copy_context()
    return lambda: context.run(target)
