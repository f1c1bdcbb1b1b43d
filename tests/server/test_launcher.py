"""The simulation's processes: started in order, watched, and gone when the launcher is, however it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from server.run_folder import RunFolder
from server.simulation.hospitals import example_study

SITES = ["central", "east", "north", "south", "west"]

# Stands in for both commands: does what the plan beside it (plan.json) says, and notes its arguments and process ids.
FAKE = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
from server.run_folder import RunFolder

here = Path(__file__).parent
plan = json.loads((here / "plan.json").read_text())
role, arguments = sys.argv[1], sys.argv[2:]
if role == "approve":
    (here / "approve.arguments").write_text(json.dumps(arguments))
    approval = plan.get("approve", {})
    if approval.get("say"):
        print(approval["say"], file=sys.stderr, flush=True)
    sys.exit(approval.get("code", 0))
def option(name):
    return [value for key, value in zip(arguments, arguments[1:]) if key == name]
name = role if role == "coordinator" else "+".join(option("--site"))
todo = plan.get(name, plan.get(role, {}))
if todo.get("stubborn"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if todo.get("grandchild"):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (here / f"grandchild.pid").write_text(str(child.pid))
(here / f"{name}.arguments").write_text(json.dumps(arguments))
(here / f".{name}.pid").write_text(str(os.getpid()))
(here / f".{name}.pid").rename(here / f"{name}.pid")
status = {"study": "cells", "pid": os.getpid(), "round": 1, "rounds": 8, "sites": {}, "state": "training"}
run = RunFolder(Path(option("--run")[0])) if role == "coordinator" else None
if run and todo.get("listen", True):
    run.write_status(status | {"address": "127.0.0.1:4242", "state": todo.get("state", "training")})
time.sleep(todo.get("seconds", 600))
if todo.get("say"):
    print(todo["say"], file=sys.stderr, flush=True)
if run and todo.get("report"):
    run.report.write_text(json.dumps(todo["report"]))
    run.rounds.write_text(todo["rounds"])
    run.write_status(status | {"address": None, "state": "finished", "published": "somewhere"})
if todo.get("kill"):
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(todo.get("code", 0))
"""

LAUNCH = """
import sys
from pathlib import Path
from common.cli import run_command
from server.simulation.launcher import Commands, simulate

fake, study, data, run, *flags = sys.argv[1:]
command = (sys.executable, fake)
sys.exit(run_command(lambda: simulate(
    Path(study), data=Path(data), run=Path(run), in_process="in-process" in flags, json_output="json" in flags,
    commands=Commands((*command, "coordinator"), (*command, "site"), (*command, "approve")), grace=1.5,
)))
"""


class Launcher:
    """A launcher in a process of its own, with fake commands that follow `plan`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = RunFolder(folder / "run")
        self.process: subprocess.Popen[str] | None = None
        (folder / "fake.py").write_text(FAKE)
        (folder / "study.yaml").write_text(example_study())
        for site in SITES:
            (folder / "data" / site).mkdir(parents=True)

    def start(self, plan: dict[str, Any], *flags: str) -> None:
        (self.folder / "plan.json").write_text(json.dumps(plan))
        names = ("fake.py", "study.yaml", "data", "run")
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, *(str(self.folder / name) for name in names), *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def started(self, count: int = 6) -> list[int]:
        """The ids of the processes, once there are so many."""
        until(lambda: len(list(self.folder.glob("[!.]*.pid"))) >= count)
        return [int(path.read_text()) for path in self.folder.glob("[!.]*.pid")]

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def end(self) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        assert self.process is not None
        out, errors = self.process.communicate(timeout=30)
        return self.process.returncode, out, errors

    def arguments(self, name: str) -> list[str]:
        found: list[str] = json.loads((self.folder / f"{name}.arguments").read_text())
        return found


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    made = Launcher(tmp_path)
    yield made
    if made.process is not None:
        made.process.kill()
        made.process.communicate()
    for path in tmp_path.glob("*.pid"):
        if alive(int(path.read_text())):
            os.kill(int(path.read_text()), signal.SIGKILL)


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # an orphan that nobody has collected yet


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_the_launcher_ends_every_process(launcher: Launcher, number: signal.Signals) -> None:
    launcher.start({})
    processes = launcher.started()
    launcher.signal(number)
    code, _, errors = launcher.end()
    assert code == 130
    assert not any(map(alive, processes))
    assert "stopped; continue with: wardround simulate" in errors and str(launcher.run.path) in errors


def test_a_process_that_does_not_listen_is_killed_after_the_grace(launcher: Launcher) -> None:
    launcher.start({"east": {"stubborn": True}, "north": {"grandchild": True}})
    processes = launcher.started(7)
    launcher.signal(signal.SIGINT)
    assert launcher.end()[0] == 130
    assert not any(map(alive, processes))


def test_nothing_survives_a_launcher_that_is_killed(launcher: Launcher) -> None:
    launcher.start({})
    processes = launcher.started()
    launcher.signal(signal.SIGKILL)
    launcher.end()
    until(lambda: not any(map(alive, processes)), 5)


def test_a_coordinator_that_cannot_start_is_quoted_and_no_site_starts(launcher: Launcher) -> None:
    error = "noise\nerror: first\nmore noise\nerror: 127.0.0.1:0: in use; choose another --listen\n  in two lines"
    launcher.start({"coordinator": {"listen": False, "seconds": 0, "code": 4, "say": error}})
    code, _, errors = launcher.end()
    assert code == 4
    assert errors.startswith("error: 127.0.0.1:0: in use; choose another --listen\n  in two lines\n")
    assert [path.name for path in launcher.folder.glob("*.pid")] == ["coordinator.pid"]


def test_the_log_of_an_earlier_run_is_kept_and_not_quoted(launcher: Launcher) -> None:
    launcher.run.path.mkdir()
    launcher.run.log.write_text("error: of yesterday\n")
    launcher.start({"coordinator": {"listen": False, "seconds": 0, "kill": True}})
    code, _, errors = launcher.end()
    assert code == 137
    assert errors.startswith("error: ended by signal 9")
    assert launcher.run.log.read_text().startswith("error: of yesterday\n")


def test_the_status_of_an_earlier_coordinator_is_not_believed(launcher: Launcher) -> None:
    launcher.run.path.mkdir()
    launcher.run.write_status({"study": "cells", "pid": 1, "state": "training", "address": "127.0.0.1:1", "sites": {}})
    launcher.start({"coordinator": {"listen": False}})
    launcher.started(1)
    time.sleep(0.5)
    assert [path.name for path in launcher.folder.glob("*.pid")] == ["coordinator.pid"]
    launcher.signal(signal.SIGTERM)
    assert launcher.end()[0] == 130


def test_a_coordinator_that_dies_in_a_round_takes_the_sites_along(launcher: Launcher) -> None:
    launcher.start({"coordinator": {"seconds": 1.5, "code": 10, "say": "error: round 1: no"}})
    processes = launcher.started()
    code, _, errors = launcher.end()
    assert (code, errors.splitlines()[0]) == (10, "error: round 1: no")
    assert not any(map(alive, processes))


def test_the_simulation_goes_on_without_a_site_as_long_as_the_quorum_can_be_met(launcher: Launcher) -> None:
    report = {"study": "cells", "holdout": None, "publication": None}
    launcher.start(
        {
            "coordinator": {"seconds": 3, "report": report, "rounds": "round\n1\n"},
            "east": {"seconds": 0, "code": 3, "say": "error: 0001.tif: torn"},
            "site": {"seconds": 3},
        }
    )
    code, out, _ = launcher.end()
    assert code == 0
    assert "site east ended: error: 0001.tif: torn" in out
    assert "goes on with 4 sites; every round waits for east up to its deadline (10 min)" in out


def test_losing_the_quorum_stops_everything_with_the_code_of_the_site(launcher: Launcher) -> None:
    torn = {"seconds": 3, "code": 3, "say": "error: 0001.tif: torn"}
    launcher.start({"east": torn, "north": torn})
    processes = launcher.started()
    code, out, _ = launcher.end()
    assert code == 3
    assert "3 sites left, the quorum is 4: the simulation stops." in out
    assert not any(map(alive, processes))


def test_sites_that_end_while_the_model_is_published_are_not_missed(launcher: Launcher) -> None:
    report = {"study": "cells", "holdout": None, "publication": None}
    coordinator = {"state": "publishing", "seconds": 2, "report": report, "rounds": "round\n"}
    launcher.start({"coordinator": coordinator, "site": {"seconds": 0, "code": 3}})
    assert launcher.end()[0] == 0


def finished(launcher: Launcher, *flags: str) -> str:
    report = {
        "study": "cells",
        "holdout": {"dice": 0.9, "iou": 0.8, "site": {"north": {"dice": 0.912, "iou": 0.8, "cases": 4}}},
        "publication": {
            "folder": "/models/v1",
            "variants": [{"name": "int8", "bytes": 2000, "dice": 0.8991, "recommended": True}],
        },
    }
    rounds = "round,train/loss,validation/dice,holdout/dice,sites,seconds\n1,0.25,0.8,0.75,5,12.5\n"
    launcher.start({"coordinator": {"seconds": 1, "report": report, "rounds": rounds}, "site": {"seconds": 1}}, *flags)
    code, out, errors = launcher.end()
    assert code == 0, errors
    return out


def test_the_end_shows_rounds_holdout_variants_and_the_model(launcher: Launcher) -> None:
    lines = [line.split() for line in finished(launcher).splitlines()]
    assert ["1", "0.250", "0.800", "0.750", "5", "12.5"] in lines
    assert ["north", "0.912", "0.800", "4"] in lines
    assert ["int8", "2,000", "–", "0.8991", "–", "–", "–", "recommended"] in lines
    assert lines[-1] == ["The", "model", "lies", "in", "/models/v1"]


def test_json_is_all_that_goes_to_stdout(launcher: Launcher) -> None:
    assert json.loads(finished(launcher, "json"))["publication"]["folder"] == "/models/v1"


def test_sites_are_told_where_everything_of_theirs_lies(launcher: Launcher) -> None:
    finished(launcher)
    run, data = launcher.run.path, launcher.folder / "data"
    for site in SITES:
        study, *options = launcher.arguments(site)
        assert study == str(run / "study.yaml")
        assert dict(zip(options[::2], options[1::2], strict=True)) == {
            "--coordinator": "127.0.0.1:4242",
            "--site": site,
            "--data": str(data / site),
            "--identity": str(run / "identity" / "sites" / site),
            "--work": str(run / "sites" / site),
        }
        assert (run / "identity" / "sites" / site / "identity.key").exists()
    assert "--holdout" not in launcher.arguments("coordinator")


def test_the_study_is_approved_for_every_site_as_the_sites_are_started_and_the_output_says_so(
    launcher: Launcher,
) -> None:
    out = finished(launcher)
    assert "The simulation approves the study for its sites, by the name of simulation" in out
    study, *options = launcher.arguments("approve")
    assert study == str(launcher.run.path / "study.yaml")
    assert options[:2] == ["--by", "simulation"]
    own = [options[i : i + 8] for i in range(2, len(options), 8)]
    assert [place[1] for place in own] == SITES
    for place in own:
        assert place == [each for each in launcher.arguments(place[1])[1:] if each in place]


def test_a_study_that_is_not_approved_starts_no_site(launcher: Launcher) -> None:
    launcher.start({"approve": {"code": 12, "say": "error: north: violates this site's policy"}})
    code, _, errors = launcher.end()
    assert (code, errors.splitlines()[0]) == (12, "error: north: violates this site's policy")
    assert [path.name for path in launcher.folder.glob("*.pid")] == ["coordinator.pid"]


def test_in_process_starts_one_process_for_all_sites(launcher: Launcher) -> None:
    (launcher.folder / "data" / "holdout").mkdir()
    finished(launcher, "in-process")
    assert {path.stem for path in launcher.folder.glob("*.pid")} == {"coordinator", "+".join(SITES)}
    options = launcher.arguments("+".join(SITES))
    assert [options[i + 1] for i, option in enumerate(options) if option == "--data"] == [
        str(launcher.folder / "data" / site) for site in SITES
    ]
    coordinator = launcher.arguments("coordinator")
    assert coordinator[coordinator.index("--holdout") + 1] == str(launcher.folder / "data" / "holdout")


def test_a_finished_run_needs_no_sites_to_show_its_results(launcher: Launcher) -> None:
    report = {"study": "cells", "holdout": None, "publication": {"folder": "/models/v1"}}
    launcher.start({"coordinator": {"listen": False, "seconds": 0, "report": report, "rounds": "round\n"}})
    code, out, _ = launcher.end()
    assert code == 0
    assert "The model lies in /models/v1" in out
