"""The units for systemd start what exists: each command, with its options, is one that the parser takes."""

from __future__ import annotations

import configparser
import shlex
from pathlib import Path

import pytest

from server.cli import _parser

UNITS = Path(__file__).parents[2] / "deploy" / "systemd"


@pytest.mark.parametrize("name", ["coordinator", "enrolment"])
def test_a_unit_starts_a_command_that_exists(name: str) -> None:
    unit = configparser.RawConfigParser(strict=False, comment_prefixes="#")
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    text = (UNITS / f"wardround-{name}.service").read_text().replace("\\\n", " ")
    unit.read_string(text)
    program, *arguments = shlex.split(unit["Service"]["ExecStart"])
    assert Path(program).name == "wardround"
    parsed = _parser().parse_args(arguments)
    assert parsed.listen.startswith("0.0.0.0:")
    # Nothing but its state can be written, and it cannot become anybody else.
    service = unit["Service"]
    assert (service["ProtectSystem"], service["NoNewPrivileges"], service["CapabilityBoundingSet"]) == (
        "strict",
        "yes",
        "",
    )
    assert service["User"] not in ("", "root")


def test_whoever_has_the_authoritys_key_is_a_user_of_its_own_and_not_started_at_boot() -> None:
    enrolment, coordinator = (
        (UNITS / f"wardround-{name}.service").read_text() for name in ("enrolment", "coordinator")
    )
    assert "\nUser=wardround-enrolment\n" in enrolment and "\nUser=wardround\n" in coordinator
    assert "\n[Install]\n" not in enrolment
