"""Masks: the streams of the standards, worked out here in plain Python, and sums that are exact."""

import hashlib
import hmac
import struct

import numpy as np
import pytest

from common.secure_aggregation.masking import Accumulator, InputSpec, Mask, mask_inputs, modulus_bits, payload_bytes
from common.secure_aggregation.packing import unpack
from common.secure_aggregation.refusals import ImpossibleSumError, InputError, MalformedMessageError

SEED = bytes(range(32))
MASK = Mask(SEED, b"context")


def chacha20_block(key: bytes, counter: int, nonce: bytes) -> bytes:
    """RFC 8439, section 2.3, from its text."""
    state = list(struct.unpack("<16I", b"expand 32-byte k" + key + struct.pack("<I", counter) + nonce))
    words = state[:]
    for _ in range(10):
        for a, b, c, d in (
            *((i, i + 4, i + 8, i + 12) for i in range(4)),
            *((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14)),
        ):
            for x, y, z, turn in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
                words[x] = (words[x] + words[y]) % 2**32
                words[z] ^= words[x]
                words[z] = (words[z] << turn | words[z] >> (32 - turn)) % 2**32
    return struct.pack("<16I", *((word + start) % 2**32 for word, start in zip(words, state, strict=True)))


def expected_stream(mask: Mask, tensor: int, count: int) -> list[int]:
    """HKDF-Expand with SHA-256 (RFC 5869, section 2.3; one block), then ChaCha20 from block 0."""
    fields = (mask.context, struct.pack("<Q", tensor))
    information = b"".join(struct.pack("<I", len(part)) + part for part in fields)
    key = hmac.new(mask.seed, information + b"\x01", hashlib.sha256).digest()
    blocks = b"".join(chacha20_block(key, counter, bytes(12)) for counter in range(-(-count // 8)))
    return list(struct.unpack(f"<{count}Q", blocks[: 8 * count]))


def stream(mask: Mask, tensor: int, count: int, bits: int) -> list[int]:
    """What masking adds to zeros."""
    specs = [InputSpec((0,), 1)] * tensor + [InputSpec((count,), bits)]
    payload = mask_inputs([np.zeros(spec.shape, np.int64) for spec in specs], specs, 2, [mask])
    return [int(value) for value in unpack(payload, count, bits + 1)]


def test_the_plain_python_above_gives_the_block_of_rfc_8439() -> None:
    block = chacha20_block(SEED, 1, bytes.fromhex("000000090000004a00000000"))
    assert block.hex().startswith("10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e")


def test_known_streams() -> None:
    whole = 2**63 - 1
    assert stream(MASK, 0, 3, 62) == [x & whole for x in (0x97FFA18B1E552E21, 0xDC7FA4A8CC224181, 0x7700EC64749C11FF)]
    assert stream(MASK, 1, 3, 62) == [x & whole for x in (0x0CB25B7AA95B0982, 0x67D96D35117724E4, 0x4D5910B87886004D)]
    assert stream(MASK.opposite(), 0, 1, 62) == [-0x97FFA18B1E552E21 & whole]


def test_known_streams_of_sums_of_32_bits() -> None:
    words = (0x1E552E21, 0x97FFA18B, 0xCC224181, 0xDC7FA4A8, 0x749C11FF, 0x7700EC64)  # the same bytes, four a value
    assert stream(MASK, 0, 6, 31) == list(words)
    assert stream(MASK, 0, 6, 15) == [word % 2**16 for word in words]
    assert stream(MASK.opposite(), 0, 1, 31) == [-0x1E552E21 % 2**32]


def test_sums_of_32_bits_are_exact_up_to_the_largest() -> None:
    specs = [InputSpec((70_000,), 30)]
    values = [np.arange(70_000) * 15_339 % 2**30, np.full(70_000, 2**30 - 1), np.full(70_000, 2**30 - 1)]
    masks = [Mask(SEED, b"1"), Mask(SEED, b"2"), Mask(SEED, b"3")]
    accumulator = Accumulator(specs, 3)
    for value, mask in zip(values, masks, strict=True):
        payload = mask_inputs([value], specs, 3, [mask])
        assert len(payload) == 4 * 70_000
        accumulator.add(payload)
    (found,) = accumulator.take_off(masks, 3)
    np.testing.assert_array_equal(found, sum(values))


def test_the_stream_goes_on_across_chunks() -> None:
    count = 70_000  # a chunk is 65,536 values
    found = stream(MASK, 0, count, 40)
    last = expected_stream(MASK, 0, 16)
    assert found[:16] == [value % 2**41 for value in last]
    key = hmac.new(SEED, b"\x07\0\0\0context\x08\0\0\0" + bytes(8) + b"\x01", hashlib.sha256).digest()
    at = 65_528  # the block before the edge, and the one after it
    for start in (at, at + 8):
        block = struct.unpack("<8Q", chacha20_block(key, start // 8, bytes(12)))
        assert found[start : start + 8] == [value % 2**41 for value in block]


def test_streams_differ_by_seed_purpose_and_tensor() -> None:
    streams = [
        stream(mask, tensor, 4, 62)
        for mask in (MASK, Mask(SEED, b"other"), Mask(SEED[::-1], b"context"))
        for tensor in (0, 1)
    ]
    assert len({value for values in streams for value in values}) == 24


@pytest.mark.parametrize("sites", [3, 4, 5, 8, 9, 33, 50])
def test_the_modulus_is_the_least_that_no_sum_wraps(sites: int) -> None:
    bits = modulus_bits(16, sites)
    assert sites * (2**16 - 1) < 2**bits
    assert 2 ** (bits - 17) < sites <= 2 ** (bits - 16)


@pytest.mark.parametrize(("bits", "sites"), [(0, 3), (-1, 3), (62, 3), (58, 50), (64, 3)])
def test_a_width_whose_sum_would_not_fit_is_refused(bits: int, sites: int) -> None:
    with pytest.raises(InputError):
        modulus_bits(bits, sites)


def test_the_accumulator_takes_a_masked_input_whole_or_not_at_all() -> None:
    specs = [InputSpec((3,), 4), InputSpec((2,), 9)]
    payload = bytes(mask_inputs([np.array([1, 2, 3]), np.array([4, 500])], specs, 3, []))
    assert len(payload) == payload_bytes(specs, 3) == 3 + 3  # 18 and 22 bits
    accumulator = Accumulator(specs, 3)
    for torn in (payload[:-1], payload + b"\0", payload[:-1] + b"\xff", b""):
        with pytest.raises(MalformedMessageError):
            accumulator.add(torn)
    accumulator.add(memoryview(payload))
    accumulator.add(payload)
    assert [tensor.tolist() for tensor in accumulator.take_off([], 2)] == [[2, 4, 6], [8, 1000]]


def test_a_sum_that_so_many_inputs_cannot_give_is_refused() -> None:
    specs = [InputSpec((1,), 4)]
    accumulator = Accumulator(specs, 3)
    for _ in range(3):
        accumulator.add(mask_inputs([np.array([15])], specs, 3, []))
    with pytest.raises(ImpossibleSumError):
        accumulator.take_off([], 2)


def test_seeds_are_left_out_of_what_is_printed() -> None:
    assert repr(SEED) not in repr(MASK) and SEED.hex() not in repr(MASK)
