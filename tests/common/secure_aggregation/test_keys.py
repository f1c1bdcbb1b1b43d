"""Agreement and encryption: the standards' vectors, worked out here with hashlib, and bound to what they are for."""

import dataclasses
import hashlib
import hmac
import struct

import pytest

from common.secure_aggregation.keys import agree, decrypt, encrypt, generate_key_pair, key_pair
from common.secure_aggregation.refusals import BadKeyError, UndecryptableShareError
from common.secure_aggregation.session import Session

# RFC 7748, section 6.1.
ALICE = key_pair(bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a"))
BOB = key_pair(bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb"))
SHARED = bytes.fromhex("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")
SESSION = Session("study", bytes(range(32)), 3, 1, ("a", "b", "c"), 3, 3)


def fields(*parts: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(part)) + part for part in parts)


def test_known_agreement() -> None:
    assert ALICE.public.hex() == "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
    protocol = b"wardround secure aggregation, version 1"
    encoded = (
        fields(protocol, b"study", bytes(range(32)))
        + struct.pack("<QQI", 3, 1, 3)
        + fields(b"a", b"b", b"c")
        + struct.pack("<QQ", 3, 3)
    )
    digest = hashlib.sha256(encoded).digest()
    assert SESSION.digest == digest
    # HKDF, RFC 5869: extract with the salt, then one block of expand.
    information = fields(protocol, b"purpose", digest, b"a", b"b", *sorted([ALICE.public, BOB.public]))
    extracted = hmac.new(digest, SHARED, hashlib.sha256).digest()
    expected = hmac.new(extracted, information + b"\x01", hashlib.sha256).digest()
    assert agree(ALICE, BOB.public, SESSION, "purpose", "a", "b") == expected
    assert agree(BOB, ALICE.public, SESSION, "purpose", "a", "b") == expected
    assert expected.hex() == "3d027ec5c2efd7e2f546650c8b3f4c3409aef287cae6bebb29d8387b0903d7c5"


def test_the_agreed_key_differs_by_session_purpose_sites_and_order() -> None:
    later = dataclasses.replace(SESSION, attempt=2)
    keys = {
        agree(ALICE, BOB.public, session, purpose, first, second)
        for session in (SESSION, later)
        for purpose in ("one", "other")
        for first, second in (("a", "b"), ("b", "a"), ("a", "c"))
    }
    assert len(keys) == 12


def test_what_is_encrypted_opens_for_its_recipient_in_its_session_only() -> None:
    sealed = encrypt(ALICE, BOB.public, SESSION, "a", "b", b"shares")
    assert decrypt(BOB, ALICE.public, SESSION, "a", "b", sealed) == b"shares"
    assert sealed != encrypt(ALICE, BOB.public, SESSION, "a", "b", b"shares")
    assert b"shares" not in sealed
    later = dataclasses.replace(SESSION, attempt=2)
    for attempt in (
        lambda: decrypt(BOB, ALICE.public, later, "a", "b", sealed),
        lambda: decrypt(BOB, ALICE.public, SESSION, "b", "a", sealed),
        lambda: decrypt(BOB, ALICE.public, SESSION, "c", "b", sealed),
        lambda: decrypt(BOB, generate_key_pair().public, SESSION, "a", "b", sealed),
        lambda: decrypt(generate_key_pair(), ALICE.public, SESSION, "a", "b", sealed),
        *(lambda cut=cut: decrypt(BOB, ALICE.public, SESSION, "a", "b", sealed[:cut]) for cut in (0, 5, 12, 20, 33)),
        *(
            lambda at=at: decrypt(
                BOB, ALICE.public, SESSION, "a", "b", sealed[:at] + bytes([sealed[at] ^ 1]) + sealed[at + 1 :]
            )
            for at in range(len(sealed))
        ),
    ):
        with pytest.raises(UndecryptableShareError):
            attempt()


@pytest.mark.parametrize("low", [bytes(32), b"\1" + bytes(31)])
def test_a_point_of_low_order_is_refused(low: bytes) -> None:
    with pytest.raises(BadKeyError):
        agree(ALICE, low, SESSION, "purpose", "a", "b")


def test_private_keys_are_left_out_of_what_is_printed() -> None:
    assert repr(ALICE.private) not in repr(ALICE) and ALICE.private.hex() not in repr(ALICE)
