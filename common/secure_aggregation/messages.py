"""The messages of a round, and the only bytes that each is written as.

Every message begins with ``b"WRSA"``, its kind (one byte) and its session's digest; length-prefixed fields follow
(`encoding`). Sites are always in sorted order, so that a message has one encoding. What can be said of a message alone
is checked when it is made, decoded or not; what it means in a session is for `site` and `coordinator` to judge.

| stage | site to coordinator | coordinator to site |
|---|---|---|
| R0 | `Advertisement` | `Roster` |
| R1 | `EncryptedShares` | `DeliveredShares` |
| R2 | `MaskedInput` | `SurvivorSet` |
| R3 | `Confirmation` | `UnmaskRequest` |
| R4 | `UnmaskShares` | |
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Final, Self

from common.secure_aggregation.encoding import (
    MAX_NAME_BYTES,
    MAX_SITES,
    Buffer,
    Reader,
    count_field,
    join_fields,
    join_names,
    number_field,
)
from common.secure_aggregation.keys import KEY_BYTES, NONCE_BYTES, TAG_BYTES
from common.secure_aggregation.refusals import MalformedMessageError
from common.secure_aggregation.session import DIGEST_BYTES, Session
from common.secure_aggregation.shamir import SHARE_BYTES

MAGIC: Final = b"WRSA"
MAX_CERTIFICATE_BYTES: Final = 16 * 1024
MAX_SIGNATURE_BYTES: Final = 512
SHARES_BYTES: Final = 2 * SHARE_BYTES
"""A share of the self-mask's seed, then one of the mask key."""
CIPHERTEXT_BYTES: Final = NONCE_BYTES + SHARES_BYTES + TAG_BYTES
_MAX_ADVERTISEMENT_BYTES: Final = 32 * 1024

BySite = tuple[tuple[str, bytes], ...]
"""A value for each of several sites, sorted by site."""


def sorted_by_site(values: Iterable[tuple[str, bytes]]) -> BySite:
    """As messages hold them."""
    return tuple(sorted(values))


@dataclass(frozen=True)
class Message(ABC):
    """Common to all: the digest of the session, 32 bytes.

    Raises
    ------
    MalformedMessageError
        From the constructor and `decode`: a field is too long or too short, a name is none, sites are unsorted or there
        twice, bytes are missing or left over.
    """

    kind: ClassVar[int]

    session: bytes

    def __post_init__(self) -> None:
        self._check_length("session", self.session, DIGEST_BYTES, DIGEST_BYTES)
        self._check()

    def encode(self) -> bytes:
        """The message's only encoding."""
        return self._head() + self._body()

    @classmethod
    def decode(cls, data: Buffer) -> Self:
        """The message that `encode` wrote."""
        reader = Reader(data, cls.__name__)
        head = bytes(reader.raw(len(MAGIC) + 1))
        if head != MAGIC + bytes([cls.kind]):
            raise MalformedMessageError(
                f"{cls.__name__}: expected it to begin with {MAGIC + bytes([cls.kind])!r}, found {head!r}: it is "
                "another message"
            )
        message = cls._parse(bytes(reader.raw(DIGEST_BYTES)), reader)
        reader.end()
        return message

    def _head(self) -> bytes:
        return MAGIC + bytes([self.kind]) + self.session

    @abstractmethod
    def _check(self) -> None:
        """Raises MalformedMessageError where a field cannot be sent."""

    @abstractmethod
    def _body(self) -> bytes:
        """The fields after the session."""

    @classmethod
    @abstractmethod
    def _parse(cls, session: bytes, reader: Reader) -> Self:
        """The inverse of `_body`."""

    def _check_length(self, name: str, content: Buffer, least: int, most: int) -> None:
        if not least <= len(content) <= most:
            wanted = str(least) if least == most else f"{least} to {most}"
            raise MalformedMessageError(
                f"{type(self).__name__}, {name}: expected {wanted} bytes, found {len(content)}; its sender is at fault"
            )

    def _check_name(self, name: str) -> None:
        if not (name.isprintable() and 1 <= len(name.encode()) <= MAX_NAME_BYTES):
            raise MalformedMessageError(
                f"{type(self).__name__}: expected a site's name of 1 to {MAX_NAME_BYTES} printable bytes, found "
                f"{ascii(name)[:MAX_NAME_BYTES]}; its sender is at fault"
            )

    def _check_names(self, names: Iterable[str]) -> None:
        found = list(names)
        for name in found:
            self._check_name(name)
        if found != sorted(set(found)) or len(found) > MAX_SITES:
            raise MalformedMessageError(
                f"{type(self).__name__}: expected at most {MAX_SITES} different sites, sorted, found "
                f"{', '.join(found)[:200]!r}; its sender is at fault"
            )

    def _check_values(self, name: str, values: BySite, least: int, most: int) -> None:
        self._check_names(site for site, _ in values)
        for _, content in values:
            self._check_length(name, content, least, most)


def _join_values(values: BySite) -> bytes:
    return count_field(len(values)) + join_fields(*(part for site, value in values for part in (site.encode(), value)))


def _read_values(reader: Reader, name: str, least: int, most: int) -> BySite:
    return tuple((reader.text("site"), reader.field(name, least, most)) for _ in range(reader.count(name)))


@dataclass(frozen=True)
class Advertisement(Message):
    """R0: a site's two fresh public keys (32 bytes each), signed by its enrolled key.

    `certificate` is whatever the study's `Verifier` needs to know that key by; this package does not look into it.
    """

    kind = 1

    site: str
    encryption_key: bytes
    mask_key: bytes
    certificate: bytes
    signature: bytes

    @staticmethod
    def statement(session: Session, site: str, encryption_key: bytes, mask_key: bytes) -> bytes:
        """What the site signs."""
        return session.context("advertise keys", site.encode(), encryption_key, mask_key)

    def _check(self) -> None:
        self._check_name(self.site)
        self._check_length("encryption key", self.encryption_key, KEY_BYTES, KEY_BYTES)
        self._check_length("mask key", self.mask_key, KEY_BYTES, KEY_BYTES)
        self._check_length("certificate", self.certificate, 0, MAX_CERTIFICATE_BYTES)
        self._check_length("signature", self.signature, 1, MAX_SIGNATURE_BYTES)

    def _body(self) -> bytes:
        return join_fields(self.site.encode(), self.encryption_key, self.mask_key, self.certificate, self.signature)

    @classmethod
    def _parse(cls, session: bytes, reader: Reader) -> Self:
        return cls(
            session,
            reader.text("site"),
            reader.field("encryption key", KEY_BYTES, KEY_BYTES),
            reader.field("mask key", KEY_BYTES, KEY_BYTES),
            reader.field("certificate", 0, MAX_CERTIFICATE_BYTES),
            reader.field("signature", 1, MAX_SIGNATURE_BYTES),
        )


@dataclass(frozen=True)
class Roster(Message):
    """After R0: all advertisements, for every site that sent one."""

    kind = 2

    advertisements: tuple[Advertisement, ...]

    @property
    def sites(self) -> tuple[str, ...]:
        """Who advertised."""
        return tuple(advertisement.site for advertisement in self.advertisements)

    def digest(self) -> bytes:
        """SHA-256 of the roster's encoding: what a site says it saw, in R3."""
        return hashlib.sha256(self.encode()).digest()

    def _check(self) -> None:
        self._check_names(self.sites)

    def _body(self) -> bytes:
        encoded = [advertisement.encode() for advertisement in self.advertisements]
        return count_field(len(encoded)) + join_fields(*encoded)

    @classmethod
    def _parse(cls, session: bytes, reader: Reader) -> Self:
        count = reader.count("advertisements")
        encoded = [reader.field("advertisement", 1, _MAX_ADVERTISEMENT_BYTES) for _ in range(count)]
        return cls(session, tuple(Advertisement.decode(content) for content in encoded))


@dataclass(frozen=True)
class EncryptedShares(Message):
    """R1: for each other site of the roster, the sender's shares for it, encrypted (94 bytes)."""

    kind = 3

    sender: str
    by_recipient: BySite

    def _check(self) -> None:
        self._check_name(self.sender)
        self._check_values("shares", self.by_recipient, CIPHERTEXT_BYTES, CIPHERTEXT_BYTES)

    def _body(self) -> bytes:
        return join_fields(self.sender.encode()) + _join_values(self.by_recipient)

    @classmethod
    def _parse(cls, session: bytes, reader: Reader) -> Self:
        return cls(session, reader.text("sender"), _read_values(reader, "shares", CIPHERTEXT_BYTES, CIPHERTEXT_BYTES))


@dataclass(frozen=True)
class DeliveredShares(Message):
    """After R1: what the other sites encrypted to the recipient. Who is missing in it dropped."""

    kind = 4

    recipient: str
    by_sender: BySite

    def _check(self) -> None:
        self._check_name(self.recipient)
        self._check_values("shares", self.by_sender, CIPHERTEXT_BYTES, CIPHERTEXT_BYTES)

    def _body(self) -> bytes:
        return join_fields(self.recipient.encode()) + _join_values(self.by_sender)

    @classmethod
    def _parse(cls, session: bytes, reader: Reader) -> Self:
        return cls(
            session, reader.text("recipient"), _read_values(reader, "shares", CIPHERTEXT_BYTES, CIPHERTEXT_BYTES)
        )


@dataclass(frozen=True)
class MaskedInput(Message):
    """R2: the site's tensors under all its masks, packed (`masking.mask_inputs`)."""

    kind = 5

    site: str
    payload: Buffer = field(repr=False)

    def pieces(self) -> tuple[bytes, Buffer]:
        """The encoding in two pieces, of which the second is the payload itself: nothing is copied."""
        return self._head() + self._body(), self.payload

    def encode(self) -> bytes:
        """The message's only encoding."""
        return b"".join(self.pieces())

    def _check(self) -> None:
        self._check_name(self.site)

    def _body(self) -> bytes:
        return join_fields(self.site.encode()) + number_field(len(self.payload))  # `encode` adds the payload

    @classmethod
    def _parse(cls, session: bytes, reader: Reader) -> Self:
        return cls(session, reader.text("site"), reader.raw(reader.number()))


@dataclass(frozen=True)
class SurvivorSet(Message):
    """After R2: the sites whose masked inputs arrived, and which alone are summed."""

    kind = 6

    survivors: tuple[str, ...]

    def _check(self) -> None:
        self._check_names(self.survivors)

    def _body(self) -> bytes:
        return join_names(self.survivors)

    @classmethod
    def _parse(cls, session: bytes, reader: Reader) -> Self:
        return cls(session, reader.names("survivors"))


@dataclass(frozen=True)
class Confirmation(Message):
    """R3: a survivor's signature over all that it was shown: the roster, who shared, and who survived."""

    kind = 7

    site: str
    signature: bytes

    @staticmethod
    def statement(
        session: Session, site: str, roster: bytes, sharers: tuple[str, ...], survivors: tuple[str, ...]
    ) -> bytes:
        """What the site signs; `roster` is the roster's digest."""
        return session.context("confirm", site.encode(), roster, join_names(sharers), join_names(survivors))

    def _check(self) -> None:
        self._check_name(self.site)
        self._check_length("signature", self.signature, 1, MAX_SIGNATURE_BYTES)

    def _body(self) -> bytes:
        return join_fields(self.site.encode(), self.signature)

    @classmethod
    def _parse(cls, session: bytes, reader: Reader) -> Self:
        return cls(session, reader.text("site"), reader.field("signature", 1, MAX_SIGNATURE_BYTES))


@dataclass(frozen=True)
class UnmaskRequest(Message):
    """After R3: whose self-masks (`survivors`) and whose mask keys (`dropped`) are asked for, and the confirmations."""

    kind = 8

    survivors: tuple[str, ...]
    dropped: tuple[str, ...]
    confirmations: BySite

    def _check(self) -> None:
        self._check_names(self.survivors)
        self._check_names(self.dropped)
        self._check_values("confirmation", self.confirmations, 1, MAX_SIGNATURE_BYTES)

    def _body(self) -> bytes:
        return join_names(self.survivors) + join_names(self.dropped) + _join_values(self.confirmations)

    @classmethod
    def _parse(cls, session: bytes, reader: Reader) -> Self:
        survivors, dropped = reader.names("survivors"), reader.names("dropped")
        return cls(session, survivors, dropped, _read_values(reader, "confirmation", 1, MAX_SIGNATURE_BYTES))


@dataclass(frozen=True)
class UnmaskShares(Message):
    """R4: the site's shares (33 bytes each) of the survivors' seeds and of the dropped sites' mask keys."""

    kind = 9

    site: str
    seed_shares: BySite = field(repr=False)
    key_shares: BySite = field(repr=False)

    def _check(self) -> None:
        self._check_name(self.site)
        self._check_values("seed share", self.seed_shares, SHARE_BYTES, SHARE_BYTES)
        self._check_values("key share", self.key_shares, SHARE_BYTES, SHARE_BYTES)

    def _body(self) -> bytes:
        return join_fields(self.site.encode()) + _join_values(self.seed_shares) + _join_values(self.key_shares)

    @classmethod
    def _parse(cls, session: bytes, reader: Reader) -> Self:
        site = reader.text("site")
        seeds = _read_values(reader, "seed share", SHARE_BYTES, SHARE_BYTES)
        return cls(session, site, seeds, _read_values(reader, "key share", SHARE_BYTES, SHARE_BYTES))
