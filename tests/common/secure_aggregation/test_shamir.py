"""Secret sharing: shares worked out by hand, and every threshold of them gives the secret back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.secure_aggregation.refusals import BadShareError
from common.secure_aggregation.shamir import PRIME, Share, evaluate, reconstruct, share_from_bytes, split

SECRET = bytes(range(32))
NUMBER = int.from_bytes(SECRET, "big")
# f(x) = NUMBER + 7x + 11x^2: 7 + 11, 14 + 44, 35 + 275
BY_HAND = [Share(1, NUMBER + 18), Share(2, NUMBER + 58), Share(5, NUMBER + 310)]


def test_known_shares() -> None:
    assert int("1" + "0" * 61 + "129", 16) == PRIME
    assert [Share(x, evaluate([NUMBER, 7, 11], x)) for x in (1, 2, 5)] == BY_HAND
    assert reconstruct(BY_HAND, 3) == SECRET
    # f(x) = 0 + (p - 1)x, which is -x modulo p.
    assert evaluate([0, PRIME - 1], 3) == PRIME - 3
    assert reconstruct([Share(1, PRIME - 1), Share(3, PRIME - 3)], 2) == bytes(32)


def test_the_field_is_a_field() -> None:
    # Miller-Rabin to 40 bases; p - 1 = 2^3 * d with d odd.
    d = (PRIME - 1) >> 3
    assert d % 2 and d << 3 == PRIME - 1
    for base in range(2, 42):
        powers = [pow(base, d << k, PRIME) for k in range(3)]
        assert powers[0] == 1 or PRIME - 1 in powers


@settings(max_examples=40)
@given(st.binary(min_size=32, max_size=32), st.data())
def test_any_threshold_of_the_shares_gives_the_secret_back(secret: bytes, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 50))
    threshold = data.draw(st.integers(1, count))
    shares = split(secret, threshold, range(1, count + 1))
    chosen = data.draw(st.permutations(shares))[: data.draw(st.integers(threshold, count))]
    assert reconstruct([share_from_bytes(share.x, share.to_bytes()) for share in chosen], threshold) == secret


def test_fewer_shares_than_the_threshold_fit_every_secret() -> None:
    two = split(SECRET, 3, [1, 2, 3])[:2]
    for secret in (bytes(32), b"\xff" * 32):
        number = int.from_bytes(secret, "big")
        # The parabola through (0, number) and the two shares: at 3 it is number - 3 y1 + 3 y2, by third differences.
        third = Share(3, (number - 3 * two[0].y + 3 * two[1].y) % PRIME)
        assert reconstruct([*two, third], 3) == secret


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        (BY_HAND[:2], "at least 3 shares, found 2"),
        ([*BY_HAND[:2], BY_HAND[0]], "two of the same"),
        ([*BY_HAND, BY_HAND[0]], "two of the same"),
        ([*BY_HAND[:2], Share(0, 5)], "a value of the field"),
        ([*BY_HAND[:2], Share(3, PRIME)], "a value of the field"),
        ([*BY_HAND[:2], Share(3, -1)], "a value of the field"),
        ([*BY_HAND, Share(7, 1)], "does not fit"),
        ([Share(x, PRIME - 1) for x in (1, 2, 3)], "a secret of 32 bytes"),
    ],
)
def test_shares_that_give_no_secret_are_refused(shares: list[Share], message: str) -> None:
    with pytest.raises(BadShareError, match=message):
        reconstruct(shares, 3)


@pytest.mark.parametrize("content", [b"", bytes(32), bytes(34), PRIME.to_bytes(33, "big"), b"\xff" * 33])
def test_bytes_that_are_no_share_are_refused(content: bytes) -> None:
    with pytest.raises(BadShareError):
        share_from_bytes(1, content)


def test_a_secret_or_threshold_that_cannot_be_shared_is_a_defect() -> None:
    for secret, threshold in ((bytes(31), 2), (bytes(33), 2), (bytes(32), 0), (bytes(32), 4)):
        with pytest.raises(ValueError):
            split(secret, threshold, [1, 2, 3])
