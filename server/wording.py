"""How status, tables and pages write names, numbers and times, and what was said elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def clean(text: str) -> str:
    """Text from elsewhere, without what would steer a terminal; line breaks stay."""
    return "\n".join("".join(c if c.isprintable() else " " for c in line) for line in text.splitlines())


def names(sites: Sequence[str]) -> str:
    """An enumeration: "a, b and c"."""
    return " and ".join([", ".join(sites[:-1]), sites[-1]] if len(sites) > 1 else sites)


def count(number: int, what: str) -> str:
    """The number with its noun: "1 site", "5 sites"."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def duration(seconds: float) -> str:
    """Seconds for people: "45 s", "7 min", "1 h 20 min"."""
    if seconds < 60:
        return f"{max(0, math.ceil(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def figure(value: Any, digits: int = 3) -> str:
    """A number to so many decimals; a dash where there is none."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return clean(str(value)) if value else "–"
    return "–" if math.isnan(number) else f"{number:.{digits}f}"


def sentence(words: str) -> str:
    """The words with a capital letter first."""
    return words[:1].upper() + words[1:]


def are(sites: Sequence[str]) -> str:
    """ "is" for one, "are" for others."""
    return "is" if len(sites) == 1 else "are"
