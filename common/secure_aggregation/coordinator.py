"""The coordinator's part in one attempt of a round: it collects, routes, sums what is masked, and unmasks the sum.

Each stage receives messages one at a time, in any order, and is closed by the caller: when all have come, or at the
round's deadline. Who has not come by then dropped. In memory are one accumulator and one masked input at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.secure_aggregation.keys import KeyPair, Verifier, key_pair
from common.secure_aggregation.masking import Accumulator, InputSpec, Mask
from common.secure_aggregation.messages import (
    Advertisement,
    BySite,
    Confirmation,
    DeliveredShares,
    EncryptedShares,
    MaskedInput,
    Message,
    Roster,
    SurvivorSet,
    UnmaskRequest,
    UnmaskShares,
    sorted_by_site,
)
from common.secure_aggregation.refusals import (
    BadShareError,
    DuplicateMessageError,
    InconsistentSetsError,
    OutOfTurnError,
    TooFewSitesError,
    UnknownSiteError,
)
from common.secure_aggregation.roster import check_advertisement, check_distinct_keys
from common.secure_aggregation.seeds import pairwise_masks, self_mask
from common.secure_aggregation.session import Session, Stage
from common.secure_aggregation.shamir import reconstruct, share_from_bytes


@dataclass(frozen=True, eq=False)
class Aggregate:
    """What a round gives.

    `tensors` are the exact sums over `survivors`, int64, in the specs' shapes; `dropped` names, for each stage, the
    sites that were lost in it (those of ``confirm`` and ``unmask`` are survivors: their inputs are in the sum).
    """

    tensors: list[npt.NDArray[np.int64]]
    survivors: tuple[str, ...]
    dropped: Mapping[str, tuple[str, ...]]


class Coordinator:
    """One attempt; used once, by one thread at a time.

    Every ``receive_...`` raises, and leaves all as it was, where a message is not as it should be: WrongSessionError,
    OutOfTurnError (late or early), UnknownSiteError (its site is not in the stage), DuplicateMessageError (its site was
    heard), besides what is listed there. Every ``close_...`` raises TooFewSitesError where too few sites are left.

    Parameters
    ----------
    session
        Proposed to all sites.
    specs
        Shapes and bit widths of the tensors, as the plan has them.
    verify
        As the sites': a site whose signature is not in order is refused here, before it makes others refuse.

    Raises
    ------
    InputError
        A bit width is too large for the number of sites.
    """

    def __init__(self, session: Session, specs: Sequence[InputSpec], verify: Verifier) -> None:
        self._session, self._verify = session, verify
        self._sum = Accumulator(specs, len(session.sites))
        self._stage = Stage.ADVERTISE
        self._expected = session.sites
        self._heard: set[str] = set()
        self._dropped: dict[str, tuple[str, ...]] = {}
        self._advertisements: dict[str, Advertisement] = {}
        self._roster = Roster(session.digest, ())
        self._inboxes: dict[str, dict[str, bytes]] = {}
        self._sharers: tuple[str, ...] = ()
        self._survivors: tuple[str, ...] = ()
        self._confirmations: dict[str, bytes] = {}
        self._unmaskings: dict[str, UnmaskShares] = {}

    @property
    def stage(self) -> Stage:
        """The messages that are received now; DONE at the end, REFUSED after too many dropped or unmasking failed."""
        return self._stage

    @property
    def waiting_for(self) -> tuple[str, ...]:
        """The sites that have not been heard in this stage."""
        return tuple(site for site in self._expected if site not in self._heard)

    @property
    def dropped(self) -> Mapping[str, tuple[str, ...]]:
        """For each stage that was closed, the sites that were lost in it."""
        return dict(self._dropped)

    def receive_advertisement(self, message: Advertisement) -> None:
        """R0. Raises BadSignatureError or DuplicateKeyError for keys that are not the site's own."""
        self._admit(Stage.ADVERTISE, message, message.site)
        check_advertisement(self._session, message, self._verify)
        check_distinct_keys([*self._advertisements.values(), message])
        self._advertisements[message.site] = message
        self._heard.add(message.site)

    def close_advertising(self) -> Roster:
        """What to send to every site of it."""
        present = self._close(Stage.ADVERTISE, Stage.SHARE, self._session.quorum)
        self._roster = Roster(self._session.digest, tuple(self._advertisements[site] for site in present))
        self._inboxes = {site: {} for site in present}
        return self._roster

    def receive_shares(self, message: EncryptedShares) -> None:
        """R1. Raises InconsistentSetsError for shares that are not for exactly the other sites of the roster."""
        self._admit(Stage.SHARE, message, message.sender)
        recipients = tuple(recipient for recipient, _ in message.by_recipient)
        others = tuple(site for site in self._roster.sites if site != message.sender)
        if recipients != others:
            raise InconsistentSetsError(
                f"shares from {message.sender!r}: expected them for {', '.join(others)}, found "
                f"{', '.join(recipients) or 'none'}; they were not used"
            )
        for recipient, ciphertext in message.by_recipient:
            self._inboxes[recipient][message.sender] = ciphertext
        self._heard.add(message.sender)

    def close_sharing(self) -> dict[str, DeliveredShares]:
        """What to send to each site that shared."""
        self._sharers = self._close(Stage.SHARE, Stage.MASK, self._session.quorum)
        inboxes, self._inboxes = self._inboxes, {}
        return {
            site: DeliveredShares(self._session.digest, site, sorted_by_site(inboxes[site].items()))
            for site in self._sharers
        }

    def receive_masked_input(self, message: MaskedInput) -> None:
        """R2: added to the sum at once; the message may be let go. Raises MalformedMessageError for another length."""
        self._admit(Stage.MASK, message, message.site)
        self._sum.add(message.payload)
        self._heard.add(message.site)

    def close_masking(self) -> SurvivorSet:
        """What to send to every survivor."""
        self._survivors = self._close(Stage.MASK, Stage.CONFIRM, self._session.quorum)
        return SurvivorSet(self._session.digest, self._survivors)

    def receive_confirmation(self, message: Confirmation) -> None:
        """R3. Raises InconsistentSetsError where the site signed other sets than the coordinator's."""
        self._admit(Stage.CONFIRM, message, message.site)
        statement = Confirmation.statement(
            self._session, message.site, self._roster.digest(), self._sharers, self._survivors
        )
        certificate = self._advertisements[message.site].certificate
        if not self._verify(message.site, certificate, statement, message.signature):
            raise InconsistentSetsError(
                f"confirmation of {message.site!r} in {self._session.name}: does not sign the sets of this session; it "
                "was not counted"
            )
        self._confirmations[message.site] = message.signature
        self._heard.add(message.site)

    def close_confirming(self) -> UnmaskRequest:
        """What to send to every site that confirmed."""
        self._close(Stage.CONFIRM, Stage.UNMASK, self._session.threshold)
        return UnmaskRequest(
            self._session.digest, self._survivors, self._lost(), sorted_by_site(self._confirmations.items())
        )

    def receive_unmask_shares(self, message: UnmaskShares) -> None:
        """R4. Raises InconsistentSetsError or BadShareError for shares that were not asked for, or are none."""
        self._admit(Stage.UNMASK, message, message.site)
        asked = (self._survivors, self._lost())
        if (_sites(message.seed_shares), _sites(message.key_shares)) != asked:
            raise InconsistentSetsError(f"shares of {message.site!r}: are not those that were asked for; not used")
        for _, content in (*message.seed_shares, *message.key_shares):
            share_from_bytes(self._session.index(message.site), content)
        self._unmaskings[message.site] = message
        self._heard.add(message.site)

    def finish(self) -> Aggregate:
        """The plain sum.

        Raises
        ------
        TooFewSitesError
            Fewer sites than the threshold sent their shares. More cannot be asked for: skip the round.
        BadShareError
            The shares do not give back a secret that fits the site's public key, or do not fit each other.
        ImpossibleSumError
            The masks did not cancel.
        """
        self._close(Stage.UNMASK, Stage.REFUSED, self._session.threshold)
        masks = [self_mask(self._session, site, self._seed(site)) for site in self._survivors]
        mask_keys = {site: advertisement.mask_key for site, advertisement in self._advertisements.items()}
        for site in self._lost():
            pair = self._mask_pair(site, mask_keys[site])
            masks += _opposites(pairwise_masks(self._session, site, pair, self._survivors, mask_keys))
        tensors = self._sum.take_off(masks, len(self._survivors))
        self._unmaskings.clear()
        self._stage = Stage.DONE
        return Aggregate(tensors, self._survivors, self.dropped)

    def _admit(self, stage: Stage, message: Message, site: str) -> None:
        what = f"{type(message).__name__} of {site!r}"
        self._session.check(message.session, what)
        if self._stage is not stage:
            raise OutOfTurnError(
                f"{what}: belongs to stage {stage} of {self._session.name}, which is now in {self._stage}; it was not "
                "used"
            )
        if site not in self._expected:
            raise UnknownSiteError(f"{what}: the site takes no part in stage {stage} of {self._session.name}")
        if site in self._heard:
            raise DuplicateMessageError(f"{what}: was received before in {self._session.name}; the first one counts")

    def _close(self, stage: Stage, following: Stage, least: int) -> tuple[str, ...]:
        """Who was heard; they are expected in the next stage."""
        if self._stage is not stage:
            raise OutOfTurnError(f"{self._session.name}: expected to close {self._stage}, was asked to close {stage}")
        present = tuple(site for site in self._expected if site in self._heard)
        self._dropped[stage.value] = self.waiting_for
        if len(present) < least:
            self._stage = Stage.REFUSED
            lost = "; ".join(f"{name}: {', '.join(sites)}" for name, sites in self._dropped.items() if sites)
            raise TooFewSitesError(
                f"{self._session.name}, stage {stage}: expected {least} or more sites, found {len(present)} (dropped, "
                f"by stage: {lost}); the attempt cannot be completed",
                self.dropped,
            )
        self._expected, self._heard, self._stage = present, set(), following
        return present

    def _lost(self) -> tuple[str, ...]:
        """Who shared keys, so that all others masked with them, and sent no masked input."""
        return tuple(site for site in self._sharers if site not in self._survivors)

    def _seed(self, site: str) -> bytes:
        return self._reconstruct(
            site, {sender: dict(shares.seed_shares) for sender, shares in self._unmaskings.items()}
        )

    def _mask_pair(self, site: str, public: bytes) -> KeyPair:
        shares = {sender: dict(shares.key_shares) for sender, shares in self._unmaskings.items()}
        pair = key_pair(self._reconstruct(site, shares))
        if pair.public != public:
            raise BadShareError(
                f"shares of the mask key of {site!r}: give back another key than it advertised: a site sent a wrong "
                "share; skip the round"
            )
        return pair

    def _reconstruct(self, site: str, by_sender: Mapping[str, Mapping[str, bytes]]) -> bytes:
        shares = [share_from_bytes(self._session.index(sender), held[site]) for sender, held in by_sender.items()]
        return reconstruct(shares, self._session.threshold)


def _sites(values: BySite) -> tuple[str, ...]:
    return tuple(site for site, _ in values)


def _opposites(masks: Sequence[Mask]) -> list[Mask]:
    return [mask.opposite() for mask in masks]
