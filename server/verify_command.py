"""`wardround verify`: whether a published version is what a study's coordinator signed, every file of it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from common.errors import IdentityError, UsageError

_DESCRIPTION = """\
Checks that a published version was signed by the coordinator of the study whose authority you trust, that every file is
as it was signed, and that no other file lies beside them.

exit codes: 0 all of this holds; 2 no such folder, or no authority to check against; 5 not signed, the signature is not
of this manifest, or it is of somebody else: another authority, a site, an expired certificate; or it is a site's
personal model, and --personal was not given; 9 a file was changed, is missing, or is not of the version
"""


def add_verify_command(commands: Any) -> None:
    """Adds `verify` to the sub-commands of `wardround` (what `add_subparsers` returned)."""
    verify = commands.add_parser(
        "verify",
        help="check the signature and the files of a published version",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verify.add_argument("version", type=Path, metavar="VERSION", help="folder of a published version")
    verify.add_argument(
        "--authority",
        type=Path,
        metavar="FILE",
        help="ca.crt of the study (default: $WARDROUND_AUTHORITY, else that of the run that the version lies in, "
        "with a warning)",
    )
    verify.add_argument(
        "--personal", action="store_true", help="accept a personal model, which a site made and signed for itself"
    )
    verify.add_argument("--json", action="store_true", help="print the result as JSON")
    verify.set_defaults(run_subcommand=_verify)


def _verify(arguments: argparse.Namespace) -> int:
    from common.inference.published import MANIFEST, read_manifest, refuse_folder_of_versions
    from common.inference.signature import check_signature
    from common.inference.version_files import check_files, listed_files
    from common.security.authorities import authority_for
    from server.versions import authority_of

    folder: Path = arguments.version
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; give that of a published version")
    refuse_folder_of_versions(folder)
    authority = authority_for(arguments.authority, authority_of(folder))
    if authority is None:
        raise UsageError(
            f"{folder}: no authority to check it against; give the study's ca.crt with --authority, as you had it from "
            "the study's coordinator and not from where the version came from"
        )
    manifest = read_manifest(folder)
    content = (folder / MANIFEST).read_bytes()
    checked = check_signature(content, folder, authority)
    signed_by = checked.signed_by
    assert signed_by is not None  # else it had been refused
    if checked.personal and not arguments.personal:
        raise IdentityError(
            f"{folder}: a personal model, made and signed by {signed_by.role} {signed_by.name!r} for its own images, "
            "not by the study's coordinator; use it only if that is what you want, and then check it with --personal"
        )
    check_files(folder)
    for warning in checked.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    count = len(listed_files(content))
    if arguments.json:
        found = {"study": manifest["study"], "version": manifest["version"], "files": count, **checked.report()}
        print(json.dumps(found, indent=1))
        return 0
    print(
        f"{manifest['study']} {manifest['version']}: signed by {signed_by.role} {signed_by.name!r} under "
        f"{authority.source}; all {count} files are as they were signed, and no other is there"
    )
    print(f"  signer's certificate, SHA-256  {signed_by.fingerprint}")
    return 0
