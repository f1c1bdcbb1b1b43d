"""Random faults over a whole study, by seed: how many studies end, and with the same bits?

A schedule is drawn from its seed alone: kills of the coordinator and of sites at random failpoints, at their first
process and at those started after it, kills, stops (SIGTERM) and halts (SIGSTOP, then SIGCONT) at random times, and
faults of each site's line. Three light sites, all of which each round waits for, so that the weights can be compared.

How to read it: "same" is the verdict, "kills" how many processes ended and were started again, "breaks" how many faults
of the line happened. `--only SEED` repeats one; how the processes are timed is not drawn, so it may take more than one
repetition.
"""

from __future__ import annotations

import math
import random
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from common.failpoints import COORDINATOR as COORDINATOR_NAMES
from common.failpoints import SITE
from tests.system.faults.arena import COORDINATOR, Arena, Bench, Scenario, bench, each, judge
from tests.system.faults.proxy import Direction, Fault, Kind
from tests.system.faults.report import Row, parser, passed, report, write
from tests.system.faults.studies import light

SCENARIO = light(sites=3, rounds=4)
_SECONDS = 12.0  # in which faults at random times are placed
_LONGEST = 4.0  # for which a process is halted or a line stalls
_AT_THE_END = ("study.", "publish.", "report.")
_ENDED = -signal.SIGKILL, 128 + signal.SIGTERM
Verb = Literal["kill", "stop", "halt", "break", "reset", "stall"]


@dataclass(frozen=True)
class Timed:
    """Something done at a time since the start: to a process, or to a site's line."""

    at: float
    verb: Verb
    role: str
    seconds: float = 0.0


@dataclass(frozen=True)
class Schedule:
    """All that is done to one run."""

    seed: int
    planned: dict[str, list[str]] = field(default_factory=dict)
    lines: dict[str, list[Fault]] = field(default_factory=dict)
    timed: list[Timed] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"{role}: {', then '.join(points)}" for role, points in self.planned.items()]
        parts += [f"line of {site}: {', '.join(map(str, faults))}" for site, faults in self.lines.items()]
        return "\n".join([f"seed {self.seed}", *parts, *map(str, self.timed)])


def draw(seed: int, scenario: Scenario) -> Schedule:
    """The schedule of a seed."""
    chance = random.Random(seed)
    schedule = Schedule(seed)
    for role in (COORDINATOR, *scenario.sites):
        names = list(COORDINATOR_NAMES if role == COORDINATOR else SITE)
        amid = [name for name in names if not name.startswith(_AT_THE_END)]
        kills = chance.choices([0, 1, 2, 3], [1, 3, 3, 2] if role == COORDINATOR else [4, 4, 1, 1])[0]
        # A kill at the end of the study would leave nothing to those planned after it.
        chosen = [chance.choice(amid) for _ in range(kills - 1)] + [chance.choice(names) for _ in range(kills > 0)]
        if chosen:
            schedule.planned[role] = [f"{name}@{chance.choice([1, 1, 2, 2, 3, 4, 6])}=kill" for name in chosen]
    for site in scenario.sites:
        for _ in range(chance.choices([0, 1, 2], [3, 3, 1])[0]):
            schedule.lines.setdefault(site, []).append(_line_fault(chance))
    for _ in range(chance.choices([0, 1, 2, 3], [2, 3, 2, 1])[0]):
        verb = chance.choice(get_args(Verb))
        roles = scenario.sites if verb in ("break", "reset", "stall") else (COORDINATOR, *scenario.sites)
        schedule.timed.append(
            Timed(chance.uniform(0, _SECONDS), verb, chance.choice(roles), chance.uniform(0.1, _LONGEST))
        )
    schedule.timed.sort(key=lambda one: one.at)
    return schedule


def _line_fault(chance: random.Random) -> Fault:
    kinds: tuple[Kind, ...] = ("cut", "reset", "stall", "half-close", "duplicate", "corrupt")
    every = chance.choice([0, 0, 0, 60_000])
    at = int(math.exp(chance.uniform(math.log(100), math.log(200_000))))
    return Fault(chance.choice(kinds), chance.choice(list(Direction)), at, chance.uniform(0.1, _LONGEST), every)


class _Doer:
    """Does what a schedule has at random times; called every few milliseconds."""

    def __init__(self, arena: Arena, timed: list[Timed]) -> None:
        self._arena = arena
        self._waiting = list(timed)
        self._started = time.monotonic()

    def __call__(self) -> None:
        while self._waiting and time.monotonic() - self._started >= self._waiting[0].at:
            self._do(self._waiting.pop(0))

    def _do(self, one: Timed) -> None:
        if one.verb in ("kill", "stop", "halt"):
            process = self._arena.processes[one.role]
            process.send({"kill": signal.SIGKILL, "stop": signal.SIGTERM, "halt": signal.SIGSTOP}[one.verb])
            if one.verb == "halt":
                going_on = threading.Timer(one.seconds, process.send, [signal.SIGCONT])
                going_on.daemon = True
                going_on.start()
        elif one.verb == "stall":
            self._arena.proxies[one.role].stall_all(one.seconds)
        else:
            self._arena.proxies[one.role].break_all(reset=one.verb == "reset")


def run_schedule(made: Bench, scenario: Scenario, seed: int, *, keep: bool = False) -> Row:
    """A row of the table."""
    schedule = draw(seed, scenario)
    with made.arena(scenario, proxied=True) as arena:
        for site, faults in schedule.lines.items():
            arena.proxies[site].place(*faults)
        doer = _Doer(arena, schedule.timed)
        verdict = judge(
            arena, lambda: arena.run_to_end(schedule.planned, tick=doer, patience=180, again=_ENDED), keep=keep
        )
        kills = sum(starts - 1 for starts in arena.starts.values())
        breaks = sum(len(proxy.struck) for proxy in arena.proxies.values())
    if not verdict.passed:
        again = f"python -m tests.system.faults.schedules --only {seed} --keep"
        print(f"\nFAILED {schedule}\n" + "\n".join(verdict.wrong) + f"\nto repeat it: {again}\n", flush=True)
    return {
        "seed": seed,
        "same": verdict.word,
        "kills": kills,
        "breaks": breaks,
        "seconds": round(verdict.seconds, 1),
    }


def _of_text(row: Mapping[str, str]) -> Row:
    """A row as the CSV has it, with its numbers."""
    numbers = {name: int(row[name]) for name in ("seed", "kills", "breaks")}
    return {**row, **numbers, "seconds": float(row["seconds"])}


def by_kills(rows: Sequence[Row]) -> list[Row]:
    """A row for each number of processes that ended; 200 are too many to read."""
    found: list[Row] = []
    for number in sorted({int(row["kills"]) for row in rows}):
        some = [row for row in rows if row["kills"] == number]
        found.append(
            {
                "processes that ended": number,
                "studies": len(some),
                "same": sum(row["same"] == "yes" for row in some),
                "breaks of lines": sum(int(row["breaks"]) for row in some),
                "longest (s)": max(float(row["seconds"]) for row in some),
            }
        )
    return found


def summary_of(rows: Sequence[Row]) -> str:
    """What the rows say together."""
    same = sum(row["same"] == "yes" for row in rows)
    kills, breaks = sum(int(row["kills"]) for row in rows), sum(int(row["breaks"]) for row in rows)
    seeds = [int(row["seed"]) for row in rows]
    return (
        f"{same} of {len(rows)} studies ended with the weights and rows of the undisturbed run, through {kills} ends "
        f"of processes and {breaks} breaks of the line (seeds {min(seeds)} to {max(seeds)})."
    )


def main() -> None:
    """Runs them."""
    options = parser(__doc__)
    options.add_argument("--count", type=int, default=200, help="schedules (default: 200)")
    options.add_argument("--seed", type=int, default=1, help="of the first; the others follow it (default: 1)")
    options.add_argument("--only", type=int, nargs="+", metavar="SEED", help="these alone")
    options.add_argument("--parallel", type=int, default=1, help="runs at a time (default: 1)")
    chosen = options.parse_args()
    seeds = chosen.only or list(range(chosen.seed, chosen.seed + chosen.count))
    known = {int(row["seed"]): row for row in passed("schedules")} if chosen.go_on else {}
    rows: list[Row] = [_of_text(known[seed]) for seed in seeds if seed in known]
    missing = [seed for seed in seeds if seed not in known]
    with bench(chosen.folder) as made:
        made.undisturbed(SCENARIO)
        for row in each(lambda seed: run_schedule(made, SCENARIO, seed, keep=chosen.keep), missing, chosen.parallel):
            rows.append(row)
            print(f"{len(rows)}/{len(seeds)}", *row.values(), flush=True)
            if chosen.write_docs:
                write("schedules", rows, summary_of(rows), page=by_kills(rows))
    report("schedules", rows, summary_of(rows), write_docs=chosen.write_docs, page=by_kills(rows))
    raise SystemExit(0 if all(row["same"] == "yes" for row in rows) else 1)


if __name__ == "__main__":
    main()
