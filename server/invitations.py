"""The register of a study's authority: who was invited, who used an invitation, what was issued.

It lies in SQLite with full sync beside the authority's key. Of a secret it holds the digest alone. An invitation is
marked as used, with the certificates that were made by it, in the same transaction, before they go out: who lost the
answer gets the very same certificates for the very same keys, and nobody else gets any.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cryptography import x509

from common.errors import IdentityError, RunFolderError
from common.failpoints import hit
from common.security.audit import NO_AUDIT, Audit
from common.security.pem_files import read_authority
from common.security.profile import Role, role_of, serial_of, study_of
from common.security.requests import Certified, CheckedRequests, Requests, certified_pem, check_requests
from common.security.revocation import RevocationFile, Revoked
from common.security.signing import Signer
from common.security.tokens import Token, digest_of

REGISTER: Final = "enrolment.sqlite"

_SCHEMA = """
CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS invitations (
    id BLOB PRIMARY KEY, role TEXT NOT NULL, name TEXT NOT NULL, digest BLOB NOT NULL,
    created REAL NOT NULL, expires REAL NOT NULL, withdrawn REAL, used REAL, keys BLOB, tls BLOB, signing BLOB
);
CREATE TABLE IF NOT EXISTS issued (
    serial TEXT PRIMARY KEY, role TEXT NOT NULL, name TEXT NOT NULL, at REAL NOT NULL, until REAL NOT NULL
);
"""
_NOBODY: Final = bytes(32)
NOT_ACCEPTED: Final = "this token is not accepted; ask whoever runs the study for a new one"
"""All that somebody hears who does not know the secret of an invitation: not whether there is one."""


class Refused(Exception):
    """A request that gets no certificate; the words are for whoever asks.

    Attributes
    ----------
    owner : who was invited, where the secret was right; "" for a guess.
    """

    def __init__(self, words: str, owner: str = "") -> None:
        super().__init__(words)
        self.owner = owner


@dataclass(frozen=True)
class Invitation:
    """A row of the register."""

    id: bytes
    role: Role
    name: str
    digest: bytes
    created: float
    expires: float
    withdrawn: float | None
    used: float | None
    keys: bytes | None
    tls: bytes | None
    signing: bytes | None

    def state(self, now: float) -> str:
        """ "open", "used", "withdrawn" or "expired"."""
        if self.used is not None:
            return "used"
        return "withdrawn" if self.withdrawn is not None else "open" if now <= self.expires else "expired"


class Register:
    """The register in the folder of an authority. Safe to use from several threads and processes.

    Raises
    ------
    RunFolderError : it cannot be read or written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / REGISTER
        self._lock = threading.RLock()
        with self._storing():
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
            self._database = sqlite3.connect(
                self.path, check_same_thread=False, isolation_level=None, timeout=10.0, cached_statements=16
            )
            self._database.execute("PRAGMA synchronous = FULL")
            self._database.executescript(_SCHEMA)

    def close(self) -> None:
        """Lets the file go."""
        with self._lock:
            self._database.close()

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """A transaction that no other process writes beside; durable at its end, or nothing of it happened."""
        with self._lock, self._storing():
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._database.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._database.execute("ROLLBACK")
                raise

    def invitations(self, role: Role | None = None, name: str | None = None) -> list[Invitation]:
        """All, or those of an owner, oldest first."""
        rows = self._rows("SELECT * FROM invitations ORDER BY created")
        found = [_invitation(row) for row in rows]
        return [each for each in found if role in (None, each.role) and name in (None, each.name)]

    def find(self, invitation: bytes) -> Invitation | None:
        """The invitation of this id."""
        rows = self._rows("SELECT * FROM invitations WHERE id = ?", invitation)
        return _invitation(rows[0]) if rows else None

    def add(self, token: Token, created: float) -> None:
        """An invitation that is open from now on."""
        values = (token.invitation, token.role, token.name, token.digest(), created, token.expires)
        self._rows(
            "INSERT INTO invitations (id, role, name, digest, created, expires) VALUES (?, ?, ?, ?, ?, ?)", *values
        )

    def withdraw(self, role: Role, name: str, now: float) -> int:
        """No open invitation of this owner can be used any more; returns how many there were."""
        where = "role = ? AND name = ? AND used IS NULL AND withdrawn IS NULL"
        open_ = self._rows(f"SELECT COUNT(*) FROM invitations WHERE {where} AND expires >= ?", role, name, now)
        self._rows(f"UPDATE invitations SET withdrawn = ? WHERE {where}", now, role, name)
        return int(open_[0][0])

    def use(self, invitation: bytes, keys: bytes, certified: Certified, now: float) -> None:
        """The invitation was used by who has these keys."""
        self._rows(
            "UPDATE invitations SET used = ?, keys = ?, tls = ?, signing = ? WHERE id = ?",
            now,
            keys,
            certified.tls,
            certified.signing,
            invitation,
        )

    def add_issued(self, role: Role, name: str, certificates: Sequence[x509.Certificate], now: float) -> None:
        """These were made."""
        for one in certificates:
            until = one.not_valid_after_utc.timestamp()
            self._rows("INSERT INTO issued VALUES (?, ?, ?, ?, ?)", serial_of(one), role, name, now, until)

    def issued(self, role: Role, name: str) -> list[tuple[str, float]]:
        """Serial numbers of an owner's certificates, and until when they hold."""
        rows = self._rows("SELECT serial, until FROM issued WHERE role = ? AND name = ? ORDER BY at", role, name)
        return [(str(serial), float(until)) for serial, until in rows]

    def setting(self, name: str) -> Any:
        """A value that was kept; None where none was."""
        rows = self._rows("SELECT value FROM settings WHERE name = ?", name)
        return json.loads(rows[0][0]) if rows else None

    def set(self, name: str, value: Any) -> None:
        """Keeps a value."""
        self._rows("INSERT OR REPLACE INTO settings VALUES (?, ?)", name, json.dumps(value))

    def _rows(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._lock, self._storing():
            return self._database.execute(statement, values).fetchall()

    @contextlib.contextmanager
    def _storing(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise RunFolderError(
                f"{self.path}: the register of invitations cannot be read or written ({error}); check its owner and "
                "free space, or restore it from a backup"
            ) from error


class Issuer:
    """Makes certificates for those who may have them.

    Parameters
    ----------
    authority : folder of the study's authority, with its key.
    revoked : who was shut out.
    signer : the coordinator's, who signs the list of those.
    audit : where it is recorded who got what.
    clock : Unix time.

    Raises
    ------
    IdentityError : the authority is missing, unreadable, expired or open to others.
    RunFolderError : the register cannot be read or written.
    """

    def __init__(
        self,
        authority: Path,
        revoked: RevocationFile,
        signer: Signer,
        audit: Audit = NO_AUDIT,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.authority_pem, self._authority, self._key = read_authority(authority)
        self.study = study_of(self._authority)
        self.register = Register(authority)
        self._revoked = revoked
        self._signer = signer
        self._audit = audit
        self._clock = clock

    def enrol(self, study: str, invitation: bytes, secret: bytes, requests: Requests) -> Certified:
        """Certificates for the bearer of a token.

        Raises
        ------
        Refused : they are not given.
        IdentityError, RunFolderError : the coordinator's own files are not as they must be.
        """
        given = digest_of(secret)
        with self.register.changing():
            found = self.register.find(invitation)
            if not hmac.compare_digest(found.digest if found is not None else _NOBODY, given) or found is None:
                raise Refused(NOT_ACCEPTED)
            # Who asks has the secret: it may know what is wrong.
            owner = f"{found.role} {found.name}"
            if study != self.study:
                raise Refused(f"the token is of study {study!r}, and here is study {self.study!r}", owner)
            try:
                checked = check_requests(requests, self.study, found.role, found.name)
            except IdentityError as error:
                raise Refused(str(error), owner) from error
            self._require_usable(found, checked, owner)
            if found.used is not None:
                assert found.tls is not None and found.signing is not None
                certified = Certified(self.authority_pem, found.tls, found.signing)
            else:
                certified = self._certify(checked, found.role, found.name)
                self.register.use(found.id, checked.digest(), certified, self._clock())
                hit("enrolment.before")
        hit("enrolment.used")
        self._audit.record(
            "enrolled", member=owner, again=found.used is not None, keys=checked.digest().hex(), id=found.id.hex()
        )
        return certified

    def _require_usable(self, found: Invitation, checked: CheckedRequests, owner: str) -> None:
        now = self._clock()
        entry = self._revoked.current().entries.get((found.role, found.name))
        if entry is not None and entry.at >= found.created:
            raise Refused(f"{owner} was revoked after this invitation was made; ask for a new one", owner)
        if found.used is not None:
            if not hmac.compare_digest(found.keys or _NOBODY, checked.digest()):
                raise Refused(
                    f"this token was used on {_day(found.used)}, with other keys; if that was not you, tell whoever "
                    "runs the study at once, who can revoke what was issued; else ask for a new token",
                    owner,
                )
        elif found.withdrawn is not None:
            raise Refused(f"this token was withdrawn on {_day(found.withdrawn)}; ask for the newer one", owner)
        elif now > found.expires:
            raise Refused(
                f"this token expired on {_day(found.expires)}; ask whoever runs the study for a new one", owner
            )

    def renew(self, certificate: x509.Certificate, role: Role, name: str, requests: Requests) -> Certified:
        """Certificates for new keys of whoever came by `certificate`, which TLS has verified. Raises as `enrol`."""
        owner = f"{role} {name}"
        self.require_not_revoked(certificate, owner)
        try:
            checked = check_requests(requests, self.study, role, name)
        except IdentityError as error:
            raise Refused(str(error), owner) from error
        with self.register.changing():
            certified = self._certify(checked, role, name)
        self._audit.record("renewed", member=owner, keys=checked.digest().hex(), by=serial_of(certificate))
        return certified

    def require_not_revoked(self, certificate: x509.Certificate, owner: str) -> None:
        """Raises Refused where the certificate is not good any more."""
        entry: Revoked | None = self._revoked.current().refuses(certificate)
        if entry is not None:
            raise Refused(entry.sentence(), owner)

    def confirmed(self, certificate: x509.Certificate, owner: str) -> None:
        """A new certificate was used. Raises Refused where it was revoked meanwhile."""
        self.require_not_revoked(certificate, owner)
        self._audit.record("rotated", member=owner, serial=serial_of(certificate))

    def refused(self, error: Refused, host: str) -> None:
        """Records that somebody got nothing."""
        self._audit.record("enrolment-refused", member=error.owner or "unknown", host=host)

    def _certify(self, checked: CheckedRequests, role: Role, name: str) -> Certified:
        """Makes the certificates, has them hold where others of the owner were revoked, and enters them."""
        made = checked.certify(self._authority, self._key, role, name)
        if (role, name) in self._revoked.current().entries:
            with self._revoked.changing(self._signer) as changing:
                serials = (serial_of(made[0]), serial_of(made[1]))
                changing.list = changing.list.with_valid(role, name, serials)
        self.register.add_issued(role, name, made, self._clock())
        return certified_pem(self.authority_pem, made)


def _invitation(row: tuple[Any, ...]) -> Invitation:
    role = role_of(row[1])
    assert role is not None, "the register holds what was written"
    return Invitation(row[0], role, *row[2:])


def _day(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(at))
