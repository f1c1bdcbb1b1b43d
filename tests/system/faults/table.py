"""Killed at each failpoint, and started again by the same command: is the end the same to the bit?

A study of two sites that train for real, three rounds of training and validation. It is run once undisturbed, which
also counts how often each process comes by each failpoint; then once for each failpoint and process, which is killed by
SIGKILL as it comes by and started again. What must be the same: the SHA-256 of every file of weights, the rows of
rounds.csv and sites.csv but for seconds and bytes, each round's journaled cohort, the published versions, and that
nothing is left lying about. Private rounds, whose noise is drawn anew in each run, are in
tests/client/test_private.py, enrolment and rotation in tests/server/test_enrolment.py.

With `--secure` the study has secure sums, of five light sites, and the failpoints are those of secure sums. A
coordinator that is killed while its sites unmask skips that round, and "same" says "skipped": the run goes on to its
end with every other round, and no sum of that one is on any disk.

How to read it: "at" is the time of coming by at which it was killed, of how many in the undisturbed run; failpoints
that are passed often are tried at the first, the middle and the last (`--every`: at each). "same" is the verdict. "not
reached" means that the process ended without coming by.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from common.failpoints import COORDINATOR as COORDINATOR_NAMES
from common.failpoints import NAMES, SITE
from tests.system.faults.arena import COORDINATOR, KILLED, Bench, Scenario, bench, each, judge
from tests.system.faults.report import Row, parser, passed, report, write
from tests.system.faults.studies import REAL, SECURE

_TRIES = 3
SKIPPING = ("secure.unmasking", "secure.unmasked")
"""Where a coordinator that is killed has lost its round for good: the sites give its sum out once."""


@dataclass(frozen=True)
class Case:
    """A process, killed as it comes by a failpoint for the `at`-th time, of `of`."""

    role: str
    name: str
    at: int
    of: int


def cases(made: Bench, scenario: Scenario, *, every: bool = False) -> list[Case]:
    """What to try: every failpoint of the coordinator and of the first site, also those that it shares with the other.

    A failpoint that its process never comes by is tried too, and shows as not reached; those of private rounds only
    where the study has such: their noise differs from run to run. Of a study with secure sums only theirs are tried.
    """
    counts = made.counts(scenario)
    private = scenario.study.privacy.unit == "patient"
    secure = scenario.study.secure_aggregation.required
    found = []
    for role, names in ((COORDINATOR, COORDINATOR_NAMES), (scenario.sites[0], SITE)):
        for name in (name for name in NAMES if name in names or counts[role].get(name)):
            if name.startswith("privacy.") and not private:
                continue
            if name.startswith("secure.") is not secure:
                continue
            of = counts[role].get(name, 0)
            times = range(1, of + 1) if every else sorted({1, (of + 1) // 2, of} - {0})
            found += [Case(role, name, at, of) for at in times or [1]]
    return found


def run_case(made: Bench, scenario: Scenario, case: Case, *, keep: bool = False) -> Row:
    """A row of the table."""
    planned = {case.role: [f"{case.name}@{case.at}=kill"]}
    for _ in range(_TRIES):  # the last coming by of some depends on who hangs up first
        with made.arena(scenario) as arena:
            verdict = judge(arena, lambda: arena.run_to_end(planned), keep=keep, skipping=case.name in SKIPPING)
            reached = arena.codes[case.role][:1] == [KILLED]
        if reached or not verdict.passed:
            break
    if not verdict.passed:
        print(f"\n{case}:\n" + "\n".join(verdict.wrong), flush=True)
    name, process, at = case_key(case)
    return {
        "failpoint": name,
        "process": process,
        "at": at,
        "same": verdict.word if reached or not verdict.passed else "not reached",
        "seconds": round(verdict.seconds, 1),
        "what it is": NAMES[case.name],
    }


def run_cases(
    made: Bench, scenario: Scenario, chosen: Sequence[Case], parallel: int, *, keep: bool = False
) -> Iterator[Row]:
    """All rows, in order, as they come."""
    made.undisturbed(scenario)
    for number, row in enumerate(each(lambda case: run_case(made, scenario, case, keep=keep), chosen, parallel), 1):
        print(f"{number}/{len(chosen)}", *list(row.values())[:-1], flush=True)
        yield row


def expected(name: str) -> str:
    """What a row should say of a coordinator or site that was killed at a failpoint."""
    return "skipped" if name in SKIPPING else "yes"


def case_key(case: Case) -> tuple[str, ...]:
    """By which a case is found in a table of an earlier run."""
    return case.name, "coordinator" if case.role == COORDINATOR else "site", f"{case.at} of {case.of}"


def row_key(row: Row) -> tuple[str, ...]:
    """The `case_key` of a row's case."""
    return str(row["failpoint"]), str(row["process"]), str(row["at"])


def summary_of(rows: Sequence[Row], weights: Mapping[str, str]) -> str:
    """What the rows say together; `weights` are the SHA-256 of the undisturbed run's, by name."""
    same = [row for row in rows if row["same"] == "yes"]
    points, last = len({row["failpoint"] for row in same}), max(weights)
    every = len([name for name in (*COORDINATOR_NAMES, *SITE) if not name.startswith(("privacy.", "secure."))])
    return (
        f"{len(same)} of {len(rows)} kills ended as the undisturbed run did, at {points} of {every} failpoints; "
        f"its weights `{last}` have SHA-256 `{weights[last][:16]}...`."
    )


def _secure(chosen: argparse.Namespace) -> NoReturn:
    with bench(chosen.folder) as made:
        wanted = [one for one in cases(made, SECURE, every=chosen.every) if not chosen.only or one.name in chosen.only]
        rows = list(run_cases(made, SECURE, wanted, chosen.parallel, keep=chosen.keep))
    right = [row for row in rows if row["same"] == expected(str(row["failpoint"]))]
    skipped = sum(row["same"] == "skipped" for row in right)
    summary = (
        f"{len(right)} of {len(rows)} kills ended as they should: {len(right) - skipped} as the undisturbed run did, "
        f"{skipped} without the round that was being unmasked."
    )
    report("secure", rows, summary, write_docs=chosen.write_docs)
    raise SystemExit(0 if len(right) == len(rows) else 1)


def main() -> None:
    """Runs them."""
    options = parser(__doc__)
    options.add_argument("--every", action="store_true", help="kill at each time of coming by, not at three")
    options.add_argument("--only", nargs="+", metavar="NAME", help="these failpoints alone")
    options.add_argument(
        "--secure", action="store_true", help="the failpoints of secure sums, in a study that has them"
    )
    options.add_argument("--parallel", type=int, default=1, help="runs at a time (default: 1)")
    chosen = options.parse_args()
    if chosen.secure:
        _secure(chosen)
    with bench(chosen.folder) as made:
        wanted = [case for case in cases(made, REAL, every=chosen.every) if not chosen.only or case.name in chosen.only]
        known = {row_key(row): row for row in passed("table")} if chosen.go_on else {}
        done = [known[case_key(case)] for case in wanted if case_key(case) in known]
        rows: list[Row] = [{**one, "seconds": float(one["seconds"])} for one in done]
        missing = [case for case in wanted if case_key(case) not in known]
        for row in run_cases(made, REAL, missing, chosen.parallel, keep=chosen.keep):
            rows.append(row)
            if chosen.write_docs:
                write("table", rows, summary_of(rows, made.undisturbed(REAL).models))
        report("table", rows, summary_of(rows, made.undisturbed(REAL).models), write_docs=chosen.write_docs)
    raise SystemExit(0 if all(row["same"] == "yes" for row in rows) else 1)


if __name__ == "__main__":
    main()
