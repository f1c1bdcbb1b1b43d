"""What sites and coordinator check alike of the keys that sites advertise."""

from __future__ import annotations

from collections.abc import Sequence

from common.secure_aggregation.keys import Verifier
from common.secure_aggregation.messages import Advertisement
from common.secure_aggregation.refusals import BadSignatureError, DuplicateKeyError
from common.secure_aggregation.session import Session


def check_advertisement(session: Session, advertisement: Advertisement, verify: Verifier) -> None:
    """Raises WrongSessionError, UnknownSiteError or BadSignatureError where it is not its site's, for this session."""
    site = advertisement.site
    session.check(advertisement.session, f"advertisement of {site!r}")
    session.index(site)
    statement = Advertisement.statement(session, site, advertisement.encryption_key, advertisement.mask_key)
    if not verify(site, advertisement.certificate, statement, advertisement.signature):
        raise BadSignatureError(
            f"advertisement of {site!r} in {session.name}: its keys are not signed by that site's enrolled key; they "
            "were replaced on their way, or its certificate is not in order"
        )


def check_distinct_keys(advertisements: Sequence[Advertisement]) -> None:
    """Raises DuplicateKeyError where a public key is there twice, be it in two roles."""
    owners: dict[bytes, str] = {}
    for advertisement in advertisements:
        for key in (advertisement.encryption_key, advertisement.mask_key):
            if key in owners:
                raise DuplicateKeyError(
                    f"advertisements of {owners[key]!r} and {advertisement.site!r}: expected different keys, found one "
                    "twice; every key must be fresh"
                )
            owners[key] = advertisement.site
