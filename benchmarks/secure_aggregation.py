"""What does secure aggregation cost a round, beside the same round in the clear?

Real processes on this machine: the product's coordinator up to where it would publish, and the product's agents, over
mutual TLS on loopback; training is replaced by constants (see `benchmarks.round_overhead`, whose parts these are). Two
studies that differ in the section `secure_aggregation` alone run one after the other, and that twice, so that a machine
that slows down slows both.

How to read it: "plain s" and "secure s" are the median times from the beginning of one round to that of the next, the
first round left out; "time" is their ratio. "bytes" is what a secure round moves up and down, divided by what the plain
one moves. "peak MB" is the most memory that each coordinator ever held. A process a site, unless `--site-processes`
says how many there are for all: the sites are threads of them then, and share their two cores' time nevertheless.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import round_overhead
from benchmarks._processes import processes
from benchmarks._report import RESULTS, median, report
from benchmarks._study import benchmark_study
from common.security.certificates import ensure_simulation_identities
from server.journal import Journal
from server.run_folder import RunFolder

_NAME = "secure_aggregation"
_DOCS = Path(__file__).resolve().parents[1] / "docs" / "secure-aggregation.md"
_SECTION = "secure_aggregation: {protocol: bonawitz, largest_weight: 1000}"
_SHOWN = {
    "sites": "sites",
    "parameters": "weights",
    "plain_seconds": "plain s",
    "secure_seconds": "secure s",
    "time_ratio": "time",
    "bytes_ratio": "bytes",
    "plain_peak_mb": "plain peak MB",
    "secure_peak_mb": "secure peak MB",
}


def main() -> None:
    """Measures every combination of sizes asked for, and adds it to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, nargs="+", default=[5], help="numbers of sites, 3 to 50 (default: 5)")
    parser.add_argument("--filters", type=int, nargs="+", default=[16], help="sizes of the U-Net (default: 16)")
    parser.add_argument("--rounds", type=int, default=6, help="rounds of each run, at least 3 (default: 6)")
    parser.add_argument("--site-processes", type=int, help="processes for all sites (default: one a site)")
    parser.add_argument(
        "--folder", type=Path, help="where updates and states are written (default: a temporary folder)"
    )
    parser.add_argument("--write-docs", action="store_true", help=f"only write the table into docs/{_DOCS.name}")
    roles = parser.add_subparsers(metavar="")  # the processes that it starts; not for people
    sites = roles.add_parser("sites")
    sites.add_argument("run", type=Path)
    sites.add_argument("names", nargs="+")
    sites.set_defaults(role=_sites)
    options = parser.parse_args()
    if "role" in options:
        options.role(options)
        return
    if options.write_docs:
        write_docs()
        return
    if options.rounds < 3 or not all(3 <= count <= 50 for count in options.sites):
        parser.error("--rounds, --sites: expected at least 3 rounds, and 3 to 50 sites")
    for filters in options.filters:
        for count in options.sites:
            print(f"U-Net of {filters} filters, {count} sites ...", file=sys.stderr, flush=True)
            row = measure(options.folder, filters, count, options.rounds, options.site_processes or count)
            kept = [one for one in _rows() if (one["filters"], one["sites"]) != (str(filters), str(count))]
            report(_NAME, sorted([*kept, row], key=_size), _SHOWN)


def measure(folder: Path | None, filters: int, count: int, rounds: int, site_processes: int) -> dict[str, Any]:
    """One row: plain, secure, secure, plain."""
    found: dict[str, list[dict[str, Any]]] = {"plain": [], "secure": []}
    for kind in ("plain", "secure", "secure", "plain"):
        with tempfile.TemporaryDirectory(prefix="wardround-benchmark-", dir=folder) as place:
            found[kind].append(_run(Path(place), kind, filters, count, rounds, site_processes))
    seconds = {kind: median([value for run in runs for value in run["seconds"]]) for kind, runs in found.items()}
    moved = {kind: runs[0]["bytes"] for kind, runs in found.items()}
    return {
        "filters": filters,
        "sites": count,
        "site_processes": site_processes,
        "parameters": found["plain"][0]["parameters"],
        "plain_seconds": seconds["plain"],
        "secure_seconds": seconds["secure"],
        "time_ratio": round(seconds["secure"] / seconds["plain"], 3),
        "plain_bytes": moved["plain"],
        "secure_bytes": moved["secure"],
        "bytes_ratio": round(moved["secure"] / moved["plain"], 4),
        "plain_peak_mb": max(run["peak_mb"] for run in found["plain"]),
        "secure_peak_mb": max(run["peak_mb"] for run in found["secure"]),
    }


def _run(folder: Path, kind: str, filters: int, count: int, rounds: int, site_processes: int) -> dict[str, Any]:
    sites = [f"site-{number:02d}" for number in range(count)]
    extra = _SECTION if kind == "secure" else ""
    study = benchmark_study(filters=filters, patch=(32, 32), rounds=rounds, sites=sites, extra=extra)
    run = RunFolder(folder / "run")
    run.prepare(study)
    ensure_simulation_identities(run.identity, study.name, sites, ["127.0.0.1"])
    with processes(folder) as started:
        coordinator = started.start("coordinator", "round_overhead", "coordinator", run.path)
        started.wait_until((run.path / round_overhead.PLAN).exists)
        journal = Journal(run.journal)
        started.wait_until(lambda: bool(journal.events("opened")))
        groups = [sites[number::site_processes] for number in range(site_processes)]
        for number, group in enumerate(groups):
            if group:
                started.start(f"sites-{number}", _NAME, "sites", run.path, *group)
        started.wait_until(lambda: coordinator.poll() is not None)  # a site that lost its line at the end waits on
    opened = [event["at"] for event in journal.events("opened")]
    skipped = journal.events("skipped")
    journal.close()
    if skipped:
        raise RuntimeError(f"a round was skipped: {skipped[0]['reason']}")
    with run.sites.open(newline="") as file:
        ledger = [row for row in csv.DictReader(file) if int(row["round"]) > 1]
    outcome = json.loads((run.path / round_overhead.OUTCOME).read_text())
    return {
        "seconds": np.diff(opened[1:]).tolist(),
        "bytes": sum(int(row["bytes_down"]) + int(row["bytes_up"]) for row in ledger) // (rounds - 1),
        "parameters": json.loads((run.path / round_overhead.PLAN).read_text())["parameters"],
        "peak_mb": outcome["peak_mb"],
    }


def _size(row: Mapping[str, Any]) -> tuple[int, int]:
    return int(row["filters"]), int(row["sites"])


def _rows() -> list[dict[str, Any]]:
    path = RESULTS / f"{_NAME}.csv"
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{key: value for key, value in row.items() if key != "cores"} for row in csv.DictReader(file)]


def write_docs() -> None:
    """Writes the results as a table into the page."""
    from benchmarks._pooled import write_between  # which loads what trains

    begin, end = f"<!-- {_NAME}: begin -->\n", f"<!-- {_NAME}: end -->\n"
    write_between(_DOCS, begin, end, _table(_rows()))


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    lines = [" | ".join(_SHOWN.values()), " | ".join("---:" for _ in _SHOWN)]
    lines += [" | ".join(row[key] for key in _SHOWN) for row in rows]
    return "".join(f"| {line} |\n" for line in lines)


def _sites(options: argparse.Namespace) -> None:
    """Some of the sites, as threads."""
    threads = [
        threading.Thread(target=round_overhead.run_site, args=(options.run, name), name=name) for name in options.names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
