"""Secure aggregation: the coordinator learns the sum of the sites' tensors, and no site's own.

The protocol is that of K. Bonawitz et al., "Practical secure aggregation for privacy-preserving machine learning",
CCS 2017, doi:10.1145/3133956.3133982, in its variant against an active adversary, on the complete graph, for 3 to 50
sites. It is written as pure states: messages in, messages out, no network, no disk but the ledger's, no TensorFlow.

In plain words. Every two sites agree on a secret, stretch it to a stream of random numbers as long as the model, and
one adds the stream to its update while the other subtracts it: each masked update looks random, and in the sum the
streams cancel. A site that drops out leaves its streams in the sum, so every site first hands to the others shares of
the key by which its streams could be made again; any t of them can. That alone would be dangerous: the
coordinator could say of a slow site that it dropped, have its streams made again, and unmask its late update. So each
site adds one more stream of its own, whose seed it hands out in shares too. For each site the others give out shares of
either its key (it dropped) or of its own seed (its update is in the sum), never of both.

The rounds, each answered by the sites that are left (see `messages`):

- **R0 advertise.** Two fresh X25519 keys, for encryption and for masks, signed by the site's enrolled key.
- **R1 share.** Mask key and seed, t-of-n shared (`shamir`), each share encrypted to its peer (`keys`).
- **R2 mask.** ``y = x + PRG(b) ± PRG(s_uv)`` for every peer, modulo 2^b (`masking`, `seeds`, `packing`).
- **R3 confirm.** Every survivor signs the sets that it was shown; at least t must have signed the same.
- **R4 unmask.** The shares, once: from then on the site refuses every other attempt of the round (`ledger`).

What a site insists on is in `site`, by name in `refusals`; `session` has the numbers. The coordinator (`coordinator`)
is trusted with availability and correctness only: it can spoil a round, but it cannot see one update, unless it is in
league with a third of the sites (at the default threshold). What the sum itself says is not hidden; that is for
differential privacy.

Differences from the paper, all of them stricter: every signature, key and ciphertext is bound to the session's digest;
R3 also signs the roster and the sites that shared; the coordinator must ask for the sets it wants unmasked, so that a
request for both secrets of a site is refused by name; and a site unmasks once in all attempts of a round. Two attempts
whose sums differ by one update would give it away: with thresholds of more than half of the invited sites, two such
sums need a site that unmasks in both.

A round of three sites, here without a network:

>>> import numpy as np
>>> from common.secure_aggregation.coordinator import Coordinator
>>> from common.secure_aggregation.ledger import InMemoryLedger
>>> from common.secure_aggregation.masking import InputSpec
>>> from common.secure_aggregation.session import Session
>>> from common.secure_aggregation.site import Site
>>> def sign(message): return b"for the example only"
>>> def verify(site, certificate, message, signature): return signature == b"for the example only"
>>> session = Session("cells-1", bytes(32), round=0, attempt=0, sites=("a", "b", "c"), threshold=3, minimum_cohort=3)
>>> specs = [InputSpec(shape=(2,), bits=16)]
>>> coordinator = Coordinator(session, specs, verify)
>>> sites = {
...     name: Site(session, name, specs, sign=sign, certificate=b"", verify=verify, ledger=InMemoryLedger())
...     for name in session.sites
... }
>>> for site in sites.values(): coordinator.receive_advertisement(site.advertise())
>>> roster = coordinator.close_advertising()
>>> for site in sites.values(): coordinator.receive_shares(site.share(roster))
>>> for name, delivered in coordinator.close_sharing().items():
...     coordinator.receive_masked_input(sites[name].mask(delivered, [np.array([1, 1000])]))
>>> survivors = coordinator.close_masking()
>>> for site in sites.values(): coordinator.receive_confirmation(site.confirm(survivors))
>>> request = coordinator.close_confirming()
>>> for site in sites.values(): coordinator.receive_unmask_shares(site.unmask(request))
>>> coordinator.finish().tensors
[array([   3, 3000])]
"""
