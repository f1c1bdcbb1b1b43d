"""Invitations as text: what comes back, what a slip of the finger does, and that nothing secret is repeated."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UsageError
from common.security.tokens import Token, digest_of

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", fullmatch=True)
TOKENS = st.builds(
    Token,
    study=st.text(min_size=1, max_size=60),
    role=st.sampled_from(["site", "investigator", "observer"]),
    name=NAMES,
    address=st.from_regex(r"[a-z0-9.-]{1,200}:[0-9]{1,5}", fullmatch=True),
    authority=st.binary(min_size=32, max_size=32),
    invitation=st.binary(min_size=8, max_size=8),
    secret=st.binary(min_size=32, max_size=32),
    expires=st.integers(0, 2**33),
)


@given(TOKENS)
def test_a_token_comes_back_from_its_text(token: Token) -> None:
    assert Token.parse(token.text()) == token


@given(TOKENS, st.data())
def test_mail_may_break_capitalize_and_indent_a_token(token: Token, data: st.DataObject) -> None:
    text = token.text()
    place = data.draw(st.integers(0, len(text)))
    assert Token.parse(f"  {text[:place].upper()}\r\n > \t{text[place:]} \n".replace(">", "")) == token


@given(TOKENS, st.data())
def test_every_wrong_letter_is_noticed(token: Token, data: st.DataObject) -> None:
    text = token.text()
    place = data.draw(st.integers(0, len(text) - 1))
    letter = data.draw(st.sampled_from("abcdefghijklmnopqrstuvwxyz234567"))
    changed = text[:place] + letter + text[place + 1 :]
    if changed != text:
        with pytest.raises(UsageError, match=r"token: .*copy the whole token again"):
            Token.parse(changed)


@given(TOKENS, st.data())
def test_lost_doubled_and_swapped_letters_are_noticed(token: Token, data: st.DataObject) -> None:
    text = token.text()
    place = data.draw(st.integers(0, len(text) - 2))
    lost = text[:place] + text[place + 1 :]
    doubled = text[: place + 1] + text[place:]
    swapped = text[:place] + text[place + 1] + text[place] + text[place + 2 :]
    for changed in (lost, doubled, swapped, text[:place]):
        if changed != text:
            with pytest.raises(UsageError):
                Token.parse(changed)


@given(st.text(max_size=300))
def test_any_text_is_a_token_or_a_clear_error(text: str) -> None:
    for each in (text, f"wr1{text}"):
        with pytest.raises(UsageError, match=r"^token: "):
            Token.parse(each)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "begins with wr1"),
        ("nonsense", "begins with wr1"),
        ("wr1", "checksum does not fit"),
        ("wr1abc1def", "letter 7 is none that a token has"),
        ("wr1" + "a" * 5000, "checksum|not whole"),
    ],
)
def test_what_is_wrong_is_said(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Token.parse(text)


@given(TOKENS)
def test_the_secret_is_in_no_message(token: Token) -> None:
    assert "secret" not in repr(token)
    with pytest.raises(UsageError) as refused:
        Token.parse(token.text()[:-1])
    assert token.text()[20:40] not in str(refused.value)


def test_secrets_are_drawn_anew_and_kept_as_digests() -> None:
    one, other = (Token.new("nuclei", "site", "north", "c:1", bytes(32), 1) for _ in range(2))
    assert one.secret != other.secret and one.invitation != other.invitation
    assert len(one.secret) == 32  # 256 bits
    assert one.digest() == digest_of(one.secret) != one.secret
