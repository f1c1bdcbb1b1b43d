"""Login tokens of a run's page: who was given one, until when; of the token itself only a digest is kept.

They lie in ``page_tokens.json`` in the run folder (mode 0600). A token holds 256 random bits, so it cannot be found by
trying, and a plain digest gives nothing away.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from common.disk import FileStamp, cannot_write, stamp_of
from common.errors import IdentityError, UsageError
from common.security.pem_files import write_pem
from common.security.profile import NAME

TokenRole = Literal["observer", "investigator"]
ROLES: Final[tuple[TokenRole, ...]] = ("observer", "investigator")
FILE: Final = "page_tokens.json"
PREFIX: Final = "wrp_"
LONGEST_DAYS: Final = 366
_FORMAT: Final = 1
_UNITS: Final[Mapping[str, float]] = {"h": 3600.0, "d": 86_400.0}


@dataclass(frozen=True)
class PageToken:
    """A token as it is kept.

    Attributes
    ----------
    id : tells tokens apart; no secret.
    name : whom it was made for.
    digest : SHA-256 of the token, in hexadecimal digits.
    expires, revoked : Unix time; `revoked` is None while it holds.
    """

    id: str
    role: TokenRole
    name: str
    digest: str
    expires: float
    revoked: float | None = None

    def holds(self, now: float) -> bool:
        """Whether it lets anybody in."""
        return self.revoked is None and now < self.expires

    def state(self, now: float) -> str:
        """A word for people."""
        return "revoked" if self.revoked is not None else "holds" if now < self.expires else "expired"


class PageTokens:
    """The tokens of a run; the file is read again when it has changed.

    Raises
    ------
    IdentityError : from every method: the file is damaged, cannot be read, or others may read it.
    """

    def __init__(self, run: Path) -> None:
        self.path = run / FILE
        self._seen: FileStamp | None = None
        self._tokens: tuple[PageToken, ...] = ()

    def all(self) -> Sequence[PageToken]:
        """Every token that was made, the oldest first."""
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                stamp = stamp_of(status)
                if stamp != self._seen:
                    if status.st_mode & 0o077:
                        raise IdentityError(f"{self.path}: is open to other users; run `chmod 600 {self.path}`")
                    self._tokens, self._seen = _parsed(file.read(), self.path), stamp
        except FileNotFoundError:
            self._tokens, self._seen = (), None
        except OSError as error:
            raise IdentityError(f"{self.path}: cannot be read ({error.strerror}); check its rights") from error
        return self._tokens

    def find(self, text: str, now: float) -> PageToken | None:
        """The token of this text, if it was made here and holds."""
        digest = digest_of(text)
        found = [token for token in self.all() if hmac.compare_digest(token.digest, digest)]
        return next((token for token in found if token.holds(now)), None)

    def holding(self, identifier: str, now: float) -> PageToken | None:
        """The token of this id, if it holds still."""
        return next((token for token in self.all() if token.id == identifier and token.holds(now)), None)

    def make(self, role: TokenRole, name: str, expires: float) -> tuple[PageToken, str]:
        """A new token, and its text, which is kept nowhere. Raises also UsageError, RunFolderError."""
        if not NAME.fullmatch(name):
            raise UsageError(f"--name {name!r}: expected letters, digits, '.', '_' and '-' only; correct it")
        text = PREFIX + secrets.token_urlsafe(32)
        token = PageToken(secrets.token_hex(4), role, name, digest_of(text), expires)
        with self._changing() as tokens:
            tokens.append(token)
        return token, text

    def revoke(self, identifier: str, now: float) -> PageToken:
        """Shuts a token out from now on. Raises also UsageError where there is none of this id."""
        with self._changing() as tokens:
            place = next((place for place, token in enumerate(tokens) if token.id == identifier), None)
            if place is None:
                raise UsageError(f"--revoke {identifier}: no such token; `wardround page token --list` has all")
            tokens[place] = replace(tokens[place], revoked=tokens[place].revoked or now)
        return tokens[place]

    @contextlib.contextmanager
    def _changing(self) -> Iterator[list[PageToken]]:
        """Holds the file against other processes; the list is written at the end."""
        try:
            lock = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            tokens = list(self.all())
            yield tokens
            content = {"format": _FORMAT, "tokens": [asdict(token) for token in tokens]}
            write_pem(self.path, json.dumps(content, indent=1).encode(), 0o600)
        finally:
            os.close(lock)


def digest_of(text: str) -> str:
    """What is kept of a token."""
    return hashlib.sha256(b"wardround-page-token-1\0" + text.strip().encode("utf-8", "replace")).hexdigest()


def expiry(text: str, now: float | None = None) -> float:
    """Unix time of "12h", "30d" (from now) or a day such as 2027-01-31 (its end, UTC). Raises UsageError."""
    at = time.time() if now is None else now
    todo = f"expected hours or days such as 12h or 30d, or a day such as 2027-01-31, at most {LONGEST_DAYS} days ahead"
    if match := re.fullmatch(r"([1-9][0-9]{0,4})([hd])", text):
        until = at + int(match[1]) * _UNITS[match[2]]
    else:
        try:
            day = datetime.datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=datetime.UTC)
        except ValueError as error:
            raise UsageError(f"--expires {text!r}: {todo}") from error
        until = (day + datetime.timedelta(days=1)).timestamp()
    if not at < until <= at + LONGEST_DAYS * _UNITS["d"]:
        raise UsageError(f"--expires {text}: {todo}")
    return until


def _parsed(content: bytes, path: Path) -> tuple[PageToken, ...]:
    try:
        document: dict[str, Any] = json.loads(content)
        tokens = tuple(PageToken(**one) for one in document["tokens"])
        if document["format"] != _FORMAT or any(token.role not in ROLES for token in tokens):
            raise ValueError("another format")
    except (ValueError, TypeError, KeyError) as error:
        raise IdentityError(
            f"{path}: the tokens of the page are damaged; move the file away and make new ones with `wardround page "
            "token`"
        ) from error
    return tokens
