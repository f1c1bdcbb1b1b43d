"""What a site's operator decided: an append-only file of records, and what it says of a study and package.

`approvals.jsonl` lies in the site's work folder, a JSON object a line. Every record holds who decided, when, what was
shown, and what the decision covers: the study in its canonical form, the digest of the installed package, and the data.
Each record holds the SHA-256 of the line before it and one of itself, so that a change or a gap is seen, and where the
identity folder has a key that signs (`common.security.signing`), a signature with the certificate of who gave it.
Without a key, whoever may write the file can forge an approval; with one or without, they can cut off the newest
records, and so take back a rejection.

A line counts when its end is written: one that is torn, because the process or the disk gave way, was never a decision.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import fcntl
import getpass
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from client.package import Package
from common.disk import cannot_write, sync_folder
from common.errors import ApprovalError, IdentityError
from common.security.pem_files import AUTHORITY_CERTIFICATE, read_certificate
from common.security.signing import can_sign, load_signer, verify
from common.study import Study

APPROVALS_FILE = "approvals.jsonl"
FORMAT = 1
PURPOSE: Final = "site approval"
"""What the signature of a record is for (`common.security.signing`)."""

Decision = Literal["approve", "reject"]


# Records. ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """What a decision is about.

    Attributes
    ----------
    site : this site's name.
    study : the study.
    package : what runs.
    data : names of data sets, or a folder's absolute path.
    """

    site: str
    study: Study
    package: Package
    data: str

    @property
    def study_digest(self) -> str:
        """SHA-256 of the study's canonical form, hexadecimal."""
        return hashlib.sha256(self.study.canonical().encode()).hexdigest()


@dataclass(frozen=True)
class Record:
    """One line of the file; `content` is as it was written."""

    number: int
    content: Mapping[str, Any]

    @property
    def decision(self) -> str:
        """ "approve" or "reject"."""
        return str(self.content["decision"])

    @property
    def by(self) -> str:
        """Who decided."""
        return str(self.content["by"])

    @property
    def day(self) -> str:
        """The day of the decision (UTC)."""
        return str(self.content["at"])[:10]


class Approvals:
    """The decisions of one site.

    Parameters
    ----------
    work : the site's work folder.
    identity : the site's identity folder, whose key signs and verifies where it has one; None without.
    """

    def __init__(self, work: Path, identity: Path | None) -> None:
        self.path = work / APPROVALS_FILE
        self._identity = identity if identity is not None and can_sign(identity) else None

    @property
    def signs(self) -> bool:
        """Whether records are signed."""
        return self._identity is not None

    def record(
        self, decision: Decision, subject: Subject, *, by: str, note: str = "", shown: Mapping[str, Any] | None = None
    ) -> Record:
        """Appends a decision, durably.

        Raises
        ------
        ApprovalError : a record of the file was changed.
        IdentityError : the key that signs cannot be used.
        RunFolderError : the file cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            with os.fdopen(descriptor, "r+b", buffering=0) as file:  # a buffer would be written again when it is closed
                fcntl.flock(file, fcntl.LOCK_EX)
                text = _whole_lines(file.read())
                records = self._records(text)
                lines = text.splitlines()
                content = {
                    "format": FORMAT,
                    "number": len(records) + 1,
                    "previous": hashlib.sha256(lines[-1]).hexdigest() if lines else "",
                    "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                    "decision": decision,
                    "by": by,
                    "account": _account(),
                    "note": note,
                    "site": subject.site,
                    "study": subject.study.name,
                    "study_digest": subject.study_digest,
                    "package": subject.package.version,
                    "package_digest": subject.package.digest,
                    "data": subject.data,
                    "canonical": json.loads(subject.study.canonical()),
                    "shown": dict(shown or {}),
                }
                content["digest"] = hashlib.sha256(_message(content)).hexdigest()
                if self._identity is not None:
                    signer = load_signer(self._identity)
                    signature = base64.b64encode(signer.sign(PURPOSE, _message(content))).decode("ascii")
                    content |= {"certificate": signer.certificate.decode("ascii"), "signature": signature}
                line = json.dumps(content, sort_keys=True, ensure_ascii=False).encode() + b"\n"
                os.ftruncate(descriptor, len(text))
                try:
                    written = file.write(line)
                    if written != len(line):
                        file.write(line[written:])  # on a full disk this says so
                    os.fsync(descriptor)
                except OSError:
                    with contextlib.suppress(OSError):
                        os.ftruncate(descriptor, len(text))
                    raise
            for folder in (self.path.parent, self.path.parent.absolute().parent):  # else a power cut takes a new file
                sync_folder(folder)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        return Record(len(records) + 1, content)

    def records(self) -> list[Record]:
        """All decisions, oldest first; none where there is no file. Raises ApprovalError where one was changed."""
        try:
            with self.path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH)
                return self._records(_whole_lines(file.read()))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ApprovalError(
                f"{self.path}: the approvals cannot be read ({error.strerror}); correct their rights"
            ) from error

    def require(self, subject: Subject, *, todo: str) -> Record:
        """The approval that covers exactly this.

        Parameters
        ----------
        todo : what the operator is to do where there is none, the end of the message.

        Raises
        ------
        ApprovalError : there is none, the study was rejected, or a record was changed; says what differs from what was
            approved.
        """
        record = self.decision(subject)
        whose = f"{subject.site}: study {subject.study.name}"
        if record is not None and record.decision == "approve":
            self._require_signature(record, todo)
            return record
        if record is not None:
            note = f" ({record.content['note']})" if record.content["note"] else ""
            raise ApprovalError(f"{whose} was rejected by {record.by} on {record.day}{note}, so nothing is run; {todo}")
        approved = self._approved(subject)
        if approved is None:
            raise ApprovalError(f"{whose} has not been approved here, so nothing is run; {todo}")
        changed = "; ".join(changes(approved.content, subject))
        raise ApprovalError(
            f"{whose}: what {approved.by} approved on {approved.day} is not what would run, so nothing is run: "
            f"{changed}; {todo}"
        )

    def decision(self, subject: Subject) -> Record | None:
        """The last decision about exactly this; a rejection is one of the study, whatever the package and data."""
        for record in reversed(self.records()):
            content = record.content
            if (content["site"], content["study_digest"]) != (subject.site, subject.study_digest):
                continue
            same = (content["package_digest"], content["data"]) == (subject.package.digest, subject.data)
            if record.decision == "reject" or same:
                return record
        return None

    def changed_since(self, subject: Subject) -> tuple[Record, list[str]] | None:
        """The last approval of a study of this name, and what has changed since; None where there is none."""
        approved = self._approved(subject)
        return None if approved is None else (approved, changes(approved.content, subject))

    def _approved(self, subject: Subject) -> Record | None:
        wanted = (subject.site, subject.study.name, "approve")
        return next(
            (
                record
                for record in reversed(self.records())
                if (record.content["site"], record.content["study"], record.decision) == wanted
            ),
            None,
        )

    def _require_signature(self, record: Record, todo: str) -> None:
        if self._identity is None:
            return
        content, whose = record.content, f"{self.path}: the approval of line {record.number}"
        certificate, signature = content.get("certificate"), content.get("signature")
        if not isinstance(certificate, str) or not isinstance(signature, str):
            raise ApprovalError(
                f"{whose} is not signed, and this site's identity ({self._identity}) has a key that signs; {todo}"
            )
        authority, _ = read_certificate(self._identity / AUTHORITY_CERTIFICATE)
        try:
            verify(
                authority,
                certificate.encode(),
                purpose=PURPOSE,
                message=_message(content),
                signature=base64.b64decode(signature),
                role="site",
                name=str(content["site"]),
                where=whose,
            )
        except ValueError as error:
            raise ApprovalError(f"{whose}: its signature is none, it was tampered with; {todo}") from error
        except IdentityError as error:
            raise ApprovalError(f"{error}; {todo}") from error

    def _records(self, text: bytes) -> list[Record]:
        found: list[Record] = []
        previous = ""
        for number, line in enumerate(text.splitlines(), start=1):
            try:
                content = json.loads(line)
            except ValueError:
                content = None
            if not isinstance(content, dict) or not _FIELDS.issubset(content):
                raise self._tampered(number, "it is no record")
            if content["digest"] != hashlib.sha256(_message(content)).hexdigest():
                raise self._tampered(number, "its content is not what was written")
            if (content["number"], content["previous"]) != (number, previous):
                raise self._tampered(number, "a record before it was changed, added or removed")
            if content["decision"] not in ("approve", "reject"):
                raise self._tampered(number, f"it decides {content['decision']!r}")
            previous = hashlib.sha256(line).hexdigest()
            found.append(Record(number, content))
        return found

    def _tampered(self, number: int, what: str) -> ApprovalError:
        return ApprovalError(
            f"{self.path}:{number}: the record was tampered with or damaged: {what}; nothing is run. Find out who "
            "changed it, restore the file from a backup, or move it away and review and approve the study again"
        )


_FIELDS = {
    *("format", "number", "previous", "digest", "at", "decision", "by", "note", "site", "data", "shown"),
    *("study", "study_digest", "canonical", "package", "package_digest"),
}


def _whole_lines(text: bytes) -> bytes:
    """The text without a last line that is torn."""
    return text[: text.rfind(b"\n") + 1]


def _message(content: Mapping[str, Any]) -> bytes:
    """What digest and signature are of."""
    kept = {key: value for key, value in content.items() if key not in ("digest", "certificate", "signature")}
    return json.dumps(kept, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _account() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return str(os.getuid())


# What has changed. -------------------------------------------------------------------------------------------------


def changes(approved: Mapping[str, Any], subject: Subject) -> list[str]:
    """What differs between what was approved and what would run, a few words for each point."""
    found = study_changes(approved["canonical"], json.loads(subject.study.canonical()))
    if approved["package_digest"] != subject.package.digest:
        version = approved["package"]
        if version != subject.package.version:
            found.append(f"Wardround: version {version} -> {subject.package.version}")
        else:
            found.append(
                f"Wardround: version {version} as before, but its files differ "
                f"({approved['package_digest'][:16]} -> {subject.package.digest[:16]})"
            )
    if approved["data"] != subject.data:
        found.append(f"data: {approved['data']} -> {subject.data}")
    return found


def study_changes(before: Any, after: Any, path: str = "") -> list[str]:
    """The keys in which two canonical studies differ, with the old and the new value."""
    if isinstance(before, dict) and isinstance(after, dict):
        below: Sequence[str] = list(dict.fromkeys([*before, *after]))
        return [
            words
            for key in sorted(below)
            for words in study_changes(before.get(key, _ABSENT), after.get(key, _ABSENT), f"{path}.{key}".strip("."))
        ]
    return [] if before == after else [f"{path}: {_shown(before)} -> {_shown(after)}"]


_ABSENT = object()


def _shown(value: Any) -> str:
    text = "not given" if value is _ABSENT else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
