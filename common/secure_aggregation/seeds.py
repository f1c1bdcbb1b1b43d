"""Which masks lie on a site's input: one of its own, and one for each peer, which the peer has with the other sign."""

from __future__ import annotations

from collections.abc import Iterable

from common.secure_aggregation.keys import KeyPair, agree
from common.secure_aggregation.masking import Mask
from common.secure_aggregation.session import Session

_PAIRWISE = "pairwise mask"


def self_mask(session: Session, site: str, seed: bytes) -> Mask:
    """The mask of the site's own 32-byte `seed` (b in the paper)."""
    return Mask(seed, session.context("self mask", site.encode()))


def pairwise_mask(session: Session, site: str, own: KeyPair, peer: str, peer_key: bytes) -> Mask:
    """The mask that `site`, the owner of the pair `own`, adds because of `peer`, whose public mask key is `peer_key`.

    The first of the two in sorted order adds, the other subtracts the same stream. Raises BadKeyError as `agree`.
    """
    first, second = sorted((site, peer))
    seed = agree(own, peer_key, session, _PAIRWISE, first, second)
    return Mask(seed, session.context(_PAIRWISE, first.encode(), second.encode()), negative=site == second)


def pairwise_masks(
    session: Session, site: str, own: KeyPair, peers: Iterable[str], mask_keys: dict[str, bytes]
) -> list[Mask]:
    """`pairwise_mask` for each of `peers` but the site itself."""
    return [pairwise_mask(session, site, own, peer, mask_keys[peer]) for peer in peers if peer != site]
