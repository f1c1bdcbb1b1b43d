"""`wardround audit verify`: whether the audit log of a run, or of a site, is what was written."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_audit_command(commands: Any) -> None:
    """Adds `audit` to the sub-commands of `wardround` (what `add_subparsers` returned)."""
    audit = commands.add_parser("audit", help="check the audit log of a run or a site")
    actions = audit.add_subparsers(title="actions", metavar="ACTION", required=True)
    verify = actions.add_parser(
        "verify",
        help="check the audit log",
        description="Checks that no entry of an audit log was changed, removed or moved, and that its signed heads are "
        "good. Exit codes: 0 it is whole, 5 a signature is not good, 7 it is not what was written.",
    )
    verify.add_argument("folder", type=Path, metavar="RUN", help="run folder, or the --work folder of a site")
    verify.add_argument(
        "--authority",
        type=Path,
        metavar="FILE",
        help="ca.crt of the study (default: $WARDROUND_AUTHORITY, else that of the run, with a warning)",
    )
    verify.add_argument("--json", action="store_true", help="print the result as JSON")
    verify.set_defaults(run_subcommand=_verify)


def _verify(arguments: argparse.Namespace) -> int:
    from common.security.audit_check import check_log, verdict
    from common.security.authorities import authority_for

    authority = authority_for(arguments.authority, arguments.folder / "identity" / "coordinator" / "ca.crt")
    print(verdict(check_log(arguments.folder, authority), as_json=arguments.json))
    return 0
