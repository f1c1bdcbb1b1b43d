"""What a run folder says of a study at one moment, checked and frozen: what page, metrics, alerts and status read.

    snapshot = read_snapshot(Path("run"))
    snapshot.rounds[-1]["holdout/dice"], [site["name"] for site in snapshot.sites], snapshot.alerts

A snapshot is cheap: of a run that was read before, only files that have changed are read, of tables only what was
added. Files that are half written or damaged cost nothing but their news: what was read last stays, and `problems` says
which they are. Nothing here needs a coordinator to run, and nothing loads TensorFlow.
"""

from __future__ import annotations

import functools
import json
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common.errors import RunFolderError, StudyError
from common.inference.published import MANIFEST
from common.security.audit_files import HEAD
from common.study import Study, parse_study
from common.watching.alert import Alert
from server.description import complete
from server.run_folder import RunFolder
from server.watching.alerts import AlertRules, alerts_of
from server.watching.files import Cached, CachedTable, mapping, plain
from server.watching.totals import Totals

FORMAT = 1
_NEWEST_BYTES, _NEWEST_ROWS = 500_000, 4000
RULES = "watching.json"
"""The file in a run folder in which its coordinator says by which rules it warns."""


@dataclass(frozen=True)
class RunSnapshot:
    """A run at one moment; all parts are plain values.

    Attributes
    ----------
    run : the run folder.
    read_at : when it was read, Unix time.
    study : the study as resolved (`study.yaml`), None before there is one.
    status : as `RunFolder.read_status` returns it, completed by what the study says (`server.status.complete`).
    sites : the study's sites in its order, a dictionary each: "name", and what the status says of it now ("connected",
        "stage", "batch", "batches", "reason", "last_seen_at", ...), and "last": its newest row of `sites.csv`, or None.
    rounds : the rows of `rounds.csv`, in order, numbers as numbers; figures that are not finite stay so here.
    site_rounds : the rows of `sites.csv`, in order.
    holdout_cases : the rows of `holdout.csv`: a row a round, case and class.
    report : `report.json`, None before the study's end.
    versions : what is published, oldest first: "name", "folder", "manifest".
    audit_head : the signed head of the coordinator's audit log: "sequence", "time", "hash"; None before the first.
    privacy : what is spent of the study's budget, None where it has none.
    disk_free, disk_total : bytes of the run folder's disk; None where the system does not say.
    problems : files that could not be read as they are now.
    alerts : what somebody should know, the most severe first.
    """

    run: str
    read_at: float
    study: Study | None
    status: Mapping[str, Any]
    sites: Sequence[Mapping[str, Any]]
    rounds: Sequence[Mapping[str, Any]]
    site_rounds: Sequence[Mapping[str, Any]]
    holdout_cases: Sequence[Mapping[str, Any]]
    report: Mapping[str, Any] | None
    versions: Sequence[Mapping[str, Any]]
    audit_head: Mapping[str, Any] | None
    privacy: Mapping[str, Any] | None
    disk_free: int | None
    disk_total: int | None
    problems: Sequence[str] = ()
    rules: AlertRules = field(default_factory=AlertRules)

    @functools.cached_property
    def alerts(self) -> tuple[Alert, ...]:
        """See the class."""
        return alerts_of(self, self.rules)

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON knows it; figures that are not finite are null."""
        value: dict[str, Any] = {"format": FORMAT}
        for name in self.__dataclass_fields__:
            if name not in ("study", "rules"):
                value[name] = plain(getattr(self, name))
        value["study"] = json.loads(self.study.canonical()) if self.study is not None else None
        value["alerts"] = [asdict(alert) for alert in self.alerts]
        return value


class SnapshotReader:
    """Reads a run again and again. Safe to use from several threads.

    Parameters
    ----------
    run : the run folder.
    most_bytes : of each table, where it is longer only its end is read, at first; None: all of it.
    most_rows : so many of the newest rows of each table are kept; None: all.

    Attributes
    ----------
    totals : sums over all rows that were read.
    """

    def __init__(self, run: Path, *, most_bytes: int | None = None, most_rows: int | None = None) -> None:
        self._run = RunFolder(run)
        self._lock = threading.Lock()
        self._study: Cached[Study | None] = Cached(self._run.study, _study, None)
        self._status: dict[str, Any] = {}
        self.totals = Totals()
        self._rounds = CachedTable(
            self._run.rounds,
            most_bytes=most_bytes,
            most_rows=most_rows,
            begin=self.totals.clear_rounds,
            seen=self.totals.add_round,
        )
        self._sites = CachedTable(
            self._run.sites,
            most_bytes=most_bytes,
            most_rows=most_rows,
            begin=self.totals.clear_sites,
            seen=self.totals.add_site,
        )
        self._holdout = CachedTable(self._run.holdout, most_bytes=most_bytes, most_rows=most_rows)
        self._report: Cached[dict[str, Any] | None] = Cached(self._run.report, mapping, None)
        self._head: Cached[dict[str, Any] | None] = Cached(run / HEAD, _head, None)
        self._rules: Cached[AlertRules] = Cached(run / RULES, _rules, AlertRules())
        self._manifests: dict[Path, Cached[dict[str, Any] | None]] = {}

    def read(self, *, now: float | None = None) -> RunSnapshot:
        """The run as it is now.

        Raises
        ------
        RunFolderError : there is no run here.
        """
        with self._lock:
            return self._read(time.time() if now is None else now)

    def _read(self, now: float) -> RunSnapshot:
        problems = []
        if not self._run.study.exists() and not self._run.status.exists():
            self._run.read_study()  # says so
        try:
            self._status = self._run.read_status()
        except RunFolderError as error:
            problems.append(f"{self._run.status.name}: {error}")
        study = self._study.read()
        status = complete(self._status, study) if study is not None else self._status
        parts: Mapping[str, Mapping[str, Any]] = status.get("sites") or {}
        site_rounds, versions = self._sites.read(), self._versions()
        newest = {row.get("site"): row for row in site_rounds[-2 * max(1, len(parts)) :]}
        tables = {"rounds": self._rounds.read(), "holdout_cases": self._holdout.read()}
        report, head, rules = self._report.read(), self._head.read(), self._rules.read()
        tables_read: list[CachedTable] = [self._rounds, self._sites, self._holdout]
        read: list[Cached[Any]] = [self._study, self._report, self._head, self._rules, *self._manifests.values()]
        problems += [each.problem for each in tables_read]
        problems += [each.problem for each in read]
        free, total = _disk(self._run.path)
        return RunSnapshot(
            run=str(self._run.path),
            read_at=now,
            study=study,
            status=status,
            sites=tuple({"name": name, **part, "last": newest.get(name)} for name, part in parts.items()),
            site_rounds=site_rounds,
            **tables,
            report=report,
            versions=versions,
            audit_head=head,
            privacy=status.get("privacy"),
            disk_free=free,
            disk_total=total,
            rules=rules,
            problems=tuple(problem for problem in problems if problem),
        )

    def _versions(self) -> tuple[dict[str, Any], ...]:
        try:
            folders = [path for path in self._run.published.iterdir() if path.name[1:].isdecimal()]
        except OSError:
            folders = []
        found = []
        for folder in sorted(folders, key=lambda path: int(path.name[1:])):
            cached = self._manifests.setdefault(folder, Cached(folder / MANIFEST, mapping, None))
            if (manifest := cached.read()) is not None:
                found.append({"name": folder.name, "folder": str(folder), "manifest": manifest})
        return tuple(found)


@functools.lru_cache(maxsize=8)
def _reader(run: Path) -> SnapshotReader:
    return SnapshotReader(run)


def read_snapshot(run: Path) -> RunSnapshot:
    """The run in this folder as it is now; of a run that was read before, what has changed is read.

    Raises
    ------
    RunFolderError : there is no run here.
    """
    return _reader(run.absolute()).read()


def _disk(folder: Path) -> tuple[int | None, int | None]:
    """Bytes that are free, and all, on the folder's disk."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None, None
    return usage.free, usage.total


class NewestStatus:
    """Reads the status of a run, completed by its study and with `alerts`, as plain values; of long tables the end.

    Parameters
    ----------
    run : the run folder.
    """

    def __init__(self, run: Path) -> None:
        self._run = RunFolder(run)
        self._reader = SnapshotReader(run, most_bytes=_NEWEST_BYTES, most_rows=_NEWEST_ROWS)

    def read(self) -> dict[str, Any]:
        """The status as it is now.

        Raises
        ------
        RunFolderError : there is no run here, or its status cannot be read.
        """
        self._run.read_status()  # says what is wrong with it
        snapshot = self._reader.read()
        return {**snapshot.status, "alerts": [asdict(alert) for alert in snapshot.alerts]}


def _study(content: bytes) -> Study:
    try:
        return parse_study(content.decode("utf-8-sig"))
    except StudyError as error:
        raise ValueError(str(error)) from error


def _head(content: bytes) -> dict[str, Any]:
    entry = mapping(content)
    return {"sequence": entry["sequence"], "time": entry["time"], "hash": entry["hash"]}


def _rules(content: bytes) -> AlertRules:
    return AlertRules(**mapping(content)["alerts"])
