"""`wardround-site status`: what it says of sites that start, work, were stopped, killed, or have ended."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from client import cli, site_status
from client.cli import main
from client.site_log import NamesSite, of_this_site, works_for
from client.site_status import SiteStatus
from common.cli import run_command
from common.disk import cannot_write
from common.errors import (
    DataError,
    IdentityError,
    NetworkError,
    PlanMismatchError,
    RunFolderError,
)
from common.security.audit import AuditDamagedError, AuditLog

TRAINING = {"state": "training", "round": 1, "batch": 49, "batches": 80, "notice": ""}
AGAIN = "Start it again with the same command; it goes on where the study stands.\n"


@pytest.fixture
def said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What `wardround-site status` prints of the work folder."""

    def call(*options: str) -> str:
        assert main(["status", "--work", str(tmp_path), *options]) == 0
        return capsys.readouterr().out

    return call


@pytest.fixture
def site(tmp_path: Path) -> Iterator[SiteStatus]:
    with SiteStatus(tmp_path, "nuclei", "north") as status:
        yield status


def test_a_site_is_starting_from_the_first_moment(site: SiteStatus, said: Callable[..., str]) -> None:
    assert said() == "north in study nuclei: starting\n"
    site({"notice": "checking its data"})
    assert said() == "north in study nuclei: starting\nchecking its data\n"


def test_a_working_site_says_round_and_batch(site: SiteStatus, said: Callable[..., str]) -> None:
    site(TRAINING)
    assert said() == "north in study nuclei: training, round 1, batch 49 of 80\n"
    found = json.loads(said("--json"))
    assert {**found, **TRAINING, "study": "nuclei", "site": "north", "running": True} == found


def test_a_stopped_site_is_no_longer_working(site: SiteStatus, said: Callable[..., str]) -> None:
    site(TRAINING)
    site.end()
    assert said() == f"north in study nuclei: stopped, last seen training, round 1, batch 49 of 80\n{AGAIN}"
    found = json.loads(said("--json"))
    assert (found["state"], found["last_state"], found["running"]) == ("stopped", "training", False)
    assert (found["notice"], found["next_step"]) == (AGAIN.strip(), AGAIN.strip())


def test_a_site_that_failed_says_why(site: SiteStatus, said: Callable[..., str]) -> None:
    site({"notice": "checking its data"})
    site.end(DataError("image 0003.tif: cannot be read"))
    assert said() == (
        f"north in study nuclei: failed, last seen starting\nimage 0003.tif: cannot be read\nMend the data. {AGAIN}"
    )
    found = json.loads(said("--json"))
    assert (found["state"], found["notice"]) == ("failed", "image 0003.tif: cannot be read")


@pytest.mark.parametrize(
    ("error", "todo", "again"),
    [
        (PlanMismatchError("plan: another"), "Get the coordinator's study file and install its version", False),
        (IdentityError("refused"), "See to this site's identity", False),
        (NetworkError("no coordinator"), "Correct --coordinator", False),
        (RunFolderError("work: cannot be read"), "See to the work folder", True),
        (cannot_write(Path("work"), OSError(errno.EROFS, "Read-only file system")), "See to the work folder", True),
        (cannot_write(Path("work"), OSError(errno.ENOSPC, "No space left on device")), "Free space on the disk", True),
        (ValueError("broadcast"), "Keep its log and report it", True),
    ],
    ids=["plan", "identity", "network", "folder", "read-only", "full", "defect"],
)
def test_what_a_failed_site_needs_is_said_and_to_start_it_again_only_where_that_helps(
    site: SiteStatus, said: Callable[..., str], error: Exception, todo: str, again: bool
) -> None:
    site(TRAINING)
    site.end(error)
    headline, reason, step = said().splitlines()
    assert headline == "north in study nuclei: failed, last seen training, round 1, batch 49 of 80"
    assert str(error) in reason
    assert step.startswith(todo)
    assert (AGAIN.strip() in step) is again


def test_a_site_that_a_full_disk_ends_says_so_on_that_disk(
    site: SiteStatus, tmp_path: Path, said: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cause = OSError(errno.ENOSPC, "No space left on device")

    def full(*_: object, **__: object) -> None:
        raise cause

    site(TRAINING | {"notice": "so much is said here that what the end has to say is less than that" * 20})
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        site.end(cannot_write(tmp_path, cause))
    assert said().startswith("north in study nuclei: failed, last seen training")
    assert "No space left on device" in said() and "Free space on the disk of the work folder." in said()


def test_a_finished_site_stays_finished(site: SiteStatus, said: Callable[..., str]) -> None:
    site({"state": "finished", "notice": "study nuclei is complete"})
    site.end()
    assert said() == "north in study nuclei: finished\nstudy nuclei is complete\n"


def test_a_killed_site_is_stopped_and_can_be_started_again(tmp_path: Path, said: Callable[..., str]) -> None:
    script = (
        "import sys, time; from pathlib import Path; from client.site_status import SiteStatus\n"
        f"status = SiteStatus(Path(sys.argv[1]), 'nuclei', 'north'); status({TRAINING!r})\n"
        "print('ready', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        assert said() == "north in study nuclei: training, round 1, batch 49 of 80\n"
        process.kill()
    assert said() == f"north in study nuclei: stopped, last seen training, round 1, batch 49 of 80\n{AGAIN}"
    assert json.loads(said("--json"))["running"] is False
    with SiteStatus(tmp_path, "nuclei", "north"):
        assert said() == "north in study nuclei: starting\n"


def test_two_sites_do_not_share_a_work_folder(
    site: SiteStatus, tmp_path: Path, said: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site_status, "_LOCK_SECONDS", 0.1)
    with pytest.raises(RunFolderError, match="another site runs with this work folder"):
        SiteStatus(tmp_path, "nuclei", "south")
    assert said().startswith("north in")


def test_a_folder_without_a_site_has_no_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--work", str(tmp_path)]) == 7
    assert "no status there; give the --work folder" in capsys.readouterr().err


def test_a_work_folder_that_cannot_be_made_ends_in_7(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match="cannot be made"):
        SiteStatus(tmp_path / "file" / "work", "nuclei", "north")


class _Agent:
    """Works until it is stopped; or fails."""

    def __init__(self, status: SiteStatus, error: Exception | None = None) -> None:
        self._status, self._error = status, error
        self._stopping = threading.Event()

    def run(self) -> str:
        self._status(TRAINING)
        if self._error is not None:
            raise self._error
        os.kill(os.getpid(), signal.SIGINT)
        assert self._stopping.wait(20)
        return ""

    def stop(self) -> None:
        self._stopping.set()


@pytest.fixture
def handlers() -> Iterator[None]:
    """`_run` takes over the process's signals; gives them back."""
    kept: list[tuple[int, Any]] = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    for number, handler in kept:
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_after_ctrl_c_a_site_is_stopped(site: SiteStatus, said: Callable[..., str]) -> None:
    assert cli._run([_Agent(site)], ["north"], [site]) == 130
    assert "stopped, last seen training" in said()


@pytest.mark.usefixtures("handlers")
def test_a_site_that_fails_is_stopped_while_another_of_its_process_goes_on(
    site: SiteStatus, tmp_path: Path, said: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    with SiteStatus(tmp_path / "other", "nuclei", "south") as other, pytest.raises(DataError):
        cli._run(
            [_Agent(site, DataError("image 0003.tif: cannot be read")), _Agent(other)],
            ["north", "south"],
            [site, other],
        )
    assert "failed, last seen training" in said() and "0003.tif" in said()


@pytest.mark.usefixtures("handlers")
def test_the_failure_of_a_site_alone_in_its_process_is_said_once(
    site: SiteStatus, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    error = PlanMismatchError("plan: another")
    assert run_command(lambda: cli._run([_Agent(site, error)], ["north"], [site])) == 6
    assert caplog.messages == []
    assert capsys.readouterr().err == "error: plan: another\n"


def test_after_a_log_was_tampered_with_no_word_says_to_start_as_before(
    tmp_path: Path, said: Callable[..., str]
) -> None:
    log = AuditLog(tmp_path, "site north")
    log.record("started")
    log.close()
    (tmp_path / "audit.log").write_text((tmp_path / "audit.log").read_text().replace("started", "stopped"))
    with pytest.raises(AuditDamagedError), SiteStatus(tmp_path, "nuclei", "north"):
        AuditLog(tmp_path, "site north")
    text = said()
    assert "failed, last seen starting" in text and "entry 1 is not as it was written" in text
    assert text.splitlines()[-1].startswith("Find out who changed the log") and "with the same command" not in text


def test_each_line_names_its_site_where_a_process_hosts_several(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.Logger("several")
    handler = logging.StreamHandler(sys.stdout)
    handler.addFilter(NamesSite())
    logger.addHandler(handler)

    def attend(site: str) -> None:
        works_for(site)
        logger.info("connected to %s", "localhost")
        logger.info("%s: says so itself", site)
        work = threading.Thread(target=of_this_site(lambda: logger.info("round %d: 100 %%", 1)))
        work.start()
        work.join()

    expected = ("connected to localhost", "says so itself", "round 1: 100 %")
    for site in ("north", "south"):
        thread = threading.Thread(target=attend, args=[site])
        thread.start()
        thread.join()
    logger.info("of none")
    assert capsys.readouterr().out.splitlines() == [
        *(f"{site}: {words}" for site in ("north", "south") for words in expected),
        "of none",
    ]


_HANGING = """
import signal, sys, threading, time
from pathlib import Path
from client import cli
from client.job import THREAD
from client.site_status import SiteStatus

class Agent:
    def __init__(self):
        self.stopping = threading.Event()

    def run(self):
        threading.Thread(target=time.sleep, args=(600,), daemon=True, name=THREAD).start()  # a batch that takes long
        status({"state": "training"})
        print("training", flush=True)
        for number in sys.argv[2:]:
            signal.pthread_kill(threading.get_ident(), int(number))
        self.stopping.wait()
        return ""

    def stop(self):
        self.stopping.set()

status = SiteStatus(Path(sys.argv[1]), "nuclei", "north")
sys.exit(cli._run([Agent()], ["north"], [status]))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_site_amid_a_batch_of_training(
    tmp_path: Path, said: Callable[..., str], number: int, code: int
) -> None:
    command = [sys.executable, "-c", _HANGING, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "training\n"
        process.send_signal(number)
        assert process.wait(5) == code
    assert "stopped, last seen training" in said()


def test_a_signal_ends_a_site_whichever_of_its_threads_receives_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _HANGING, str(tmp_path), str(int(signal.SIGTERM))]
    assert subprocess.run(command, capture_output=True, timeout=30).returncode == 143


def test_start_says_starting_while_it_checks_its_data(
    tmp_path: Path, said: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from common.security.certificates import ensure_simulation_identities
    from common.study import parse_study
    from server.simulation.hospitals import example_study

    study = parse_study(example_study(), "example study")
    (tmp_path / "study.yaml").write_text(example_study())
    ensure_simulation_identities(tmp_path / "identities", study.name, ["north"], ["localhost"])
    seen: list[str] = []

    def check(*_: Any) -> None:
        seen.append(said())
        raise DataError("image 0003.tif: cannot be read")

    monkeypatch.setattr(cli, "_dataset", check)
    place = [str(tmp_path / "study.yaml"), "--site", "north", "--data", str(tmp_path), "--work", str(tmp_path)]
    place += ["--identity", str(tmp_path / "identities" / "sites" / "north")]
    assert main(["approve", *place, "--by", "Kim"]) == 0
    capsys.readouterr()
    assert main(["start", *place, "--coordinator", "localhost:1"]) == 3
    assert seen == [f"north in study {study.name}: starting\nchecking its data\n"]
    assert "failed, last seen starting\nimage 0003.tif" in said()
