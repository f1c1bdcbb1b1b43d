"""The page as a process: beside a run, which it cannot disturb, and ending with it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from server.cli import main
from server.dashboard.beside import LOG, page_beside
from server.run_folder import RunFolder
from tests.server.dashboard.runs import WrittenRun

ROOT = Path(__file__).resolve().parents[3]
PATIENCE = 120.0
pytestmark = pytest.mark.system


def until(condition: Callable[[], Any]) -> Any:
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return found


def url_in(log: Path) -> Any:
    """Where the page of this log is."""
    return until(lambda: log.exists() and re.search(r"http://\S+", log.read_text()))[0]


def running(run: RunFolder) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(run.path) in path.read_text() and "page" in path.read_text():
                found.append(int(path.parent.name))
    return found


@pytest.fixture
def run(tmp_path: Path) -> Iterator[WrittenRun]:
    written = WrittenRun(tmp_path / "run")
    yield written
    for pid in running(written.folder):
        os.kill(pid, signal.SIGKILL)


def test_a_page_beside_a_run_answers_is_nice_and_ends_with_it(run: WrittenRun) -> None:
    said: list[str] = []
    with page_beside(run.folder, "127.0.0.1:0", None, said.append):
        url = url_in(run.folder.path / LOG)
        with urllib.request.urlopen(url, timeout=60) as answer:
            assert b"cells" in answer.read()
        pids = running(run.folder)
        assert [os.getpriority(os.PRIO_PROCESS, pid) for pid in pids] == [max(10, os.nice(0))]
    until(lambda: not running(run.folder))
    assert "page.log" in said[0]


def test_a_page_that_cannot_listen_leaves_the_run_alone(run: WrittenRun) -> None:
    with contextlib.ExitStack() as stack:
        taken = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        stack.enter_context(page_beside(run.folder, f"127.0.0.1:{taken.getsockname()[1]}", None, lambda line: None))
        until(lambda: "in use" in (run.folder.path / LOG).read_text())
    assert "Traceback" not in (run.folder.path / LOG).read_text()


def test_a_page_whose_run_was_killed_ends_too(run: WrittenRun) -> None:
    script = (
        "import sys, time; from pathlib import Path; from server.run_folder import RunFolder\n"
        "from server.dashboard.beside import page_beside\n"
        "with page_beside(RunFolder(Path(sys.argv[1])), '127.0.0.1:0', None, print): time.sleep(300)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, "-c", script, str(run.folder.path)], env=environment)
    url_in(run.folder.path / LOG)
    parent.kill()
    parent.wait()
    until(lambda: not running(run.folder))


def test_no_page_is_started_where_none_is_asked_for(run: WrittenRun) -> None:
    with page_beside(run.folder, None, None, lambda line: pytest.fail(line)):
        assert not (run.folder.path / LOG).exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--listen", "nonsense"], 4, "expected host:port"),
        (["--listen", "0.0.0.0:0"], 5, "identity"),
    ],
)
def test_a_page_that_cannot_be_served_says_why(
    run: WrittenRun, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    assert main(["page", "--run", str(run.folder.path), *arguments]) == code
    assert words in capsys.readouterr().err


def test_what_is_no_run_has_no_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["page", "--run", str(tmp_path)]) == 7
    assert "no run here" in capsys.readouterr().err
