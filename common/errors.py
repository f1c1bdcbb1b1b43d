"""One class per cause of failure, each with the exit code that the commands end on.

Every message has three parts: what is wrong, where, what to do. The codes are a contract (README, "Exit codes").
"""

from __future__ import annotations

from typing import ClassVar


class WardroundError(Exception):
    """Base of every failure that a user can act on; anything else is a defect of Wardround (exit code 70)."""

    exit_code: ClassVar[int] = 1


class UsageError(WardroundError):
    """The command was called with arguments that cannot work together or do not exist."""

    exit_code = 2


class StudyError(WardroundError):
    """The study file has an unknown key, a wrong type or an impossible value."""

    exit_code = 2


class PolicyFileError(WardroundError):
    """A site's policy file has an unknown key, a wrong type or an impossible value, or cannot be read."""

    exit_code = 2


class DataError(WardroundError):
    """Images or labels are missing, unreadable, or do not fit each other or the study."""

    exit_code = 3


class NetworkError(WardroundError):
    """A port is in use, an address is malformed, or something that is not the coordinator answers there."""

    exit_code = 4


class IdentityError(WardroundError):
    """A certificate, key or signature is missing, unreadable or expired, or somebody else's."""

    exit_code = 5


class PlanMismatchError(WardroundError):
    """Coordinator and site hold different plans: another study file, or another version of the plan's format."""

    exit_code = 6


class RunFolderError(WardroundError):
    """A run folder is missing, in use, of another study, or cannot be read or written."""

    exit_code = 7


class WireError(WardroundError):
    """A message or a stored tensor file is torn, damaged, or not of the type the plan says."""

    exit_code = 8


class PublishError(WardroundError):
    """The model could not be converted, or a published file does not do what it should."""

    exit_code = 9


class TrainingError(WardroundError):
    """Training, evaluation or a whole study could not be completed."""

    exit_code = 10


class ProtocolError(WardroundError):
    """Secure aggregation was refused or could not be completed; `common.secure_aggregation.refusals` has the causes."""

    exit_code = 10


class ApprovalError(WardroundError):
    """A site's operator has not approved this study with this package, has rejected it, or the record was changed."""

    exit_code = 11


class PolicyError(WardroundError):
    """The site's own policy forbids what was asked of it."""

    exit_code = 12


class BudgetSpentError(TrainingError):
    """The next round would spend more privacy than the study, or the site, allows; it does not begin."""


class RoundSkippedError(ProtocolError):
    """A round's secure sum failed once unmasking had begun: the study goes on with the next round, without this one."""
