"""What becomes of a run's weights: figures on holdouts, published versions, the report; also for finished runs."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import DataError, IdentityError, RunFolderError, UsageError
from common.export.figures import json_ready
from common.inference.published import MANIFEST
from common.learning.runtime import configure_tensorflow
from common.privacy.accounting import epsilon_of, round_of_cohort
from common.privacy.report import privacy_report
from common.security.audit import Audit, AuditLog
from common.security.signing import Signer, load_signer
from common.study import Study
from common.wire.partial import disk_hit
from common.wire.tensors import Array, TensorSpec
from server.journal import read_history
from server.run_folder import COORDINATOR, RunFolder, write_atomically
from server.versions import next_version

if TYPE_CHECKING:
    from common.export.forward import ForwardPass
    from common.models.network import Network
    from server.evaluation import Holdout, HoldoutResult
    from server.starting import Start
    from server.watching.samples import Sampler

_log = logging.getLogger("wardround.coordinator")


class Evaluated:
    """A folder's holdout and the network's forward pass over it, in TensorFlow, on all cores.

    Attributes
    ----------
    latest : the result of the newest weights.

    Raises
    ------
    DataError : the folder's images do not fit the study.
    """

    def __init__(self, study: Study, folder: Path, holdout: Holdout | None = None) -> None:
        from server.evaluation import Holdout

        self.study = study
        self.folder = folder
        self.holdout = holdout or Holdout(study, folder)
        self.latest: HoldoutResult | None = None

    @cached_property
    def _forward(self) -> ForwardPass:
        from common.export.forward import ForwardPass
        from common.models import build_network

        return ForwardPass(self.study, build_network(self.study))

    def evaluate(
        self, weights: Sequence[Array], *, mirror: bool = True, sampler: Sampler | None = None
    ) -> HoldoutResult:
        """The holdout result of these weights; see `Holdout.evaluate`."""
        predict = self._forward.with_weights(weights)
        self.latest = self.holdout.evaluate(
            predict, tile=self.study.publishing.tile, threads=os.cpu_count() or 1, mirror=mirror, sampler=sampler
        )
        return self.latest


def open_holdout(study: Study, folder: Path | None, option: str = "--holdout") -> Evaluated | None:
    """The holdout in the folder; None without one, and where the study has no use for it.

    Raises
    ------
    DataError : there is no such folder, or it does not fit the study.
    """
    if folder is None or not study.evaluation.holdout:
        return None
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder; give the coordinator's own labelled images with {option}, or leave it out"
        )
    return Evaluated(study, folder)


def publish_round(
    study: Study,
    run: RunFolder,
    round_number: int,
    score: float | None,
    evaluated: Evaluated | None,
    old: Evaluated | None,
    start: Start | None,
    began: float | None,
    *,
    signer: Signer,
    audit: Audit,
    announce: Callable[[dict[str, Any], Path], None] = lambda report, partial: None,
) -> dict[str, Any]:
    """Evaluates and publishes one round's weights; returns the report, where "best_round" is that round.

    Parameters
    ----------
    score : its validation Dice.
    evaluated, old : the holdout, and that of the study whose model this one started from.
    start : what the run started from.
    began : when, by `time.monotonic()`; None where the study ended before.
    signer : signs the version.
    audit : where it is recorded.
    announce : called with the report and the folder of the version just before it is put in place.

    Raises
    ------
    DataError : the holdout cannot be read. One that does not fit the study before costs the comparison alone.
    PublishError : see `server.publishing.publish`.
    RunFolderError : what the run keeps of its sites and rounds cannot be read.
    """
    from common.models import build_network
    from server.continual import compare
    from server.publishing import publish as publish_files
    from server.publishing.provenance import provenance_of

    weights = _weights(run, round_number, build_network(study))
    result = evaluated.evaluate(weights) if evaluated is not None else None
    holdout = evaluated.holdout if evaluated is not None else None
    details: dict[str, Any] = {"round": round_number, "rounds": study.training.rounds, "validation_dice": score}
    origin = dict(start.origin) if start is not None else {}
    if start is not None and start.study is not None and (evaluated is not None or old is not None):
        _log.info("comparing with the weights that the study started from")
        try:
            origin["continual"] = compare(study, start, weights, evaluated, old, result)
        except DataError as error:  # the images may not fit the study before; the rounds are worth publishing anyway
            _log.warning("published without the comparison with what the study started from: %s", error)
    details |= origin
    provenance = provenance_of(study, run, round_number, signer)
    privacy = _privacy(study, run)
    if privacy is not None:
        details["privacy"] = provenance.of_privacy(privacy)
    version = next_version(run.published)

    def full(publication: Mapping[str, Any]) -> dict[str, Any]:
        report = {
            "study": study.name,
            "rounds": study.training.rounds,
            "best_round": round_number,
            "validation_dice": score,
            **origin,
            **({"privacy": privacy} if privacy is not None else {}),
            "holdout": json_ready(result.scalars()) if result is not None else None,
            "publication": {**publication, "version": version, "folder": str(run.published / version)},
            "seconds": round(time.monotonic() - began, 1) if began is not None else None,
        }
        written: dict[str, Any] = json_ready(report)
        return written

    def about_to_appear(publication: Mapping[str, Any], partial: Path) -> None:
        announce(full(publication), partial)
        digest = _sha256(partial / MANIFEST)
        audit.record("version-published", version=version, round=round_number, manifest=digest)

    disk_hit("publish.before", run.published / version)
    publication = publish_files(
        study,
        weights,
        holdout,
        run.published / version,
        details=details,
        provenance=provenance,
        progress=_log.info,
        announce=about_to_appear,
    )
    disk_hit("publish.renamed", run.report)
    return full(publication)


def _privacy(study: Study, run: RunFolder) -> dict[str, Any] | None:
    """What the whole run has spent of its budget: all of its rounds chose the one that is published."""
    if study.privacy.unit == "none":
        return None
    history = read_history(run.journal)
    sums = epsilon_of([round_of_cohort(study.privacy)] * history.sums, study.privacy.delta)
    return privacy_report(study, history.spent, sums)


def publish_study(
    study: Study, run: RunFolder, round_number: int, *rest: Any, signer: Signer, audit: Audit
) -> dict[str, Any]:
    """Publishes what the study ended with, once, and writes `report.json`; returns it.

    The report is kept as `report.pending.json` before the version appears. A coordinator that was killed in between
    finds both when it is started again, and publishes nothing more. The parameters are those of `publish_round`.

    Raises
    ------
    RunFolderError : the report cannot be written, or the weights are not there.
    """
    model = run.models / f"{round_number:06d}.tensors"

    def announce(report: dict[str, Any], partial: Path) -> None:
        content = {"model_sha256": _sha256(model), "manifest_sha256": _sha256(partial / MANIFEST), "report": report}
        write_atomically(run.pending, json.dumps(content, indent=1))

    report = _announced(run, model)
    if report is None:
        report = publish_round(study, run, round_number, *rest, signer=signer, audit=audit, announce=announce)
    write_atomically(run.report, json.dumps(report, indent=1), failpoint="report.before")
    disk_hit("report.written", run.report)
    return report


def _announced(run: RunFolder, model: Path) -> dict[str, Any] | None:
    """The report of a version of these weights that was put in place before the coordinator was killed."""
    try:
        content = json.loads(run.pending.read_text(encoding="utf-8"))
        report: dict[str, Any] = content["report"]
        folder = run.published / report["publication"]["version"]
        if (content["manifest_sha256"], content["model_sha256"]) != (_sha256(folder / MANIFEST), _sha256(model)):
            return None
    except (OSError, ValueError, KeyError, TypeError):  # killed before it appeared, or nothing was begun
        return None
    _log.info("%s is published already", folder)
    report["publication"]["folder"] = str(folder)
    return report


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _weights(run: RunFolder, round_number: int, network: Network) -> list[Array]:
    from server.state import load_weights

    digest = read_history(run.journal).models.get(round_number)
    return load_weights(run.models, round_number, [TensorSpec("float32", spec.shape) for spec in network.specs], digest)


def coordinators_signer(identity: Path) -> Signer:
    """Who signs what a study publishes. Raises IdentityError where the folder's identity is no coordinator's."""
    signer = load_signer(identity)
    if signer.role != "coordinator":
        raise IdentityError(
            f"{identity}: the identity is of {signer.role} {signer.name!r}, and a coordinator signs what a study "
            "publishes; give its folder with --identity"
        )
    return signer


def _chosen_round(study: Study, run: RunFolder, round_number: int | None) -> tuple[int, float | None]:
    """The round asked for, or the best one that status knows, or the last kept; and its validation Dice, if any."""
    if round_number is not None:
        return round_number, _validation_dice(run, round_number)
    best = run.read_status().get("best")
    if best:
        return int(best["round"]), best["validation_dice"]
    kept = sorted(int(path.stem) for path in run.models.glob("*.tensors") if path.stem.isdigit())
    if not kept:
        raise RunFolderError(f"{run.path}: no round's model was kept yet; wait for the end of a round")
    return kept[-1], _validation_dice(run, kept[-1])


def _validation_dice(run: RunFolder, round_number: int) -> float | None:
    """What `rounds.csv` says of the round; None where the sites did not validate or the round has no row."""
    if not run.rounds.exists():
        return None
    with run.rounds.open(newline="") as file:
        found = [row.get("validation/dice") for row in csv.DictReader(file) if row["round"] == str(round_number)]
    return json_ready(float(found[-1])) if found and found[-1] else None


def evaluate(run: RunFolder, holdout: Path, round_number: int | None) -> dict[str, Any]:
    """Holdout metrics of a kept round of this run: {"round", "holdout"}."""
    study = run.read_study()
    chosen, score = _chosen_round(study, run, round_number)
    opened = open_holdout(study, holdout)
    if opened is None:
        raise UsageError("evaluation.holdout is false in this study; there is nothing to evaluate on")
    configure_tensorflow(study.training.threads)
    from common.models import build_network

    result = opened.evaluate(_weights(run, chosen, build_network(study)))
    return {"round": chosen, "validation_dice": score, "holdout": json_ready(result.scalars())}


def publish(
    run: RunFolder,
    holdout: Path | None,
    round_number: int | None,
    old_holdout: Path | None = None,
    *,
    identity: Path,
    explain: bool = False,
) -> dict[str, Any]:
    """Publishes a kept round of this run as a new version; returns the report. `explain` sets `publishing.explain`.

    Raises IdentityError where the identity in that folder is none to sign with.
    """
    signer = coordinators_signer(identity)
    study = run.read_study()
    if explain:
        study = replace(study, publishing=replace(study.publishing, explain=True))
    chosen, score = _chosen_round(study, run, round_number)
    opened = open_holdout(study, holdout)
    old = open_holdout(study, old_holdout, "--old-holdout")
    configure_tensorflow(study.training.threads)
    from common.models import build_network
    from server.starting import kept_start

    start = kept_start(run, build_network(study))
    audit = AuditLog(run.path, COORDINATOR, signer)
    try:
        report = publish_round(study, run, chosen, score, opened, old, start, None, signer=signer, audit=audit)
        audit.sign_head()
    finally:
        audit.close()
    if not run.report.exists():  # the study's own final figures stay as they are
        write_atomically(run.report, json.dumps(report, indent=1))
    return report
