"""Where a site keeps what: the options that `start`, `review`, `approve` and `reject` share, made one thing each."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.policy import POLICY_FILE
from common.errors import IdentityError, UsageError
from common.wording import printable

POLICY_VARIABLE = "WARDROUND_SITE_POLICY"


@dataclass(frozen=True)
class Place:
    """One site on this machine.

    Attributes
    ----------
    site : its name; "" where nothing says it.
    data : as given; None where it was not.
    identity, work : its folders; None where they were not given.
    """

    site: str
    data: str | None
    identity: Path | None
    work: Path | None


def add_policy_option(parser: Any) -> None:
    """Adds `--policy`."""
    parser.add_argument(
        "--policy",
        type=Path,
        metavar="FILE",
        help=f"this site's policy (default: ${POLICY_VARIABLE}, or {POLICY_FILE} in the --work folder)",
    )


def policy_path(given: Path | None, work: Path | None) -> tuple[Path | None, bool]:
    """Where the policy lies, and whether there must be one because somebody named it.

    Raises UsageError where its name is not UTF-8.
    """
    if given is not None:
        require_utf8("policy", given)
        return given, True
    if named := os.environ.get(POLICY_VARIABLE):
        require_utf8(f"${POLICY_VARIABLE}", named)
        return Path(named), True
    return (None if work is None else work / POLICY_FILE), False


def default_work(site: str) -> Path:
    """The work folder of a site where none is given."""
    return Path(f"wardround-{site}")


def places(options: argparse.Namespace) -> list[Place]:
    """The sites that a command was called for.

    Raises
    ------
    UsageError : options that belong together were given different numbers of times, or one is not UTF-8.
    IdentityError : an identity cannot be read, or is not the site's.
    """
    given: dict[str, Sequence[Any]] = {
        name: getattr(options, name) for name in ("site", "data", "identity", "work") if getattr(options, name, None)
    }
    for name, values in given.items():
        for value in values:
            require_utf8(f"--{name}", value)
    require_utf8("STUDY", getattr(options, "study", ""))
    count = max((len(values) for values in given.values()), default=1)
    if any(len(values) != count for values in given.values()):
        raise UsageError("--site, --data, --identity and --work: give each the same number of times, in the same order")
    names = list(given.get("site", ()))
    identities: Sequence[Path | None] = given.get("identity", [None] * count)
    found = []
    for index, identity in enumerate(identities):
        site = names[index] if names else ""
        if identity is not None:
            site = _name_of(identity, site)
        work = given["work"][index] if "work" in given else default_work(site) if site else None
        found.append(Place(site, given["data"][index] if "data" in given else None, identity, work))
    return found


def require_utf8(what: str, value: object) -> None:
    """Raises UsageError where an argument is of bytes that are no UTF-8: a page or a record could not hold it."""
    try:
        str(value).encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{what} {printable(str(value))}: expected UTF-8, found other bytes; correct it, or rename what it names"
        ) from error


def _name_of(folder: Path, expected: str) -> str:
    from common.security.certificates import load_identity

    identity = load_identity(folder)
    if identity.role != "site" or (expected and identity.name != expected):
        wanted = f"of site {expected!r}" if expected else "a site's"
        raise IdentityError(
            f"{folder}: the certificate is of {identity.role} {identity.name!r}, not {wanted}; give this site's own"
        )
    return identity.name


def command_text(command: str, study: Path, place: Place, *more: str, policy: Path | None = None) -> str:
    """A call of `wardround-site` for a place, to be copied from a message."""
    parts: list[str] = ["wardround-site", command, str(study)]
    if place.site and (place.identity is None or command == "start"):
        parts += ["--site", place.site]
    for name, value in (("data", place.data), ("identity", place.identity), ("work", place.work), ("policy", policy)):
        if value is not None:
            parts += [f"--{name}", str(value)]
    return " ".join([*(shlex.quote(part) for part in parts), *more])
