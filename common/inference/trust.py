"""Whom a machine believes: the options of commands that open published versions, and the check that they ask for."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.security import AUTHORITY_VARIABLE
from common.wording import printable

if TYPE_CHECKING:  # what checks signatures takes a while to load, and `--help` needs none of it
    from common.inference.signature import Checked
    from common.security.authorities import Authority

_AUTHORITY = "ca.crt"


def add_trust_options(parser: argparse.ArgumentParser, *, has_identity: bool, what: str = "") -> None:
    """Adds `--allow-unsigned` and `--authority`; `what` says which model is meant, where the command is of another."""
    which = f" {what}" if what else ""
    default = f"${AUTHORITY_VARIABLE}" + (f", or {_AUTHORITY} in --identity" if has_identity else "")
    parser.add_argument(
        "--authority",
        type=Path,
        metavar="FILE",
        help=f"{_AUTHORITY} of the study, whose coordinator must have signed the model{which}; a file may hold several "
        f"(default: {default})",
    )
    parser.add_argument(
        "--allow-unsigned",
        action="store_true",
        help=f"take a model{which} that was published before models were signed",
    )


class Trust:
    """Checks the signature of a published version: the `verify` of `common.inference.published`.

    Parameters
    ----------
    authority : whose signers are believed; None: the signature is held against its own certificate alone.
    allow_unsigned : whether versions of before they were signed will do.

    Attributes
    ----------
    checked : what was found of the last version; None before the first.
    """

    def __init__(self, authority: Authority | None, allow_unsigned: bool = False) -> None:
        self._authority = authority
        self._allow_unsigned = allow_unsigned
        self.checked: Checked | None = None

    @classmethod
    def of(cls, options: argparse.Namespace, identity: Path | None = None) -> Trust:
        """What the options of a command say. Raises IdentityError where the authority's certificate is none."""
        from common.security.authorities import trusted_authority

        given = options.authority
        if given is None and identity is not None:
            given = identity / _AUTHORITY
        return cls(trusted_authority(given), options.allow_unsigned)

    @classmethod
    def of_run(cls, options: argparse.Namespace, own: Path | None) -> Trust:
        """As `of`; where nobody names an authority, that of the run which the version lies in, with a warning.

        Parameters
        ----------
        own : that authority's certificate; None where there is none.
        """
        from common.security.authorities import authority_for

        return cls(authority_for(options.authority, own), options.allow_unsigned)

    def __call__(self, manifest: bytes, folder: Path) -> None:
        """See `common.inference.published.Verify`. Raises IdentityError."""
        from common.inference.signature import check_signature

        self.checked = check_signature(manifest, folder, self._authority, allow_unsigned=self._allow_unsigned)

    def warn(self) -> None:
        """Says what is not certain of the version that was checked."""
        for warning in self.checked.warnings if self.checked is not None else ():
            print(f"warning: {printable(warning)}", file=sys.stderr)

    def report(self) -> dict[str, Any]:
        """What was found, as plain values; see `Checked.report`."""
        return self.checked.report() if self.checked is not None else {}
