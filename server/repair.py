"""`wardround repair`: what is damaged in a run folder, what can be done about it, and doing it.

Nothing that is damaged is deleted: it goes to `damaged/` in the run folder. A run goes back to the last round whose
state is whole; closed rounds are done again with the same cohorts, and so end in the same bits. No TensorFlow here.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common.errors import RunFolderError, StudyError, UsageError, WardroundError
from common.inference.published import MANIFEST
from common.inference.version_files import listed_files
from common.study import load_study
from common.wire.tensors import Stored
from server.journal import Journal, JournalDamagedError, read_history, salvaged, write_events
from server.kept import fault, kept
from server.replay import RunHistory, replay
from server.run_folder import RunFolder, free_name, set_aside, storing, sync_folder
from server.tables import read_table, write_table
from server.updates import round_of
from server.versions import published_versions

_ASIDE = "move it to damaged/"


@dataclass(frozen=True)
class Repair:
    """One thing that is wrong.

    Attributes
    ----------
    path : where, within the run folder.
    problem : what is wrong.
    action : what is done about it, as an order; or what somebody has to do.
    apply : does it.
    """

    path: str
    problem: str
    action: str
    apply: Callable[[], object]


def examine(run: RunFolder) -> list[Repair]:
    """What is wrong in a run that nobody coordinates now, in the order in which it is to be repaired. Changes nothing.

    Raises
    ------
    RunFolderError : this is no run folder, or it cannot be read.
    """
    if not run.path.is_dir() or not (run.study.exists() or run.journal.exists() or run.state.is_dir()):
        raise RunFolderError(f"{run.path}: no run here; give the folder of a run with --run")
    with storing(run.path):
        history, repairs = _journal(run)
        good, found = _states(run, history, lost=bool(repairs))
        repairs += found
        repairs += _models(run, history)
        repairs += _updates(run, history, good)
        repairs += [*_tables(run), *_partial(run), *_published(run), *_texts(run), *_start(run)]
    return repairs


def repair(run: RunFolder) -> list[Repair]:
    """Does what `examine` finds; returns that. Raises RunFolderError where a coordinator runs, or the disk fails."""
    with run.locked():
        repairs = examine(run)
        for found in repairs:
            found.apply()
    return repairs


def give_up(run: RunFolder, site: str, number: int, *, dry_run: bool) -> list[str]:
    """Lets a round that was closed go on without the lost update of a site that never comes back.

    The round's result is then another than it was, or would have been. Where the rest of its cohort is below the
    quorum, the round is open again, to every site. Returns sentences on what was (or would be) done.

    Raises
    ------
    UsageError : no round waits for an update of this site.
    RunFolderError : a coordinator runs, or the journal is damaged or cannot be written.
    """
    study = run.read_study()
    history = read_history(run.journal)
    if site not in study.cohort.sites:
        raise UsageError(f"--give-up: {site!r} is not in the cohort of study {study.name!r}")
    if number <= history.saved:
        raise UsageError(f"--give-up: round {number} is saved; nothing waits for {site} there")
    said = []
    with contextlib.nullcontext() if dry_run else run.locked():
        for kind in ("train", "evaluate"):
            found = history.find(kind, number)
            if found is None or site not in (found.closed or ()):
                continue
            received = found.received.get(site)
            again = received is not None and received.outdated and study.training.personal != "none"
            if received is not None and not again and not fault(run.updates / received.file, received.sha256):
                continue
            left = [other for other in found.closed or () if other != site]
            quorum = min(study.cohort.quorum, len(found.sites))
            if not dry_run:
                journal = Journal(run.journal)
                journal.given_up(kind, number, site, quorum)
                journal.close()
            what = f"round {number} ({kind})"
            if len(left) < max(1, quorum):
                said.append(
                    f"{what}: without {site} it is below the quorum of {quorum}; it is open again to every site"
                )
            else:
                said.append(f"{what}: goes on with {', '.join(left)} alone; its result is not what it was with {site}")
    if not said:
        raise UsageError(
            f"--give-up: round {number} waits for no lost update of {site}: it is not closed with {site}, and then its "
            "deadline leaves the site out, or the update is here"
        )
    return said


# The journal. ------------------------------------------------------------------------------------------------------


def _journal(run: RunFolder) -> tuple[RunHistory, list[Repair]]:
    """What can be read of the journal, and what is to be done where that is not all."""
    name = run.journal.name
    if not run.journal.exists():
        if not kept(run.state):
            return RunHistory(), []
        todo = "go on from the newest state; with which sites a round was closed is not known"
        return RunHistory(), [Repair(name, "the journal is missing", todo, lambda: None)]
    with _copy(run.journal) as copy:
        try:
            journal = Journal(copy)
            try:
                return journal.history(), []
            finally:
                journal.close()
        except JournalDamagedError as error:
            problem = str(error).removeprefix(f"{copy}: ").split("; `wardround")[0]
    with _copy(run.journal) as copy:
        events, lost = salvaged(copy)
    todo = (
        f"{_ASIDE}, and keep the {len(events)} events that can be read, {lost or 'none'} between them "
        f"{'is' if lost == 1 else 'are'} lost, and perhaps some after them. A round of which it is lost how it was "
        "closed may close with other sites"
    )

    def salvage() -> None:
        new = run.path / f".{name}.salvaged.partial"
        new.unlink(missing_ok=True)
        write_events(new, [*events, _salvage_note(len(events), lost)])
        files = [run.journal, *(run.journal.with_name(name + suffix) for suffix in ("-wal", "-shm"))]
        run.damaged.mkdir(exist_ok=True)
        for file in [file for file in files if file.exists()]:
            shutil.copyfile(file, free_name(run.damaged / file.name))
        for file in files[1:]:  # a log beside another database than its own would ruin that too
            file.unlink(missing_ok=True)
        new.replace(run.journal)
        sync_folder(run.path)

    return replay(events), [Repair(name, problem, todo, _storing(run.journal, salvage))]


def _salvage_note(events: int, lost: int) -> dict[str, object]:
    row = dict.fromkeys(("kind", "round", "attempt", "site"))
    return {"at": 0.0, "event": "salvaged", **row, "events": events, "lost": lost}


@contextlib.contextmanager
def _copy(journal: Path) -> Iterator[Path]:
    """A copy to look into: SQLite writes to what it reads."""
    with tempfile.TemporaryDirectory(prefix="wardround-repair-") as folder:
        for suffix in ("", "-wal"):
            source = journal.with_name(journal.name + suffix)
            if source.exists():
                shutil.copyfile(source, Path(folder, source.name))
        yield Path(folder, journal.name)


# Tensor files. -----------------------------------------------------------------------------------------------------


def _states(run: RunFolder, history: RunHistory, *, lost: bool) -> tuple[int, list[Repair]]:
    """The last round whose state is whole, and what is to be done about others; `lost`: the journal is not whole."""
    repairs, good, unrecorded = [], [0], []
    for number, path in kept(run.state).items():
        digest = history.states.get(number)
        problem = fault(path, digest)
        if problem:
            repairs.append(_aside(run, path, f"the state after round {number} is damaged: {problem}"))
        elif digest is not None or not history.states:
            good.append(number)
        else:
            unrecorded.append(number)  # its round is not over: the coordinator was killed before it said so
    last = max(good)
    if history.saved > last or lost:
        adopted = max((number for number in unrecorded if number > last), default=0)
    else:
        adopted = 0
    if history.saved > max(last, adopted) or (history.saved > last and adopted):
        todo = f"go back to round {last}: the rounds after it are done again, closed ones with the same sites"
        if last == 0:
            todo = "begin again with round 1: closed rounds are done again with the same sites"
        if adopted:
            todo = f"go on from the state after round {adopted}"
        problem = f"the state after round {history.saved} is lost"
        repairs.append(Repair(run.state.name, problem, todo, partial(_journaled, run, Journal.returned, last)))
    if adopted:
        path = kept(run.state)[adopted]
        repairs.append(
            Repair(
                str(path.relative_to(run.path)),
                f"the journal does not have the state after round {adopted}",
                "take it, as it can be read",
                lambda: _journaled(run, Journal.state, adopted, _stored(path)),
            )
        )
    return max(last, adopted), repairs


def _models(run: RunFolder, history: RunHistory) -> list[Repair]:
    found = []
    for number, path in kept(run.models).items():
        problem = fault(path, history.models.get(number))
        if problem:
            todo = f"{_ASIDE}. If it was the best, publish another with `wardround publish --round`"
            found.append(_aside(run, path, f"the model of round {number} is damaged: {problem}", todo))
    return found


def _updates(run: RunFolder, history: RunHistory, good: int) -> list[Repair]:
    found: list[Repair] = []
    if not run.updates.is_dir():
        return found
    for (kind, number, broadcast), round_ in history.rounds.items():
        if number <= good or history.current.get((kind, number)) != broadcast:
            continue
        for site, received in round_.received.items():
            path = run.updates / received.file
            todo = f"the coordinator asks {site} for it again"
            if round_.closed is not None:
                todo += f", as the round is closed with it. If it never comes: `--give-up {site} {number}`"
            what = f"the update of {site} for round {number} ({kind})"
            if path.exists():
                problem = fault(path, received.sha256)
                if problem:
                    found.append(_aside(run, path, f"{what} is damaged: {problem}", f"{_ASIDE}; {todo}"))
            elif number > history.saved:
                name = str(path.relative_to(run.path))
                found.append(Repair(name, f"{what} is missing", todo, lambda: None))
    for path in sorted(run.updates.iterdir()):
        number = round_of(path) or good + 1
        if number <= good and path.is_file():
            found.append(_removed(run, path, f"left over from round {number}, which is saved"))
    return found


# The other files. --------------------------------------------------------------------------------------------------


def _tables(run: RunFolder) -> Iterator[Repair]:
    for path in (run.rounds, run.sites, run.holdout):
        content = read_table(path)
        if not content.torn:
            continue

        def mend(path: Path = path) -> None:
            run.damaged.mkdir(exist_ok=True)
            shutil.copyfile(path, free_name(run.damaged / path.name))
            whole = read_table(path)
            if whole.columns:
                write_table(path, whole.columns, whole.rows)
            else:
                path.unlink()

        todo = f"copy it to damaged/, and keep its {len(content.rows)} whole rows"
        yield Repair(path.name, "a line is torn or no row of the table", todo, _storing(path, mend))


def _partial(run: RunFolder) -> Iterator[Repair]:
    for path in run.partial_files():
        yield _removed(run, path, "was still being written when its process ended")
    for folder in sorted(run.published.glob(".v*.partial")) if run.published.is_dir() else []:
        if not _is_held(folder):
            yield Repair(
                str(folder.relative_to(run.path)),
                "was still being written when its process ended",
                "remove it",
                partial(shutil.rmtree, folder, ignore_errors=True),
            )


def _published(run: RunFolder) -> Iterator[Repair]:
    for name, folder in published_versions(run.published).items() if run.published.is_dir() else []:
        problem = version_fault(folder)
        if problem:
            todo = f"{_ASIDE}. Publish the round again with `wardround publish`"
            yield _aside(run, folder, f"the published version {name} is damaged: {problem}", todo)


def version_fault(folder: Path) -> str:
    """What is wrong with the files of a published version, by the digests of its manifest; "" if nothing is."""
    try:
        for name, digest in listed_files((folder / MANIFEST).read_bytes()).items():
            with (folder / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    return f"{name} is not as it was written"
    except (OSError, WardroundError) as error:
        return str(error)
    return ""


def _texts(run: RunFolder) -> Iterator[Repair]:
    for path in (run.status, run.report, run.pending):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except ValueError:
            yield _aside(run, path, "cannot be read")
    try:
        if run.study.exists():
            load_study(run.study)
    except StudyError as error:
        todo = f"{_ASIDE}. The next start writes it again from the study file that it is given: give the same"
        yield _aside(run, run.study, f"cannot be read: {str(error).splitlines()[0]}", todo)


def _start(run: RunFolder) -> Iterator[Repair]:
    papers = run.start / "start.json"
    if not papers.exists():
        return
    try:
        problem = fault(run.start / "weights.tensors", json.loads(papers.read_text(encoding="utf-8"))["kept_sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = str(error)
    if problem:
        todo = f"{_ASIDE}. The next start copies what the study starts from again: it must be there, unchanged"
        yield _aside(run, run.start, f"what the study started from is damaged: {problem}", todo)


# What is done. -----------------------------------------------------------------------------------------------------


def _aside(run: RunFolder, path: Path, problem: str, action: str = _ASIDE) -> Repair:
    return Repair(str(path.relative_to(run.path)), problem, action, partial(set_aside, path, run.path))


def _removed(run: RunFolder, path: Path, problem: str) -> Repair:
    remove = _storing(path, partial(path.unlink, missing_ok=True))
    return Repair(str(path.relative_to(run.path)), problem, "remove it", remove)


def _journaled(run: RunFolder, record: Callable[..., None], *arguments: object) -> None:
    journal = Journal(run.journal)
    try:
        record(journal, *arguments)
    finally:
        journal.close()


def _stored(path: Path) -> Stored:
    with path.open("rb") as file:
        return Stored(path, hashlib.file_digest(file, "sha256").digest(), path.stat().st_size)


def _storing(path: Path, action: Callable[[], object]) -> Callable[[], None]:
    def stored() -> None:
        with storing(path):
            action()

    return stored


def _is_held(folder: Path) -> bool:
    """Whether a process is writing to this folder of a version now (`common.whole_folder`)."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False
