"""One study in one folder: its processes are started, started again when they die, and what they left is judged."""

from __future__ import annotations

import concurrent.futures
import contextlib
import csv
import hashlib
import json
import shutil
import signal
import sqlite3
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from common.failpoints import VARIABLE
from common.security.certificates import ensure_simulation_identities
from common.study import parse_study
from server.run_folder import RunFolder
from tests.system.faults.proxy import Proxy
from tests.system.ports import free_port
from tests.system.zygote import Child, Zygote

COORDINATOR = "coordinator"
KILLED = -signal.SIGKILL
_TIMED = ("seconds", "bytes", "slowest")  # how columns begin that may differ from run to run
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_GRACE = 5.0  # for a site to end by itself once its coordinator has ended


class Stuck(AssertionError):
    """A study did not come to its end; says where everybody was."""


class Unexpected(AssertionError):
    """A process ended otherwise than by what was done to it."""


@dataclass(frozen=True)
class Scenario:
    """A study to run. Its sites train for real, on generated images, or are light."""

    text: str
    real: bool = False
    batch_seconds: float = 0.02

    @property
    def study(self) -> Any:
        """The parsed study."""
        return parse_study(self.text, "scenario")

    @property
    def sites(self) -> tuple[str, ...]:
        """The cohort."""
        return tuple(self.study.cohort.sites)


@dataclass(frozen=True)
class Left:
    """What a run left behind, and what must be the same however it was disturbed.

    Attributes
    ----------
    models : SHA-256 of each file of weights, by name.
    rounds, sites : the rows of rounds.csv and sites.csv, without seconds and bytes.
    closed : the cohort of each round, by kind and round, as journaled.
    published : the names of the versions.
    litter : files that should have been removed.
    """

    models: Mapping[str, str]
    rounds: Sequence[Mapping[str, str]]
    sites: Sequence[Mapping[str, str]]
    closed: Mapping[str, Sequence[str]]
    published: Sequence[str]
    litter: Sequence[str]

    def without(self, *columns: str) -> Left:
        """The same, but for these columns."""

        def cut(rows: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
            return [{name: value for name, value in row.items() if name not in columns} for row in rows]

        return replace(self, rounds=cut(self.rounds), sites=cut(self.sites))

    def differences(self, undisturbed: Left) -> list[str]:
        """What differs, in words; empty where nothing does."""
        found = []
        if self.models != undisturbed.models:
            found.append(f"weights: {_short(self.models)} instead of {_short(undisturbed.models)}")
        for name in ("rounds", "sites"):
            mine, other = getattr(self, name), getattr(undisturbed, name)
            if mine != other:
                odd = [row for row in mine if row not in other] + [f"-{row}" for row in other if row not in mine]
                found.append(f"{name}.csv: {len(mine)} rows instead of {len(other)}; {odd[:2]}")
        if self.closed != undisturbed.closed:
            found.append(f"cohorts: {self.closed} instead of {undisturbed.closed}")
        if self.published != undisturbed.published:
            found.append(f"published: {self.published} instead of {undisturbed.published}")
        if self.litter != undisturbed.litter:
            found.append(f"left lying: {self.litter}")
        return found


class Bench:
    """What runs of many arenas share: the zygote, images, certificates, compiled plans and undisturbed runs."""

    def __init__(self, folder: Path, zygote: Zygote) -> None:
        self.folder = folder
        self.zygote = zygote
        self._undisturbed: dict[Scenario, tuple[Left, dict[str, dict[str, int]]]] = {}
        self._made = 0

    def arena(self, scenario: Scenario, *, proxied: bool = False, folder: Path | None = None) -> Arena:
        """A new arena; with `proxied` each site dials through a proxy of its own."""
        self._made += 1
        return Arena(self, scenario, folder or self.folder / f"{self._made:04d}", proxied=proxied)

    def images(self) -> Path:
        """Folders `east`, `north` and `south` of five small images each."""
        from server.simulation.hospitals import generate_hospitals

        folder = self.folder / "hospitals"
        if not folder.exists():
            counts = {"east": 5, "north": 5, "south": 5}
            generate_hospitals(folder, seed=1, images_per_site=counts, holdout_per_site=1, size=64)
        return folder

    def no_images(self) -> Path:
        """A folder for light sites, which read no data."""
        folder = self.folder / "no-images"
        folder.mkdir(exist_ok=True)
        return folder

    def identities(self, scenario: Scenario) -> Path:
        """The certificates of the study."""
        folder = self._of(scenario) / "identity"
        ensure_simulation_identities(folder, scenario.study.name, scenario.sites, ["127.0.0.1"])
        return folder

    def plan(self, scenario: Scenario) -> Path:
        """What light sites need to know of the study."""
        path = self._of(scenario) / "plan.json"
        if not path.exists():
            study = path.with_name("study.yaml")
            study.write_text(scenario.text)
            log = path.with_name("plan.log")
            code = self.zygote.start("light-site", ["plan", study, path], log).wait(120)
            assert code == 0, log.read_text()
        return path

    def undisturbed(self, scenario: Scenario) -> Left:
        """What the scenario leaves where nothing is done to it; run once."""
        return self._run_once(scenario)[0]

    def counts(self, scenario: Scenario) -> dict[str, dict[str, int]]:
        """By role, how often its process came by each failpoint where nothing is done to it."""
        return self._run_once(scenario)[1]

    def _run_once(self, scenario: Scenario) -> tuple[Left, dict[str, dict[str, int]]]:
        if scenario not in self._undisturbed:
            with self.arena(scenario, folder=self._of(scenario) / "undisturbed") as arena:
                arena.count_failpoints = True
                arena.run_to_end()
                self._undisturbed[scenario] = (arena.left(), arena.counts())
        return self._undisturbed[scenario]

    def _of(self, scenario: Scenario) -> Path:
        key = f"{scenario.text}{scenario.real}{scenario.batch_seconds}"
        folder = self.folder / f"scenario-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
        folder.mkdir(exist_ok=True)
        return folder


@contextlib.contextmanager
def bench(folder: Path | None = None) -> Iterator[Bench]:
    """A bench in a folder, or in a temporary one that is removed unless something failed."""
    place = folder or Path(tempfile.mkdtemp(prefix="wardround-faults-"))
    place.mkdir(parents=True, exist_ok=True)
    try:
        with Zygote(place / "zygote.log") as zygote:
            yield Bench(place, zygote)
    finally:
        if folder is None and not any(place.glob("[0-9]*")):  # arenas that passed have removed their own
            shutil.rmtree(place, ignore_errors=True)


class Arena:
    """One study in a folder of its own; a context manager that ends its processes.

    Attributes
    ----------
    run, sites_folder : where the coordinator writes, and the sites; another disk may be put in place before the start.
    port : where the coordinator listens, at every start.
    works : by site, where its own folder is not in `sites_folder`.
    proxies : by site, where asked for.
    processes : by role (`coordinator`, or a site's name), the newest.
    codes : by role, how each of its processes ended.
    """

    def __init__(self, bench: Bench, scenario: Scenario, folder: Path, *, proxied: bool = False) -> None:
        self.bench = bench
        self.scenario = scenario
        self.folder = folder
        self.run = RunFolder(folder / "run")
        self.sites_folder = folder / "sites"
        self.works: dict[str, Path] = {}
        self.port = free_port()
        self.proxies = {site: Proxy(lambda: self.port) for site in scenario.sites} if proxied else {}
        self.processes: dict[str, Child] = {}
        self.codes: dict[str, list[int]] = {role: [] for role in (COORDINATOR, *scenario.sites)}
        self.starts = dict.fromkeys(self.codes, 0)
        self.count_failpoints = False
        self.environment: dict[str, dict[str, str]] = {}
        self.study_file = folder / "study.yaml"
        folder.mkdir(parents=True, exist_ok=True)
        self.study_file.write_text(scenario.text)
        self._identities = bench.identities(scenario)

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes.values():
            process.kill()
        for proxy in self.proxies.values():
            proxy.close()

    def remove(self) -> None:
        """Removes the folder, once all is well."""
        shutil.rmtree(self.folder, ignore_errors=True)

    # --- processes --------------------------------------------------------------------------------------------------

    def start(self, role: str, failpoints: str = "", *, serve: bool = False) -> Child:
        """Starts the role's process, always by the same command; `failpoints` is its WARDROUND_FAILPOINTS.

        With `serve` the coordinator goes on answering sites once the study is over.
        """
        self.starts[role] += 1
        environment = {VARIABLE: failpoints, "FAULTS_LONGEST_PAUSE": "1.0"}
        if self.count_failpoints:
            environment["FAULTS_COUNT"] = str(self.folder / f"count-{role}.json")
        environment |= self.environment.get(role, {})
        if role == COORDINATOR:
            command = "wardround"
            arguments: list[str | Path] = ["coordinator", self.study_file, "--run", self.run.path]
            arguments += ["--listen", f"127.0.0.1:{self.port}", "--identity", self._identities / "coordinator"]
            arguments += ["--serve"] if serve else []
        else:
            command = "wardround-site" if self.scenario.real else "light-site"
            data = self.bench.images() / role if self.scenario.real else self.bench.no_images()
            if not self.scenario.real:
                environment["FAULTS_PLAN"] = str(self.bench.plan(self.scenario))
                environment["FAULTS_BATCH_SECONDS"] = str(self.scenario.batch_seconds)
            port = self.proxies[role].port if role in self.proxies else self.port
            place = [self.study_file, "--site", role, "--data", data, "--work", self.work(role)]
            place += ["--identity", self._identities / "sites" / role]
            if self.starts[role] == 1:
                self._approve(role, place)
            arguments = ["start", *place, "--coordinator", f"127.0.0.1:{port}"]
        process = self.bench.zygote.start(command, arguments, self.folder / f"{role}.log", environment)
        process.name = role
        self.processes[role] = process
        return process

    def _approve(self, role: str, place: Sequence[str | Path]) -> None:
        """What the site's operator does before its first start."""
        log = self.folder / f"approval-{role}.log"
        code = self.bench.zygote.start("wardround-site", ["approve", *place, "--by", "fault tests"], log).wait(60)
        assert code == 0, log.read_text()

    def work(self, site: str) -> Path:
        """The site's own folder."""
        return self.works.get(site, self.sites_folder / site)

    def run_to_end(
        self,
        planned: Mapping[str, Sequence[str]] | None = None,
        *,
        patience: float = 240.0,
        again: Collection[int] = (KILLED,),
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        """Starts whoever does not run and starts again whoever ends by a code of `again`, until the study is over.

        Parameters
        ----------
        planned : by role, the failpoints of its first process, of the second, ...; later ones have none.
        patience : seconds until the study counts as stuck.
        tick : called every few milliseconds.

        Raises
        ------
        Stuck : the study does not end.
        Unexpected : a process ended by another code.
        """
        plans = {role: list((planned or {}).get(role, ())) for role in self.codes}
        for role, plan in plans.items():
            if role not in self.processes:
                self.start(role, plan.pop(0) if plan else "")
        end = time.monotonic() + patience
        while not self._over():
            tick()
            for role, process in list(self.processes.items()):
                code = process.poll()
                if code is None or code == 0 or (self.codes[role] and self.codes[role][-1] == 0):
                    continue
                self.codes[role].append(code)
                if code not in again:
                    raise Unexpected(f"{role} ended with {code}; it said:\n{process.said()[-3000:]}")
                self.start(role, plans[role].pop(0) if plans[role] else "")
            if time.monotonic() > end:
                raise Stuck(f"no end after {patience:.0f} s\n{self.describe()}")
            time.sleep(0.01)

    def _over(self) -> bool:
        """The coordinator has ended well, and so have the sites or they dial for a coordinator that is gone."""
        if self.processes[COORDINATOR].poll() != 0:
            return False
        self.codes[COORDINATOR].append(0)
        end = time.monotonic() + _GRACE
        sites = [self.processes[site] for site in self.scenario.sites]
        while any(site.poll() is None for site in sites) and time.monotonic() < end:
            time.sleep(0.01)
        late = [site for site in sites if site.poll() is None]
        if any(any((self.work(site.name) / "updates").rglob("update.json")) for site in late):
            self._answer(late)
        for site in sites:
            site.send(signal.SIGCONT)
            site.send(signal.SIGTERM)
            self.codes[site.name].append(site.wait(30))
        return True

    def _answer(self, late: Sequence[Child]) -> None:
        """The study ended before these sites came back, and one holds an update: they hear what became of it.

        As operations.md says, the coordinator is started once more for that.
        """
        serving = self.start(COORDINATOR, serve=True)
        try:
            for site in late:
                site.wait(60)
        finally:
            serving.send(signal.SIGTERM)
            serving.wait(30)

    # --- what is there ----------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """What the coordinator last wrote of itself; {} before that."""
        try:
            found: dict[str, Any] = json.loads(self.run.status.read_text())
        except (OSError, ValueError):
            return {}
        return found

    def until(self, condition: Callable[[], object], patience: float = 120.0) -> None:
        """Waits until the condition holds. Raises Stuck where it does not."""
        end = time.monotonic() + patience
        while not condition():
            if time.monotonic() > end:
                raise Stuck(f"waited in vain for {patience:.0f} s\n{self.describe()}")
            time.sleep(0.01)

    def events(self, event: str | None = None) -> list[dict[str, Any]]:
        """The journal's, oldest first; read in a copy, so as not to hold the coordinator's."""
        if not self.run.journal.exists():
            return []
        names = ("event", "kind", "round", "attempt", "site")
        with tempfile.TemporaryDirectory() as folder:
            for path in (self.run.journal, self.run.journal.with_name(f"{self.run.journal.name}-wal")):
                with contextlib.suppress(FileNotFoundError):
                    shutil.copy(path, folder)
            database = sqlite3.connect(Path(folder) / self.run.journal.name)
            try:
                rows = database.execute(f"SELECT detail, {', '.join(names)} FROM events ORDER BY id").fetchall()
            except sqlite3.Error:  # it is just being made, or was copied in the middle of a checkpoint
                return []
            finally:
                database.close()
        found = [{**dict(zip(names, row[1:], strict=True)), **json.loads(row[0])} for row in rows]
        return [one for one in found if event in (None, one["event"])]

    def left(self) -> Left:
        """What the run left behind."""
        closed: dict[str, list[str]] = {}
        for event in self.events("closed"):
            cohort = sorted(event["included"])
            key = f"{event['kind']} {event['round']}"
            # Two closes of one round with other cohorts must show.
            closed[key] = cohort if closed.get(key, cohort) == cohort else [*closed[key], "or", *cohort]
        litter = [
            path.name
            for folder in (self.run.path, self.sites_folder)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and (path.suffix in (".partial", ".upload") or "updates" in path.parts[-4:])
        ]
        return Left(
            models={path.name: sha256_of(path) for path in sorted(self.run.models.glob("*.tensors"))},
            rounds=_rows(self.run.rounds),
            sites=_rows(self.run.sites),
            closed=closed,
            published=sorted(path.name for path in self.run.published.iterdir()),
            litter=litter,
        )

    def not_skipped(self) -> list[str]:
        """What is wrong with a run of secure sums in which one round had to be skipped; empty where nothing is."""
        skipped = [event["round"] for event in self.events("skipped")]
        summed = [event["round"] for event in self.events("summed")]
        rounds = range(1, self.scenario.study.training.rounds + 1)
        if len(skipped) == 1 and sorted([*summed, *skipped]) == list(rounds):
            return []
        return [
            f"rounds skipped: {skipped}, summed: {summed}; expected one skipped, and each of the others summed once"
        ]

    def counts(self) -> dict[str, dict[str, int]]:
        """By role, how often its last process came by each failpoint, where it was told to count."""
        return {role: json.loads((self.folder / f"count-{role}.json").read_text()) for role in self.codes}

    def describe(self) -> str:
        """Where everybody is, for whoever reads of a failure."""
        status = self.status()
        lines = [
            f"{self.folder}",
            f"status: {status.get('state')}, round {status.get('round')}, {status.get('notice')}",
        ]
        lines += [f"  {site}: {entry}" for site, entry in status.get("sites", {}).items()]
        for role, process in self.processes.items():
            code = process.poll()
            alive = "stopped" if process.stopped() else "alive" if code is None else str(code)
            lines.append(f"{role} ({alive}, before: {self.codes[role]}) said:")
            lines += [f"    {line}" for line in process.said().splitlines()[-8:]]
        return "\n".join(lines)


@dataclass
class Verdict:
    """How a disturbed run ended: by no differences, or by what is wrong."""

    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0
    skipped: bool = False

    @property
    def passed(self) -> bool:
        """Whether it ended as the undisturbed run did."""
        return not self.wrong

    @property
    def word(self) -> str:
        """For a table."""
        if not self.passed:
            return "NO"
        return "skipped" if self.skipped else "yes"


def judge(arena: Arena, run: Callable[[], None], *, keep: bool = False, skipping: bool = False) -> Verdict:
    """Runs it and compares what it left with the undisturbed run; the folder of one that passed is removed.

    `skipping`: a round of secure sums must have been skipped, once, and all others have come to their end.
    """
    undisturbed = arena.bench.undisturbed(arena.scenario)
    started = time.monotonic()
    verdict = Verdict()
    try:
        run()
        if skipping:
            verdict.wrong, verdict.skipped = arena.not_skipped(), True
        elif arena.scenario.study.secure_aggregation.required:  # every attempt has keys, and a number, of its own
            verdict.wrong = arena.left().without("attempt").differences(undisturbed.without("attempt"))
        else:
            verdict.wrong = arena.left().differences(undisturbed)
    except (AssertionError, TimeoutError) as error:
        verdict.wrong = [str(error) or type(error).__name__]
    verdict.seconds = time.monotonic() - started
    if verdict.wrong:
        verdict.wrong.append(f"its folder: {arena.folder}")
    elif not keep:
        arena.remove()
    return verdict


def each(run: Callable[[_Item], _Result], items: Sequence[_Item], parallel: int) -> Iterator[_Result]:
    """The results of all items, in their order, as they come; so many are run at a time."""
    with concurrent.futures.ThreadPoolExecutor(parallel) as pool:
        yield from pool.map(run, items)


def sha256_of(path: Path) -> str:
    """The file's digest."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [
            {name: value for name, value in row.items() if not name.startswith(_TIMED)} for row in csv.DictReader(file)
        ]


def _short(models: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {digest[:12]}" for name, digest in models.items()) or "none"
