"""Wording: counts, shortened lists and text that is safe to print."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from common.wording import counted, file_name, listed, printable


@pytest.mark.parametrize(("number", "text"), [(0, "0 cases"), (1, "1 case"), (2, "2 cases")])
def test_a_count_has_its_plural(number: int, text: str) -> None:
    assert counted(number, "case") == text


def test_a_long_list_ends_with_the_number_of_the_others() -> None:
    assert listed([]) == ""
    assert listed(range(5)) == "0, 1, 2, 3, 4"
    assert listed(iter("abcd"), most=2) == "a, b and 2 more"


def test_what_is_printed_can_neither_steer_a_terminal_nor_fail_to_be_encoded() -> None:
    assert printable("\x1b[31mé\n\udcff") == "\ufffd[31mé\ufffd\ufffd"
    assert file_name(Path("folder") / os.fsdecode(b"scan-\xff.tif")) == r"scan-\xff.tif"
