"""Invitations: the one line that lets somebody enrol, once, until it expires.

A token says where to enrol and whom to trust there, and holds a secret of 256 bits of which the coordinator keeps only
the digest. Text: ``wr1`` and then letters and digits of base32, in which case, blanks, line breaks and hyphens mean
nothing, so that it survives e-mail. It ends in a checksum: a letter that was lost or mistyped is told before anything
is sent. The checksum is no secret and protects against nothing else.

    >>> token = Token("nuclei", "site", "north", "c.example.org:8444", b"f" * 32, b"invite-1", b"s" * 32, 1_900_000_000)
    >>> Token.parse(token.text()) == token, token.text()[:3]
    (True, 'wr1')

Source: base32 is RFC 4648, section 6.
"""

from __future__ import annotations

import base64
import binascii
import datetime
import hashlib
import re
import secrets
from dataclasses import dataclass, field
from typing import Final

from common.errors import UsageError
from common.security.profile import MEMBERS, NAME, Role, role_of

PREFIX: Final = "wr1"
SECRET_BYTES: Final = 32
_ID_BYTES: Final = 8
_PIN_BYTES: Final = 32
_CHECKSUM_BYTES: Final = 5
_FIXED_BYTES: Final = 8 + _ID_BYTES + SECRET_BYTES + _PIN_BYTES
_MOST_LETTERS: Final = 4096
_AGAIN: Final = "copy the whole token again from where you got it"


@dataclass(frozen=True)
class Token:
    """An invitation as its bearer holds it.

    Attributes
    ----------
    study, role, name : what the certificates will say.
    address : where to enrol, host:port.
    authority : SHA-256 of the certificate (DER) of the study's authority: nobody else is believed.
    invitation : tells invitations apart; no secret.
    secret : proves that its bearer was invited; left out of ``repr``.
    expires : Unix time, in seconds.
    """

    study: str
    role: Role
    name: str
    address: str
    authority: bytes
    invitation: bytes
    secret: bytes = field(repr=False)
    expires: int

    @staticmethod
    def new(study: str, role: Role, name: str, address: str, authority: bytes, expires: int) -> Token:
        """An invitation with a secret that nobody has seen."""
        drawn = secrets.token_bytes(_ID_BYTES), secrets.token_bytes(SECRET_BYTES)
        return Token(study, role, name, address, authority, *drawn, expires)

    def text(self) -> str:
        """What is handed over, one word of letters and digits."""
        words = [word.encode() for word in (self.study, self.role, self.name, self.address)]
        body = b"".join(
            (
                self.expires.to_bytes(8),
                self.invitation,
                self.secret,
                self.authority,
                *(bytes([len(word)]) + word for word in words),
            )
        )
        return PREFIX + base64.b32encode(body + _checksum(body)).decode("ascii").rstrip("=").lower()

    @staticmethod
    def parse(text: str) -> Token:
        """The token in a text.

        Raises
        ------
        UsageError : it is none, or not as it was printed. The message never repeats what the text holds.
        """
        letters = re.sub(r"[\s-]", "", text[:_MOST_LETTERS]).lower()
        if not letters.startswith(PREFIX):
            raise UsageError(f"token: expected a text that begins with {PREFIX}, found another; {_AGAIN}")
        letters = letters.removeprefix(PREFIX)
        if wrong := re.search(r"[^a-z2-7]", letters):
            raise UsageError(
                f"token: letter {len(PREFIX) + wrong.start() + 1} is none that a token has (a to z, 2 to 7); {_AGAIN}"
            )
        try:
            raw = base64.b32decode(letters.upper() + "=" * (-len(letters) % 8))
        except binascii.Error as error:
            raise UsageError(f"token: it is not whole ({len(letters)} letters after {PREFIX}); {_AGAIN}") from error
        body, checksum = raw[:-_CHECKSUM_BYTES], raw[-_CHECKSUM_BYTES:]
        # The last letter holds bits that stand for nothing: they are as they were written, too.
        if _checksum(body) != checksum or base64.b32encode(raw).decode().rstrip("=").lower() != letters:
            raise UsageError(f"token: a letter is wrong, or it is not whole (its checksum does not fit); {_AGAIN}")
        token = _read(body)
        if token is None:
            raise UsageError("token: it is of another version of Wardround; install the coordinator's")
        return token

    @property
    def expiry(self) -> datetime.datetime:
        """When it expires, in UTC."""
        return datetime.datetime.fromtimestamp(self.expires, datetime.UTC)

    def digest(self) -> bytes:
        """What the coordinator keeps of the secret."""
        return digest_of(self.secret)


def digest_of(secret: bytes) -> bytes:
    """SHA-256 is enough: a secret of 256 random bits cannot be found by trying."""
    return hashlib.sha256(b"wardround-invitation-1\0" + secret).digest()


def _checksum(body: bytes) -> bytes:
    return hashlib.sha256(PREFIX.encode() + body).digest()[:_CHECKSUM_BYTES]


def _read(body: bytes) -> Token | None:
    """The token of these bytes; None where this version would not have made them."""
    if len(body) < _FIXED_BYTES:
        return None
    expires, invitation = int.from_bytes(body[:8]), body[8 : 8 + _ID_BYTES]
    rest = body[8 + _ID_BYTES :]
    secret, authority, rest = rest[:SECRET_BYTES], rest[SECRET_BYTES : SECRET_BYTES + _PIN_BYTES], rest[64:]
    words = []
    try:
        for _ in range(4):
            length = rest[0]
            if len(rest) <= length:
                return None
            words.append(rest[1 : 1 + length].decode())
            rest = rest[1 + length :]
        datetime.datetime.fromtimestamp(expires, datetime.UTC)
    except (IndexError, UnicodeDecodeError, ValueError, OverflowError, OSError):
        return None
    study, word, name, address = words
    role = role_of(word)
    if rest or role not in MEMBERS or role is None or not NAME.fullmatch(name):
        return None
    return Token(study, role, name, address, authority, invitation, secret, expires)
