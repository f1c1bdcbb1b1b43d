"""Fifty sites that come and go: does the study end, and how long do its rounds take?

Fifty light agents in one process, over mutual TLS, and the real coordinator. In each round a share of them (30 %)
leaves at a random moment, in the middle of whatever it does, stays away for a random time, which may reach into the
next rounds, and comes back as a new agent with the same work folder. A round closes when all answered, or at its
deadline with the quorum.

How to read it: "sites" is how many updates went into the round, "left" and "returned" how many agents went and came
while it was open, "seconds" how long it took; its deadline bounds it wherever somebody is missing, unless the quorum
is, too.
"""

from __future__ import annotations

import csv
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.security.certificates import load_identity
from common.wire.channel import parse_address
from tests.system.faults.arena import COORDINATOR, Arena, Bench, Scenario, bench
from tests.system.faults.light import LightPlan, LightWorker
from tests.system.faults.report import Row, parser, report
from tests.system.faults.studies import light

LEAVING = 0.3


@dataclass
class _Site:
    """One site, at work or away."""

    name: str
    agent: Any = None
    thread: threading.Thread | None = None
    leaves_at: float | None = None
    back_at: float | None = None
    ended: list[BaseException] = field(default_factory=list)


class Crowd:
    """The sites of an arena as agents in threads of this process."""

    def __init__(self, arena: Arena, seed: int, leaving: float = LEAVING) -> None:
        self._arena = arena
        self._plan = LightPlan.read(arena.bench.plan(arena.scenario))
        self._chance = random.Random(seed)
        self._leaving = leaving
        self._identities = arena.bench.identities(arena.scenario) / "sites"
        self._sites = [_Site(name) for name in arena.scenario.sites]
        self._deadline = arena.scenario.study.cohort.deadline_seconds
        self._round = 0
        self.left: Counter[int] = Counter()
        self.returned: Counter[int] = Counter()
        for site in self._sites:
            self._come(site)

    def tick(self) -> None:
        """Lets whoever is due leave or return; called every few milliseconds."""
        now = time.monotonic()
        number = self._arena.status().get("round") or 0
        if number != self._round:
            self._round = number
            present = [site for site in self._sites if site.back_at is None]
            for site in self._chance.sample(present, min(len(present), round(self._leaving * len(self._sites)))):
                site.leaves_at = now + self._chance.uniform(0, self._deadline / 2)
        for site in self._sites:
            if site.leaves_at is not None and now >= site.leaves_at:
                site.leaves_at = None
                site.back_at = now + self._chance.uniform(0, 1.5 * self._deadline)
                site.agent.stop()
                self.left[self._round] += 1
            elif site.back_at is not None and now >= site.back_at and site.thread and not site.thread.is_alive():
                site.back_at = None
                self.returned[self._round] += 1
                self._come(site)

    def failures(self) -> list[str]:
        """How agents ended that should not have."""
        return [f"{site.name}: {type(error).__name__}: {error}" for site in self._sites for error in site.ended]

    def close(self) -> None:
        """Stops every agent and waits for it."""
        for site in self._sites:
            site.agent.stop()
        for site in self._sites:
            if site.thread is not None:
                site.thread.join(20)

    def _come(self, site: _Site) -> None:
        worker = LightWorker(self._plan, site.name, self._arena.scenario.batch_seconds)
        site.agent = new_agent(
            self._arena, site.name, worker, self._identities / site.name, self._arena.work(site.name)
        )

        def attend(agent: Any = site.agent) -> None:
            try:
                agent.run()
            except BaseException as error:
                site.ended.append(error)

        site.thread = threading.Thread(target=attend, daemon=True, name=site.name)
        site.thread.start()


def new_agent(arena: Arena, site: str, worker: LightWorker, identity: Path, work: Path) -> Any:
    """The site's agent, as `wardround-site start` makes it."""
    from client.agent import Agent

    work.mkdir(parents=True, exist_ok=True)
    address = parse_address(f"127.0.0.1:{arena.port}")
    return Agent(arena.scenario.study.name, site, worker, address, load_identity(identity), work)


def run_crowd(made: Bench, scenario: Scenario, seed: int, patience: float, leaving: float = LEAVING) -> list[Row]:
    """The rounds of the study; raises AssertionError where it does not end as it should."""
    with made.arena(scenario) as arena:
        coordinator = arena.start(COORDINATOR)
        crowd = Crowd(arena, seed, leaving)
        try:
            end = time.monotonic() + patience
            while coordinator.poll() is None:
                crowd.tick()
                assert time.monotonic() < end, f"no end after {patience:.0f} s\n{arena.describe()}"
                time.sleep(0.02)
        finally:
            crowd.close()
        assert coordinator.poll() == 0, coordinator.said()[-3000:]
        assert not crowd.failures(), crowd.failures()
        with arena.run.rounds.open(newline="") as file:
            rounds = list(csv.DictReader(file))
    arena.remove()
    return [
        {
            "round": int(row["round"]),
            "sites": int(row["sites"]),
            "attempt": int(row["attempt"]),
            "left": crowd.left[int(row["round"])],
            "returned": crowd.returned[int(row["round"])],
            "seconds": float(row["seconds"]),
        }
        for row in rounds
    ]


def main() -> None:
    """Runs it."""
    options = parser(__doc__)
    options.add_argument("--sites", type=int, default=50, help="how many (default: 50)")
    options.add_argument("--rounds", type=int, default=20, help="how many (default: 20)")
    options.add_argument("--seed", type=int, default=1, help="of who leaves when (default: 1)")
    options.add_argument("--deadline", type=int, default=15, help="seconds of a round (default: 15)")
    chosen = options.parse_args()
    quorum = round(0.6 * chosen.sites)
    scenario = light(
        sites=chosen.sites,
        rounds=chosen.rounds,
        quorum=quorum,
        deadline=f"{chosen.deadline}s",
        batch_seconds=0.25,
    )
    with bench(chosen.folder) as made:
        rows = run_crowd(made, scenario, chosen.seed, patience=300 + 10 * chosen.rounds * chosen.deadline)
    seconds = [float(row["seconds"]) for row in rows]
    fewest = min(int(row["sites"]) for row in rows)
    summary = (
        f"{chosen.sites} sites, of which {LEAVING:.0%} leave in each round; quorum {quorum}, deadline "
        f"{chosen.deadline} s. The study ended after {len(rows)} rounds of {min(seconds):.1f} to {max(seconds):.1f} s, "
        f"with {fewest} sites or more in each; {sum(int(row['left']) for row in rows)} agents left and "
        f"{sum(int(row['returned']) for row in rows)} returned."
    )
    report("fifty", rows, summary, write_docs=chosen.write_docs)
    raise SystemExit(0 if len(rows) == chosen.rounds and fewest >= quorum else 1)


if __name__ == "__main__":
    main()
