"""Signatures of secure aggregation: made with a site's enrolled key, checked against the study's authority alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from common.errors import IdentityError
from common.security.signing import RevokedSigners, Signer, verify

PURPOSE: Final = "secure aggregation"


def nobody_revoked() -> RevokedSigners | None:
    """Of whoever has no list of those who were shut out."""
    return None


class EnrolledSites:
    """Whose signature counts: that of a site whose certificate the study's authority issued, and that holds still.

    Parameters
    ----------
    authority : the study's (PEM), as whoever checks holds it.
    revoked : asked at each signature for the list of those who were shut out.
    """

    def __init__(self, authority: bytes, revoked: Callable[[], RevokedSigners | None] = nobody_revoked) -> None:
        self._authority, self._revoked = authority, revoked

    def __call__(self, site: str, certificate: bytes, message: bytes, signature: bytes, /) -> bool:
        """See `common.secure_aggregation.keys.Verifier`."""
        try:
            verify(
                self._authority,
                certificate,
                purpose=PURPOSE,
                message=message,
                signature=signature,
                role="site",
                name=site,
                revoked=self._revoked(),
            )
        except IdentityError:
            return False
        return True


def sign_with(signer: Signer) -> Callable[[bytes], bytes]:
    """Signs with a site's enrolled key, for secure aggregation and nothing else."""

    def sign(message: bytes, /) -> bytes:
        return signer.sign(PURPOSE, message)

    return sign
