"""A full or read-only disk at each write: is it said clearly, is nothing lost, does the study go on once it is mended?

A disk is a small tmpfs, where this user may mount one. The process halts itself at a failpoint just before a write; the
disk is then filled to its last byte, and the process goes on: it meets a really full disk at exactly that write. It
must end with exit code 7 and one sentence that names the file. Then space is freed, and the process started again by
the same command. Elsewhere, and for read-only disks, the failpoint raises the error itself.

How to read it: "code" is how the process ended ("went on": it did not, as nothing that counts was to be written before
there was space again), "said" whether its last words are one sentence with a path and no traceback, "same" whether
weights, rows and cohorts are those of the undisturbed run.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.failpoints import NAMES
from server.run_folder import RunFolder
from tests.system.faults.arena import COORDINATOR, Arena, Bench, Scenario, bench, judge
from tests.system.faults.report import Row, parser, report
from tests.system.faults.studies import light

SCENARIO = light(sites=2, rounds=2, filters=16, depth=2)
_BROKEN = 7
_MEGABYTES = 48
_WAIT = 20.0

COORDINATOR_WRITES: Sequence[tuple[str, int]] = (
    ("journal.before", 1),
    ("journal.before", 3),
    ("round.opened", 2),
    ("update.partial", 1),
    ("update.stored", 2),
    ("blob.before_rename", 1),
    ("round.closing", 1),
    ("sites_csv.before", 1),
    ("round.updated", 2),
    ("state.before", 1),
    ("model.before", 1),
    ("metrics.before", 1),
    ("study.trained", 1),
    ("publish.before", 1),
    ("report.before", 1),
    ("status.before", 2),
)
SITE_WRITES: Sequence[tuple[str, int]] = (
    ("site.task", 1),
    ("site.broadcast_partial", 1),
    ("site.trained", 1),
    ("site.trained", 2),
    ("site.held", 1),
)
Error = Literal["full", "ENOSPC", "EROFS"]


@dataclass(frozen=True)
class Trial:
    """A disk that fails under a process as it comes by a failpoint for the `at`-th time."""

    role: str
    name: str
    at: int
    error: Error


def trials(scenario: Scenario, *, mounting: bool) -> list[Trial]:
    """All of them."""
    errors: Sequence[Error] = ("full", "EROFS") if mounting else ("ENOSPC", "EROFS")
    places = [(COORDINATOR, *place) for place in COORDINATOR_WRITES]
    places += [(scenario.sites[0], *place) for place in SITE_WRITES]
    return [Trial(*place, error) for error in errors for place in places]


def may_mount() -> bool:
    """Whether this user may mount a small file system."""
    if os.geteuid() != 0:
        return False
    try:
        with small_disk(1):
            return True
    except (OSError, subprocess.SubprocessError):
        return False


@contextlib.contextmanager
def small_disk(megabytes: int) -> Iterator[Path]:
    """A disk of this size, for as long as the context lasts."""
    with tempfile.TemporaryDirectory(prefix="wardround-disk-") as folder:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "wardround", folder], check=True, capture_output=True
        )
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True, capture_output=True)


def fill(disk: Path) -> Path:
    """Fills the disk to its last byte with one file, which is returned."""
    ballast = disk / "ballast"
    descriptor = os.open(ballast, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        for size in (1 << 20, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    os.write(descriptor, b"\0" * size)
    finally:
        os.close(descriptor)
    return ballast


def run_trial(made: Bench, scenario: Scenario, trial: Trial, *, keep: bool = False) -> Row:
    """A row of the table."""
    with contextlib.ExitStack() as stack:
        arena = stack.enter_context(made.arena(scenario))
        if trial.error == "full":
            disk = stack.enter_context(small_disk(_MEGABYTES))
            ended = _Ended()
            verdict = judge(arena, lambda: _on_full_disk(arena, trial, disk, ended), keep=keep)
        else:
            ended = _Ended()
            verdict = judge(arena, lambda: _with_error(arena, trial, ended), keep=keep)
    clear = is_clear(ended.said)
    passed = verdict.passed and ended.code in (_BROKEN, None) and (clear or ended.code is None)
    if not passed:
        print(f"\n{trial}: ended with {ended.code}\n{ended.said}\n" + "\n".join(verdict.wrong), flush=True)
    return {
        "before the write": trial.name,
        "at": trial.at,
        "process": "coordinator" if trial.role == COORDINATOR else "site",
        "disk": {"full": "full", "ENOSPC": "full (simulated)", "EROFS": "read-only (simulated)"}[trial.error],
        "code": "went on" if ended.code is None else ended.code,
        "said": "yes" if clear else ("-" if ended.code is None else "NO"),
        "same": verdict.word,
        "seconds": round(verdict.seconds, 1),
        "what it is": NAMES[trial.name],
        "passed": "yes" if passed else "NO",
    }


@dataclass
class _Ended:
    """How the process ended when the disk failed; code None: it did not."""

    code: int | None = None
    said: str = ""


def _on_full_disk(arena: Arena, trial: Trial, disk: Path, ended: _Ended) -> None:
    if trial.role == COORDINATOR:
        arena.run = RunFolder(disk / "run")
    else:
        arena.sites_folder = disk
    for role in arena.codes:
        arena.start(role, f"{trial.name}@{trial.at}=stop" if role == trial.role else "")
    process = arena.processes[trial.role]
    arena.until(lambda: process.stopped() or process.poll() is not None)
    assert process.poll() is None, f"ended with {process.poll()} without coming by {trial.name}"
    ballast = fill(disk)
    process.send(signal.SIGCONT)
    end = time.monotonic() + _WAIT
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    ended.code, ended.said = process.poll() or None, process.said()
    ballast.unlink()
    arena.run_to_end(again=(_BROKEN,))


def _with_error(arena: Arena, trial: Trial, ended: _Ended) -> None:
    arena.run_to_end({trial.role: [f"{trial.name}@{trial.at}=error:{trial.error}"]}, again=(_BROKEN,))
    codes = arena.codes[trial.role]
    ended.code = codes[0] if len(codes) > 1 else None
    ended.said = (arena.folder / f"{trial.role}.log").read_text(errors="replace")


def is_clear(said: str) -> bool:
    """Whether what a process said has one error, of one line, with a path, and no traceback."""
    errors = [line for line in said.splitlines() if line.startswith(("error: ", "internal error"))]
    return len(errors) == 1 and errors[0].startswith("error: ") and "/" in errors[0] and "Traceback" not in said


def main() -> None:
    """Runs them."""
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", metavar="NAME", help="these failpoints alone")
    chosen = options.parse_args()
    mounting = may_mount()
    rows = []
    with bench(chosen.folder) as made:
        for trial in trials(SCENARIO, mounting=mounting):
            if not chosen.only or trial.name in chosen.only:
                rows.append(run_trial(made, SCENARIO, trial, keep=chosen.keep))
                print(*list(rows[-1].values())[:-2], flush=True)
    passed = sum(row["passed"] == "yes" for row in rows)
    summary = f"{passed} of {len(rows)} failures of the disk were said clearly and lost nothing. Full disks are " + (
        f"real ones, of {_MEGABYTES} MB." if mounting else "simulated, as no small file system could be mounted."
    )
    shown = ["before the write", "at", "process", "disk", "code", "said", "same", "what it is"]
    report("disk", rows, summary, write_docs=chosen.write_docs, shown=shown)
    raise SystemExit(0 if passed == len(rows) else 1)


if __name__ == "__main__":
    main()
