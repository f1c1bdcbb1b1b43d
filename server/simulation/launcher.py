"""The simulation's processes: a coordinator and its sites on this machine, watched to the end; none survives.

A site is the same `wardround-site` command that a hospital runs, and reaches the coordinator over mutual TLS on
loopback. The launcher only starts, shows and stops: rounds, data and models are the processes' own affair.
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Final

from rich.console import Console
from rich.text import Text

from common.cli import INTERRUPTED
from common.errors import DataError, RunFolderError, UsageError
from common.security.certificates import ensure_simulation_identities
from common.study import HOLDOUT, Study, load_study, parse_study
from server.continual import continual_table
from server.dashboard.beside import page_beside
from server.following import View, view
from server.run_folder import RunFolder
from server.simulation.hospitals import example_study, generate_hospitals
from server.status import (
    ENDED,
    complete,
    count,
    describe,
    duration,
    holdout_table,
    names,
    output,
    rounds_table,
    variants_table,
)

GRACE_SECONDS: Final = 8.0
APPROVED_BY: Final = "simulation"
IMAGES_PER_SITE: Final = 16
HOLDOUT_IMAGES_PER_SITE: Final = 4
_POLL_SECONDS: Final = 0.1
_SHOWN_LINES: Final = 12
_PR_SET_PDEATHSIG: Final = 1
_NEEDS_NO_SITES: Final = ("publishing", "finished", "failed", "stopped")

# -P: a folder named `server` where the user stands is not to be mistaken for the package.
_PYTHON: Final = (sys.executable, "-P", "-m")


@dataclass(frozen=True)
class Commands:
    """What is started; arguments are added to it."""

    coordinator: Sequence[str] = (*_PYTHON, "server.cli", "coordinator")
    site: Sequence[str] = (*_PYTHON, "client.cli", "start")
    approve: Sequence[str] = (*_PYTHON, "client.cli", "approve")


def simulate(
    study_path: Path | None,
    *,
    data: Path | None = None,
    run: Path | None = None,
    in_process: bool = False,
    json_output: bool = False,
    commands: Commands | None = None,
    grace: float = GRACE_SECONDS,
    coordinator_options: Sequence[str] = (),
    page: str | None = None,
) -> int:
    """Runs a study on this machine and shows its results; returns the exit code.

    Parameters
    ----------
    study_path : the study; the example study on generated images if None.
    data : holds a folder a site, `<site>/{images,labels}`, and may hold `holdout/{images,labels}`; with a study only.
    run : the run folder, `runs/<study>-<time>` if None; a run of the same study in it is continued.
    in_process : one process hosts all sites, instead of one a site.
    json_output : prints `report.json` to stdout at the end, and everything else to stderr.
    commands : what to start instead of Wardround's own commands.
    grace : how many seconds a process has to end when it is told to.
    coordinator_options : of `wardround coordinator`, for that of the simulation.
    page : where to show the run as a live page meanwhile; None: nowhere.

    Raises
    ------
    UsageError, StudyError, DataError, RunFolderError, IdentityError : before anything is started.
    """
    console = output(stderr=json_output)
    if study_path is None and data is not None:
        raise UsageError(
            "simulate: --data needs a study that names its sites; give one: wardround simulate STUDY --data DIR"
        )
    if study_path is not None and data is None:
        raise UsageError(
            "simulate: a study needs images; give the folder that holds one folder a site with --data, "
            "or no study, to run the example on generated images"
        )
    study = parse_study(example_study(), "example study") if study_path is None else load_study(study_path)
    if data is not None:
        _check_data(data, study)
    folder = RunFolder((run or Path("runs", f"{study.name}-{time.strftime('%Y%m%d-%H%M%S')}")).absolute())
    continued = folder.status.exists()
    folder.prepare(study)
    if folder.is_finished():
        console.print(Text(f"{study.name} is complete already, in {folder.path}"), soft_wrap=True)
        _show_results(folder, console, json_output)
        return 0

    def say(line: str) -> None:
        console.print(Text(line), soft_wrap=True)

    with _interruptible() as stop:
        say(
            f"{'Continuing' if continued else 'Running'} {study.name}: {count(study.training.rounds, 'round')}, "
            f"{count(len(study.cohort.sites), 'site')}, in {folder.path}"
        )
        if data is None:
            data = folder.path / "hospitals"
            if not data.exists():
                say(f"Generating images of {count(len(study.cohort.sites), 'hospital')} in {data}")
            generate_hospitals(
                data, seed=study.seed, images_per_site=IMAGES_PER_SITE, holdout_per_site=HOLDOUT_IMAGES_PER_SITE
            )
        ensure_simulation_identities(folder.identity, study.name, study.cohort.sites, ["127.0.0.1", "localhost"])
        say("The simulation makes its own certificates; in a real study every hospital keeps its own key.")
        say(
            f"The simulation approves the study for its sites, by the name of {APPROVED_BY}; in a real study every "
            "hospital reviews it and decides (wardround-site review, approve)."
        )
        stop.by_flag = True
        launch = _Launch(
            study, folder, data.absolute(), commands or Commands(), console, stop, grace, coordinator_options
        )
        with page_beside(folder, page, folder.identity / "coordinator", say):
            try:
                code = launch.run(in_process=in_process)
            finally:
                launch.children.stop()
    if code == INTERRUPTED:
        again = "" if study_path is None else f" {study_path} --data {data}"
        output(stderr=True).print(
            Text(f"stopped; continue with: wardround simulate{again} --run {folder.path}"), soft_wrap=True
        )
    elif code == 0:
        _show_results(folder, console, json_output)
    return code


def _check_data(data: Path, study: Study) -> None:
    if not data.is_dir():
        raise DataError(f"{data}: the folder does not exist; give the folder that holds one folder a site with --data")
    if missing := [site for site in study.cohort.sites if not (data / site).is_dir()]:
        raise DataError(
            f"{data}: no folder for {names(missing)}; give every site of the study a folder of its name with images/ "
            "and labels/"
        )


# Stopping. ---------------------------------------------------------------------------------------------------------


@dataclass
class _Stop:
    """How often somebody asked to stop, and whether that only counts or also interrupts."""

    requests: int = 0
    by_flag: bool = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.requests += 1
        if not self.by_flag:
            raise KeyboardInterrupt


@contextlib.contextmanager
def _interruptible() -> Iterator[_Stop]:
    """SIGINT, SIGTERM and SIGHUP (unless ignored, as under nohup) end the simulation in order."""
    stop = _Stop()
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# Processes. --------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Child:
    """A process with its log; `offset` is where this process began to write."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    offset: int

    def exit_code(self) -> int | None:
        """None while it runs; 128 + n where signal n ended it, as shells say it."""
        code = self.process.poll()
        return code if code is None or code >= 0 else 128 - code

    def error(self) -> str:
        """Why it ended: its last error, or else the end of its log, or the signal that killed it."""
        with self.log.open("rb") as file:
            file.seek(self.offset)
            lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        starts = [i for i, line in enumerate(lines) if line.startswith(("error:", "internal error:"))]
        if starts:
            message = "\n".join(lines[starts[-1] :][:_SHOWN_LINES])
        else:
            code = self.process.poll() or 0
            message = f"error: ended by signal {-code}" if code < 0 else f"error: ended with exit code {code}"
            if code == -signal.SIGKILL:
                message += ", as when memory runs out"
            message = "\n".join([*lines[-_SHOWN_LINES:], message])
        return f"{message}\n(log of {self.name}: {self.log})"


@dataclass
class _Children:
    """All processes of the simulation; whatever ends this process ends them."""

    stopped: _Stop
    grace: float
    all: list[_Child] = field(default_factory=list)

    def start(self, name: str, command: Sequence[str], log: Path) -> _Child:
        """Starts a process in a session of its own, so that Ctrl-C reaches it through this process alone."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            offset = file.tell()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=_environment(),
                start_new_session=True,
                preexec_fn=_die_with(os.getpid()),
            )
        child = _Child(name, process, log, offset)
        self.all.append(child)
        return child

    def stop(self) -> None:
        """SIGTERM to all; to those that still run after the grace, or when asked again, SIGKILL."""
        asked = self.stopped.requests
        self._signal(signal.SIGTERM)
        self.wait(self.grace, unless=lambda: self.stopped.requests > asked)
        self._signal(signal.SIGKILL)
        for child in self.all:
            child.process.wait()

    def wait(self, seconds: float, unless: Any = lambda: False) -> None:
        """Until all have ended, at most so long."""
        end = time.monotonic() + seconds
        while any(child.process.poll() is None for child in self.all) and time.monotonic() < end and not unless():
            time.sleep(0.02)

    def _signal(self, number: signal.Signals) -> None:
        for child in self.all:
            if child.process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.process.pid, number)  # also what it started itself


def _environment() -> dict[str, str]:
    """This process's, with the packages that it runs itself first on the path."""
    root = str(Path(__file__).resolve().parents[2])
    path = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path)}


def _die_with(parent: int) -> Any:
    """What a child does before its program starts: asks the kernel for a SIGTERM when its parent dies."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up here: between fork and exec as little as possible happens

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
        if os.getppid() != parent:  # it died before we asked
            os._exit(INTERRUPTED)

    return ask


# The run. ----------------------------------------------------------------------------------------------------------


@dataclass
class _Launch:
    study: Study
    folder: RunFolder
    data: Path
    commands: Commands
    console: Console
    stop: _Stop
    grace: float
    coordinator_options: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.children = _Children(self.stop, self.grace)
        self._reported: set[str] = set()
        self._seen = -1
        self._status: dict[str, Any] | None = None

    def run(self, *, in_process: bool) -> int:
        """Coordinator first, then the sites, then the view until the coordinator ends; the exit code."""
        coordinator = self._start_coordinator()
        approval = self._approve()
        while (address := (self._read_status(coordinator) or {}).get("address")) is None:
            if (code := coordinator.exit_code()) is not None:
                return self._ended(coordinator, code)
            if self.stop.requests:
                return INTERRUPTED
            time.sleep(_POLL_SECONDS / 2)
        while (code := approval.exit_code()) is None:  # it has ended long ago: the coordinator takes longer
            if self.stop.requests:
                return INTERRUPTED
            time.sleep(_POLL_SECONDS / 2)
        if code:
            return self._ended(approval, code)
        sites = self._start_sites(str(address), in_process=in_process)
        with view(self.console) as shown:
            code = self._watch(coordinator, sites, shown)
        if self.stop.requests:
            return INTERRUPTED
        if code is None:
            return self._ended(coordinator, coordinator.exit_code() or 0)
        return code

    def _start_coordinator(self) -> _Child:
        command = [
            *self.commands.coordinator, str(self.folder.study),
            "--run", str(self.folder.path),
            "--listen", "127.0.0.1:0",
            "--identity", str(self.folder.identity / "coordinator"),
        ]  # fmt: skip
        if (self.data / HOLDOUT).is_dir():
            command += ["--holdout", str(self.data / HOLDOUT)]
        return self.children.start("the coordinator", [*command, *self.coordinator_options], self.folder.log)

    def _approve(self) -> _Child:
        """What every hospital's operator does in a real study, by the same command, for all sites at once."""
        command = [*self.commands.approve, str(self.folder.study), "--by", APPROVED_BY]
        for site in self.study.cohort.sites:
            command += self._place(site)
        return self.children.start("the approval", command, self.folder.path / "sites" / "approval.log")

    def _place(self, site: str) -> list[str]:
        """A site's own options, the same in its approval and its start."""
        return [
            "--site", site,
            "--data", str(self.data / site),
            "--identity", str(self.folder.identity / "sites" / site),
            "--work", str(self.folder.path / "sites" / site),
        ]  # fmt: skip

    def _start_sites(self, address: str, *, in_process: bool) -> dict[_Child, list[str]]:
        """The processes, each with the sites in it."""
        folder = self.folder.path / "sites"
        groups = [[*self.study.cohort.sites]] if in_process else [[site] for site in self.study.cohort.sites]
        started = {}
        for sites in groups:
            command = [*self.commands.site, str(self.folder.study), "--coordinator", address]
            for site in sites:
                command += self._place(site)
            name = "the sites" if in_process else f"site {sites[0]}"
            log = folder / f"{'all' if in_process else sites[0]}.log"
            started[self.children.start(name, command, log)] = sites
        return started

    def _watch(self, coordinator: _Child, sites: dict[_Child, list[str]], shown: View) -> int | None:
        """Until the coordinator ends (None), too few sites are left (their exit code) or somebody asks to stop."""
        while coordinator.exit_code() is None and not self.stop.requests:
            status = self._read_status(coordinator) or {}
            if status:
                shown.show(status)
            if status.get("state") not in _NEEDS_NO_SITES:
                code = self._lost(sites, shown)
                if code is not None:
                    return code
            time.sleep(_POLL_SECONDS)
        if not self.stop.requests and coordinator.exit_code() == 0:
            self.children.wait(self.grace, unless=lambda: self.stop.requests)
            shown.show({**(self._read_status(coordinator) or {}), "running": False})
        return None

    def _lost(self, sites: dict[_Child, list[str]], shown: View) -> int | None:
        """Tells of sites that died; the exit code of the last one where the quorum cannot be met without them."""
        lost: list[str] = []
        fresh = None
        for child, inside in sites.items():
            if child.exit_code():
                lost += inside
                if child.name not in self._reported:
                    self._reported.add(child.name)
                    fresh = child
                    shown.say(f"{child.name} ended: {child.error()}")
        if fresh is None:
            return None
        left, quorum = len(self.study.cohort.sites) - len(lost), self.study.cohort.quorum
        if left < quorum:
            shown.say(f"{count(left, 'site')} left, the quorum is {quorum}: the simulation stops.")
            return fresh.exit_code()
        deadline = duration(self.study.cohort.deadline_seconds)
        shown.say(f"The simulation goes on with {count(left, 'site')}; every round waits for {names(lost)} up to its "
                  f"deadline ({deadline}).")  # fmt: skip
        return None

    def _ended(self, coordinator: _Child, code: int) -> int:
        if code:
            errors = output(stderr=True)
            errors.print(Text(coordinator.error()), soft_wrap=True)
        return code

    def _read_status(self, coordinator: _Child) -> dict[str, Any] | None:
        """The status that this coordinator wrote; None while there is only that of an earlier one, or none."""
        # Not `RunFolder.read_status`: that looks for the lock, which the coordinator is about to take.
        try:
            modified = self.folder.status.stat().st_mtime_ns
            if modified != self._seen:
                found = json.loads(self.folder.status.read_text(encoding="utf-8"))
                own = isinstance(found, dict) and found.get("pid") == coordinator.process.pid
                self._status = (
                    complete({**found, "running": found.get("state") not in ENDED, "simulated": True}, self.study)
                    if own
                    else None
                )
                self._seen = modified
        except (OSError, ValueError):
            return self._status
        return self._status


# Results. ----------------------------------------------------------------------------------------------------------


def _show_results(folder: RunFolder, console: Console, json_output: bool) -> None:
    try:
        report = json.loads(folder.report.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunFolderError(
            f"{folder.report}: no figures to show ({error}); the coordinator's log says how the run ended: {folder.log}"
        ) from error
    if json_output:
        print(json.dumps(report, indent=1))
        return
    with contextlib.suppress(OSError), folder.rounds.open(newline="", encoding="utf-8") as file:
        console.print("", rounds_table(list(csv.DictReader(file))))
    if holdout := report.get("holdout"):
        console.print("", holdout_table(holdout))
    if continual := report.get("continual"):
        console.print("", continual_table(continual))
    if publication := report.get("publication"):
        console.print("", variants_table(publication), "")
        console.print(Text(f"The model lies in {publication.get('folder')}"), soft_wrap=True)
    else:
        console.print("", Text(describe(folder.read_status()).cause), soft_wrap=True)
