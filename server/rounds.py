"""The state of one round as a pure machine: who was asked, who answered, when it closes. No clock, no I/O.

A round asks its cohort for one thing, a trained update or an evaluation. It closes when every site of the cohort
answered, or at its deadline if the quorum is met; below the quorum it begins another attempt, which keeps what was
received. An update that was received is included, always: that is what makes the result a function of the cohort alone.
A round that was closed before the coordinator was stopped closes with the same cohort and no other, however long that
takes.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

from common.privacy.accounting import BUDGET_SPENT
from common.wire.tensors import Stored


class Kind(enum.Enum):
    """What a round asks for."""

    TRAIN = "train"
    EVALUATE = "evaluate"


class Stage(enum.Enum):
    """Where a site is within a round, in the words that status shows."""

    WAITING = "waiting"  # it has no connection
    ASSIGNED = "assigned"
    DOWNLOAD = "download"
    TRAINING = "training"
    EVALUATION = "evaluation"
    READY = "ready"  # of a secure round: its work is done, and nothing of it is sent
    UPLOAD = "upload"
    DONE = "done"
    FAILED = "failed"


@dataclass
class Answer:
    """One site's part in a round."""

    stage: Stage = Stage.WAITING
    batch: int = 0
    batches: int = 0
    reason: str = ""
    refused: bool = False  # its update is worth nothing; it is asked again in the next attempt
    update: Stored | None = None
    cases: int = 0
    seconds_download: float = 0.0
    seconds_work: float = 0.0
    seconds_upload: float = 0.0
    arrived: float | None = None  # when the update was on disk, by the clock of whoever has one
    epsilon: float | None = None  # what the site has spent of its privacy budget, this update included

    @property
    def spent(self) -> bool:
        """Whether the site has no privacy budget left for this round: it is not asked again in it."""
        return self.reason == BUDGET_SPENT


@dataclass
class Round:
    """One call of the cohort.

    Parameters
    ----------
    kind, number : what is asked and in which round, from 1.
    sites : the cohort, in name order.
    quorum : how many answers are enough at the deadline.
    attempt : from 1; each deadline that is passed below the quorum begins another.
    fixed : the cohort that the round was closed with before, in name order; None: it was not closed yet.
    """

    kind: Kind
    number: int
    sites: Sequence[str]
    quorum: int
    attempt: int = 1
    fixed: Sequence[str] | None = None
    closed: bool = False
    answers: dict[str, Answer] = field(init=False)

    def __post_init__(self) -> None:
        self.sites = sorted(self.sites)
        self.answers = {site: Answer() for site in self.sites}

    @property
    def asked(self) -> Sequence[str]:
        """The sites that may answer, in name order."""
        return self.sites if self.fixed is None else self.fixed

    @property
    def needed(self) -> int:
        """How many answers the round cannot close without."""
        return self.quorum if self.fixed is None else len(self.fixed)

    @property
    def included(self) -> list[str]:
        """The sites whose updates are in, in name order, the order in which they are summed."""
        return [site for site in self.sites if self.answers[site].update is not None]

    @property
    def missing(self) -> list[str]:
        """The sites that were asked and have sent nothing."""
        return [site for site in self.asked if self.answers[site].update is None]

    @property
    def complete(self) -> bool:
        """Every site that was asked answered, with an update or a failure, and enough of them with an update."""
        answered = all(self.answers[site].stage in (Stage.DONE, Stage.FAILED) for site in self.asked)
        return answered and len(self.included) >= self.needed

    def wants(self, site: str) -> bool:
        """Whether the site still has this round's work to do."""
        return not self.closed and site in self.asked and self.answers[site].update is None

    def connected(self, site: str) -> None:
        """The site is there and was given its task (again, if it had failed or gone, but not after a refusal)."""
        if self.wants(site) and not self.answers[site].refused and not self.answers[site].spent:
            self.answers[site] = Answer(stage=Stage.ASSIGNED)

    def disconnected(self, site: str) -> None:
        """The site's stream broke; what it was doing is not known until it is back."""
        if self.wants(site) and self.answers[site].stage is not Stage.FAILED:
            self.answers[site] = Answer(stage=Stage.WAITING)

    def progressed(self, site: str, stage: Stage, batch: int, batches: int) -> None:
        """The site is at `batch` of `batches` of a stage."""
        if self.wants(site) and not self.answers[site].refused:
            answer = self.answers[site]
            answer.stage, answer.batch, answer.batches = stage, batch, batches

    def failed(self, site: str, reason: str) -> None:
        """The site cannot do this round's work, and says why."""
        if self.wants(site):
            self.answers[site].stage, self.answers[site].reason = Stage.FAILED, reason

    def refused(self, site: str, reason: str) -> None:
        """The site's update is not taken: its part in this attempt is over."""
        if self.wants(site):
            self.failed(site, reason)
            self.answers[site].refused = True

    def received(
        self,
        site: str,
        update: Stored,
        *,
        cases: int = 0,
        download: float = 0.0,
        work: float = 0.0,
        upload: float = 0.0,
        epsilon: float | None = None,
        arrived: float | None = None,
    ) -> None:
        """The site's update is on disk."""
        if self.wants(site):
            answer = self.answers[site]
            answer.stage, answer.update, answer.cases, answer.reason = Stage.DONE, update, cases, ""
            answer.refused = False
            answer.seconds_download, answer.seconds_work, answer.seconds_upload = download, work, upload
            answer.epsilon, answer.arrived = epsilon, arrived

    def ready(self, site: str) -> None:
        """The site's work is done; it waits for the others before it sends anything."""
        if self.wants(site):
            self.answers[site] = Answer(stage=Stage.READY)

    def begin_again(self) -> None:
        """What was received so far is worth nothing, as a secure sum needs all of one attempt: another attempt."""
        self.attempt += 1
        for site, answer in self.answers.items():
            if answer.update is not None:
                self.answers[site] = Answer(stage=Stage.READY)

    def close(self) -> None:
        """No more updates; `included` is final."""
        self.closed = True

    def deadline(self) -> bool:
        """The deadline passed: closes if enough answered and returns True, or begins another attempt, returns False."""
        if len(self.included) >= self.needed:
            self.close()
            return True
        self.attempt += 1
        for site in self.missing:
            if self.answers[site].stage is Stage.FAILED and not self.answers[site].spent:
                self.answers[site] = Answer()
        return False
