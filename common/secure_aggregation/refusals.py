"""Why a message, a session or an input was refused: one class per cause, so that tests and logs can tell them apart.

What a site refuses protects its patients: it never answers the message and takes no further part in the attempt. What
the coordinator refuses leaves its state as it was: the message's site counts as dropped unless a good one comes.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from common.errors import ProtocolError


class MalformedMessageError(ProtocolError):
    """Bytes or fields are not what the protocol writes: torn, too long, unsorted, of another kind."""


class InvalidSessionError(ProtocolError):
    """A session that nobody may take part in: too few or too many sites, an impossible threshold or round."""


class WrongSessionError(ProtocolError):
    """The message belongs to another study, plan, round, attempt or cohort: a mix-up, or a replay."""


class OutOfTurnError(ProtocolError):
    """The message does not belong to this stage: it is late, early, or asks for the same step again."""


class DuplicateMessageError(ProtocolError):
    """The site has sent its message of this stage already; the first one counts."""


class UnknownSiteError(ProtocolError):
    """A site that is not in the set it would have to be in."""


class BadSignatureError(ProtocolError):
    """An advertisement's keys were not signed by the site's enrolled key."""


class DuplicateKeyError(ProtocolError):
    """A public key appears twice: two sites would share a secret that only one of them should have."""


class BadKeyError(ProtocolError):
    """A public key with which no secret can be agreed (a point of low order)."""


class OwnKeyReplacedError(ProtocolError):
    """The roster lacks the site's own advertisement, or holds another one in its name."""


class CohortTooSmallError(ProtocolError):
    """Fewer sites than the session or the site's own policy asks for: the sum would say too much about each."""


class ThresholdTooLowError(ProtocolError):
    """So few sites could unmask that two disjoint groups of them might do so for two different sums."""


class UndecryptableShareError(ProtocolError):
    """A peer's share does not decrypt: it was changed, or was meant for another recipient or session."""


class BadShareError(ProtocolError):
    """Shares from which no secret can be reconstructed: too few, twice the same site, out of range, inconsistent."""


class InputError(ProtocolError):
    """A tensor that cannot be masked: another shape, not integers, or values beyond its bit width."""


class InconsistentSetsError(ProtocolError):
    """Sites were shown different sets (equivocation), or a confirmation of the set is forged."""


class TooFewConfirmationsError(ProtocolError):
    """Fewer sites than the threshold confirmed the set of survivors."""


class NotASurvivorError(ProtocolError):
    """The set of survivors does not hold the site that is asked to confirm it."""


class BothSharesAskedError(ProtocolError):
    """The self-mask and the mask key of one site were asked for: together they reveal its input."""


class SetChangedError(ProtocolError):
    """The sets to unmask are not those that the site confirmed."""


class UnmaskingBegunError(ProtocolError):
    """The site has begun to unmask this round of the study: a second sum of it could be subtracted from the first."""


class ImpossibleSumError(ProtocolError):
    """The masks did not cancel: a site masked another input, or with other keys, than it said."""


class TooFewSitesError(ProtocolError):
    """Too many sites dropped out: this attempt cannot be completed.

    `dropped` maps the name of each stage up to this one to the sites that were lost in it.
    """

    def __init__(self, message: str, dropped: Mapping[str, tuple[str, ...]] = MappingProxyType({})) -> None:
        super().__init__(message)
        self.dropped = dropped
