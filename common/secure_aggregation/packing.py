"""Integers of b bits each, packed without gaps: value i lies in bits i*b to (i+1)*b of a little-endian number.

Vectorized over blocks of 64/gcd(b, 64) values, which fill whole 64-bit words.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from common.secure_aggregation.encoding import Buffer
from common.secure_aggregation.refusals import MalformedMessageError

Words = npt.NDArray[np.unsignedinteger[Any]]

WORD_BITS: Final = 32
"""Values of so many bits are packed as they lie in memory; those of fewer are held in words of so many."""
MAX_BITS: Final = 63
"""Sums are given out as int64."""
BLOCK: Final = 64
"""Any multiple of so many values fills whole words, whatever their width."""


def packed_bytes(count: int, bits: int) -> int:
    """How many bytes `count` values of `bits` bits take."""
    return -(-count * bits // 8)


def pack(values: Words, bits: int) -> npt.NDArray[np.uint8]:
    """The bytes of a one-dimensional array of values below 2^bits (1 to 63 bits); unused bits of the last are zero.

    Values beyond are not looked for: mask them first.
    """
    if bits == WORD_BITS:
        return values.astype("<u4", copy=False).view(np.uint8)
    values = values.astype(np.uint64, copy=False)
    group, words = _group(bits)
    rows = -(-len(values) // group)
    if len(values) != rows * group:
        values = np.concatenate([values, np.zeros(rows * group - len(values), np.uint64)])
    table = values.reshape(rows, group)
    packed = np.zeros((rows, words), "<u8")
    for column in range(group):
        word, shift = divmod(column * bits, 64)
        packed[:, word] |= table[:, column] << np.uint64(shift)
        if shift + bits > 64:
            packed[:, word + 1] |= table[:, column] >> np.uint64(64 - shift)
    return packed.reshape(-1).view(np.uint8)


def unpack(data: Buffer, count: int, bits: int) -> Words:
    """The `count` values of `bits` bits that `pack` wrote, in words of 32 bits where they fit.

    Raises MalformedMessageError where `data` has another length, or a bit set that belongs to no value.
    """
    check_packed(data, count, bits)
    if bits == WORD_BITS:
        return np.frombuffer(data, "<u4")
    group, words = _group(bits)
    rows = -(-count // group)
    packed = np.zeros((rows, words), "<u8")
    packed.reshape(-1).view(np.uint8)[: len(data)] = np.frombuffer(data, np.uint8)
    table = np.empty((rows, group), np.uint64)
    for column in range(group):
        word, shift = divmod(column * bits, 64)
        table[:, column] = packed[:, word] >> np.uint64(shift)
        if shift + bits > 64:
            table[:, column] |= packed[:, word + 1] << np.uint64(64 - shift)
    table &= np.uint64(2**bits - 1)
    return table.reshape(-1)[:count] if bits > WORD_BITS else table.reshape(-1)[:count].astype(np.uint32)


def check_packed(data: Buffer, count: int, bits: int) -> None:
    """Raises MalformedMessageError where `data` cannot be `count` values of `bits` bits."""
    if len(data) != packed_bytes(count, bits):
        raise MalformedMessageError(
            f"packed values: expected {packed_bytes(count, bits)} bytes for {count} values of {bits} bits, found "
            f"{len(data)}; both sides must run the same study"
        )
    used = count * bits % 8
    if used and data[-1] >> used:
        raise MalformedMessageError(
            f"packed values: expected zeros after the last of {count} values of {bits} bits, found other bits; have "
            "them sent again"
        )


def _group(bits: int) -> tuple[int, int]:
    """The fewest values that fill whole 64-bit words, and how many words."""
    divisor = math.gcd(bits, 64)
    return 64 // divisor, bits // divisor
