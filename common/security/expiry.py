"""When somebody is to be told that a certificate ends: the same words on both sides. Imports nothing."""

from __future__ import annotations

import math
import time
from typing import Final

WARNING_DAYS: Final = 30
_DAY: Final = 86_400.0


def expiry_words(until: float | None, now: float) -> str:
    """What to say of a certificate that ends at `until` (both Unix time); "" while there is time, or none is known.

    >>> expiry_words(1_800_000_000.0, 1_800_000_000.0 - 12.5 * 86_400)
    'ends in 12 days, on 2027-01-15'
    >>> expiry_words(1_800_000_000.0, 1_800_000_000.0 - 31 * 86_400)
    ''
    """
    if until is None or until - now > WARNING_DAYS * _DAY:
        return ""
    day = time.strftime("%Y-%m-%d", time.gmtime(until))
    if until <= now:
        return f"ended on {day}"
    days = math.floor((until - now) / _DAY)
    if days < 1:
        return f"ends within a day, on {day}"
    return f"ends in {days} day{'' if days == 1 else 's'}, on {day}"
