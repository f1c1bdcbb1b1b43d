"""Key pairs of one attempt, the secrets that two sites agree on, and the encryption of shares between them.

X25519 (RFC 7748) gives a shared secret, HKDF with SHA-256 (RFC 5869) a key from it that is bound to the session, the
purpose and both sites in order; ChaCha20-Poly1305 (RFC 8439) encrypts.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Final, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from common.secure_aggregation.refusals import BadKeyError, UndecryptableShareError
from common.secure_aggregation.session import Session

KEY_BYTES: Final = 32
NONCE_BYTES: Final = 12
TAG_BYTES: Final = 16


class Signer(Protocol):
    """Signs with the site's enrolled Ed25519 key."""

    def __call__(self, message: bytes, /) -> bytes:
        """The signature."""


class Verifier(Protocol):
    """Says whether `signature` is that of `site` over `message`.

    `certificate` comes from the coordinator and must not be trusted: an implementation checks that the study's
    authority issued it, and to this very site. It answers False, and does not raise, for whatever is not in order.
    """

    def __call__(self, site: str, certificate: bytes, message: bytes, signature: bytes, /) -> bool:
        """Whether it is."""


@dataclass(frozen=True)
class KeyPair:
    """An X25519 key pair: two times 32 bytes. The private key is left out of ``repr``."""

    private: bytes = field(repr=False)
    public: bytes


def generate_key_pair() -> KeyPair:
    """A fresh pair, from the operating system's randomness."""
    return key_pair(X25519PrivateKey.generate().private_bytes_raw())


def key_pair(private: bytes) -> KeyPair:
    """The pair of a private key of 32 bytes."""
    return KeyPair(private, X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw())


def agree(own: KeyPair, peer: bytes, session: Session, purpose: str, first: str, second: str) -> bytes:
    """The 32 bytes that the owner of `own` and that of the public key `peer` derive alike for a purpose.

    `first` and `second` are the two sites, in the order that the purpose has (sender and recipient, or sorted).
    Raises BadKeyError where `peer` is a point of low order, which would fix the secret in advance.
    """
    try:
        secret = X25519PrivateKey.from_private_bytes(own.private).exchange(X25519PublicKey.from_public_bytes(peer))
    except ValueError as error:
        raise BadKeyError(
            f"public key {peer.hex()}: no secret can be agreed with it (between {first!r} and {second!r}); "
            "its site must make new keys"
        ) from error
    keys = sorted((own.public, peer))
    information = session.context(purpose, first.encode(), second.encode(), *keys)
    return HKDF(SHA256(), KEY_BYTES, salt=session.digest, info=information).derive(secret)


def encrypt(own: KeyPair, peer: bytes, session: Session, sender: str, recipient: str, content: bytes) -> bytes:
    """`content` from sender (whose pair is `own`) to recipient: nonce (12 bytes), ciphertext and tag (16 bytes)."""
    key = agree(own, peer, session, "share encryption", sender, recipient)
    nonce = os.urandom(NONCE_BYTES)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, content, _associated(session, sender, recipient))


def decrypt(own: KeyPair, peer: bytes, session: Session, sender: str, recipient: str, content: bytes) -> bytes:
    """The inverse of `encrypt`; here `own` is the recipient's pair.

    Raises UndecryptableShareError where the content was not encrypted so, and BadKeyError as `agree`.
    """
    key = agree(own, peer, session, "share encryption", sender, recipient)
    nonce, ciphertext = content[:NONCE_BYTES], content[NONCE_BYTES:]
    try:
        return ChaCha20Poly1305(key).decrypt(nonce, ciphertext, _associated(session, sender, recipient))
    except (InvalidTag, ValueError) as error:
        raise UndecryptableShareError(
            f"share from {sender!r} to {recipient!r}: does not decrypt in {session.name}: it was changed, or is "
            "another session's; the round must be tried again without its sender"
        ) from error


def _associated(session: Session, sender: str, recipient: str) -> bytes:
    return session.context("share", sender.encode(), recipient.encode())
