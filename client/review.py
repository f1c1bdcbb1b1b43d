"""What a study would do at this site, in plain words, for those who decide whether it may: `wardround-site review`.

No TensorFlow is loaded, unless the plan's digest is asked for or the network is one that has to be built to be counted,
and no image is read: cases are counted by looking at the folders.
"""

from __future__ import annotations

import hashlib
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from client.approvals import Approvals, Subject
from client.data_cli import open_registry, registry_path
from client.policy import PolicyOfFile, Proposal, Violation, study_violations, violations_text
from client.study_privacy import StudyPrivacy, privacy_of
from common.errors import StudyError, UsageError
from common.imaging.case import Case
from common.network_sizes import size_of
from common.secure_aggregation.packing import WORD_BITS, packed_bytes
from common.study import Study
from common.wording import counted, listed, printable

if TYPE_CHECKING:
    from client.registry import DataSet

_WIDTH = 22
_LINE = 110


@dataclass(frozen=True)
class DataFound:
    """The data that a study would use, as `data_name` calls it, and how much is there; no file is named."""

    names: str
    is_registered: bool
    cases: int
    labelled: int
    patients: int | None

    @property
    def words(self) -> str:
        """For people."""
        what = "data set" if self.is_registered else "folder"
        patients = "patients not known" if self.patients is None else counted(self.patients, "patient")
        return (
            f"{what} {printable(self.names)}: {counted(self.cases, 'case')}, {self.labelled} with a label, {patients}"
        )


def data_of(data: str, registry: Path | None) -> DataFound:
    """What `--data` names, counted and not examined.

    Raises
    ------
    UsageError : it is neither a registered data set nor a folder.
    DataError : the folder cannot be listed.
    """
    name, registered = data_name(data, registry), _registered(data, registry)
    if registered is None:
        from common.imaging.discovery import discover

        return _counted(name, False, discover(Path(data).absolute()).cases)
    with open_registry(registry) as opened:
        return _counted(name, True, [case for one in registered for case in opened.cases(one.name)])


def data_name(data: str, registry: Path | None) -> str:
    """What an approval calls the data: the absolute path of a folder, or data sets, each with its folder.

    Raises UsageError where it is neither.
    """
    registered = _registered(data, registry)
    if registered is not None:
        return ", ".join(f"{one.name} ({one.path})" for one in registered)
    if Path(data).is_dir():
        return str(Path(data).absolute())
    raise UsageError(
        f"--data {data}: neither a registered data set nor a folder; register it with `wardround-site data add`, or "
        "correct the path"
    )


def _registered(data: str, registry: Path | None) -> list[DataSet] | None:
    """The data sets, or None where a folder is meant; which of both is decided as `client.data_selection` does."""
    if registry is None and not registry_path(registry).exists():
        return None
    names = data.split(",")
    with open_registry(registry) as opened:
        known = {data_set.name for data_set in opened.data_sets()}
        if known.issuperset(names) or not Path(data).is_dir():
            return [opened.get(name) for name in names]
    return None


def _counted(names: str, is_registered: bool, cases: Sequence[Case]) -> DataFound:
    known = [case for case in cases if case.patient != case.name]
    patients = len({case.patient for case in cases}) if known else None
    return DataFound(names, is_registered, len(cases), sum(case.label is not None for case in cases), patients)


@dataclass(frozen=True)
class Review:
    """Everything that is shown, and recorded with a decision.

    Attributes
    ----------
    subject : what is decided about.
    study_file : SHA-256 of the study file's bytes, hexadecimal.
    data : None where the data was not asked for.
    weights, update_bytes : of the model, and of the numbers of one update.
    plan : the plan's digest, hexadecimal; "" where it was not asked for.
    policy : with the file that it is from.
    violations : of the policy.
    decisions : lines about earlier decisions.
    """

    subject: Subject
    study_file: str
    data: DataFound | None
    weights: int
    update_bytes: int
    plan: str
    policy: PolicyOfFile
    violations: Sequence[Violation]
    decisions: Sequence[str]

    @property
    def privacy(self) -> StudyPrivacy:
        """The study's settings."""
        return privacy_of(self.subject.study)

    def to_json(self) -> dict[str, Any]:
        """Plain data; no file of a patient is named in it."""
        study, privacy = self.subject.study, self.privacy
        return {
            "site": self.subject.site,
            "study": study.name,
            "model": study.model.name,
            "dimensions": study.task.dimensions,
            "weights": self.weights,
            "rounds": study.training.rounds,
            "classes": list(study.task.classes),
            "sites": list(study.cohort.sites),
            "quorum": study.cohort.quorum,
            "data": None
            if self.data is None
            else {
                "names": self.data.names,
                "registered": self.data.is_registered,
                "cases": self.data.cases,
                "labelled": self.data.labelled,
                "patients": self.data.patients,
            },
            "update_bytes": self.update_bytes,
            "leaves": leaving(study, self.weights, self.update_bytes),
            "never_leaves": list(NEVER_LEAVES),
            "privacy": {
                "personal": privacy.personal,
                "unit": privacy.unit,
                "epsilon": privacy.epsilon,
                "delta": privacy.delta,
                "secure_aggregation": privacy.secure_aggregation,
            },
            "digests": {
                "study": self.subject.study_digest,
                "study_file": self.study_file,
                "package": self.subject.package.digest,
                "plan": self.plan,
            },
            "package": self.subject.package.version,
            "policy": {
                "file": None if self.policy.path is None else str(self.policy.path),
                "digest": self.policy.digest,
                "violations": violations_text(list(self.violations)),
            },
            "decisions": list(self.decisions),
        }

    def to_text(self) -> str:
        """The page that a hospital's IT reads."""
        study, package = self.subject.study, self.subject.package
        labels = "objects" if study.task.labels == "instances" else "classes"
        lines = [f"Study {study.name}, at site {self.subject.site}", "", "What would run"]
        lines += _rows(
            {
                "model": f"{study.model.name} for {study.task.dimensions}D images, {self.weights:,} weights",
                "classes": f"{', '.join(study.task.classes)} ({labels})",
                "rounds": f"{study.training.rounds}; in each this site trains {_trained(study)}",
                "sites": f"{len(study.cohort.sites)} ({listed(study.cohort.sites)}); a round counts with "
                f"{study.cohort.quorum}",
                "code": "this site's own package; none is ever sent",
            }
        )
        lines += ["", "On which data"]
        lines += [f"  {self.data.words}" if self.data else "  (--data was not given)"]
        lines += ["  They are read where they lie; nothing was read for this page."]
        lines += ["", "What leaves this site"]
        lines += _rows(leaving(study, self.weights, self.update_bytes))
        lines += ["", "What never leaves", *(f"  {each}" for each in NEVER_LEAVES)]
        lines += ["", "Privacy", *_rows(privacy_words(self.privacy))]
        lines += ["", "Digests (SHA-256)"]
        lines += _rows(
            {
                "study": self.subject.study_digest,
                "study file": self.study_file,
                "package": f"{package.digest} (Wardround {package.version}, {package.files} files)",
                "plan": self.plan or "follows from study and package; --plan compiles it, which takes some seconds",
            }
        )
        lines += ["", "This site's policy", *self._policy_lines()]
        lines += ["", "Decisions so far", *(f"  {each}" for each in self.decisions)]
        return "\n".join(lines)

    def _policy_lines(self) -> list[str]:
        if self.policy.path is None:
            return ["  There is none: whatever is approved may run. `wardround-site policy init` makes one."]
        where = f"  {self.policy.path}"
        if not self.violations:
            return [f"{where}: the study violates no point of it."]
        words = counted(len(self.violations), "point")
        return [
            f"{where}: the study violates {words} of it, and would not run.",
            *(f"    {each}" for each in violations_text(list(self.violations))),
        ]


NEVER_LEAVES = (
    "images, labels, or parts of them",
    "names of files, patients and cases; dates; anything of an image's header",
    "figures of single cases or patients, where it validates on more than one",
)


def _trained(study: Study) -> str:
    """On how much of its own a site trains in a round."""
    training, privacy = study.training, study.privacy
    if privacy.unit == "patient":
        patches = "1 patch" if privacy.crops_per_patient == 1 else f"{privacy.crops_per_patient} patches"
        return (
            f"{counted(privacy.steps_per_round, 'step')} on patches of its own; in each, every patient takes part by "
            f"chance, {privacy.patients_per_step:g} are expected, with {patches} each"
        )
    drawn = f"{training.local_epochs} x its cases"
    if training.patches_per_epoch:
        drawn = f"{training.patches_per_epoch * training.local_epochs:,} patches"
    return f"on {drawn} of its own"


_BESIDE_THE_UPDATE = {
    "none": "; with it the sum of the training loss, the numbers of batches, patches and cases",
    "site": ", clipped; with it the numbers of batches and cases",
    "patient": ", with this site's noise; with it the privacy spent so far (epsilon at delta), the numbers of steps "
    "and cases",
}
"""What a training round sends, by `privacy.unit`; no other says a loss."""


def leaving(study: Study, weights: int, update_bytes: int) -> dict[str, str]:
    """What a study sends, by occasion."""
    if study.secure_aggregation.required:
        return _leaving_securely(study, weights)
    update = f"{weights:,} weights = {update_bytes:,} bytes{_BESIDE_THE_UPDATE[study.privacy.unit]}"
    found = {
        "once": "this site's name, the version of Wardround, its numbers of training and validation cases",
        "each round": f"an update of {update}, and the seconds that it took",
        "meanwhile": "how far it is (round, batch k of n), and in a few fixed words why it cannot go on",
    }
    if study.evaluation.validation_fraction > 0:
        found["evaluations"] = f"{counted(2 * len(study.task.foreground), 'number')}: Dice of each class over this "
        found["evaluations"] += "site's validation cases together, and whether the class occurred; their number"
    return found


def _leaving_securely(study: Study, weights: int) -> dict[str, str]:
    """What leaves where sums are secure: under masks, numbers that say nothing by themselves."""
    size = packed_bytes(weights, WORD_BITS)
    noised = {"none": "", "site": ", clipped", "patient": ", with this site's noise"}[study.privacy.unit]
    counts = "the numbers of batches and patches" if study.privacy.unit == "none" else "the number of steps"
    loss = "the training loss, " if study.privacy.unit == "none" else ""
    found = {
        "once": "this site's name and the version of Wardround; no number of cases",
        "each round": f"under masks an update of {weights:,} weights{noised}, its weight, {loss}{counts}: at most "
        f"{size:,} bytes and a little; beside it keys and shares of keys",
        "meanwhile": "what it is at (training, evaluation), and in a few fixed words why it cannot go on",
    }
    if study.evaluation.validation_fraction > 0:
        found["evaluations"] = "under masks Dice of each class over this site's validation cases together, and whether "
        found["evaluations"] += "the class occurred"
    return found


def privacy_words(privacy: StudyPrivacy) -> dict[str, str]:
    """The settings, each with what it means here."""
    units = {
        "patient": "hides each patient: noise is added at this site",
        "site": "hides each site, in the published model: the coordinator adds the noise, after it has the updates",
    }
    spent = f"epsilon at most {privacy.epsilon:g} at delta {privacy.delta:g}; {units.get(privacy.unit, '')}"
    return {
        "personal layers": "not used: all layers are shared"
        if privacy.personal == "none"
        else f"the {privacy.personal} layers stay at this site",
        "differential privacy": "not used: nothing bounds what an update says of one patient"
        if privacy.unit == "none"
        else spent,
        "secure aggregation": "the coordinator can read sums alone: of updates, losses, counts and Dice. It sees which "
        "sites took part, when, and for how long; and what a sum itself says of its sites is not hidden"
        if privacy.secure_aggregation
        else "not used: the coordinator can read this site's own update",
    }


def make_review(
    subject: Subject,
    study_path: Path,
    *,
    data: DataFound | None,
    policy: PolicyOfFile,
    coordinator: str | None,
    approvals: Approvals | None,
    compile_plan: bool = False,
) -> Review:
    """Looks everything up.

    Raises
    ------
    StudyError : the study file cannot be read.
    ApprovalError : a record of an earlier decision was changed.
    """
    study = subject.study
    size = size_of(study)
    plan = ""
    if compile_plan:
        from common.learning.plan import build_plan
        from common.learning.runtime import configure_tensorflow

        configure_tensorflow(study.training.threads)
        plan = build_plan(study).digest.hex()
    proposal = Proposal(study, data.cases if data else None, coordinator, {"train": size.update_bytes})
    try:
        study_file = hashlib.sha256(study_path.read_bytes()).hexdigest()
    except OSError as error:
        raise StudyError(f"study file: cannot be read: {error.strerror}; give a YAML file ({study_path})") from error
    return Review(
        subject,
        study_file,
        data,
        size.weights,
        size.update_bytes,
        plan,
        policy,
        study_violations(policy.policy, proposal),
        _decisions(approvals, subject),
    )


def _decisions(approvals: Approvals | None, subject: Subject) -> list[str]:
    if approvals is None:
        return ["not looked at: --work was not given"]
    record = approvals.decision(subject)
    if record is not None:
        done = "approved" if record.decision == "approve" else "rejected"
        note = f": {printable(str(record.content['note']))}" if record.content["note"] else ""
        return [f"{done} by {printable(record.by)} on {record.day}{note}"]
    changed = approvals.changed_since(subject)
    if changed is None:
        return ["none: this study was not approved here"]
    before, differences = changed
    return [
        f"approved by {printable(before.by)} on {before.day}, but changed since then; it has to be approved again:",
        *(f"  {each}" for each in differences),
    ]


def _rows(rows: Mapping[str, str]) -> list[str]:
    lines: list[str] = []
    for name, words in rows.items():
        first, *more = textwrap.wrap(words, _LINE - _WIDTH, break_long_words=False, break_on_hyphens=False)
        lines += [f"  {name:<{_WIDTH}}{first}", *(f"  {'':<{_WIDTH}}{line}" for line in more)]
    return lines
