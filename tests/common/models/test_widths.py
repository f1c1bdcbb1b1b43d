"""Layers of published networks: as wide as in the paper with 16 filters, in proportion with others."""

from __future__ import annotations

import pytest

from common.models.widths import PUBLISHED_FILTERS, nearest_multiple, scaled_channels, scaled_multiple


@pytest.mark.parametrize(
    "published", [16, 24, 40, 48, 64, 72, 80, 96, 112, 120, 128, 160, 184, 200, 240, 480, 672, 960]
)
def test_sixteen_filters_are_the_papers_widths(published: int) -> None:
    assert scaled_channels(published, PUBLISHED_FILTERS) == published
    assert scaled_multiple(published, PUBLISHED_FILTERS) == published


def test_other_filters_scale_all_layers() -> None:
    assert [scaled_channels(728, filters) for filters in (4, 8, 32)] == [182, 364, 1456]
    assert scaled_channels(16, 1) == 1
    assert scaled_channels(16, 1, least=4) == 4
    assert [scaled_multiple(24, filters) for filters in (4, 8, 24, 32)] == [8, 12, 40, 48]
    assert scaled_multiple(16, 1) == 4


def test_rounding_takes_no_more_than_a_tenth() -> None:
    """12 lies midway and goes up; 17 goes down to 16; 9 and 35.6 would lose more than a tenth in 8 and 32."""
    assert [nearest_multiple(channels, 8) for channels in (3, 9, 12, 17, 35.6)] == [8, 16, 16, 16, 40]
