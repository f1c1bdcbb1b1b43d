"""How wide the layers of published networks are for a study's number of filters: the paper's channels, in proportion.

With `PUBLISHED_FILTERS` every layer is as wide as in its paper. Two roundings are in use, each its network's own:
multiples of 8 where the paper's code keeps to them (MobileNetV3), whole channels elsewhere.
"""

from __future__ import annotations

PUBLISHED_FILTERS = 16
"""The channels of MobileNetV3's stem, by which all networks of published widths are scaled."""


def scaled_channels(published: int, filters: int, *, least: int = 1) -> int:
    """The paper's channels times filters / 16, rounded down, but no fewer than `least`."""
    return max(least, published * filters // PUBLISHED_FILTERS)


def scaled_multiple(published: int, filters: int) -> int:
    """The paper's channels times filters / 16, as a multiple of 8; of 4 below 16 filters."""
    return nearest_multiple(published * filters / PUBLISHED_FILTERS, 8 if filters >= PUBLISHED_FILTERS else 4)


def nearest_multiple(channels: float, divisor: int) -> int:
    """The nearest multiple, or the next one where that would be less than nine tenths; as in MobileNetV3's code."""
    nearest = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * channels else nearest
