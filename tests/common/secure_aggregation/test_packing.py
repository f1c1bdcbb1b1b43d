"""Packed integers: the bytes of the definition, nothing wasted, nothing else taken."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.secure_aggregation.packing import pack, packed_bytes, unpack
from common.secure_aggregation.refusals import MalformedMessageError


def test_known_bytes() -> None:
    # 1 + 2 * 2^3 + 3 * 2^6 + 5 * 2^9 = 2769 = 0x0ad1
    assert pack(np.array([1, 2, 3, 5], np.uint64), 3)[:2].tobytes() == b"\xd1\x0a"
    # 35 bits: 2^35 - 1 in bits 0 to 34, 1 in bit 35
    assert pack(np.array([2**35 - 1, 1], np.uint64), 35)[:9].tobytes() == b"\xff\xff\xff\xff\x0f\0\0\0\0"


@settings(max_examples=60)
@given(st.integers(1, 63), st.integers(0, 300), st.integers(0, 2**32 - 1))
def test_value_i_lies_in_bits_i_times_b_of_one_little_endian_number(bits: int, count: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 2**bits, count, dtype=np.uint64)
    packed = pack(values, bits)[: packed_bytes(count, bits)].tobytes()
    assert len(packed) == -(-count * bits // 8)
    assert int.from_bytes(packed, "little") == sum(int(value) << (i * bits) for i, value in enumerate(values))
    np.testing.assert_array_equal(unpack(packed, count, bits), values)


@pytest.mark.parametrize("data", [b"", b"\xd1", b"\xd1\x0a\0", b"\xd1\x1a", b"\xd1\x8a"])
def test_other_lengths_and_bits_beyond_the_last_value_are_refused(data: bytes) -> None:
    assert unpack(b"\xd1\x0a", 4, 3).tolist() == [1, 2, 3, 5]
    with pytest.raises(MalformedMessageError):
        unpack(data, 4, 3)
