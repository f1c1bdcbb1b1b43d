"""The power fails at each failpoint: is what was acknowledged on the disk, and not only in the system's memory?

A killed process leaves what it wrote in the system's cache; a power cut does not. Here the process's folder is on an
ext4 file system in a file (a loop device; root only), which writes to that file nothing but what was synced, and what
is older than many seconds. When the process is killed, the file is copied at once, and the copy is mounted in the place
of the first: whatever was not synced is gone. Then the process is started again by the same command.

How to read it: as the table of kills. "disk" is whose disk lost its power, the coordinator's or a site's.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from common.failpoints import NAMES
from server.run_folder import RunFolder
from tests.system.faults.arena import COORDINATOR, KILLED, Arena, Bench, Scenario, bench, each, judge
from tests.system.faults.report import Row, parser, report
from tests.system.faults.studies import light
from tests.system.faults.table import Case, cases

SCENARIO = light(sites=2, rounds=2)
_MEGABYTES = 64
# Metadata is committed every 5 minutes instead of 5 seconds, and a rename does not sync what it renames.
_OPTIONS = "loop,commit=300,noauto_da_alloc"


class LoopDisk:
    """A small ext4 file system in a file, whose power can be cut."""

    def __init__(self, folder: Path) -> None:
        self._image = folder / "disk.img"
        self.path = folder / "disk"
        self.path.mkdir()
        with self._image.open("wb") as file:
            file.truncate(_MEGABYTES << 20)
        _run("mkfs.ext4", "-q", "-F", str(self._image))
        self._mount()
        os.sync()

    def cut(self) -> None:
        """What was not synced is lost. Nobody may have a file open on it."""
        after = self._image.with_name("after.img")
        shutil.copyfile(self._image, after)
        self.close()
        after.replace(self._image)
        self._mount()

    def close(self) -> None:
        """Unmounts it."""
        for _ in range(100):
            try:
                _run("umount", str(self.path))
                return
            except subprocess.CalledProcessError:  # somebody reads a file for a moment
                time.sleep(0.05)
        _run("umount", "--lazy", str(self.path))

    def _mount(self) -> None:
        _run("mount", "-t", "ext4", "-o", _OPTIONS, str(self._image), str(self.path))


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@contextlib.contextmanager
def loop_disk() -> Iterator[LoopDisk]:
    """A disk for as long as the context lasts."""
    with tempfile.TemporaryDirectory(prefix="wardround-power-") as folder:
        disk = LoopDisk(Path(folder))
        try:
            yield disk
        finally:
            disk.close()


def may_mount() -> bool:
    """Whether this user may mount a file system in a file."""
    if os.geteuid() != 0:
        return False
    try:
        with loop_disk() as disk:
            (disk.path / "synced").write_text("kept")
            os.sync()
            (disk.path / "unsynced").write_text("lost")
            disk.cut()
            return sorted(path.name for path in disk.path.glob("*synced")) == ["synced"]
    except (OSError, subprocess.SubprocessError):
        return False


def run_case(made: Bench, scenario: Scenario, case: Case, *, keep: bool = False) -> Row:
    """A row of the table."""
    with loop_disk() as disk, made.arena(scenario) as arena:
        if case.role == COORDINATOR:
            arena.run = RunFolder(disk.path / "run")
        else:
            arena.sites_folder = disk.path / "sites"
        verdict = judge(arena, lambda: _cut_and_go_on(arena, disk, case), keep=keep)
        reached = arena.codes[case.role][:1] == [KILLED]
        if not verdict.passed and keep:
            shutil.copytree(disk.path, arena.folder / "disk", dirs_exist_ok=True)
        for process in arena.processes.values():
            process.kill()  # before its disk is unmounted
    if not verdict.passed:
        print(f"\n{case}:\n" + "\n".join(verdict.wrong), flush=True)
    return {
        "failpoint": case.name,
        "disk": "coordinator" if case.role == COORDINATOR else "site",
        "at": f"{case.at} of {case.of}",
        "same": verdict.word if reached or not verdict.passed else "not reached",
        "seconds": round(verdict.seconds, 1),
        "what it is": NAMES[case.name],
    }


def _cut_and_go_on(arena: Arena, disk: LoopDisk, case: Case) -> None:
    if case.role != COORDINATOR:
        arena.works |= {site: arena.folder / "sites" / site for site in arena.scenario.sites if site != case.role}
    for role in arena.codes:
        arena.start(role, f"{case.name}@{case.at}=kill" if role == case.role else "")
    process = arena.processes[case.role]
    arena.until(lambda: process.poll() is not None or arena.processes[COORDINATOR].poll() == 0)
    if process.poll() == KILLED:
        disk.cut()
    arena.run_to_end()


def main() -> None:
    """Runs them."""
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", metavar="NAME", help="these failpoints alone")
    options.add_argument("--parallel", type=int, default=1, help="runs at a time (default: 1)")
    chosen = options.parse_args()
    if not may_mount():
        raise SystemExit("a file system in a file cannot be mounted here: this needs root, and loop devices")
    rows: list[Row] = []
    with bench(chosen.folder) as made:
        made.undisturbed(SCENARIO)
        wanted = [case for case in cases(made, SCENARIO) if not chosen.only or case.name in chosen.only]
        for row in each(lambda case: run_case(made, SCENARIO, case, keep=chosen.keep), wanted, chosen.parallel):
            rows.append(row)
            print(f"{len(rows)}/{len(wanted)}", *list(row.values())[:-1], flush=True)
    same = sum(row["same"] == "yes" for row in rows)
    points = len({row["failpoint"] for row in rows if row["same"] == "yes"})
    summary = f"{same} of {len(rows)} power cuts ended as the undisturbed run did, at {points} failpoints."
    report("power", rows, summary, write_docs=chosen.write_docs)
    raise SystemExit(0 if same == len(rows) else 1)


if __name__ == "__main__":
    main()
