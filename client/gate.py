"""What stands between a coordinator's task and this site's work: the operator's approval and the site's policy.

Both are read again before every task, so that a rejection or a changed policy takes effect at once. Nothing of a
coordinator's messages but the task's kind and round enters, so none can weaken either.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from client.approvals import Approvals, Record, Subject
from client.policy import (
    PolicyOfFile,
    Proposal,
    Violation,
    is_there,
    read_policy,
    secure_policy,
    study_violations,
    task_violations,
    violations_text,
)
from common.errors import ApprovalError, IdentityError, PolicyError, PolicyFileError, WardroundError
from common.secure_aggregation.session import SitePolicy

UNREADABLE = "its site's policy cannot be read"
NOT_APPROVED = "its site's operator does not approve it any more"
NO_SUCH_ROUND = "its site's operator approved no such round: training.rounds"


@dataclass(frozen=True)
class Refusal:
    """Why a task is not worked on.

    Attributes
    ----------
    reason : for the coordinator.
    words : for the site's operator.
    opens_in : seconds until the task may be looked at again; None where waiting does not help.
    error : what ends the site, where no further task can succeed either.
    """

    reason: str
    words: str
    opens_in: float | None = None
    error: WardroundError | None = None


@dataclass(frozen=True)
class Passed:
    """What lets a site start: the approval, and the policy that the study keeps to."""

    approval: Record
    policy: PolicyOfFile


class Gate(Protocol):
    """Whoever says which tasks a site works on."""

    def refusal(self, kind: str, round_number: int) -> Refusal | None:
        """Why a "train" or "evaluate" task of this round is not worked on; None where it is."""


class OpenGate:
    """Refuses nothing: of agents that are made by a program, not by `wardround-site start`."""

    def refusal(self, kind: str, round_number: int) -> Refusal | None:
        """See `Gate`."""
        return None


class SiteGate:
    """The gate of a site.

    Parameters
    ----------
    approvals, subject : what was decided, and about what.
    policy : where the policy lies.
    policy_required : whether there must be a file; where one was there at the start, there must be one later too.
    proposal : what is known of the study when the site starts; `complete` adds what is known later.
    todo : what to do without an approval, the end of its message.
    now : the local time.

    Raises
    ------
    PolicyFileError : it cannot be seen whether there is a policy.
    """

    def __init__(
        self,
        approvals: Approvals,
        subject: Subject,
        policy: Path,
        proposal: Proposal,
        *,
        policy_required: bool,
        todo: str,
        now: Callable[[], datetime.datetime] = datetime.datetime.now,
    ) -> None:
        self._approvals = approvals
        self._subject = subject
        self._path = policy
        self._proposal = proposal
        self._todo = todo
        self._now = now
        self._required = policy_required or is_there(policy)

    def check(self) -> Passed:
        """Whether the site may start at all.

        Raises
        ------
        ApprovalError : see `Approvals.require`.
        IdentityError : the key that verifies cannot be used.
        PolicyFileError : the policy cannot be read.
        PolicyError : the study violates it, whatever the hour.
        """
        approval = self._approvals.require(self._subject, todo=self._todo)
        found = read_policy(self._path, required=self._required)
        violations = study_violations(found.policy, self._proposal)
        if violations:
            points = "; ".join(violations_text(violations))
            raise PolicyError(
                f"{self._subject.site}: study {self._subject.study.name} violates this site's policy, so nothing is "
                f"run: {points} ({self._path}); ask whoever runs the study to change it, or change the policy"
            )
        return Passed(approval, found)

    def complete(self, proposal: Proposal) -> Passed:
        """Goes on with what is known now of the study, and checks it; raises as `check` does."""
        self._proposal = proposal
        return self.check()

    def secure_policy(self) -> SitePolicy:
        """What the policy asks of a secure sum, now. Raises PolicyFileError."""
        return secure_policy(read_policy(self._path, required=self._required).policy, self._subject.study)

    def refusal(self, kind: str, round_number: int) -> Refusal | None:
        """See `Gate`."""
        try:
            self._approvals.require(self._subject, todo=self._todo)
        except (ApprovalError, IdentityError) as error:
            return Refusal(NOT_APPROVED, str(error), error=error)
        rounds = self._subject.study.training.rounds
        if not 1 <= round_number <= rounds:
            words = f"training.rounds: 1 to {rounds} were approved, the coordinator asks for round {round_number}"
            return Refusal(NO_SUCH_ROUND, words)
        try:
            policy = read_policy(self._path, required=self._required).policy
        except PolicyFileError as error:
            return Refusal(UNREADABLE, str(error))
        violations = study_violations(policy, self._proposal)
        violations += task_violations(policy, kind, round_number, self._now())
        if not violations:
            return None
        return _refusal(violations, self._path)


def _refusal(violations: list[Violation], path: Path) -> Refusal:
    waits = [one.opens_in for one in violations]
    opens_in = None if None in waits else max(wait for wait in waits if wait is not None)
    points = "; ".join(violations_text(violations))
    return Refusal(violations[0].reason, f"this site's policy forbids it: {points} ({path})", opens_in)
