"""Masks: 256-bit seeds stretched to streams of integers, added to tensors and taken off again modulo 2^b.

For each tensor a seed gives a key (HKDF-Expand, RFC 5869) and the key a stream (ChaCha20 from block 0 with a zero
nonce, RFC 8439: a key is used for one stream only). Four bytes of it, little-endian, make a value where b is at most
32, eight where it is more; arithmetic is that of integers of so many bytes, which wraps modulo 2^32 or 2^64 and so
modulo 2^b. The modulus is as wide as the sum of all sites' values may be, so that the sum itself never wraps. All work
is done in chunks: beside inputs and results, memory is a few hundred kilobytes a mask at most.

ChaCha20 was chosen over AES-CTR: both outrun the additions, and ChaCha20 does so on processors without AES too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from common.secure_aggregation.encoding import Buffer, join_fields, number_field
from common.secure_aggregation.packing import (
    BLOCK,
    MAX_BITS,
    WORD_BITS,
    Words,
    check_packed,
    pack,
    packed_bytes,
    unpack,
)
from common.secure_aggregation.refusals import ImpossibleSumError, InputError, MalformedMessageError

SEED_BYTES: Final = 32

_CHUNK: Final = 1024 * BLOCK
"""Values handled at a time: they stay in the processor's cache, and fill whole words when packed."""
_NONCE: Final = bytes(16)  # the block counter and the nonce
_SLACK: Final = 64  # `update_into` asks for a buffer that is longer than what it writes, by a block less a byte
_ZEROS: Final = bytes(_CHUNK * 8)
_Word = type[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class InputSpec:
    """A tensor to be summed: its shape, and the bit width `bits` of its values (0 to 2^bits - 1)."""

    shape: tuple[int, ...]
    bits: int

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Mask:
    """A stream of values to add or to subtract.

    `seed` has 32 bytes and is left out of ``repr``; `context` says what the mask is for (`Session.context`), so that
    no two masks share a stream even if they shared a seed.
    """

    seed: bytes = field(repr=False)
    context: bytes
    negative: bool = False

    def opposite(self) -> Mask:
        """The mask that takes this one off."""
        return Mask(self.seed, self.context, not self.negative)


def modulus_bits(bits: int, sites: int) -> int:
    """b of the modulus 2^b: the sum of `sites` values of `bits` bits stays below it.

    Raises InputError where b would be beyond 63, or `bits` is below 1.
    """
    width = bits + (sites - 1).bit_length()
    if bits < 1 or width > MAX_BITS:
        raise InputError(
            f"bit width {bits}: expected 1 to {MAX_BITS - (sites - 1).bit_length()} for {sites} sites; clip or "
            "quantize more coarsely"
        )
    return width


def payload_bytes(specs: Sequence[InputSpec], sites: int) -> int:
    """Length of a masked input among so many sites."""
    return sum(packed_bytes(spec.size, modulus_bits(spec.bits, sites)) for spec in specs)


def check_inputs(tensors: Sequence[npt.NDArray[Any]], specs: Sequence[InputSpec]) -> None:
    """Raises InputError unless there is, for each spec, a tensor of its shape with integers of 0 to 2^bits - 1."""
    if len(tensors) != len(specs):
        raise InputError(f"expected {len(specs)} tensors to mask, found {len(tensors)}; they must be the plan's")
    for index, (tensor, spec) in enumerate(zip(tensors, specs, strict=True)):
        if not np.issubdtype(tensor.dtype, np.integer):
            raise InputError(f"tensor {index}: expected integers to mask, found {tensor.dtype}; quantize them first")
        if tensor.shape != spec.shape:
            raise InputError(f"tensor {index}: expected shape {spec.shape}, found {tensor.shape}")
        # The values themselves are patients' matter and stay out of the message.
        if tensor.size and (int(tensor.min()) < 0 or int(tensor.max()) >> spec.bits):
            raise InputError(
                f"tensor {index}: expected values of 0 to 2^{spec.bits} - 1, found others; clip them before masking"
            )


def mask_inputs(
    tensors: Sequence[npt.NDArray[Any]], specs: Sequence[InputSpec], sites: int, masks: Sequence[Mask]
) -> bytearray:
    """The tensors plus all masks modulo their 2^b, each packed to b bits a value and to whole bytes.

    Raises InputError as `check_inputs`, before any mask is made.
    """
    check_inputs(tensors, specs)
    payload = bytearray(payload_bytes(specs, sites))
    written = memoryview(payload)
    position = 0
    for index, (tensor, spec) in enumerate(zip(tensors, specs, strict=True)):
        bits = modulus_bits(spec.bits, sites)
        word = _word(bits)
        streams = _Streams(masks, index, word)
        flat = tensor.reshape(-1)
        for start, stop in _chunks(spec.size):
            values = flat[start:stop].astype(word)
            streams.add_to(values)
            values &= word(2**bits - 1)
            size = packed_bytes(stop - start, bits)
            written[position : position + size] = pack(values, bits)[:size].data
            position += size
    return payload


class Accumulator:
    """The running sum of masked inputs, modulo each tensor's 2^b: one integer a value, however many inputs.

    Parameters
    ----------
    specs
        The tensors.
    sites
        How many may be summed; it fixes the modulus, and is that of the session.
    """

    def __init__(self, specs: Sequence[InputSpec], sites: int) -> None:
        self._specs = tuple(specs)
        self._bits = [modulus_bits(spec.bits, sites) for spec in specs]
        self._sums: list[Words] = [
            np.zeros(spec.size, _word(bits)) for spec, bits in zip(specs, self._bits, strict=True)
        ]

    def add(self, payload: Buffer) -> None:
        """Add what `mask_inputs` gave. Raises MalformedMessageError, and adds nothing, where it is of another form."""
        view = memoryview(payload)
        pieces = []
        position = 0
        for spec, bits in zip(self._specs, self._bits, strict=True):
            size = packed_bytes(spec.size, bits)
            pieces.append(view[position : position + size])
            check_packed(pieces[-1], spec.size, bits)
            position += size
        if position != len(view):
            raise MalformedMessageError(
                f"masked input: expected {position} bytes, found {len(view)}; both sides must run the same study"
            )
        for piece, total, bits in zip(pieces, self._sums, self._bits, strict=True):
            for start, stop in _chunks(len(total)):
                first = packed_bytes(start, bits)
                last = first + packed_bytes(stop - start, bits)
                total[start:stop] += unpack(piece[first:last], stop - start, bits)

    def take_off(self, masks: Sequence[Mask], summed: int) -> list[npt.NDArray[np.int64]]:
        """The plain sums, once all that is left of the masks was subtracted. The accumulator is of no use afterwards.

        Raises ImpossibleSumError where a value is larger than `summed` inputs can give.
        """
        opposites = [mask.opposite() for mask in masks]
        for index, (total, bits) in enumerate(zip(self._sums, self._bits, strict=True)):
            word = _word(bits)
            streams = _Streams(opposites, index, word)
            largest = summed * (2 ** self._specs[index].bits - 1)
            for start, stop in _chunks(len(total)):
                values = total[start:stop]
                streams.add_to(values)
                values &= word(2**bits - 1)
                if int(values.max()) > largest:
                    raise ImpossibleSumError(
                        f"tensor {index}: expected sums of at most {summed} times 2^{self._specs[index].bits} - 1, "
                        "found a larger one: a site's masks did not cancel; skip the round"
                    )
        sums, self._sums = self._sums, []
        return [total.astype(np.int64).reshape(spec.shape) for total, spec in zip(sums, self._specs, strict=True)]


class _Streams:
    """The streams of all masks for one tensor, at the same position, in words of one type."""

    def __init__(self, masks: Sequence[Mask], tensor: int, word: _Word) -> None:
        self._streams = [(_stream(mask, tensor), mask.negative) for mask in masks]
        self._word_bytes = word(0).itemsize
        self._buffer = bytearray(_CHUNK * self._word_bytes + _SLACK)
        self._values = np.frombuffer(self._buffer, f"<u{self._word_bytes}", _CHUNK)

    def add_to(self, chunk: Words) -> None:
        """Add the next values of every stream to the chunk, in place, modulo what a word holds."""
        zeros = memoryview(_ZEROS)[: len(chunk) * self._word_bytes]
        values = self._values[: len(chunk)]
        for stream, negative in self._streams:
            stream.update_into(zeros, self._buffer)
            if negative:
                chunk -= values
            else:
                chunk += values


def _word(bits: int) -> _Word:
    """What values modulo 2^bits are held in."""
    return np.uint32 if bits <= WORD_BITS else np.uint64


def _stream(mask: Mask, tensor: int) -> CipherContext:
    information = join_fields(mask.context, number_field(tensor))
    key = HKDFExpand(SHA256(), SEED_BYTES, information).derive(mask.seed)
    return Cipher(ChaCha20(key, _NONCE), mode=None).encryptor()


def _chunks(size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, size, _CHUNK):
        yield start, min(start + _CHUNK, size)
