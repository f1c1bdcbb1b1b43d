"""A site's part in one attempt of a round: messages in, messages out, and every check that protects its input.

    advertise() ─► share(Roster) ─► mask(DeliveredShares, tensors) ─► confirm(SurvivorSet) ─► unmask(UnmaskRequest)

The site believes the coordinator nothing that its peers have not signed. A message of another session or stage is
refused and changes nothing; any other refusal ends the site's part in the attempt.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from common.secure_aggregation.keys import Signer, Verifier, decrypt, encrypt, generate_key_pair
from common.secure_aggregation.ledger import UnmaskLedger, begun_refusal
from common.secure_aggregation.masking import SEED_BYTES, InputSpec, mask_inputs, modulus_bits
from common.secure_aggregation.messages import (
    SHARES_BYTES,
    Advertisement,
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
    BothSharesAskedError,
    InconsistentSetsError,
    NotASurvivorError,
    OutOfTurnError,
    OwnKeyReplacedError,
    SetChangedError,
    TooFewConfirmationsError,
    UnknownSiteError,
)
from common.secure_aggregation.roster import check_advertisement, check_distinct_keys
from common.secure_aggregation.seeds import pairwise_masks, self_mask
from common.secure_aggregation.session import Session, SitePolicy, Stage
from common.secure_aggregation.shamir import SHARE_BYTES, Share, share_from_bytes, split

_DEFAULT_POLICY = SitePolicy()


@dataclass(frozen=True, repr=False)
class _PeerShares:
    """This site's shares of a peer's two secrets, of which it will give out one."""

    mask_key: Share
    seed: Share

    def to_bytes(self) -> bytes:
        return self.mask_key.to_bytes() + self.seed.to_bytes()


class Site:
    """One site in one attempt; used once. Keys and seed are fresh, from the operating system's randomness.

    Not for use by two threads at once. Nothing of it is stored: a site that starts again takes part in a new attempt.

    Parameters
    ----------
    session
        What the coordinator proposes.
    site
        This site's name in it.
    specs
        Shapes and bit widths of the tensors, as the plan has them; coordinator and sites must have the same.
    sign, certificate
        Signs with the site's enrolled key; what peers' `verify` knows that key by (at most 16 KiB).
    verify
        Checks peers' signatures against the study's authority.
    ledger
        Remembers, durably, which rounds this site has begun to unmask.
    policy
        What this site asks of every session.

    Raises
    ------
    UnknownSiteError
        The session does not hold the site.
    CohortTooSmallError, ThresholdTooLowError
        The session offers less than `policy` asks for.
    InputError
        A bit width is too large for the number of sites.
    UnmaskingBegunError
        The site has begun to unmask this round of this study before. Every step raises it too, should that happen
        in another attempt meanwhile.
    """

    def __init__(
        self,
        session: Session,
        site: str,
        specs: Sequence[InputSpec],
        *,
        sign: Signer,
        certificate: bytes,
        verify: Verifier,
        ledger: UnmaskLedger,
        policy: SitePolicy = _DEFAULT_POLICY,
    ) -> None:
        session.index(site)
        policy.check(session)
        for spec in specs:
            modulus_bits(spec.bits, len(session.sites))
        self._session, self._site, self._specs = session, site, tuple(specs)
        self._sign, self._verify, self._ledger, self._policy = sign, verify, ledger, policy
        self._check_ledger()
        self._encryption, self._mask, self._seed = generate_key_pair(), generate_key_pair(), os.urandom(SEED_BYTES)
        statement = Advertisement.statement(session, site, self._encryption.public, self._mask.public)
        self._advertisement = Advertisement(
            session.digest, site, self._encryption.public, self._mask.public, certificate, sign(statement)
        )
        self._roster = Roster(session.digest, (self._advertisement,))
        self._shares: dict[str, _PeerShares] = {}
        self._survivors: tuple[str, ...] = ()
        self._stage = Stage.ADVERTISE

    @property
    def stage(self) -> Stage:
        """The step that comes next; DONE after the last, REFUSED after a refusal that ended the site's part."""
        return self._stage

    def advertise(self) -> Advertisement:
        """R0: the site's fresh public keys, signed."""
        with self._step(Stage.ADVERTISE, Stage.SHARE):
            return self._advertisement

    def share(self, roster: Roster) -> EncryptedShares:
        """R1: a share of mask key and self-mask seed for every site of the roster, encrypted to it.

        Raises
        ------
        UnknownSiteError, OwnKeyReplacedError, DuplicateKeyError, BadSignatureError, BadKeyError
            The roster holds a site that was not invited; not this site's own advertisement; a key twice; keys that
            their site did not sign; a key that is none.
        CohortTooSmallError
            Fewer sites advertised than session and policy ask for.
        OutOfTurnError, WrongSessionError
            As every step: the message is not of this stage or session.
        """
        with self._step(Stage.SHARE, Stage.MASK, roster):
            self._check_roster(roster)
            self._roster = roster
            xs = [self._session.index(peer) for peer in roster.sites]
            key_shares = split(self._mask.private, self._session.threshold, xs)
            seed_shares = split(self._seed, self._session.threshold, xs)
            by_recipient = []
            for peer, key_share, seed_share in zip(roster.advertisements, key_shares, seed_shares, strict=True):
                shares = _PeerShares(key_share, seed_share)
                if peer.site == self._site:
                    self._shares[self._site] = shares
                    continue
                ciphertext = encrypt(
                    self._encryption, peer.encryption_key, self._session, self._site, peer.site, shares.to_bytes()
                )
                by_recipient.append((peer.site, ciphertext))
            return EncryptedShares(self._session.digest, self._site, tuple(by_recipient))

    def mask(self, delivered: DeliveredShares, tensors: Sequence[npt.NDArray[Any]]) -> MaskedInput:
        """R2: the tensors under the self-mask and a mask for every peer whose shares arrived.

        Raises
        ------
        UnknownSiteError
            Shares are of a site that is not in the roster, or were meant for another recipient.
        UndecryptableShareError, BadShareError
            Shares were changed, or are none.
        CohortTooSmallError
            Fewer sites shared than session and policy ask for.
        InputError
            A tensor has another shape than its spec, or values beyond its bit width.
        """
        with self._step(Stage.MASK, Stage.CONFIRM, delivered):
            if delivered.recipient != self._site:
                raise UnknownSiteError(
                    f"shares for {delivered.recipient!r}: were brought to {self._site!r}; they were not opened"
                )
            senders = {advertisement.site: advertisement for advertisement in self._roster.advertisements}
            for sender, ciphertext in delivered.by_sender:
                if sender not in senders or sender == self._site:
                    raise UnknownSiteError(
                        f"shares from {sender!r}: expected those of other sites of the roster; they were not opened"
                    )
                key = senders[sender].encryption_key
                content = decrypt(self._encryption, key, self._session, sender, self._site, ciphertext)
                self._shares[sender] = self._open(sender, content)
            sharers = self._sharers()
            self._policy.check_cohort(self._session, sharers, "to share their keys")
            mask_keys = {site: advertisement.mask_key for site, advertisement in senders.items()}
            masks = pairwise_masks(self._session, self._site, self._mask, sharers, mask_keys)
            masks.append(self_mask(self._session, self._site, self._seed))
            payload = mask_inputs(tensors, self._specs, len(self._session.sites), masks)
            return MaskedInput(self._session.digest, self._site, payload)

    def confirm(self, message: SurvivorSet) -> Confirmation:
        """R3: this site's signature over the roster, the sites that shared and the survivors, all as it saw them.

        Raises
        ------
        NotASurvivorError
            The set lacks this site.
        UnknownSiteError
            It holds a site that did not share its keys.
        CohortTooSmallError
            It holds fewer sites than session and policy ask for.
        """
        with self._step(Stage.CONFIRM, Stage.UNMASK, message):
            survivors, sharers = message.survivors, self._sharers()
            if self._site not in survivors:
                raise NotASurvivorError(
                    f"survivors {', '.join(survivors)}: lack {self._site!r}, whose input would be left open to being "
                    "unmasked as a dropped one; the attempt is not confirmed"
                )
            if unknown := set(survivors) - set(sharers):
                raise UnknownSiteError(
                    f"survivors: hold {', '.join(sorted(unknown))}, whose keys were not shared; expected some of "
                    f"{', '.join(sharers)}"
                )
            self._policy.check_cohort(self._session, survivors, "to survive")
            self._survivors = survivors
            return Confirmation(self._session.digest, self._site, self._sign(self._statement(self._site)))

    def unmask(self, request: UnmaskRequest) -> UnmaskShares:
        """R4: shares of the survivors' seeds and of the dropped sites' mask keys; the ledger knows before it returns.

        Raises
        ------
        BothSharesAskedError
            A site is asked for as a survivor and as dropped.
        SetChangedError
            The sets are not those that this site confirmed.
        UnknownSiteError, InconsistentSetsError
            A confirmation is of no survivor; it does not sign what this site saw.
        TooFewConfirmationsError
            Fewer confirmations than the threshold.
        UnmaskingBegunError
            Another attempt came first.
        RunFolderError
            The ledger could not be written; nothing may be sent.
        """
        with self._step(Stage.UNMASK, Stage.DONE, request):
            self._check_request(request)
            session = self._session
            self._ledger.begin(session.study, session.round, session.attempt, request.survivors)
            seeds = [(peer, self._shares[peer].seed.to_bytes()) for peer in request.survivors]
            keys = [(peer, self._shares[peer].mask_key.to_bytes()) for peer in request.dropped]
            self._shares.clear()
            return UnmaskShares(session.digest, self._site, sorted_by_site(seeds), sorted_by_site(keys))

    @contextmanager
    def _step(self, stage: Stage, following: Stage, message: Message | None = None) -> Iterator[None]:
        """Runs a step once, in turn; whatever goes wrong in it ends the site's part."""
        if self._stage is not stage:
            raise OutOfTurnError(
                f"{self._site!r} in {self._session.name}: expected to {self._stage}, was asked to {stage}; the message "
                "was not used"
            )
        if message is not None:
            self._session.check(message.session, type(message).__name__)
        self._stage = Stage.REFUSED
        self._check_ledger()
        yield
        self._stage = following

    def _check_ledger(self) -> None:
        attempt = self._ledger.begun(self._session.study, self._session.round)
        if attempt is not None:
            raise begun_refusal(self._session.study, self._session.round, attempt)

    def _check_roster(self, roster: Roster) -> None:
        if self._advertisement not in roster.advertisements:
            raise OwnKeyReplacedError(
                f"roster of {self._session.name}: lacks the advertisement of {self._site!r}, or holds another in its "
                "name; the coordinator, or who speaks for it, is not to be trusted"
            )
        for advertisement in roster.advertisements:
            check_advertisement(self._session, advertisement, self._verify)
        check_distinct_keys(roster.advertisements)
        self._policy.check_cohort(self._session, roster.sites, "to advertise keys")

    def _open(self, sender: str, content: bytes) -> _PeerShares:
        if len(content) != SHARES_BYTES:
            raise BadShareError(f"shares from {sender!r}: expected {SHARES_BYTES} bytes, found {len(content)}")
        x = self._session.index(self._site)
        return _PeerShares(share_from_bytes(x, content[:SHARE_BYTES]), share_from_bytes(x, content[SHARE_BYTES:]))

    def _sharers(self) -> tuple[str, ...]:
        return tuple(sorted(self._shares))

    def _statement(self, site: str) -> bytes:
        return Confirmation.statement(self._session, site, self._roster.digest(), self._sharers(), self._survivors)

    def _check_request(self, request: UnmaskRequest) -> None:
        if both := set(request.survivors) & set(request.dropped):
            raise BothSharesAskedError(
                f"unmasking of {self._session.name}: both secrets of {', '.join(sorted(both))} were asked for, which "
                "together reveal its input; the coordinator, or who speaks for it, is not to be trusted"
            )
        dropped = tuple(site for site in self._sharers() if site not in self._survivors)
        if (request.survivors, request.dropped) != (self._survivors, dropped):
            raise SetChangedError(
                f"unmasking of {self._session.name}: expected the survivors {', '.join(self._survivors)} that this "
                f"site confirmed and the dropped sites {', '.join(dropped) or 'none'}, found "
                f"{', '.join(request.survivors)} and {', '.join(request.dropped) or 'none'}"
            )
        certificates = {peer.site: peer.certificate for peer in self._roster.advertisements}
        for site, signature in request.confirmations:
            if site not in self._survivors:
                raise UnknownSiteError(f"confirmation of {site!r}: expected one of a survivor; it was not counted")
            if not self._verify(site, certificates[site], self._statement(site), signature):
                raise InconsistentSetsError(
                    f"confirmation of {site!r}: does not sign the sets that {self._site!r} saw in "
                    f"{self._session.name}: the coordinator showed other sets to it, or forged it"
                )
        if len(request.confirmations) < self._session.threshold:
            raise TooFewConfirmationsError(
                f"unmasking of {self._session.name}: expected {self._session.threshold} or more confirmations, found "
                f"{len(request.confirmations)}; skip the round"
            )
