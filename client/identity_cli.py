"""`wardround-site enrol` and `rotate`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import UsageError
from common.wording import printable

if TYPE_CHECKING:
    from client.enrolment import Enrolled

_MOST_LETTERS = 10_000


def add_identity_commands(commands: Any) -> None:
    """Adds the sub-commands to those of `wardround-site` (what `add_subparsers` returned)."""
    enrol = commands.add_parser(
        "enrol",
        help="get this site's identity, by the token of its invitation",
        description="Makes this site's private keys here, where they stay, and has the study's coordinator certify "
        "them. The token is good once; cut off at any point, the same command goes on.",
    )
    enrol.add_argument("token", metavar="TOKEN", help="as the coordinator printed it; - reads it from standard input")
    enrol.add_argument("--folder", type=Path, metavar="DIR", help="the identity's folder, new (default: identity-NAME)")
    enrol.add_argument(
        "--work", type=Path, metavar="DIR", help="where the audit log is kept (default: in the identity's folder)"
    )
    enrol.add_argument("--json", action="store_true", help="print JSON")
    enrol.set_defaults(handler=_enrol)

    rotate = commands.add_parser(
        "rotate",
        help="renew this site's keys and certificates",
        description="Makes new private keys, has them certified, tries them, and only then puts them in the place of "
        "the old ones. A site that runs takes them when it dials next.",
    )
    rotate.add_argument("--identity", type=Path, required=True, metavar="DIR", help="this site's identity")
    rotate.add_argument("--at", metavar="HOST:PORT", help="where renewals are served (default: as the enrolment said)")
    rotate.add_argument(
        "--work", type=Path, metavar="DIR", help="where the audit log is kept (default: in the identity's folder)"
    )
    rotate.add_argument("--json", action="store_true", help="print JSON")
    rotate.set_defaults(handler=_rotate)


def _enrol(options: argparse.Namespace) -> int:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from client.enrolment import enrol, require_free
    from common.security.audit import AuditLog
    from common.security.signing import load_signer
    from common.security.tokens import Token

    token = Token.parse(_given(options.token))
    folder: Path = options.folder or Path(f"identity-{token.name}")
    require_free(folder)
    work: Path = options.work or folder
    actor = f"{token.role} {token.name}"
    with contextlib.closing(AuditLog(work, actor)) as audit:
        enrolled = enrol(token, folder, audit)
    with contextlib.closing(AuditLog(work, actor, load_signer(folder))) as audit:
        audit.sign_head()
    if options.json:
        return _print_json(enrolled)
    print(
        f"Enrolled as {actor} in study {printable(token.study)}, until {enrolled.until:%Y-%m-%d}. The identity is in "
        f"{folder}; its private keys (mode 0600) were made here and stay here."
    )
    if token.role == "site":
        print(
            f"Next: wardround-site review STUDY --data DATA --identity {folder}, then approve and start.\n"
            f"Before {enrolled.until:%Y-%m-%d}: wardround-site rotate --identity {folder}"
        )
    else:
        print(
            f"Next: wardround status --coordinator HOST:PORT --identity {folder} (the address that sites dial).\n"
            f"Before {enrolled.until:%Y-%m-%d}: wardround-site rotate --identity {folder}"
        )
    return 0


def _given(token: str) -> str:
    if token != "-":
        return token
    text = sys.stdin.read(_MOST_LETTERS)
    if not text.strip():
        raise UsageError("token: nothing came on standard input; give it there, or as the argument")
    return text


def _rotate(options: argparse.Namespace) -> int:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from client.enrolment import rotate
    from common.security.audit import AuditLog
    from common.security.certificates import load_identity
    from common.security.signing import load_signer

    identity, signer = load_identity(options.identity), load_signer(options.identity)
    actor = f"{identity.role} {identity.name}"
    with contextlib.closing(AuditLog(options.work or options.identity, actor, signer)) as audit:
        enrolled = rotate(options.identity, options.at, audit)
        audit.sign_head()
    if options.json:
        return _print_json(enrolled)
    print(
        f"{actor} has new keys and certificates, which the coordinator has accepted, until {enrolled.until:%Y-%m-%d} "
        f"(before: {identity.not_after:%Y-%m-%d}). A site that runs takes them when it dials next."
    )
    return 0


def _print_json(enrolled: Enrolled) -> int:
    print(
        json.dumps(
            {
                "folder": str(enrolled.folder),
                "study": enrolled.study,
                "role": enrolled.role,
                "name": enrolled.name,
                "until": enrolled.until.isoformat(),
            }
        )
    )
    return 0
