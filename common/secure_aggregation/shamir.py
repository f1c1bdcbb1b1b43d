"""Shamir's secret sharing: n shares of a 32-byte secret, of which any t give it back and t - 1 say nothing about it.

The secret is the constant term of a random polynomial of degree t - 1 over the integers modulo `PRIME`; a share is the
polynomial's value at the site's index in the session, which begins at 1 and never changes.

Source: A. Shamir, "How to share a secret", Communications of the ACM 22 (1979), doi:10.1145/359168.359176.
"""

from __future__ import annotations

import functools
import math
import secrets
from collections.abc import Sequence
from typing import Final, NamedTuple

from common.secure_aggregation.refusals import BadShareError

PRIME: Final = 2**256 + 297
"""The smallest prime above 2^256, so that every secret of 32 bytes is an element of the field."""
SECRET_BYTES: Final = 32
SHARE_BYTES: Final = 33


class Share(NamedTuple):
    """The polynomial's value `y` (0 to PRIME - 1) at `x` (from 1: 0 is where the secret lies)."""

    x: int
    y: int

    def to_bytes(self) -> bytes:
        """`y` in 33 bytes, big-endian; who receives it knows `x`."""
        return self.y.to_bytes(SHARE_BYTES, "big")


def share_from_bytes(x: int, content: bytes) -> Share:
    """The inverse of `Share.to_bytes`. Raises BadShareError where it is not 33 bytes or not below PRIME."""
    share = Share(x, int.from_bytes(content, "big"))
    if len(content) != SHARE_BYTES:
        raise BadShareError(f"share {x}: expected {SHARE_BYTES} bytes, found {len(content)}; its sender is at fault")
    _check(share)
    return share


def split(secret: bytes, threshold: int, xs: Sequence[int]) -> list[Share]:
    """One share of the 32-byte `secret` at each of `xs`, any `threshold` of which give it back.

    The coefficients come from the operating system's randomness.

    Raises
    ------
    ValueError
        The secret is not 32 bytes, or the threshold is not 1 to the number of shares.
    BadShareError
        An x is not 1 to PRIME - 1, or is there twice.
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"expected a secret of {SECRET_BYTES} bytes, found {len(secret)}")
    if not 1 <= threshold <= len(xs):
        raise ValueError(f"expected a threshold of 1 to {len(xs)}, found {threshold}")
    coefficients = [int.from_bytes(secret, "big"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    shares = [Share(x, evaluate(coefficients, x)) for x in xs]
    _check_distinct(shares)
    return shares


def evaluate(coefficients: Sequence[int], x: int) -> int:
    """The polynomial's value at `x` modulo PRIME; the constant term comes first."""
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * x + coefficient) % PRIME
    return value


def reconstruct(shares: Sequence[Share], threshold: int) -> bytes:
    """The 32-byte secret from `threshold` or more shares.

    Shares beyond the threshold are checked to lie on the same polynomial, so that a wrong one is noticed (which one it
    was cannot be told).

    Raises
    ------
    BadShareError
        Fewer shares than the threshold, two of the same x, one that is out of range or does not fit the others, or a
        result that is no secret of 32 bytes.
    """
    if len(shares) < threshold:
        raise BadShareError(f"expected at least {threshold} shares, found {len(shares)}: too many sites dropped out")
    _check_distinct(shares)
    base, others = shares[:threshold], shares[threshold:]
    xs = tuple(share.x for share in base)
    for share in others:
        if _interpolate(base, xs, share.x) != share.y:
            raise BadShareError(
                f"share {share.x}: does not fit the {threshold} before it: a site sent a wrong share; skip the round"
            )
    secret = _interpolate(base, xs, 0)
    if secret >> (8 * SECRET_BYTES):
        raise BadShareError(
            f"expected a secret of {SECRET_BYTES} bytes, found a larger number: a site sent a wrong share; skip the "
            "round"
        )
    return secret.to_bytes(SECRET_BYTES, "big")


def _interpolate(shares: Sequence[Share], xs: tuple[int, ...], at: int) -> int:
    weights = _weights(xs, at)
    return sum(weight * share.y for weight, share in zip(weights, shares, strict=True)) % PRIME


# A round reconstructs up to a hundred secrets from the shares of the same sites, hence at the same x.
@functools.lru_cache(maxsize=256)
def _weights(xs: tuple[int, ...], at: int) -> tuple[int, ...]:
    """Lagrange's basis polynomials for the nodes `xs`, evaluated at `at`."""
    weights = []
    for x in xs:
        others = [other for other in xs if other != x]
        above = math.prod(at - other for other in others)
        below = math.prod(x - other for other in others)
        weights.append(above * pow(below, -1, PRIME) % PRIME)
    return tuple(weights)


def _check(share: Share) -> None:
    if not (0 < share.x < PRIME and 0 <= share.y < PRIME):
        raise BadShareError(f"share {share.x}: expected a value of the field, found one beyond; its sender is at fault")


def _check_distinct(shares: Sequence[Share]) -> None:
    for share in shares:
        _check(share)
    if len({share.x for share in shares}) != len(shares):
        raise BadShareError("expected shares of different sites, found two of the same; each site counts once")
