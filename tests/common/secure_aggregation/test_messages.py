"""Messages: one encoding each, and no bytes that are anything else do more than raise ProtocolError."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ProtocolError
from common.secure_aggregation.messages import (
    CIPHERTEXT_BYTES,
    Advertisement,
    Confirmation,
    DeliveredShares,
    EncryptedShares,
    MaskedInput,
    Message,
    Roster,
    SurvivorSet,
    UnmaskRequest,
    UnmaskShares,
)
from common.secure_aggregation.refusals import MalformedMessageError

SESSION = st.binary(min_size=32, max_size=32)
SITE = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=16)
SITES = st.lists(SITE, unique=True, max_size=5).map(sorted).map(tuple)


def exactly(size: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=size, max_size=size)


def by_site(values: st.SearchStrategy[bytes]) -> st.SearchStrategy[tuple[tuple[str, bytes], ...]]:
    return st.dictionaries(SITE, values, max_size=5).map(lambda found: tuple(sorted(found.items())))


SIGNATURE = st.binary(min_size=1, max_size=80)
KEY = exactly(32)
ADVERTISEMENT = st.builds(Advertisement, SESSION, SITE, KEY, KEY, st.binary(max_size=50), SIGNATURE)
MESSAGES = st.one_of(
    ADVERTISEMENT,
    st.builds(
        lambda session, held: Roster(session, tuple(sorted(held, key=lambda one: one.site))),
        SESSION,
        st.lists(ADVERTISEMENT, unique_by=lambda one: one.site, max_size=3),
    ),
    st.builds(EncryptedShares, SESSION, SITE, by_site(exactly(CIPHERTEXT_BYTES))),
    st.builds(DeliveredShares, SESSION, SITE, by_site(exactly(CIPHERTEXT_BYTES))),
    st.builds(MaskedInput, SESSION, SITE, st.binary(max_size=100)),
    st.builds(SurvivorSet, SESSION, SITES),
    st.builds(Confirmation, SESSION, SITE, SIGNATURE),
    st.builds(UnmaskRequest, SESSION, SITES, SITES, by_site(SIGNATURE)),
    st.builds(UnmaskShares, SESSION, SITE, by_site(exactly(33)), by_site(exactly(33))),
)
KINDS: list[type[Message]] = [
    Advertisement,
    Roster,
    EncryptedShares,
    DeliveredShares,
    MaskedInput,
    SurvivorSet,
    Confirmation,
    UnmaskRequest,
    UnmaskShares,
]


def test_every_kind_has_its_own_number() -> None:
    assert [kind.kind for kind in KINDS] == list(range(1, 10))


def test_known_bytes() -> None:
    session = bytes(range(32))
    assert SurvivorSet(session, ("a", "bc")).encode() == b"WRSA\x06" + session + (
        b"\x02\0\0\0" + b"\x01\0\0\0a" + b"\x02\0\0\0bc"
    )
    assert MaskedInput(session, "a", b"xyz").encode() == b"WRSA\x05" + session + (
        b"\x01\0\0\0a" + b"\x03\0\0\0\0\0\0\0xyz"
    )


@settings(max_examples=60)
@given(MESSAGES)
def test_a_message_comes_back_from_its_bytes(message: Message) -> None:
    encoded = message.encode()
    assert type(message).decode(encoded) == message
    assert type(message).decode(memoryview(encoded)).encode() == encoded
    for kind in KINDS:
        if kind is not type(message):
            with pytest.raises(MalformedMessageError):
                kind.decode(encoded)


@settings(max_examples=100)
@given(MESSAGES, st.data())
def test_damaged_bytes_are_refused_or_are_another_message(message: Message, data: st.DataObject) -> None:
    encoded = message.encode()
    for torn in (encoded[: data.draw(st.integers(0, len(encoded) - 1))], encoded + data.draw(exactly(1))):
        with pytest.raises(MalformedMessageError):
            type(message).decode(torn)
    at, other = data.draw(st.integers(0, len(encoded) - 1)), data.draw(st.integers(1, 255))
    damaged = encoded[:at] + bytes([encoded[at] ^ other]) + encoded[at + 1 :]
    try:
        found = type(message).decode(damaged)
    except ProtocolError:
        return
    assert found.encode() == damaged


@settings(max_examples=100)
@given(st.sampled_from(KINDS), st.binary(max_size=200))
def test_any_bytes_are_refused(kind: type[Message], content: bytes) -> None:
    for data in (content, b"WRSA" + bytes([kind.kind]) + bytes(32) + content):
        try:
            found = kind.decode(data)
        except ProtocolError:
            continue
        assert found.encode() == data


@pytest.mark.parametrize(
    "make",
    [
        lambda session: SurvivorSet(session, ("b", "a")),
        lambda session: SurvivorSet(session, ("a", "a")),
        lambda session: SurvivorSet(session, tuple(f"{i:02}" for i in range(51))),
        lambda session: SurvivorSet(session, ("",)),
        lambda session: SurvivorSet(session, ("a" * 65,)),
        lambda session: SurvivorSet(session, ("\udcff",)),
        lambda session: SurvivorSet(session[1:], ()),
        lambda session: Confirmation(session, "a\n", b"s"),
        lambda session: Confirmation(session, "a", b""),
        lambda session: Confirmation(session, "a", bytes(513)),
        lambda session: EncryptedShares(session, "a", (("b", bytes(93)),)),
        lambda session: UnmaskShares(session, "a", (("b", bytes(32)),), ()),
        lambda session: UnmaskShares(session, "a", (), (("c", bytes(33)), ("b", bytes(33)))),
        lambda session: Advertisement(session, "a", bytes(31), bytes(32), b"", b"s"),
        lambda session: Advertisement(session, "a", bytes(32), bytes(33), b"", b"s"),
        lambda session: Advertisement(session, "a", bytes(32), bytes(32), bytes(16385), b"s"),
    ],
)
def test_a_message_that_cannot_be_sent_cannot_be_made(make) -> None:
    with pytest.raises(MalformedMessageError):
        make(bytes(32))


@pytest.mark.parametrize("length", [b"\xff\xff\xff\xff", b"\x41\0\0\0"])
def test_a_length_that_is_announced_too_large_is_refused_before_it_is_read(length: bytes) -> None:
    with pytest.raises(MalformedMessageError):
        Confirmation.decode(b"WRSA\x07" + bytes(32) + length + b"a" * 65)


def test_the_payload_is_not_copied() -> None:
    payload = bytearray(100)
    message = MaskedInput(bytes(32), "a", payload)
    assert message.pieces()[1] is payload and b"".join(message.pieces()) == message.encode()
    encoded = bytearray(message.encode())
    decoded = MaskedInput.decode(encoded)
    encoded[-1] = 7
    assert decoded.payload[-1] == 7


def test_shares_and_payloads_are_left_out_of_what_is_printed() -> None:
    message = UnmaskShares(bytes(32), "a", (("b", b"s" * 33),), ())
    assert "sss" not in repr(message)
    assert "ppp" not in repr(MaskedInput(bytes(32), "a", b"p" * 33))
