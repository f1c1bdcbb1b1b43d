"""Whose signers are believed: the authorities that a user names, before any that what is to be checked brings along."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from common.security import AUTHORITY_VARIABLE
from common.security.pem_files import read_certificates
from common.security.signing import issued


@dataclass(frozen=True)
class Authority:
    """The certificates (PEM) of the authorities that are trusted, at least one, and the file that they came from.

    Each vouches for its own study alone, so a hospital can trust those of all the studies that it takes part in.
    """

    certificates: tuple[bytes, ...]
    source: str

    def issuer_of(self, certificate: bytes) -> bytes:
        """The one that issued the certificate (PEM), or the first, for which that can then be shown not to be so."""
        fitting = (one for one in self.certificates if issued(certificate, one))
        return next(fitting, self.certificates[0])


def trusted_authority(given: Path | None) -> Authority | None:
    """The authorities whose certificates are in the file given, or in that which the environment names; None without.

    Raises
    ------
    IdentityError : the file is missing, or holds no certificate.
    """
    path = given if given is not None else Path(named) if (named := os.environ.get(AUTHORITY_VARIABLE)) else None
    if path is None:
        return None
    return Authority(tuple(read_certificates(path)), str(path))


def authority_for(given: Path | None, own: Path | None) -> Authority | None:
    """As `trusted_authority`; where the user names none, that which what is to be checked brings along, with a warning.

    Parameters
    ----------
    own : a certificate in the folder to be checked; None, or a path where nothing is: it brings none along.
    """
    authority = trusted_authority(given)
    if authority is not None or own is None or not own.exists():
        return authority
    print(
        f"warning: the authority was taken from the folder itself ({own}): this proves nothing to anybody but who made "
        "the run; give the study's ca.crt with --authority",
        file=sys.stderr,
    )
    return trusted_authority(own)
