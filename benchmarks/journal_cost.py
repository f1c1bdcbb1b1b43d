"""What do the journal and durable files cost a round?

The coordinator and sites of `round_overhead` (real processes over mutual TLS; a site sends a constant instead of
training), in one run whose rounds alternate in blocks between two modes:

- "with": as the product is. The coordinator journals each decision with full sync, writes and syncs updates and the
  round's state; a site writes and syncs its update before it sends it.
- "without": nothing is journaled, no state is written, nothing is synced. Updates are still files, as they are summed
  from files, and sent from them.

By default everything lies in memory (/dev/shm), where a write costs a copy and a sync nothing: what remains is what the
project's own code costs, apart from the disk's own time. `--folder` on a disk shows that, too.

How to read it: "with s" and "without s" are median times from the beginning of one round to that of the next; the first
round of each block is left out. "ratio" is the first divided by the second. The blocks' own ratios are in the CSV.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import round_overhead
from benchmarks._processes import processes
from benchmarks._report import median, report
from benchmarks._study import benchmark_study
from common.security.certificates import ensure_simulation_identities
from common.wire.tensors import Stored
from server.run_folder import RunFolder, write_atomically

BLOCK = 6
"""Rounds in one mode, of which the first is not timed."""
_TIMES = "times.json"
_SHOWN = {
    "filters": "filters",
    "parameters": "weights",
    "sites": "sites",
    "with_seconds": "with s",
    "without_seconds": "without s",
    "ratio": "ratio",
    "lowest_ratio": "lowest",
    "highest_ratio": "highest",
    "where": "where",
}


def main() -> None:
    """Measures every size asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=5, help="how many sites (default: 5)")
    parser.add_argument("--filters", type=int, nargs="+", default=[64], help="sizes of the U-Net (default: 64)")
    parser.add_argument("--blocks", type=int, default=4, help=f"pairs of blocks of {BLOCK} rounds (default: 4)")
    parser.add_argument("--threads", type=int, default=1, help="TensorFlow's threads at the coordinator (default: 1)")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="where all files are (default: memory)")
    roles = parser.add_subparsers(metavar="")  # the processes that it starts; not for people
    coordinator = roles.add_parser("coordinator")
    coordinator.add_argument("run", type=Path)
    coordinator.set_defaults(role=_coordinator)
    site = roles.add_parser("site")
    site.add_argument("run", type=Path)
    site.add_argument("name")
    site.set_defaults(role=_site)
    options = parser.parse_args()
    if "role" in options:
        options.role(options)
        return
    rows = []
    for filters in options.filters:
        with tempfile.TemporaryDirectory(prefix="wardround-benchmark-", dir=options.folder) as folder:
            print(f"U-Net of {filters} filters, {options.sites} sites ...", file=sys.stderr, flush=True)
            rows.append(measure(Path(folder), filters, options.sites, options.blocks, options.threads))
            rows[-1]["where"] = str(options.folder)
    report("journal_cost", rows, _SHOWN)


def measure(folder: Path, filters: int, count: int, pairs: int, threads: int) -> dict[str, Any]:
    """One row."""
    sites = [f"site-{number:02d}" for number in range(count)]
    rounds = 2 * pairs * BLOCK + 1  # the last has no next one that would end it
    study = benchmark_study(filters=filters, patch=(32, 32), rounds=rounds, sites=sites, threads=threads)
    run = RunFolder(folder / "run")
    run.prepare(study)
    ensure_simulation_identities(run.identity, study.name, sites, ["127.0.0.1"])
    with processes(folder) as started:
        coordinator = started.start("coordinator", "journal_cost", "coordinator", run.path)
        started.wait_until((run.path / round_overhead._PLAN).exists)
        running = [started.start(site, "journal_cost", "site", run.path, site) for site in sites]
        started.wait_until((run.path / _TIMES).exists)
        for process in [coordinator, *running]:  # what would be published is not of interest
            process.kill()
            process.wait()
    opened = json.loads((run.path / _TIMES).read_text())
    seconds = [later - earlier for earlier, later in itertools.pairwise(opened)]
    blocks = [seconds[start + 1 : start + BLOCK] for start in range(0, len(seconds), BLOCK)]
    on, off = blocks[0::2], blocks[1::2]
    ratios = [median(one) / median(other) for one, other in zip(on, off, strict=True)]
    with_seconds = median([value for block in on for value in block])
    without_seconds = median([value for block in off for value in block])
    return {
        "filters": filters,
        "parameters": json.loads((run.path / round_overhead._PLAN).read_text())["parameters"],
        "sites": count,
        "with_seconds": with_seconds,
        "without_seconds": without_seconds,
        "ratio": round(with_seconds / without_seconds, 3),
        "lowest_ratio": round(min(ratios), 3),
        "highest_ratio": round(max(ratios), 3),
        "rounds": rounds,
    }


class _Mode:
    """Whether this process journals and syncs now: in every second block of rounds, beginning with the first."""

    on = True

    def at(self, number: int) -> None:
        """A round begins."""
        self.on = (number - 1) // BLOCK % 2 == 0


def _switched_sync(mode: _Mode) -> None:
    """Has this process sync files in one mode only."""
    system: Any = os
    sync = os.fsync

    def switched(file: Any) -> None:
        if mode.on:
            sync(file)

    system.fsync = switched


def _coordinator(options: argparse.Namespace) -> None:
    """That of `round_overhead`, with the switch; writes when each round was opened, once the last one is."""
    import server.journal
    import server.state

    journal: Any = server.journal
    state: Any = server.state
    mode, opened = _Mode(), list[float]()
    _switched_sync(mode)
    rounds = RunFolder(options.run).read_study().training.rounds
    insert, write_tensors, open_round = journal._insert, state.write_tensors, journal.Journal.opened

    def opened_now(self: Any, kind: str, number: int, sites: Sequence[str], broadcast: bytes) -> None:
        opened.append(time.monotonic())
        mode.at(number)
        open_round(self, kind, number, sites, broadcast)
        if number == rounds:
            write_atomically(options.run / _TIMES, json.dumps(opened))

    def insert_if_on(*arguments: Any) -> None:
        if mode.on:
            insert(*arguments)

    def write_if_on(path: Path, tensors: Any, *rest: Any) -> Stored:
        stored: Stored = write_tensors(path, tensors, *rest) if mode.on else Stored(path, b"", 0)
        return stored

    journal.Journal.opened, journal._insert, state.write_tensors = opened_now, insert_if_on, write_if_on
    round_overhead._coordinator(options)


def _site(options: argparse.Namespace) -> None:
    """That of `round_overhead`, with the switch."""
    mode = _Mode()
    _switched_sync(mode)
    work = round_overhead.ConstantWorker.work

    def switched(self: Any, kind: str, number: int, broadcast: Any, on_batch: Any) -> Any:
        mode.at(number)
        return work(self, kind, number, broadcast, on_batch)

    round_overhead.ConstantWorker.work = switched  # type: ignore[method-assign, assignment]
    round_overhead._site(options)


if __name__ == "__main__":
    main()
