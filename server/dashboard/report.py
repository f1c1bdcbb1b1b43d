"""The report of a run: what an ethics board, a funder or a hospital reads when a study is over."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from common.errors import WardroundError
from common.security.audit_check import check_log
from common.security.audit_files import HEAD, LOG
from common.security.authorities import Authority
from common.study import Study
from common.version import VERSION
from server.dashboard.figures import figures
from server.dashboard.history import History, mean, number
from server.dashboard.paper import write_paper
from server.dashboard.pictures import Pictures
from server.dashboard.sections import content
from server.dashboard.viewer import LOCAL
from server.run_folder import RunFolder
from server.watching.snapshot import RunSnapshot, SnapshotReader
from server.wording import duration

_PACKAGES: Final = ("tensorflow", "tensorflow-federated", "ai-edge-litert", "numpy", "grpcio", "cryptography", "plotly")


@dataclass(frozen=True)
class Written:
    """A report: its file, and what is wrong with the run's audit log where there is one, else None."""

    path: Path
    trouble: WardroundError | None


def write_report(run: RunFolder, out: Path, authority: Authority | None) -> Written:
    """Writes the report as one HTML file.

    Parameters
    ----------
    authority : whose signers are believed, of the audit log.

    Raises
    ------
    RunFolderError : there is no run, or the file cannot be written.
    """
    study = run.read_study()
    snapshot = SnapshotReader(run.path).read()
    history = History.of(snapshot)
    pictures = Pictures.of(run.path)
    page = content(snapshot, history, LOCAL, pictures) | {"samples": pictures.shown(embedded=True)}
    budget = (snapshot.privacy or {}).get("budget")
    audit, trouble = _audit(run.path, authority)
    path = write_paper(
        out,
        "report.html",
        figures(history, budget=budget),
        page=page,
        title=f"{study.name}: report",
        study=study,
        facts=_facts(study, snapshot, history),
        settings=study.to_yaml(),
        members=_members(study, snapshot, history),
        audit=audit,
        software=_software(snapshot),
        written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(snapshot.read_at)),
        plan=snapshot.status.get("plan") or "",
        static=True,
        finished=snapshot.status.get("state") == "finished",
    )
    kept = any((run.path / name).exists() for name in (LOG, HEAD))
    return Written(path, trouble if kept else None)


def _facts(study: Study, snapshot: RunSnapshot, history: History) -> list[tuple[str, str]]:
    """What the study is, in words."""
    task, training, curves = study.task, study.training, history.curves
    best = curves.best("holdout/dice") or curves.best("validation/dice")
    at = snapshot.status.get("started_at")
    started = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(at)) if at else "unknown"
    found = [
        ("Task", f"segmentation of {', '.join(task.foreground)} in {task.dimensions}D images of {task.channels} "
                 f"{'channel' if task.channels == 1 else 'channels'}"),
        ("Model", f"{study.model.name}, {study.model.filters} filters, depth {study.model.depth}, normalization: "
                  f"{study.model.normalization}"),
        ("Training", f"{training.algorithm}, {len(curves.rounds)} of {training.rounds} rounds, "
                     f"{training.client_optimizer.name} at the sites"),
        ("Cohort", f"{len(study.cohort.sites)} sites, quorum {study.cohort.quorum}"),
        ("Best round", f"{best[0]}, Dice {best[1]:.3f}" if best else "none: no Dice was measured"),
        ("Time", f"{duration(sum(map(curves.seconds, range(len(curves.rounds)))))} in rounds"),
        ("Coordinator last started", started),
    ]  # fmt: skip
    if ended := snapshot.status.get("ended"):
        found.append(("Ended early", f"after round {ended.get('round')}: {ended.get('reason')}"))
    return found


def _members(study: Study, snapshot: RunSnapshot, history: History) -> list[dict[str, Any]]:
    """What each site contributed, by `sites.csv`."""
    secure = study.secure_aggregation.required  # then no site tells how long it worked
    seconds: dict[str, list[float | None]] = {}
    sent: dict[str, float] = {}
    for row in snapshot.site_rounds:
        if row.get("outcome") == "included":
            site = str(row.get("site"))
            sent[site] = sent.get(site, 0.0) + (number(row.get("bytes_up")) or 0.0)
            if row.get("kind") == "train":
                seconds.setdefault(site, []).append(number(row.get("seconds_work")))
    found = []
    for site in study.cohort.sites:
        record = history.sites.get(site)
        found.append(
            {
                "site": site,
                "included": record.included if record else 0,
                "left_out": record.left_out if record else 0,
                "cases": number(record.last.get("cases")) if record else None,
                "seconds": None if secure else mean(seconds.get(site, [])),
                "bytes": sent.get(site),
            }
        )
    return found


def _audit(run: Path, authority: Authority | None) -> tuple[Mapping[str, Any], WardroundError | None]:
    """The coordinator's audit log, checked now: "good", and its head or what is wrong; and the error itself."""
    try:
        checked = check_log(run, authority)
    except WardroundError as error:
        return {"good": False, "trouble": str(error)}, error
    found = checked.report()
    by = found["signed_by"]
    return {
        "good": True,
        **found,
        "signer": f"{by['role']} {by['name']}" if by else "",
        "certificate": by["certificate_sha256"] if by else "",
    }, None


def _software(snapshot: RunSnapshot) -> list[tuple[str, str]]:
    """What computed the study, as its published versions say, and what made this report."""
    found = [(f"Version {one['name']} was published by", f"Wardround {one['manifest'].get('wardround', 'unknown')}")
             for one in snapshot.versions]  # fmt: skip
    found.append(("This report was made by", f"Wardround {VERSION}, Python {platform.python_version()}"))
    installed = []
    for package in _PACKAGES:
        try:
            installed.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    found.append(("Installed where it was made", ", ".join(installed)))
    return found


def plain_study(study: Study) -> dict[str, Any]:
    """Every setting of a study by its path in the file, as "training.rounds"."""
    found: dict[str, Any] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict) and value:
            for key, each in value.items():
                walk(each, f"{path}.{key}" if path else str(key))
        else:
            found[path] = value

    walk(json.loads(study.canonical()), "")
    return found
