"""Failpoints: off they do nothing, on they do what was asked at the time that was asked, and each lies in the code."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from common import failpoints
from common.errors import UsageError

ROOT = Path(__file__).parents[2]
_HIT = re.compile(r"""\b(?:\w+_)?hit\(\s*(?:"|')([a-z_.]+)(?:"|')""")


def run(code: str, variable: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from common.failpoints import hit\n" + code],
        env=os.environ | {failpoints.VARIABLE: variable, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_nothing_happens_unless_the_variable_names_it() -> None:
    found = run("hit('state.before'); hit('no.such.name'); print('on')", "")
    assert (found.returncode, found.stdout) == (0, "on\n")


def test_the_process_is_killed_the_kth_time_that_it_comes_by() -> None:
    code = "for number in range(5):\n  print(number, flush=True)\n  hit('journal.after')"
    found = run(code, "journal.after@3=kill")
    assert (found.returncode, found.stdout) == (-signal.SIGKILL, "0\n1\n2\n")


def test_a_disk_fails_from_the_kth_time_on() -> None:
    code = (
        "for number in range(4):\n  try:\n    hit('state.before'); print('ok')\n  except OSError as error: print(error)"
    )
    found = run(code, "journal.after=kill, state.before@2=error:ENOSPC")
    assert found.stdout.splitlines() == ["ok", *[f"[Errno {errno.ENOSPC}] No space left on device"] * 3]


def test_it_waits_in_passing() -> None:
    code = "import time; began = time.monotonic(); hit('round.closed'); print(time.monotonic() - began >= 0.2)"
    assert run(code, "round.closed=sleep:0.2").stdout == "True\n"


@pytest.mark.parametrize(
    "text",
    [
        "nothing=kill",
        "state.before",
        "state.before=die",
        "state.before@0=kill",
        "state.before@x=kill",
        "state.before=error:EPERM",
        "state.before=sleep:",
        "state.before=kill:9",
    ],
)
def test_what_cannot_be_meant_is_refused_when_the_process_starts(text: str) -> None:
    with pytest.raises(UsageError, match=failpoints.VARIABLE):
        failpoints.parse(text)


def test_every_failpoint_lies_in_the_code_and_every_one_there_has_its_line() -> None:
    sources = [path for folder in ("common", "server", "client") for path in (ROOT / folder).rglob("*.py")]
    placed = {name for path in sources for name in _HIT.findall(path.read_text(encoding="utf-8"))}
    named = re.findall(r'"([a-z_]+\.[a-z_]+)"', (ROOT / "server/tables.py").read_text(encoding="utf-8"))
    named += re.findall(r'failpoint="([a-z_.]+)"', "".join(path.read_text(encoding="utf-8") for path in sources))
    placed |= {name for name in named if name in failpoints.NAMES}  # given on to what writes
    assert placed == set(failpoints.NAMES)
