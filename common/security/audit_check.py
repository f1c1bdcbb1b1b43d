"""Verifying an audit log: the chain, the signed heads, and that the log reaches the newest of them."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import IdentityError, RunFolderError
from common.security.audit import (
    HEAD_PURPOSE,
    HEAD_SIGNED,
    Entry,
    Tail,
    check_head,
    damaged,
    entries,
    head_statement,
    read_head,
)
from common.security.audit_files import HEAD, LOG
from common.security.authorities import Authority
from common.security.signing import SignedBy, verify


@dataclass(frozen=True)
class CheckedLog:
    """A log that is whole.

    Attributes
    ----------
    entries : all of them.
    heads : how many heads were signed.
    signed_by : who signed the newest; None where none is signed.
    signed_up_to : the last entry that a signature covers; 0 where none is signed.
    authority : what vouches for the signers; None where none was given.
    torn : bytes of an entry that was being written when its process ended; the next start cuts them off.
    """

    path: Path
    entries: tuple[Entry, ...]
    heads: int
    signed_by: SignedBy | None
    signed_up_to: int
    authority: Authority | None
    torn: int

    def report(self) -> dict[str, Any]:
        """Plain values."""
        by = self.signed_by
        return {
            "log": str(self.path),
            "entries": len(self.entries),
            "first": self.entries[0].time if self.entries else None,
            "last": self.entries[-1].time if self.entries else None,
            "head": self.entries[-1].hash if self.entries else None,
            "heads_signed": self.heads,
            "signed_up_to": self.signed_up_to,
            "signed_by": by and {"role": by.role, "name": by.name, "certificate_sha256": by.fingerprint},
            "authority": self.authority.source if self.authority is not None and by is not None else None,
            "torn_bytes": self.torn,
        }

    def text(self) -> str:
        """The same for people."""
        count = len(self.entries)
        lines = [f"{self.path}: whole, {count} entries, each as it was written and after the one before"]
        if self.entries:
            lines.append(f"  from {self.entries[0].time} to {self.entries[-1].time}; head {self.entries[-1].hash}")
        if self.signed_by is None:
            lines.append("  no head is signed: whoever can write the file could have written it anew")
        else:
            by = f"{self.signed_by.role} {self.signed_by.name!r}"
            under = (
                f"under {self.authority.source}"
                if self.authority is not None
                else f"certificate {self.signed_by.fingerprint}, not checked against an authority (--authority)"
            )
            lines.append(f"  signed up to entry {self.signed_up_to} by {by}, {self.heads} heads, {under}")
            later = count - self.signed_up_to - 1  # the entry of the signature is not in what it signs
            if later > 0:
                lines.append(f"  {later} later, not signed: whether others followed them, the log cannot say")
        if self.torn:
            lines.append(f"  {self.torn} bytes of one more entry, torn by a crash; the next start cuts them off")
        return "\n".join(lines)


def check_log(folder: Path, authority: Authority | None = None) -> CheckedLog:
    """The audit log in a run's or site's folder, verified.

    Parameters
    ----------
    authority : of the study, whose signers alone are believed; None: signatures are held against the certificates that
        come with them, which whoever writes the whole log anew can make too.

    Raises
    ------
    AuditDamagedError : an entry was changed, removed or moved, or the log does not reach its signed head.
    IdentityError : a signature is bad, or of somebody else than who the entries say; with an authority, none is there.
    RunFolderError : there is no log, or it cannot be read.
    """
    path = folder / LOG
    found: list[Entry] = []
    torn = size = 0
    signed: Entry | None = None
    signed_by: SignedBy | None = None
    heads = 0
    try:
        with path.open("rb") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_SH)  # its owner may run, and adds nothing meanwhile
            for entry, end in entries(file, path):
                if entry is None:
                    file.seek(size)
                    torn = len(file.read())
                    break
                if entry.event == HEAD_SIGNED:
                    signed_by = _check_signature(entry, found, path, authority, signed_by)
                    signed, heads = entry, heads + 1
                found.append(entry)
                size = end
            head = read_head(folder)
            check_head(Tail(found[-1] if found else None, signed, size, b""), head, path)
            if head is None and heads > 1:  # a crash can have left the first head alone without its file
                raise damaged(path, f"{heads} heads were signed, and {HEAD} is not there")
    except FileNotFoundError as error:
        if read_head(folder) is not None:
            raise damaged(path, f"it is not there, and {HEAD} says that it was signed") from error
        raise RunFolderError(
            f"{path}: no audit log here; give the folder of a run, or the --work folder of a site"
        ) from error
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be read ({error.strerror or error}); check its rights") from error
    if authority is not None and signed_by is None:
        raise IdentityError(
            f"{path}: no head is signed, so that {authority.source} vouches for none of it, and whoever can write the "
            "file could have written it anew. Where the identity has no key that signs, check it without an authority"
        )
    if signed_by is not None:
        _check_actors(found, signed_by, path)
    up_to = int(signed.details["sequence"]) if signed is not None else 0
    return CheckedLog(path, tuple(found), heads, signed_by, up_to, authority, torn)


def _check_actors(found: list[Entry], signed_by: SignedBy, path: Path) -> None:
    """Who signed the heads is who did what the entries say: nobody signs a log in another's name."""
    owner = "coordinator" if signed_by.role == "coordinator" else f"{signed_by.role} {signed_by.name}"
    for entry in found:
        if entry.actor != owner:
            raise IdentityError(
                f"{path}: entry {entry.sequence} is of {entry.actor!r}, and the heads are signed by {signed_by.role} "
                f"{signed_by.name!r}: the log is not one owner's; keep it for whoever looks into it"
            )


def _check_signature(
    entry: Entry, before: list[Entry], path: Path, authority: Authority | None, earlier: SignedBy | None
) -> SignedBy:
    where = f"{path}: entry {entry.sequence}"
    try:
        sequence, head = int(entry.details["sequence"]), str(entry.details["head"])
        pem = str(entry.details["certificate"]).encode()
        signature = base64.b64decode(entry.details["signature"], validate=True)
        at = entry.when
    except (KeyError, ValueError, TypeError) as error:
        raise damaged(path, f"entry {entry.sequence} holds no signature") from error
    if not before or (sequence, head) != (before[-1].sequence, before[-1].hash):
        raise damaged(path, f"the head that entry {entry.sequence} signs is not that of the entry before")
    found = verify(
        authority.issuer_of(pem) if authority is not None else None,
        pem,
        purpose=HEAD_PURPOSE,
        message=head_statement(sequence, head),
        signature=signature,
        where=where,
        at=at,
    )
    if earlier is not None and (found.role, found.name) != (earlier.role, earlier.name):
        raise IdentityError(
            f"{where}: its head is signed by {found.role} {found.name!r}, those before by {earlier.role} "
            f"{earlier.name!r}; the log is not one owner's: keep it for whoever looks into it"
        )
    return found


def verdict(checked: CheckedLog, *, as_json: bool) -> str:
    """What a command prints of a log that is whole."""
    return json.dumps(checked.report(), indent=1) if as_json else checked.text()
