"""Numbers and times as pages show them."""

from __future__ import annotations

import math
import time
from typing import Any

NONE = "–"
_DAY = 86_400.0


def figure(value: Any, digits: int = 3) -> str:
    """A number to so many decimals; a dash where there is none.

    >>> figure("0.91234"), figure(None), figure(float("nan")), figure(12, 0)
    ('0.912', '–', '–', '12')
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        return NONE
    return f"{number:.{digits}f}" if math.isfinite(number) else NONE


def amount(size: float | None) -> str:
    """Bytes for people.

    >>> amount(950), amount(1_940_000), amount(None)
    ('950 B', '1.94 MB', '–')
    """
    if size is None:
        return NONE
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size:.0f} B"


def relative_day(until: float | None, now: float | None = None) -> str:
    """How many days are left until a Unix time: "in 12 days", "within a day", "3 days ago"; a dash without one.

    >>> relative_day(10 * 86_400, 0.0), relative_day(0.5, 0.0), relative_day(0.1, 2 * 86_400)
    ('in 10 days', 'within a day', '2 days ago')
    """
    if until is None:
        return NONE
    days = (until - (time.time() if now is None else now)) / _DAY
    if days < 0:
        ago = math.ceil(-days)
        return f"{ago} day{'' if ago == 1 else 's'} ago"
    left = math.floor(days)
    return "within a day" if left < 1 else f"in {left} day{'' if left == 1 else 's'}"
