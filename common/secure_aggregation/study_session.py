"""What a study makes of a session: the one that both sides expect, so that nothing in a proposal is left to choose."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from common.secure_aggregation.encoding import join_fields
from common.secure_aggregation.packing import WORD_BITS
from common.secure_aggregation.refusals import UnknownSiteError, WrongSessionError
from common.secure_aggregation.session import Session, decode_session
from common.study import Study


def update_bits(sites: int) -> int:
    """Of each weight's change at one of so many sites, such that the sum has `WORD_BITS`: these are masked fastest."""
    return WORD_BITS - (sites - 1).bit_length()


def broadcast_digest(tensors: bytes, scalars: bytes) -> bytes:
    """What tells the weights that a round's work begins from, 32 bytes, of the SHA-256 of each part of a broadcast."""
    return hashlib.sha256(join_fields(tensors, scalars)).digest()


@dataclass(frozen=True)
class StudySums:
    """The sums of one run of a study; coordinator and sites make the same sessions of it.

    Attributes
    ----------
    study, plan_digest : what is trained.
    run : what tells this run of the study apart, 32 bytes; a site unmasks a round of a run once.
    """

    study: Study
    plan_digest: bytes
    run: bytes

    def session(self, kind: str, number: int, attempt: int, sites: Sequence[str], *, broadcast: bytes) -> Session:
        """The session of an attempt of a round among these sites of the study.

        Its plan digest is one of the plan and of the broadcast: sites that were given other weights than their peers do
        not find the same session. Else a coordinator would give all sites but one weights from which nothing is
        learned, and the sum would be that one's update (Pasquini et al. 2022, doi:10.1145/3548606.3560557).

        Parameters
        ----------
        kind : "train" or "evaluate"; each round of a kind is unmasked for itself.
        broadcast : what all sites begin from, as `broadcast_digest` says it.

        Raises
        ------
        InvalidSessionError, ThresholdTooLowError : see `Session`.
        """
        secure = self.study.secure_aggregation
        name = f"{self.study.name} {kind} {self.run.hex()[:32]}"
        work = hashlib.sha256(join_fields(self.plan_digest, broadcast)).digest()
        return Session(name, work, number, attempt, tuple(sorted(sites)), secure.threshold, secure.minimum_cohort)

    def proposed(self, proposal: bytes, kind: str, number: int, attempt: int, *, broadcast: bytes) -> Session:
        """A coordinator's proposal, where it is what `session` gives: only its sites are the coordinator's choice.

        Raises
        ------
        WrongSessionError : another study, plan, run, round, attempt, threshold or minimum cohort; or the coordinator
            gave this site other weights than the session is for.
        UnknownSiteError : a site that is not in the study.
        MalformedMessageError, InvalidSessionError, ThresholdTooLowError : see `decode_session`.
        """
        session = decode_session(proposal)
        known = self.study.cohort.sites
        if strangers := sorted(set(session.sites) - set(known)):
            raise UnknownSiteError(
                f"{session.name}: holds {', '.join(strangers)}, expected sites of the study alone ("
                f"{', '.join(known)}); the coordinator, or who speaks for it, is not to be trusted"
            )
        expected = self.session(kind, number, attempt, session.sites, broadcast=broadcast)
        if session != expected:
            raise WrongSessionError(
                f"{session.name}: expected the session of {expected.name}, with threshold {expected.threshold} and a "
                f"minimum cohort of {expected.minimum_cohort}, found threshold {session.threshold} and "
                f"{session.minimum_cohort}, another plan, or other weights than those that this site was given; it was "
                "not joined"
            )
        return session
