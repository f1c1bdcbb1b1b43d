"""A site's policy: what its operator lets any study ask of it. It is a file at the site, and nothing that is sent
changes it.

The dataclasses below are the format, read as a study file is (`common.study_reader`). A key that is left out asks for
nothing. What violates a policy is said by key, so that the hospital's operator and the coordinator's can talk about it:

    >>> [one.key for one in study_violations(Policy(minimum_cohort=5), proposal)]
    ['minimum_cohort']
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from yaml.nodes import Node, ScalarNode

from client.study_privacy import privacy_of
from common import study_reader
from common.errors import PolicyFileError
from common.secure_aggregation.session import MIN_SITES, SitePolicy, default_threshold
from common.study import Study
from common.study_reader import Found
from common.study_rules import Absent, Choice, Fault, Integer, ListOf, Number, Refused, Text
from common.wording import counted

POLICY_FILE = "policy.yaml"
_MOST_BYTES = 10**12
_DAY = 24 * 60
_HOST = Text(r"[A-Za-z0-9:._-]{1,253}", "a host name or address, without a port")
_STUDY = Text(r"[a-z0-9][a-z0-9_-]{0,62}", "a study's name")


@dataclass(frozen=True, slots=True)
class Hours:
    """A part of every day, in minutes since midnight (`end` up to 24 hours); it may reach over midnight.

    `begin` is in it, `end` is not.
    """

    begin: int
    end: int

    def __str__(self) -> str:
        return f"{_clock(self.begin)}-{_clock(self.end)}"

    def holds(self, now: datetime.datetime) -> bool:
        """Whether a local time is within."""
        minute = now.hour * 60 + now.minute
        if self.begin < self.end:
            return self.begin <= minute < self.end
        return minute >= self.begin or minute < self.end

    def seconds_until(self, now: datetime.datetime) -> float:
        """Seconds of the clock until they begin; 0 within."""
        if self.holds(now):
            return 0.0
        begin = now.replace(hour=self.begin // 60, minute=self.begin % 60, second=0, microsecond=0)
        if begin <= now:
            begin += datetime.timedelta(days=1)
        return (begin - now).total_seconds()


@dataclass(frozen=True, slots=True)
class DailyHours:
    """The rule of `Hours`."""

    expected: str = 'hours of the day, local time, in quotes, such as "20:00-06:00"'

    def read(self, node: Node) -> Hours:
        """See `common.study_rules.Rule`."""
        parts = str(node.value).split("-") if isinstance(node, ScalarNode) else []
        minutes = [_minutes(part.strip()) for part in parts]
        known = [minute for minute in minutes if minute is not None]
        if len(minutes) != 2 or len(known) != 2 or known[0] % _DAY == known[1]:
            raise Refused(Fault(self.expected, node))
        return Hours(known[0] % _DAY, known[1])

    def write(self, value: Hours) -> str:
        """See `common.study_rules.Rule`."""
        return str(value)


def _minutes(text: str) -> int | None:
    hours, _, minutes = text.partition(":")
    if not (hours.isdecimal() and minutes.isdecimal() and len(minutes) == 2 and len(hours) <= 2 and text.isascii()):
        return None
    total = int(hours) * 60 + int(minutes)
    return total if int(minutes) < 60 and total <= _DAY else None


def _clock(minutes: int) -> str:
    return f"{minutes // 60:02d}:{minutes % 60:02d}"


# The format. -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class DifferentialPrivacy:
    """A ceiling for a study's budget, epsilon at delta; without `maximum_epsilon` none is asked for.

    Where noise is added here it is one for all studies of this site together, too.
    `unit` "patient" asks for noise that is added here; "any" is content with noise that the coordinator adds.
    """

    maximum_epsilon: Annotated[float | None, Number(above=0, maximum=1000)] = None
    at_delta: Annotated[float, Number(above=0, maximum=0.1)] = 1e-5
    unit: Literal["patient", "any"] = "patient"


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What a site asks of every study. None asks for nothing.

    `minimum_cases` are the site's own. `minimum_cohort` is the fewest sites whose updates are summed: the study's
    quorum, or with secure aggregation what its sums need. `minimum_threshold` is the fewest sites that may unmask a
    secure sum together; None asks for more than two thirds of the study's sites. `hours` are those in which tasks
    begin. `coordinators` are host names as in `--coordinator`. `models` are the studies whose published models may be
    fetched.
    """

    minimum_cases: Annotated[int | None, Integer(1)] = None
    minimum_cohort: Annotated[int | None, Integer(1, 50)] = None
    secure_aggregation: Literal["required", "optional"] = "optional"
    minimum_threshold: Annotated[int | None, Integer(2, 50)] = None
    differential_privacy: Annotated[DifferentialPrivacy, Absent()] = DifferentialPrivacy()
    hours: Annotated[Hours | None, DailyHours()] = None
    tasks: Annotated[tuple[str, ...], ListOf(Choice(("train", "evaluate")), "tasks", at_least=1, at_most=2)] = (
        "train",
        "evaluate",
    )
    coordinators: Annotated[tuple[str, ...] | None, ListOf(_HOST, "host names")] = None
    maximum_rounds: Annotated[int | None, Integer(1)] = None
    maximum_bytes_up: Annotated[int | None, Integer(1, _MOST_BYTES)] = None
    models: Annotated[tuple[str, ...] | None, ListOf(_STUDY, "names of studies")] = None

    def to_yaml(self) -> str:
        """The policy, every default filled in; `parse_policy` of it gives an equal one."""
        return study_reader.to_yaml(self)


NO_POLICY = Policy()
"""Of a site without a policy file: an approval is all that it takes."""

TEMPLATE = """\
# What this site lets any study ask of it. Wardround enforces it here, at start and before every task; nothing that a
# coordinator sends changes it. A line that is left out, or begins with #, asks for nothing. Check it after a change:
#   wardround-site policy check FILE

minimum_cases: 10               # of this site's own, sound cases
minimum_cohort: 3               # sites whose updates are summed: the study's quorum must be as large
secure_aggregation: optional    # or: required
# minimum_threshold: 4          # of a secure sum; left out: more than two thirds of the study's sites
# differential_privacy:         # required where maximum_epsilon is given
#   maximum_epsilon: 8          # of each study, and of all that add noise here together
#   at_delta: 1e-5
#   unit: patient               # noise is added here; "any" is content with noise of the coordinator's
# hours: "20:00-06:00"          # local time; a task that began within is finished
tasks: [train, evaluate]
# coordinators: [coordinator.example.org]
# maximum_rounds: 100
# maximum_bytes_up: 50000000    # of one update
# models: []                    # studies whose published models may be fetched; [] for none
"""


def parse_policy(text: str, source: str = "policy") -> Policy:
    """Parses a policy; `source` is what errors call the file. Raises PolicyFileError with a line for each problem."""
    if not text.strip():
        raise PolicyFileError(
            f"{source}: the policy file is empty, as one that was cut off; write the policy as `wardround-site policy "
            "init` makes it, or where it is to ask for nothing, the line `tasks: [train, evaluate]`"
        )
    if not any(line.strip() and not line.lstrip().startswith("#") for line in text.splitlines()):
        return NO_POLICY  # every line begins with #
    return study_reader.read(Policy, text, source, _RELATIONS, what="policy file", error=PolicyFileError)


def _coordinators_are_lower_case(found: Found) -> None:
    known = found.known("coordinators")
    if known and known[0] is not None:
        found.values["coordinators"] = tuple(host.lower() for host in known[0])


_RELATIONS: tuple[Callable[[Found], None], ...] = (_coordinators_are_lower_case,)


@dataclass(frozen=True)
class PolicyOfFile:
    """A policy with the file that it was read from; without one (None) it is `NO_POLICY`."""

    policy: Policy = NO_POLICY
    path: Path | None = None
    digest: str = ""


def is_there(path: Path) -> bool:
    """Whether there is a policy file. Raises PolicyFileError where that cannot be seen."""
    try:
        return path.exists()
    except OSError as error:
        raise _unreadable(path, error) from error


def read_policy(path: Path, *, required: bool) -> PolicyOfFile:
    """The policy in a file; `NO_POLICY` where there is no such file and none is `required`.

    Raises
    ------
    PolicyFileError : it is missing, cannot be read, or is wrong.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        if not required:
            return PolicyOfFile()
        raise PolicyFileError(
            f"{path}: there is no policy file; make one with `wardround-site policy init {path}`, or give the right one"
        ) from None
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PolicyFileError(f"{path}: expected UTF-8 text, found other bytes; save it as UTF-8") from error
    return PolicyOfFile(parse_policy(text, str(path)), path, hashlib.sha256(data).hexdigest())


def _unreadable(path: Path, error: OSError) -> PolicyFileError:
    return PolicyFileError(f"{path}: the policy file cannot be read ({error.strerror}); correct its rights")


# Violations. -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Violation:
    """A point of the policy that is not met.

    Attributes
    ----------
    key : of the policy.
    words : for the site's operator.
    opens_in : seconds until it is met by itself; None where it is not.
    """

    key: str
    words: str
    opens_in: float | None = None

    @property
    def reason(self) -> str:
        """For the coordinator, who learns which point it is and nothing of this site's data."""
        return f"its site's policy forbids it: {self.key}"


@dataclass(frozen=True)
class Proposal:
    """What a study asks of a site, as far as that is known; a policy is not held against what is None.

    Attributes
    ----------
    study : the study.
    cases : of the site's own.
    coordinator : host that is dialled.
    bytes_up : of an update, by task.
    """

    study: Study
    cases: int | None = None
    coordinator: str | None = None
    bytes_up: Mapping[str, int] = field(default_factory=dict)


def study_violations(policy: Policy, proposal: Proposal) -> list[Violation]:
    """The points of a policy that a study violates, whatever it asks in its rounds."""
    study, found = proposal.study, []

    def refuse(key: str, words: str) -> None:
        found.append(Violation(key, words))

    if policy.minimum_cases is not None and proposal.cases is not None and proposal.cases < policy.minimum_cases:
        refuse("minimum_cases", f"at least {policy.minimum_cases} cases, this site has {proposal.cases}")
    fewest, key = fewest_summed(study)
    if policy.minimum_cohort is not None and fewest < policy.minimum_cohort:
        refuse(
            "minimum_cohort",
            f"at least {counted(policy.minimum_cohort, 'site')} in every sum, a round of this study counts with "
            f"{fewest} ({key})",
        )
    if proposal.coordinator is not None and (words := _coordinator_is_refused(policy, proposal.coordinator)):
        refuse("coordinators", words)
    if policy.maximum_rounds is not None and study.training.rounds > policy.maximum_rounds:
        refuse("maximum_rounds", f"at most {policy.maximum_rounds} rounds, this study has {study.training.rounds}")
    largest = max(proposal.bytes_up.values(), default=0)
    if policy.maximum_bytes_up is not None and largest > policy.maximum_bytes_up:
        refuse("maximum_bytes_up", f"at most {policy.maximum_bytes_up:,} bytes an update, this one has {largest:,}")
    return found + _privacy_violations(policy, study)


def fewest_summed(study: Study) -> tuple[int, str]:
    """The fewest sites in a sum of the study, and the key that says so."""
    secure = study.secure_aggregation
    if not secure.required:
        return study.cohort.quorum, "cohort.quorum"
    if secure.threshold >= secure.minimum_cohort:
        return secure.threshold, "secure_aggregation.threshold"
    return secure.minimum_cohort, "secure_aggregation.minimum_cohort"


def secure_policy(policy: Policy, study: Study) -> SitePolicy:
    """What a site asks of each secure sum of a study."""
    return SitePolicy(
        minimum_cohort=max(MIN_SITES, policy.minimum_cohort or 0),
        minimum_threshold=policy.minimum_threshold or default_threshold(len(study.cohort.sites)),
    )


def _secure_violations(policy: Policy, study: Study) -> list[Violation]:
    secure = study.secure_aggregation
    if not secure.required:
        if policy.secure_aggregation == "optional":
            return []
        words = "required, this study has none: the coordinator would see this site's own update"
        return [Violation("secure_aggregation", words)]
    wanted = secure_policy(policy, study).minimum_threshold
    if secure.threshold >= wanted:
        return []
    words = (
        f"at least {counted(wanted, 'site')} to unmask a sum, in this study it takes {secure.threshold} "
        "(secure_aggregation.threshold)"
    )
    return [Violation("minimum_threshold", words)]


def _privacy_violations(policy: Policy, study: Study) -> list[Violation]:
    privacy, wanted = privacy_of(study), policy.differential_privacy
    found = _secure_violations(policy, study)
    if wanted.maximum_epsilon is None:
        return found
    asked = f"epsilon at most {wanted.maximum_epsilon:g} at delta {wanted.at_delta:g}"
    key = "differential_privacy"
    if privacy.unit == "none":
        found.append(Violation(key, f"{asked}, this study has no differential privacy"))
    elif wanted.unit == "patient" and privacy.unit != "patient":
        found.append(
            Violation(f"{key}.unit", f"patient, with noise added at this site; this study's unit is the {privacy.unit}")
        )
    elif privacy.epsilon > wanted.maximum_epsilon or privacy.delta > wanted.at_delta:
        words = f"{asked}, this study may spend epsilon {privacy.epsilon:g} at delta {privacy.delta:g}"
        found.append(Violation(f"{key}.maximum_epsilon", words))
    return found


def epsilon_ceiling(policy: Policy, study: Study, given: float | None) -> float | None:
    """The most epsilon that all studies of a site may spend together: the smaller of the policy's and of what is given.

    It is at the study's delta, which is at most the policy's. None: nothing bounds them together.
    """
    maximum = policy.differential_privacy.maximum_epsilon if privacy_of(study).unit == "patient" else None
    return min((one for one in (maximum, given) if one is not None), default=None)


def task_violations(policy: Policy, kind: str, round_number: int, now: datetime.datetime) -> list[Violation]:
    """The points of a policy that one task violates: "train" or "evaluate", of a round, at this local time."""
    found = []
    if kind not in policy.tasks:
        found.append(Violation("tasks", f"only {' and '.join(policy.tasks)}, the coordinator asks to {kind}"))
    if policy.maximum_rounds is not None and round_number > policy.maximum_rounds:
        words = f"at most {policy.maximum_rounds} rounds, the coordinator asks for round {round_number}"
        found.append(Violation("maximum_rounds", words))
    if policy.hours is not None and not policy.hours.holds(now):
        words = f"{policy.hours} local time, it is {now:%H:%M}"
        found.append(Violation("hours", words, policy.hours.seconds_until(now)))
    return found


def fetch_violations(policy: Policy, coordinator: str, study: str | None) -> list[Violation]:
    """The points of a policy that fetching a published model violates; `study` None: not known yet."""
    found = []
    if words := _coordinator_is_refused(policy, coordinator):
        found.append(Violation("coordinators", words))
    if policy.models is not None and study is not None and study not in policy.models:
        known = ", ".join(policy.models) or "none"
        found.append(Violation("models", f"published models of these studies: {known}; this one is of {study}"))
    return found


def _coordinator_is_refused(policy: Policy, host: str) -> str:
    if policy.coordinators is None or host.lower() in policy.coordinators:
        return ""
    return f"only {', '.join(policy.coordinators) or 'none'}, this one is {host}"


def violations_text(violations: list[Violation]) -> list[str]:
    """A line for each."""
    return [f"{one.key}: {one.words}" for one in violations]


def as_json(policy: Policy) -> dict[str, Any]:
    """The policy as plain data."""
    import yaml

    found: dict[str, Any] = yaml.safe_load(policy.to_yaml())
    return found
