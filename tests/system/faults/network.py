"""Each fault of the network: is the end the same to the bit, and how much was sent again?

Two light sites; one reaches the coordinator through a proxy that does one thing to the line, in the middle of a
transfer where a byte is named. A site sends (and receives) about 2 MB a round, in two rounds, over a line of 2 MB/s.

How to read it: "moved" is all that passed on the line in the direction of the fault, in kB; "again" is how much more
that is than in a run through the same proxy that does nothing; "of a transfer" is "again" divided by the size of one
transfer: 1.00 would be a transfer sent anew. "breaks" is how often the line broke. A break that costs nothing still
costs a TLS handshake of 2 to 4 kB.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from common.wire.tensors import encoded_size
from tests.system.faults.arena import Arena, Bench, Scenario, bench, judge
from tests.system.faults.light import LightPlan
from tests.system.faults.proxy import Direction, Fault, Kind, Proxy
from tests.system.faults.report import Row, parser, report
from tests.system.faults.studies import light

SCENARIO = light(sites=2, rounds=2, filters=16, depth=3)
UP, DOWN = Direction.UP, Direction.DOWN
LINE = 2e6
"""Bytes a second of the line. Without a bound whole transfers would wait in buffers, to be lost in a break."""


@dataclass(frozen=True)
class Trial:
    """What is done to the line.

    Attributes
    ----------
    direction : in which it happens, and is counted.
    faults : made of the sizes of an update and of a broadcast.
    throttle, delay, refusing : see `Proxy`; it refuses for so many seconds from the start.
    """

    name: str
    direction: Direction = UP
    faults: Callable[[int], list[Fault]] = field(default=lambda size: [])
    throttle: float = LINE
    delay: float = 0.0
    refusing: float = 0.0


def _at(kind: Kind, direction: Direction, part: float, *, seconds: float = 0.0, every: float = 0.0) -> Trial:
    where = "update" if direction is UP else "broadcast"
    how = {0.0: "", math.inf: " for ever"}.get(seconds, f" for {seconds:.0f} s")
    name = f"{kind}{how} at {part:.0%} of the {where}"
    if every:
        name = f"{kind} after every {every:.0%} of the {where}"
    return Trial(
        name,
        direction,
        lambda size: [Fault(kind, direction, max(1, int(part * size)), seconds, int(every * size))],
    )


TRIALS: Mapping[str, Trial] = {
    trial.name: trial
    for trial in (
        *(_at(kind, way, 0.5) for kind in ("cut", "reset") for way in (UP, DOWN)),
        *(_at("half-close", way, 0.5) for way in (UP, DOWN)),
        *(_at("duplicate", way, 0.5) for way in (UP, DOWN)),
        *(_at("corrupt", way, 0.5) for way in (UP, DOWN)),
        *(_at("stall", way, 0.5, seconds=5) for way in (UP, DOWN)),
        *(_at("stall", way, 0.5, seconds=math.inf) for way in (UP, DOWN)),
        _at("cut", UP, 0.99),
        _at("reset", DOWN, 0.99),
        _at("reset", UP, 1.6),
        *(_at("reset", way, 0.4, every=0.4) for way in (UP, DOWN)),
        Trial("reset in the TLS handshake", UP, lambda size: [Fault("reset", UP, 200)]),
        Trial("throttled to 250 kB/s", UP, throttle=2.5e5),
        Trial("delayed by 100 ms a piece", UP, delay=0.1),
        Trial("refused for 6 s", UP, refusing=6.0),
        Trial(
            "throttled to 500 kB/s, delayed by 20 ms, and reset after every 50%",
            UP,
            lambda size: [Fault("reset", UP, size // 2, every=size // 2)],
            throttle=5e5,
            delay=0.02,
        ),
    )
}


def sizes(made: Bench, scenario: Scenario) -> dict[Direction, int]:
    """Bytes of an update's and of a broadcast's blob."""
    plan = LightPlan.read(made.plan(scenario))
    return {UP: encoded_size(plan.sent), DOWN: encoded_size([spec for spec in plan.broadcast if spec.shape])}


def baseline(made: Bench, scenario: Scenario) -> dict[Direction, int]:
    """What passes on a good line."""
    with made.arena(scenario, proxied=True) as arena:
        _proxy(arena).throttle = LINE
        arena.run_to_end()
        passed = dict(_proxy(arena).passed)
    arena.remove()
    return passed


def run_trial(
    made: Bench, scenario: Scenario, trial: Trial, good: Mapping[Direction, int], *, keep: bool = False
) -> Row:
    """A row of the table."""
    size = sizes(made, scenario)[trial.direction]
    with made.arena(scenario, proxied=True) as arena:
        proxy = _proxy(arena)
        proxy.place(*trial.faults(size))
        proxy.throttle, proxy.delay, proxy.refusing = trial.throttle, trial.delay, trial.refusing > 0

        def tick() -> None:
            if proxy.refusing:
                process = arena.processes[scenario.sites[0]]
                proxy.refusing = _age(process.started) < trial.refusing

        verdict = judge(arena, lambda: arena.run_to_end(tick=tick), keep=keep)
    again = proxy.passed[trial.direction] - good[trial.direction]
    expected = bool(trial.faults(size))
    if verdict.passed and expected and not proxy.struck:
        verdict.wrong = ["the fault never happened"]
    if not verdict.passed:
        print(f"\n{trial.name}:\n" + "\n".join(verdict.wrong), flush=True)
    return {
        "fault": trial.name,
        "same": verdict.word,
        "breaks": len(proxy.struck),
        "connections": proxy.connections,
        "moved": proxy.passed[trial.direction] // 1000,
        "again": max(0, again) // 1000,
        "of a transfer": round(max(0, again) / size, 2),
        "seconds": round(verdict.seconds, 1),
    }


def _proxy(arena: Arena) -> Proxy:
    return arena.proxies[arena.scenario.sites[0]]


def _age(started: float) -> float:
    import time

    return time.monotonic() - started


def main() -> None:
    """Runs them."""
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", metavar="NAME", choices=list(TRIALS), help="these faults alone")
    chosen = options.parse_args()
    rows = []
    with bench(chosen.folder) as made:
        made.undisturbed(SCENARIO)
        good = baseline(made, SCENARIO)
        for name, trial in TRIALS.items():
            if not chosen.only or name in chosen.only:
                rows.append(run_trial(made, SCENARIO, trial, good, keep=chosen.keep))
                print(*rows[-1].values(), flush=True)
        size = sizes(made, SCENARIO)
    same = sum(row["same"] == "yes" for row in rows)
    summary = (
        f"{same} of {len(rows)} faults changed nothing. An update has {size[UP] / 1000:.0f} kB, a broadcast "
        f"{size[DOWN] / 1000:.0f} kB; on a good line {good[UP] / 1000:.0f} kB go up and {good[DOWN] / 1000:.0f} kB "
        "down in two rounds."
    )
    report("network", rows, summary, write_docs=chosen.write_docs)
    raise SystemExit(0 if same == len(rows) else 1)


if __name__ == "__main__":
    main()
