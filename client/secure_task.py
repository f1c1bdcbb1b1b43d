"""A site's side of secure sums: answers the coordinator's steps, and lets its update leave under masks alone.

Its checks are those of `common.secure_aggregation.site`; here is what ties them to a study, its plan, this site's
enrolled key, its policy and its ledger of what it has unmasked. One attempt is under way at a time; a new one begins
with fresh keys, whatever became of the one before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.disk import cannot_write
from common.errors import ProtocolError
from common.secure_aggregation.ledger import FileLedger
from common.secure_aggregation.masking import InputSpec
from common.secure_aggregation.messages import (
    DeliveredShares,
    MaskedInput,
    Roster,
    SurvivorSet,
    UnmaskRequest,
)
from common.secure_aggregation.refusals import OutOfTurnError
from common.secure_aggregation.session import Session, SitePolicy, Stage
from common.secure_aggregation.site import Site
from common.secure_aggregation.study_session import StudySums
from common.security.audit import NO_AUDIT, Audit
from common.security.secure_signatures import EnrolledSites, sign_with
from common.security.signing import Signer
from common.study import Study
from common.wire.partial import disk_hit
from common.wire.tensors import Array

LEDGER = "unmasked.jsonl"
"""In the site's work folder: which rounds it has begun to unmask. It must outlive all else there."""


@dataclass(frozen=True)
class Step:
    """What the coordinator asks: in which attempt of which round, and with what content.

    `broadcast` is what the site's update was computed from (`broadcast_digest`), whatever the coordinator says.
    """

    kind: str
    number: int
    attempt: int
    broadcast: bytes = field(repr=False)
    session: bytes = field(repr=False)
    content: bytes = field(repr=False)

    def goes_on(self, first: Step) -> bool:
        """Whether it is of the attempt that `first` began, on the same weights."""
        attempts = [(one.kind, one.number, one.attempt, one.broadcast) for one in (self, first)]
        return attempts[0] == attempts[1]


@dataclass(frozen=True)
class Masked:
    """A masked update in a file, to be uploaded."""

    path: Path
    sha256: bytes
    size: int


@dataclass
class _Attempt:
    """An attempt under way: its state, and the last step with its answer, which may be asked for once more."""

    step: Step
    site: Site
    session: Session
    asked: bytes
    answer: bytes | Masked


class SecureTask:
    """Takes part in the sums of one study. For one thread.

    Parameters
    ----------
    study, site, plan_digest : whose sums, as which site, by which plan.
    run : what tells runs of the study apart (`Identity.run`).
    specs : shapes and bit widths of what is summed, by task ("train", "evaluate").
    signer : signs with the site's enrolled key; its authority is the one that peers are checked against.
    folder : the site's own; holds the ledger, and the masked update while it is sent.
    policy : what the site asks of every sum, asked anew at each attempt.
    audit : where each step is recorded before its answer is sent.
    """

    def __init__(
        self,
        study: Study,
        site: str,
        plan_digest: bytes,
        run: bytes,
        specs: Mapping[str, Sequence[InputSpec]],
        *,
        signer: Signer,
        folder: Path,
        policy: Callable[[], SitePolicy],
        audit: Audit = NO_AUDIT,
    ) -> None:
        self._sums, self._site = StudySums(study, plan_digest, run), site
        self._specs, self._signer, self._folder, self._policy = dict(specs), signer, folder, policy
        self._verify = EnrolledSites(signer.authority)
        self._ledger = FileLedger(folder / LEDGER)
        self._masked_file = folder / "masked.part"
        self._audit = audit
        self._attempt: _Attempt | None = None

    def answer(self, step: Step, update: Callable[[], Sequence[Array]]) -> bytes | Masked:
        """What to send back. `update` gives the tensors that the plan's work computed for the step's round.

        Raises
        ------
        ProtocolError : the step is refused, and this site's part in the attempt is over; the class says why.
        PolicyFileError : the policy cannot be read.
        RunFolderError : ledger, audit log or the masked update cannot be written.
        """
        try:
            return self._answer(step, update)
        except ProtocolError as error:
            self._audit.record("secure-step-refused", **_named(step), reason=type(error).__name__)
            raise

    def _answer(self, step: Step, update: Callable[[], Sequence[Array]]) -> bytes | Masked:
        if step.session:
            return self._join(step)
        attempt = self._attempt
        if attempt is None or not step.goes_on(attempt.step):
            raise OutOfTurnError(
                f"{step.kind} round {step.number}, attempt {step.attempt}: this site takes no part in it; ask it "
                "with a new session"
            )
        if attempt.asked == step.content:  # the line broke, and the answer was lost
            return attempt.answer
        attempt.answer = self._next(attempt, step, update)
        attempt.asked = step.content
        return attempt.answer

    def _join(self, step: Step) -> bytes | Masked:
        before = self._attempt
        if before is not None and before.step == step and before.asked == b"":  # its answer was lost on the line
            return before.answer
        self._attempt = None
        session = self._sums.proposed(step.session, step.kind, step.number, step.attempt, broadcast=step.broadcast)
        site = Site(
            session,
            self._site,
            self._specs[step.kind],
            sign=sign_with(self._signer),
            certificate=self._signer.certificate,
            verify=self._verify,
            ledger=self._ledger,
            policy=self._policy(),
        )
        self._audit.record("secure-sum-joined", **_named(step), sites=list(session.sites), threshold=session.threshold)
        answer = site.advertise().encode()
        self._attempt = _Attempt(step, site, session, b"", answer)
        return answer

    def _next(self, attempt: _Attempt, step: Step, update: Callable[[], Sequence[Array]]) -> bytes | Masked:
        site, content = attempt.site, step.content
        if site.stage is Stage.SHARE:
            roster = Roster.decode(content)
            answer = site.share(roster).encode()
            self._audit.record("secure-shares-sent", **_named(step), sites=list(roster.sites))
            return answer
        if site.stage is Stage.MASK:
            return self._masked(step, site.mask(DeliveredShares.decode(content), update()))
        if site.stage is Stage.CONFIRM:
            self._masked_file.unlink(missing_ok=True)  # it has arrived, or comes too late
            survivors = SurvivorSet.decode(content)
            answer = site.confirm(survivors).encode()
            self._audit.record("secure-survivors-confirmed", **_named(step), survivors=list(survivors.survivors))
            return answer
        if site.stage is Stage.UNMASK:
            request = UnmaskRequest.decode(content)
            answer = site.unmask(request).encode()
            disk_hit("secure.begun", self._folder / LEDGER)
            self._audit.record(
                "secure-sum-unmasked",
                **_named(step),
                survivors=list(request.survivors),
                dropped=list(request.dropped),
            )
            return answer
        raise OutOfTurnError(
            f"{attempt.session.name}: this site has done its part, or refused; the message was not used"
        )

    def _masked(self, step: Step, masked: MaskedInput) -> Masked:
        """Writes the masked update. It need not survive a power cut: nothing but this process can go on with it."""
        path = self._masked_file
        digest, size = hashlib.sha256(), 0
        try:
            with path.open("wb") as file:
                for piece in masked.pieces():
                    digest.update(piece)
                    size += file.write(piece)
        except OSError as error:
            raise cannot_write(path, error) from error
        disk_hit("secure.masked", path)
        return Masked(path, digest.digest(), size)


def _named(step: Step) -> dict[str, Any]:
    return {"kind": step.kind, "round": step.number, "attempt": step.attempt}
