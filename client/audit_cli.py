"""`wardround-site audit`: whether this site's audit log is whole, and what it says left the hospital."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add_audit_commands(commands: Any) -> None:
    """Adds `audit verify` and `audit summary` to the sub-commands of `wardround-site`."""
    audit = commands.add_parser("audit", help="what left this hospital, and whether its log is whole")
    actions = audit.add_subparsers(dest="action", required=True, metavar="ACTION")
    verify = actions.add_parser(
        "verify",
        help="check the audit log",
        description="Checks that no entry of this site's audit log was changed, removed or moved, and that its signed "
        "heads are good. Exit codes: 0 it is whole, 5 a signature is not good, 7 it is not what was written.",
    )
    verify.set_defaults(handler=_verify)
    summary = actions.add_parser(
        "summary",
        help="what left this hospital, on one page",
        description="What this site has sent, by study and round, from its audit log, which is checked first.",
    )
    summary.set_defaults(handler=_summary)
    for each in (verify, summary):
        each.add_argument("work", type=Path, metavar="WORK", help="the --work folder the site was started with")
        each.add_argument(
            "--authority", type=Path, metavar="FILE", help="ca.crt of the study (default: $WARDROUND_AUTHORITY)"
        )
        each.add_argument("--json", action="store_true", help="print JSON")


def _verify(options: argparse.Namespace) -> int:
    from common.security.audit_check import check_log, verdict
    from common.security.authorities import trusted_authority

    print(verdict(check_log(options.work, trusted_authority(options.authority)), as_json=options.json))
    return 0


def _summary(options: argparse.Namespace) -> int:
    from client.audit_summary import summary_of, summary_text
    from common.security.audit_check import check_log
    from common.security.authorities import trusted_authority

    checked = check_log(options.work, trusted_authority(options.authority))
    found = summary_of(checked.entries, checked.path)
    print(json.dumps({**found, "log": checked.report()}, indent=1) if options.json else summary_text(found, checked))
    return 0
