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

from common.disk import sync_folder
from common.errors import RunFolderError, StudyError, UsageError, WardroundError
from common.inference.published import MANIFEST, SIGNATURE
from common.inference.signature import was_signed
from common.inference.version_files import listed_files
from common.security.audit_check import check_log
from common.security.audit_files import HEAD, LOG
from common.study import Study, load_study
from common.wire.tensors import Stored
from server.journal import Journal, JournalDamagedError, read_history, salvaged, write_events
from server.kept import fault, kept
from server.repair_record import findings_of, record
from server.replay import RoundHistory, RunHistory, replay
from server.run_folder import RunFolder, free_name, set_aside, storing
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
    awaited : it is no damage: the coordinator asks a site again for what an earlier repair, or a start, set aside.
    """

    path: str
    problem: str
    action: str
    apply: Callable[[], object]
    awaited: bool = False


def examine(run: RunFolder) -> list[Repair]:
    """What is wrong in a run that nobody coordinates now, in the order in which it is to be repaired. Changes nothing.

    Raises
    ------
    RunFolderError : this is no run folder, or it cannot be read.
    """
    _require_run(run)
    with storing(run.path):
        history, repairs = _journal(run)
        good, found = _states(run, history, lost=bool(repairs))
        repairs += found
        repairs += _models(run, history)
        repairs += _updates(run, history, good)
        repairs += [*_tables(run), *_partial(run), *_published(run), *_texts(run), *_start(run)]
    return repairs


def audit_fault(run: RunFolder) -> WardroundError | None:
    """What is wrong with the audit log of a run, if anything; nobody may repair that."""
    if not any((run.path / name).exists() for name in (LOG, HEAD)):
        return None  # of a run from before there was one
    try:
        check_log(run.path)
    except WardroundError as error:
        return error
    return None


def repair(run: RunFolder) -> list[Repair]:
    """Does what `examine` finds; returns that. Raises RunFolderError where a coordinator runs, or the disk fails."""
    _require_run(run)  # before a lock is made in it
    with run.locked():
        repairs = examine(run)
        done = [found for found in repairs if not found.awaited]
        if done:  # before it is done
            record(run, "run-repaired", findings=findings_of((found.path, found.problem) for found in done))
        for found in repairs:
            found.apply()
        if not all(found.awaited for found in repairs):
            _write_status(run)
    return repairs


def _require_run(run: RunFolder) -> None:
    if not run.path.is_dir() or not (run.study.exists() or run.journal.exists() or run.state.is_dir()):
        raise RunFolderError(f"{run.path}: no run here; give the folder of a run")


def _write_status(run: RunFolder, said: str = "") -> None:
    """Says in `status.json` that the run was repaired, unless its study is over all the same."""
    history = read_history(run.journal)
    saved = history.saved or max(kept(run.state), default=0)
    if history.published and run.is_finished():
        return
    where = f"goes on after round {saved}" if saved else "begins with round 1"
    status: dict[str, object] = {"study": "study"}
    with contextlib.suppress(WardroundError):  # it was set aside
        status["study"] = run.read_study().name
    with contextlib.suppress(WardroundError):
        status |= run.read_status()
    for name in ("running", "run"):
        status.pop(name, None)
    for name in ("last", "best"):
        figures = status.get(name)
        number = figures.get("round", 0) if isinstance(figures, dict) else 0
        if number > saved or (name == "best" and number not in kept(run.models)):
            status[name] = None
    if not history.published:
        status["published"] = None
    status |= {"state": "repaired", "error": "", "notice": "", "round": saved, "kind": None}
    status["repair"] = said or f"`wardround repair` set aside what was damaged, in damaged/; the run {where}."
    run.write_status(status)


def give_up(run: RunFolder, site: str, number: int, *, dry_run: bool) -> list[str]:
    """Lets a round that was closed go on without the lost update of a site that never comes back.

    The round's result is then another than it was, or would have been. Where the rest of its cohort is below the
    quorum, the round is open again, to every site. Returns sentences on what was (or would be) done.

    Raises
    ------
    UsageError : the round waits for no update of this site: it is not closed with it, or the update is here. An
        evaluation counts as lost only once the sites were asked for it, as all training updates are here.
    RunFolderError : a coordinator runs, or the journal is damaged or cannot be written.
    """
    study = run.read_study()
    history = read_history(run.journal)
    if site not in study.cohort.sites:
        raise UsageError(f"--give-up: {site!r} is not in the cohort of study {study.name!r}")
    if number <= history.saved:
        raise UsageError(f"--give-up: round {number} is saved; nothing waits for {site} there")
    kind = _lost_kind(run, study, history, site, number)
    if kind is None:
        raise UsageError(
            f"--give-up: round {number} waits for no lost update of {site}: it is not closed with {site}, and then its "
            "deadline leaves the site out, or the update is here, and counts"
        )
    found = history.find(kind, number)
    assert found is not None
    left = [other for other in found.closed or () if other != site]
    quorum = min(study.cohort.quorum, len(found.sites))
    what = f"round {number} ({kind})"
    if len(left) < max(1, quorum):
        said = [f"{what}: without {site} it is below the quorum of {quorum}; it is open again to every site"]
    else:
        said = [f"{what}: goes on with {', '.join(left)} alone"]
    said.append(f"This changes the result of round {number}, and so of all rounds after it")
    if not dry_run:
        with run.locked():
            record(run, "site-given-up", site=site, kind=kind, round=number)
            journal = Journal(run.journal)
            try:
                journal.given_up(kind, number, site, quorum)
            finally:
                journal.close()
            _write_status(run, f"{site} was given up in round {number}, which changes the result.")
    return said


def _lost_kind(run: RunFolder, study: Study, history: RunHistory, site: str, number: int) -> str | None:
    """Which update of a site its closed round waits for: that of training, or else of evaluation; None if for none."""
    training, evaluation = history.find("train", number), history.find("evaluate", number)
    lost = [] if training is None else _lost(run, training, personal=study.training.personal != "none")
    if site in lost:
        return "train"
    if evaluation is None or lost or not _was_asked(run, "evaluate", number):
        return None
    return "evaluate" if site in _lost(run, evaluation, personal=False) else None


def _lost(run: RunFolder, round_: RoundHistory, *, personal: bool) -> list[str]:
    """The sites of a closed round whose updates are not here, or have to come again."""
    if round_.summed is not None:  # no update of a secure sum is kept
        return []
    here = [
        site
        for site, received in round_.received.items()
        if not (personal and received.outdated) and not fault(run.updates / received.file, received.sha256)
    ]
    return [site for site in round_.closed or () if site not in here]


def _was_asked(run: RunFolder, kind: str, number: int) -> bool:
    """Whether a round was opened since the run went back last."""
    asked = False
    with _copy(run.journal) as copy:
        journal = Journal(copy)
        try:
            for event in journal.events():
                if event["event"] == "returned":
                    asked = False
                elif (event["event"], event["kind"], event["round"]) == ("opened", kind, number):
                    asked = True
        finally:
            journal.close()
    return asked


# The journal. ------------------------------------------------------------------------------------------------------


def _journal(run: RunFolder) -> tuple[RunHistory, list[Repair]]:
    """What can be read of the journal, and what is to be done where that is not all."""
    name = run.journal.name
    if not run.journal.exists():
        if not kept(run.state):
            return RunHistory(), []
        todo = "go on from the newest state; with which sites a round was closed is not known"
        anew = partial(_write_journal, run, [_salvage_note(0, 0)])
        return RunHistory(), [Repair(name, "the journal is missing", f"begin a new one, and {todo}", anew)]
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
        f"{'is' if lost == 1 else 'are'} lost, and perhaps some after them. For the run: rounds whose state is saved "
        "stay as they are; a later round of which it is lost how it was closed may close with other sites, which "
        "changes the result. Else the result is the same"
    )

    def salvage() -> None:
        files = [run.journal, *(run.journal.with_name(name + suffix) for suffix in ("-wal", "-shm"))]
        run.damaged.mkdir(exist_ok=True)
        for file in [file for file in files if file.exists()]:
            shutil.copyfile(file, free_name(run.damaged / file.name))
        _write_journal(run, [*events, _salvage_note(len(events), lost)])

    return replay(events), [Repair(name, problem, todo, _storing(run.journal, salvage))]


def _write_journal(run: RunFolder, events: list[dict[str, object]]) -> None:
    """Replaces the journal by a new one of these events."""
    new = run.path / f".{run.journal.name}.salvaged.partial"
    new.unlink(missing_ok=True)
    write_events(new, events)
    for suffix in ("-wal", "-shm"):  # a log beside another database than its own would ruin that too
        run.journal.with_name(run.journal.name + suffix).unlink(missing_ok=True)
    new.replace(run.journal)
    sync_folder(run.path)


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
                todo += ", as the round is closed with it"
                if kind == "train":
                    todo += f". If it never comes: `wardround repair --run {run.path} --give-up {site} {number}`"
            what = f"the update of {site} for round {number} ({kind})"
            if path.exists():
                problem = fault(path, received.sha256)
                if problem:
                    found.append(_aside(run, path, f"{what} is damaged: {problem}", f"{_ASIDE}; {todo}"))
            elif number > history.saved:
                name = str(path.relative_to(run.path))
                found.append(Repair(name, f"{what} is missing", todo, lambda: None, awaited=True))
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
            todo = (
                f"{_ASIDE}. The coordinator, started again, publishes the best round again if the study ended with it; "
            )
            todo += "any other round `wardround publish --round`"
            yield _aside(run, folder, f"the published version {name} is damaged: {problem}", todo)


def version_fault(folder: Path) -> str:
    """What is wrong with the files of a published version, by the digests of its manifest; "" if nothing is."""
    try:
        manifest = (folder / MANIFEST).read_bytes()
        if was_signed(manifest, folder) and not (folder / SIGNATURE).exists():
            return f"{SIGNATURE} is not there"
        for name, digest in listed_files(manifest).items():
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
