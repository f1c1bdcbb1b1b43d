"""Who was shut out of a study: a list of names, signed by the coordinator, in the folder of its identity.

An entry refuses **every** certificate of its owner, whenever and by whom it was issued, save those whose serial numbers
it lists: these were issued after a new invitation. So a certificate that nobody has on record is refused too. The list
lies in ``revoked.json`` beside the coordinator's certificates, so each run of the study knows it. A coordinator that
runs looks at the file at each call and twice a second.

A list that is damaged, or not signed by the coordinator, is an error where a process starts; one that runs keeps to the
last good list, and to one with a lower number never goes back.

X.509 has lists of its own (RFC 5280, section 5): they name serial numbers alone, and gRPC for Python reads none.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from cryptography import x509

from common.disk import FileStamp, cannot_write, stamp_of
from common.errors import IdentityError
from common.security.pem_files import write_pem
from common.security.profile import MEMBERS, NAME, Role, owner_of, role_of, serial_of
from common.security.signing import Signer, verify

REVOKED: Final = "revoked.json"
PURPOSE: Final = "revocation list"
MOST_REASON: Final = 200

_ASK: Final = (
    "ask the study's coordinator for a new invitation, move this identity away, and enrol anew with `wardround-site "
    "enrol TOKEN`"
)


@dataclass(frozen=True)
class Revoked:
    """Somebody who was shut out.

    Attributes
    ----------
    at : Unix time.
    reason : in words of the coordinator's operator; "" where none was given.
    valid : serial numbers of certificates that were issued since, by a new invitation.
    """

    role: Role
    name: str
    at: float
    reason: str = ""
    valid: tuple[str, ...] = ()

    def sentence(self) -> str:
        """What its owner is told."""
        when = datetime.datetime.fromtimestamp(self.at, datetime.UTC)
        why = f" ({self.reason})" if self.reason else ""
        return f"the certificate of {self.role} {self.name!r} was revoked on {when:%Y-%m-%d %H:%M} UTC{why}; {_ASK}"


@dataclass(frozen=True)
class RevocationList:
    """Who was shut out, by role and name. `number` grows with each change."""

    number: int = 0
    entries: Mapping[tuple[Role, str], Revoked] = field(default_factory=dict)

    def refuses(self, certificate: x509.Certificate) -> Revoked | None:
        """Why a certificate is not good any more; None where it is.

        Raises IdentityError where it is none that Wardround issued.
        """
        entry = self.entries.get(owner_of(certificate))
        return None if entry is None or serial_of(certificate) in entry.valid else entry

    def of(self, role: Role, name: str) -> Revoked | None:
        """The entry of this owner; None where there is none, or certificates of a new invitation hold."""
        entry = self.entries.get((role, name))
        return None if entry is None or entry.valid else entry

    def with_entry(self, entry: Revoked) -> RevocationList:
        """The next list, with this entry in place of one for the same owner."""
        return RevocationList(self.number + 1, {**self.entries, (entry.role, entry.name): entry})

    def with_valid(self, role: Role, name: str, serials: tuple[str, ...]) -> RevocationList:
        """The next list, where these certificates hold too; this one, where nothing refuses them."""
        entry = self.entries.get((role, name))
        if entry is None or set(serials) <= set(entry.valid):
            return self
        return self.with_entry(replace(entry, valid=(*entry.valid, *serials)))


class RevocationFile:
    """The list in the folder of a coordinator's identity.

    Parameters
    ----------
    folder : of the identity.
    authority : the study's (PEM), which must vouch for who signed the list.
    """

    def __init__(self, folder: Path, authority: bytes) -> None:
        self.path = folder / REVOKED
        self._authority = authority
        self._seen: FileStamp | None = None
        self._newest = RevocationList()

    def current(self) -> RevocationList:
        """The list as it is now; the file is read only where it has changed.

        Raises
        ------
        IdentityError : it is damaged, not signed by the coordinator, or older than one that was here.
        """
        stamp = self._stamp()
        if stamp is not None and stamp != self._seen:
            found = _parse(self._read(), self._authority, self.path)
            if found.number < self._newest.number:
                raise IdentityError(
                    f"{self.path}: is list {found.number}, and list {self._newest.number} was here before: an older "
                    "one was put back; restore the newer one, or revoke again"
                )
            self._newest, self._seen = found, stamp
        return self._newest

    @property
    def newest(self) -> RevocationList:
        """The last good list."""
        return self._newest

    @contextlib.contextmanager
    def changing(self, signer: Signer) -> Iterator[Changing]:
        """Holds the list against other processes; what is set meanwhile is signed and on the disk at the end.

        Raises
        ------
        IdentityError, RunFolderError : as `current`; or it cannot be written.
        """
        try:
            lock = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            before = self.current()
            changing = Changing(before)
            yield changing
            if changing.list != before:
                write_pem(self.path, _text(changing.list, signer), 0o644)
                os.fsync(lock)
        finally:
            os.close(lock)

    def _stamp(self) -> FileStamp | None:
        try:
            return stamp_of(self.path.stat())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise IdentityError(f"{self.path}: cannot be read ({error.strerror}); check its rights") from error

    def _read(self) -> bytes:
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise IdentityError(f"{self.path}: cannot be read ({error.strerror}); check its rights") from error


@dataclass
class Changing:
    """A list that is being changed."""

    list: RevocationList


def revoke(file: RevocationFile, signer: Signer, role: Role, name: str, reason: str, at: float) -> Revoked:
    """Shuts somebody out: on the disk when this returns.

    Raises
    ------
    IdentityError : the list cannot be read, or name or reason cannot be.
    RunFolderError : the disk does not take it.
    """
    if not NAME.fullmatch(name) or role not in MEMBERS:
        raise IdentityError(f"{role} {name!r}: nobody can have such a name; correct it")
    if len(reason) > MOST_REASON or not reason.isprintable():
        raise IdentityError(f"--reason: expected up to {MOST_REASON} printable letters in one line; shorten it")
    entry = Revoked(role, name, at, reason)
    with file.changing(signer) as changing:
        changing.list = changing.list.with_entry(entry)
    return entry


def _text(revoked: RevocationList, signer: Signer) -> bytes:
    entries = [
        {"role": one.role, "name": one.name, "at": one.at, "reason": one.reason, "valid": list(one.valid)}
        for one in revoked.entries.values()
    ]
    content = {"number": revoked.number, "signed_at": datetime.datetime.now(datetime.UTC).isoformat()}
    content["revoked"] = entries
    signature = base64.b64encode(signer.sign(PURPOSE, _statement(content))).decode("ascii")
    signed = {**content, "certificate": signer.certificate.decode("ascii"), "signature": signature}
    return json.dumps(signed, indent=1).encode()


def _statement(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _parse(text: bytes, authority: bytes, path: Path) -> RevocationList:
    restore = "restore it from a backup, or revoke again after moving it away; until then nobody knows who was shut out"
    try:
        content = json.loads(text)
        certificate = content.pop("certificate").encode()
        signature = base64.b64decode(content.pop("signature"), validate=True)
        at = datetime.datetime.fromisoformat(content["signed_at"])
        entries = [_entry(one) for one in content["revoked"]]
        number = content["number"]
        if set(content) != {"number", "signed_at", "revoked"} or type(number) is not int or at.tzinfo is None:
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IdentityError(f"{path}: the list of who was revoked is damaged; {restore}") from error
    # It has to have been signed while the certificate held; the list outlives it.
    verify(
        authority,
        certificate,
        purpose=PURPOSE,
        message=_statement(content),
        signature=signature,
        role="coordinator",
        where=str(path),
        at=at,
    )
    return RevocationList(number, {(one.role, one.name): one for one in entries})


def _entry(one: Mapping[str, Any]) -> Revoked:
    role, name, at, reason, valid = (one[key] for key in ("role", "name", "at", "reason", "valid"))
    known = role_of(role)
    if known is None or not NAME.fullmatch(name) or not isinstance(reason, str) or len(one) != 5:
        raise ValueError("no entry")
    if not all(isinstance(serial, str) and re.fullmatch("[0-9a-f]+", serial) for serial in valid):
        raise ValueError("no serial numbers")
    return Revoked(known, name, float(at), reason, tuple(valid))
