"""What the system tests share: tiny data, a tiny study, and processes that end with the test that started them."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from common.security.certificates import ensure_simulation_identities
from server.run_folder import RunFolder
from server.simulation.hospitals import generate_hospitals
from tests.system.browsing import browser, serve, tab  # noqa: F401  (fixtures)
from tests.system.zygote import Zygote

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 300.0  # seconds until a test gives up: many times what a step takes on two idle cores

# One study for everything whose weights are compared. A round trains long enough to be caught at it.
STUDY = """\
study: tiny
seed: 3
task: {dimensions: 2, channels: 3, classes: [background, cell], labels: instances}
model: {filters: 4, depth: 1, head: sigmoid}
preprocessing: {patch: [32, 32]}
training: {rounds: 3, patches_per_epoch: 240, batch_size: 4}
cohort: {sites: [east, north], quorum: 2, deadline: 10m}
publishing: {variants: [float32], tile: [64, 64]}
"""

# One round and nothing around it, for what needs a coordinator more than its weights.
SHORT_STUDY = """\
study: short
seed: 3
task: {dimensions: 2, channels: 3, classes: [background, cell], labels: instances}
model: {filters: 4, depth: 1, head: sigmoid}
preprocessing: {patch: [32, 32]}
training: {rounds: 1, patches_per_epoch: 8, batch_size: 4}
cohort: {sites: [east, north], quorum: 2, deadline: 10m}
evaluation: {validation_fraction: 0, holdout: false}
publishing: {variants: [float32], tile: [64, 64]}
"""


def environment(first: Path | None = None) -> dict[str, str]:
    """This process's, with the packages under test (and before them `first`) on the path."""
    path = [str(first)] if first is not None else []
    return os.environ | {"PYTHONPATH": os.pathsep.join([*path, str(ROOT)])}


def command(name: str, *arguments: str | Path) -> list[str]:
    """A call of `wardround` or `wardround-site`."""
    module = {"wardround": "server.cli", "wardround-site": "client.cli"}[name]
    return [sys.executable, "-P", "-m", module, *map(str, arguments)]


def call(name: str, *arguments: str | Path, first: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end."""
    return subprocess.run(
        command(name, *arguments), env=environment(first), capture_output=True, text=True, timeout=PATIENCE
    )


class Process:
    """A command that runs beside the test; what it says goes to a file."""

    def __init__(self, zygote: Zygote, name: str, arguments: Sequence[str | Path], log: Path) -> None:
        self._child = zygote.start(name, arguments, log, environment())
        self.pid, self.said, self.kill = self._child.pid, self._child.said, self._child.kill

    def lives(self) -> bool:
        return self._child.poll() is None

    def signal(self, number: int) -> None:
        self._child.send(number)

    def end(self) -> int:
        """Its exit code, once it has ended."""
        try:
            return self._child.wait(PATIENCE)
        except TimeoutError as error:
            pytest.fail(str(error))


class Setting:
    """A study on this machine: its file, its data, identities and run folder, and the processes started for it.

    A coordinator or site needs `identities` to be made before; a simulation makes its own.
    """

    def __init__(self, folder: Path, study: str, data: Path, zygote: Zygote) -> None:
        self.folder = folder
        self.data = data
        self._zygote = zygote
        self.study = folder / "study.yaml"
        folder.mkdir(parents=True, exist_ok=True)
        self.study.write_text(study)
        self.run = RunFolder(folder / "run")
        self.processes: list[Process] = []
        self.address = ""
        self._approved: set[tuple[str | Path, ...]] = set()

    def identities(self, *sites: str) -> None:
        """Makes the certificates that `coordinator` and `site` use."""
        name = self.study.read_text().split()[1]
        ensure_simulation_identities(self.run.identity, name, sites, ["127.0.0.1"])

    def coordinator(self, *, listen: str = "127.0.0.1:0", holdout: bool = False) -> Process:
        """Starts the coordinator and waits until it has its address."""
        options: list[str | Path] = ["--run", self.run.path, "--listen", listen]
        if holdout:
            options += ["--holdout", self.data / "holdout"]
        process = self.start("wardround", ["coordinator", self.study, *options], self.folder / "coordinator.log")
        self.until(lambda status: status.get("pid") == process.pid and status.get("address"), process)
        self.address = self.status()["address"]
        return process

    def site(
        self,
        *sites: str,
        study: Path | None = None,
        identity: Path | None = None,
        data: Path | None = None,
        work: Path | None = None,
    ) -> Process:
        """Starts one process that hosts these sites; one alone may have another study file, identity, data or work."""
        place: list[str | Path] = [study or self.study]
        for site in sites:
            place += ["--site", site, "--data", data or self.data / site, "--work"]
            place += [work or self.folder / "sites" / site]
            place += ["--identity", identity or self.run.identity / "sites" / site]
        self.approve(*place)
        log = self.folder / f"{'+'.join(sites)}-{len(self.processes)}.log"
        return self.start("wardround-site", ["start", *place, "--coordinator", self.address], log)

    def approve(self, *place: str | Path) -> None:
        """What the operators of these sites do before they start them; once for each study, data and folders."""
        if place not in self._approved:
            self._approved.add(place)
            done = call("wardround-site", "approve", *place, "--by", "system tests")
            assert done.returncode == 0, done.stderr

    def simulate(self, *flags: str) -> subprocess.CompletedProcess[str]:
        """Runs `wardround simulate` on the study to its end."""
        return call("wardround", "simulate", self.study, "--data", self.data, "--run", self.run.path, *flags)

    def start(self, name: str, arguments: Sequence[str | Path], log: Path) -> Process:
        """Starts a command of the project, which ends with the module's tests."""
        process = Process(self._zygote, name, arguments, log)
        self.processes.append(process)
        return process

    def status(self) -> dict[str, Any]:
        """What the coordinator last wrote of itself; {} before that."""
        try:
            found: dict[str, Any] = json.loads(self.run.status.read_text())
        except FileNotFoundError:
            return {}
        return found

    def until(self, condition: Callable[[dict[str, Any]], Any], *alive: Process) -> dict[str, Any]:
        """Waits for a status that meets the condition, as long as these processes live; returns that status."""
        end = time.monotonic() + PATIENCE
        while not condition(status := self.status()):
            for process in alive:
                assert process.lives(), f"ended in between, and said:\n{process.said()[-3000:]}"
            assert time.monotonic() < end, f"waited in vain; the status is {json.dumps(status, indent=1)}"
            time.sleep(0.02)
        return status

    def weights(self) -> dict[str, bytes]:
        """The bytes of every model that the run kept, by file name."""
        return {path.name: path.read_bytes() for path in sorted(self.run.models.glob("*.tensors"))}

    def rows(self, name: str) -> list[dict[str, str]]:
        """The rows of a CSV file of the run."""
        with (self.run.path / name).open(newline="") as file:
            return list(csv.DictReader(file))

    def left_behind(self) -> list[str]:
        """The processes on this machine that have the run folder in their arguments, as those of a simulation do."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                arguments = path.read_bytes().decode(errors="replace").replace("\0", " ")
                if str(self.run.path) in arguments:
                    found.append(arguments)
        return found

    def close(self) -> None:
        for process in self.processes:
            process.kill()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `east`, `north` and `south` with five small images each, and a holdout."""
    folder = tmp_path_factory.mktemp("system") / "hospitals"
    generate_hospitals(folder, seed=1, images_per_site={"east": 5, "north": 5, "south": 5}, holdout_per_site=1, size=64)
    return folder


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """Starts processes that need not load TensorFlow first; they are gone at the end of the session."""
    with Zygote(tmp_path_factory.mktemp("zygote") / "log") as made:
        yield made


@pytest.fixture(scope="session")
def wardround() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a command to its end: `wardround(name, *arguments)`."""
    return call


@pytest.fixture(scope="session")
def tiny_study() -> str:
    return STUDY


@pytest.fixture(scope="session")
def short_study() -> str:
    return SHORT_STUDY


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory, data: Path, zygote: Zygote) -> Iterator[Callable[[str], Setting]]:
    """Makes a setting of a study; its processes are gone at the end of the module."""
    made: list[Setting] = []

    def make(study: str) -> Setting:
        made.append(Setting(tmp_path_factory.mktemp("setting"), study, data, zygote))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(scope="session")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, data: Path, zygote: Zygote
) -> tuple[Setting, subprocess.CompletedProcess[str]]:
    """The tiny study, simulated with all sites in one process; every other way must end in its weights."""
    made = Setting(tmp_path_factory.mktemp("undisturbed"), STUDY, data, zygote)
    return made, made.simulate("--in-process")


@pytest.fixture(scope="session")
def without_tensorflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that, first on the path, ends whoever imports TensorFlow."""
    folder = tmp_path_factory.mktemp("without")
    for name in ("tensorflow", "tensorflow_federated"):
        (folder / f"{name}.py").write_text("raise SystemExit('error: TensorFlow was loaded')\n")
    return folder
