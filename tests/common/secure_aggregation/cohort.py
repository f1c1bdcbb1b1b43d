"""Sites with enrolled keys, a coordinator, and a round between them in which sites drop out where a test says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from common.secure_aggregation.coordinator import Aggregate, Coordinator
from common.secure_aggregation.ledger import InMemoryLedger
from common.secure_aggregation.masking import InputSpec
from common.secure_aggregation.messages import DeliveredShares, MaskedInput, Roster, SurvivorSet, UnmaskRequest
from common.secure_aggregation.session import Session, SitePolicy, default_threshold
from common.secure_aggregation.site import Site

PLAN = bytes(range(32))
NAMES = tuple("abcdefghijkl")
SPECS = (InputSpec((3,), 16), InputSpec((), 8))


class Authority:
    """A study's authority: a certificate is a site's public key, then the authority's signature over name and key."""

    def __init__(self) -> None:
        self._key = Ed25519PrivateKey.generate()
        self._enrolled: dict[str, Ed25519PrivateKey] = {}

    def enrolled_key(self, site: str) -> Ed25519PrivateKey:
        return self._enrolled.setdefault(site, Ed25519PrivateKey.generate())

    def certificate(self, site: str) -> bytes:
        public = self.enrolled_key(site).public_key().public_bytes_raw()
        return public + self._key.sign(site.encode() + public)

    def verify(self, site: str, certificate: bytes, message: bytes, signature: bytes, /) -> bool:
        public, issued = certificate[:32], certificate[32:]
        try:
            self._key.public_key().verify(issued, site.encode() + public)
            Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
        except (InvalidSignature, ValueError):
            return False
        return True


class Cohort:
    """The sites of a study over its rounds and attempts: keys and ledgers stay, sites are new in each."""

    def __init__(self, sites: int = 5, specs: Sequence[InputSpec] = SPECS, policy: SitePolicy | None = None) -> None:
        self.names = NAMES[:sites] if sites <= len(NAMES) else tuple(f"site-{index:02}" for index in range(sites))
        self.specs = tuple(specs)
        self.authority = Authority()
        self.policy = policy or SitePolicy()
        self.ledgers = {name: InMemoryLedger() for name in self.names}

    def session(
        self, names: Sequence[str] | None = None, *, round: int = 0, attempt: int = 0, threshold: int | None = None
    ) -> Session:
        names = tuple(names or self.names)
        return Session("study", PLAN, round, attempt, names, threshold or default_threshold(len(names)), 3)

    def site(self, session: Session, name: str) -> Site:
        return Site(
            session,
            name,
            self.specs,
            sign=self.authority.enrolled_key(name).sign,
            certificate=self.authority.certificate(name),
            verify=self.authority.verify,
            ledger=self.ledgers[name],
            policy=self.policy,
        )

    def attempt(self, session: Session | None = None) -> Attempt:
        return Attempt(self, session or self.session())

    def inputs(self, seed: int = 0) -> dict[str, list[np.ndarray]]:
        """Random tensors of each site, over the whole range of every width."""
        random = np.random.default_rng(seed)
        return {
            name: [random.integers(0, 2**spec.bits, spec.shape, dtype=np.int64) for spec in self.specs]
            for name in self.names
        }


class Attempt:
    """One attempt, stage by stage. Every message passes through its bytes, and `log` keeps what the coordinator saw."""

    def __init__(self, cohort: Cohort, session: Session) -> None:
        self.cohort, self.session = cohort, session
        self.coordinator = Coordinator(session, cohort.specs, cohort.authority.verify)
        self.sites = {name: cohort.site(session, name) for name in session.sites}
        self.log: list[bytes] = []

    def seen(self, message: Any) -> Any:
        """The message as it arrives at the other side."""
        encoded = message.encode()
        self.log.append(encoded)
        return type(message).decode(encoded)

    def advertise(self, drop: Sequence[str] = ()) -> Roster:
        for name in self._left(self.session.sites, drop):
            self.coordinator.receive_advertisement(self.seen(self.sites[name].advertise()))
        roster: Roster = self.seen(self.coordinator.close_advertising())
        return roster

    def share(self, roster: Roster, drop: Sequence[str] = ()) -> dict[str, DeliveredShares]:
        for name in self._left(roster.sites, drop):
            self.coordinator.receive_shares(self.seen(self.sites[name].share(roster)))
        return {name: self.seen(delivered) for name, delivered in self.coordinator.close_sharing().items()}

    def mask(
        self,
        delivered: Mapping[str, DeliveredShares],
        inputs: Mapping[str, Sequence[np.ndarray]],
        drop: Sequence[str] = (),
    ) -> SurvivorSet:
        for name in self._left(delivered, drop):
            masked: MaskedInput = self.seen(self.sites[name].mask(delivered[name], inputs[name]))
            self.coordinator.receive_masked_input(masked)
        survivors: SurvivorSet = self.seen(self.coordinator.close_masking())
        return survivors

    def confirm(self, survivors: SurvivorSet, drop: Sequence[str] = ()) -> UnmaskRequest:
        for name in self._left(survivors.survivors, drop):
            self.coordinator.receive_confirmation(self.seen(self.sites[name].confirm(survivors)))
        request: UnmaskRequest = self.seen(self.coordinator.close_confirming())
        return request

    def unmask(self, request: UnmaskRequest, drop: Sequence[str] = ()) -> Aggregate:
        for name in self._left([site for site, _ in request.confirmations], drop):
            self.coordinator.receive_unmask_shares(self.seen(self.sites[name].unmask(request)))
        return self.coordinator.finish()

    def run(
        self, inputs: Mapping[str, Sequence[np.ndarray]], drop: Mapping[str, Sequence[str]] | None = None
    ) -> Aggregate:
        """All stages; `drop` names, for each stage, the sites that do not answer in it."""
        lost = drop or {}
        roster = self.advertise(lost.get("advertise", ()))
        delivered = self.share(roster, lost.get("share", ()))
        survivors = self.mask(delivered, inputs, lost.get("mask", ()))
        request = self.confirm(survivors, lost.get("confirm", ()))
        return self.unmask(request, lost.get("unmask", ()))

    def until_confirmed(self, inputs: Mapping[str, Sequence[np.ndarray]], drop: Sequence[str] = ()) -> UnmaskRequest:
        """Everything before unmasking; the sites of `drop` send no masked input."""
        return self.confirm(self.mask(self.share(self.advertise()), inputs, drop))

    @staticmethod
    def _left(names: Sequence[str] | Mapping[str, object], drop: Sequence[str]) -> list[str]:
        return [name for name in names if name not in drop]


def plain_sums(inputs: Mapping[str, Sequence[np.ndarray]], names: Sequence[str]) -> list[np.ndarray]:
    return [np.sum(tensors, axis=0, dtype=np.int64) for tensors in zip(*(inputs[name] for name in names), strict=True)]
