"""The session: what coordinator and sites agree on before a round, and what every signature and key is bound to.

Each attempt of a round is a session of its own. Its digest enters every signature, every key derivation and the
associated data of every ciphertext, so that nothing of one session is of use in another.
"""

from __future__ import annotations

import enum
import functools
import hashlib
from dataclasses import dataclass
from typing import Final

from common.secure_aggregation.encoding import (
    MAX_NAME_BYTES,
    MAX_SITES,
    Buffer,
    Reader,
    join_fields,
    join_names,
    number_field,
)
from common.secure_aggregation.refusals import (
    CohortTooSmallError,
    InvalidSessionError,
    MalformedMessageError,
    ThresholdTooLowError,
    UnknownSiteError,
    WrongSessionError,
)

PROTOCOL: Final = "wardround secure aggregation, version 1"
MIN_SITES: Final = 3
DIGEST_BYTES: Final = 32
_FEW_SITES: Final = 5
_MAX_STUDY_BYTES: Final = 256


class Stage(enum.StrEnum):
    """What a site or the coordinator does next; R0 to R4 of the protocol, in order."""

    ADVERTISE = "advertise"
    SHARE = "share"
    MASK = "mask"
    CONFIRM = "confirm"
    UNMASK = "unmask"
    DONE = "done"
    REFUSED = "refused"


def default_threshold(sites: int) -> int:
    """floor(2n/3) + 1: safe while the coordinator is in league with fewer than a third of the sites (theorem 6.5)."""
    return 2 * sites // 3 + 1


def small_cohort_warning(sites: int) -> str | None:
    """What to tell people about a cohort of fewer than five sites; None where there is nothing to say."""
    if sites >= _FEW_SITES:
        return None
    return (
        f"secure aggregation among {sites} sites: each site knows its own update, so that few others hide in the sum; "
        f"no more than {sites - default_threshold(sites)} may drop out of a round. Invite {_FEW_SITES} sites or more"
    )


@dataclass(frozen=True)
class Session:
    """One attempt of one round.

    Parameters
    ----------
    study
        Names the study, and must name this run of it: a site unmasks a round of it once and never again. 1 to 256
        bytes of UTF-8.
    plan_digest
        SHA-256 of the plan that coordinator and sites follow, 32 bytes; it says which tensors are summed.
    round, attempt
        From 0.
    sites
        All that are invited: 3 to 50 different names, sorted.
    threshold
        How many must take part in unmasking; more than half of `sites`, at most all.
    minimum_cohort
        The fewest updates that may be summed; at least 2. What a site asks for besides is in `SitePolicy`.

    Raises
    ------
    ThresholdTooLowError
        The threshold is not more than half of the sites.
    InvalidSessionError
        Anything else is not as above.
    """

    study: str
    plan_digest: bytes
    round: int
    attempt: int
    sites: tuple[str, ...]
    threshold: int
    minimum_cohort: int

    def __post_init__(self) -> None:
        count = len(self.sites)
        where = f"session of round {self.round}, attempt {self.attempt}"
        if not MIN_SITES <= count <= MAX_SITES:
            raise InvalidSessionError(
                f"{where}: expected {MIN_SITES} to {MAX_SITES} sites, found {count}; invite others"
            )
        if list(self.sites) != sorted(set(self.sites)):
            raise InvalidSessionError(f"{where}: expected different sites, sorted, found {', '.join(self.sites)!r}")
        for name, limit in ((self.study, _MAX_STUDY_BYTES), *((site, MAX_NAME_BYTES) for site in self.sites)):
            if not 1 <= len(name.encode(errors="surrogatepass")) <= limit or not name.isprintable():
                raise InvalidSessionError(f"{where}: expected a name of 1 to {limit} printable bytes, found {name!r}")
        if len(self.plan_digest) != DIGEST_BYTES:
            raise InvalidSessionError(
                f"{where}: expected a plan's digest of {DIGEST_BYTES} bytes, found {len(self.plan_digest)}"
            )
        if not (0 <= self.round < 2**64 and 0 <= self.attempt < 2**64):
            raise InvalidSessionError(f"{where}: expected a round and an attempt from 0")
        if self.threshold <= count // 2:
            raise ThresholdTooLowError(
                f"{where}: expected a threshold of {count // 2 + 1} or more for {count} sites, found {self.threshold}; "
                f"{default_threshold(count)} is the usual one"
            )
        if self.threshold > count:
            raise InvalidSessionError(
                f"{where}: expected a threshold of at most {count}, the number of sites, found {self.threshold}"
            )
        if not 2 <= self.minimum_cohort <= count:
            raise InvalidSessionError(
                f"{where}: expected a minimum cohort of 2 to {count}, the number of sites, found {self.minimum_cohort}"
            )

    @functools.cached_property
    def digest(self) -> bytes:
        """SHA-256 of the session's encoding, 32 bytes."""
        return hashlib.sha256(self.encode()).digest()

    @property
    def quorum(self) -> int:
        """The fewest sites with which a stage up to masking may end."""
        return max(self.threshold, self.minimum_cohort)

    def index(self, site: str) -> int:
        """1 for the first site: where its shares are evaluated. Raises UnknownSiteError for others."""
        try:
            return self.sites.index(site) + 1
        except ValueError as error:
            raise UnknownSiteError(
                f"site {site!r}: is not in {self.name}; expected one of {', '.join(self.sites)}"
            ) from error

    @property
    def name(self) -> str:
        """For messages to people."""
        return f"study {self.study!r}, round {self.round}, attempt {self.attempt}"

    def check(self, digest: bytes, what: str) -> None:
        """Raises WrongSessionError where a message carries another session's digest."""
        if digest != self.digest:
            raise WrongSessionError(
                f"{what}: belongs to another session than {self.name}: another round, attempt, plan or cohort; it was "
                "not used"
            )

    def context(self, purpose: str, *parts: bytes) -> bytes:
        """What is signed, or names a derived key: protocol, purpose, session, and what is particular to it."""
        return join_fields(PROTOCOL.encode(), purpose.encode(), self.digest, *parts)

    def encode(self) -> bytes:
        """The session's only encoding."""
        return (
            join_fields(PROTOCOL.encode(), self.study.encode(), self.plan_digest)
            + number_field(self.round)
            + number_field(self.attempt)
            + join_names(self.sites)
            + number_field(self.threshold)
            + number_field(self.minimum_cohort)
        )


def decode_session(data: Buffer) -> Session:
    """The session that `Session.encode` wrote.

    Raises MalformedMessageError where it did not write these bytes, and what `Session` raises for impossible values.
    """
    reader = Reader(data, "session")
    protocol = reader.text("protocol")
    if protocol != PROTOCOL:
        raise MalformedMessageError(
            f"session: expected the protocol {PROTOCOL!r}, found {protocol!r}; both sides must run the same version"
        )
    study = reader.text("study", _MAX_STUDY_BYTES)
    digest = reader.field("plan digest", DIGEST_BYTES, DIGEST_BYTES)
    number, attempt = reader.number(), reader.number()
    sites = reader.names("sites")
    threshold, minimum_cohort = reader.number(), reader.number()
    reader.end()
    return Session(study, digest, number, attempt, sites, threshold, minimum_cohort)


@dataclass(frozen=True)
class SitePolicy:
    """What a site asks for, whatever the coordinator says: the fewest updates in a sum, and the lowest threshold."""

    minimum_cohort: int = MIN_SITES
    minimum_threshold: int = 2

    def check(self, session: Session) -> None:
        """Raises CohortTooSmallError or ThresholdTooLowError where the session offers less."""
        self.check_cohort(session, session.sites, "invited")
        if session.threshold < self.minimum_threshold:
            raise ThresholdTooLowError(
                f"{session.name}: expected a threshold of {self.minimum_threshold} or more by this site's policy, "
                f"found {session.threshold}; change the study or the policy"
            )

    def check_cohort(self, session: Session, sites: tuple[str, ...], what: str) -> None:
        """Raises CohortTooSmallError where there are fewer `sites` than the session and this policy ask for."""
        least = max(session.quorum, self.minimum_cohort)
        if len(sites) < least:
            raise CohortTooSmallError(
                f"{session.name}: expected {least} or more sites {what}, found {len(sites)}; wait for more sites, or "
                "skip the round"
            )
