"""Length-prefixed fields: the one way in which this package turns several values into bytes.

A field is its length (u32, little-endian) and its bytes, so that no two lists of fields share an encoding; what is
signed, hashed, authenticated or sent is always such a list.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Final

from common.secure_aggregation.refusals import MalformedMessageError

MAX_SITES: Final = 50
MAX_NAME_BYTES: Final = 64

_LENGTH: Final = struct.Struct("<I")
_NUMBER: Final = struct.Struct("<Q")

Buffer = bytes | bytearray | memoryview


def join_fields(*parts: bytes) -> bytes:
    """The fields, one after the other."""
    return b"".join(_LENGTH.pack(len(part)) + part for part in parts)


def join_names(names: Iterable[str]) -> bytes:
    """The number of names, and each as a UTF-8 field."""
    encoded = [name.encode() for name in names]
    return _LENGTH.pack(len(encoded)) + join_fields(*encoded)


def number_field(number: int) -> bytes:
    """A number of 0 to 2^64 - 1, in 8 bytes."""
    return _NUMBER.pack(number)


def count_field(count: int) -> bytes:
    """The number of entries that follow, in 4 bytes."""
    return _LENGTH.pack(count)


class Reader:
    """Takes fields off the front of a message. Every method raises MalformedMessageError where they are not there.

    Parameters
    ----------
    data
        The message.
    what
        What the message is, for errors.
    """

    def __init__(self, data: Buffer, what: str) -> None:
        self._view = memoryview(data).cast("B")
        self._position = 0
        self._what = what

    def raw(self, size: int) -> memoryview:
        """The next `size` bytes, not copied."""
        available = len(self._view) - self._position
        if size > available:
            raise MalformedMessageError(
                f"{self._what}: expected {size} more bytes at byte {self._position}, found {available}: it is torn; "
                "have it sent again"
            )
        self._position += size
        return self._view[self._position - size : self._position]

    def field(self, name: str, least: int, most: int) -> bytes:
        """The next field, of `least` to `most` bytes."""
        (size,) = _LENGTH.unpack(self.raw(_LENGTH.size))
        self._check(name, size, least, most, "bytes")
        return bytes(self.raw(size))

    def text(self, name: str, most: int = MAX_NAME_BYTES) -> str:
        """The next field as UTF-8 text of 1 to `most` bytes."""
        content = self.field(name, 1, most)
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise MalformedMessageError(
                f"{self._what}, {name}: expected UTF-8 text, found other bytes; have it sent again"
            ) from error

    def number(self) -> int:
        """The next number of 8 bytes."""
        number: int = _NUMBER.unpack(self.raw(_NUMBER.size))[0]
        return number

    def count(self, name: str, most: int = MAX_SITES) -> int:
        """The number of entries that follow, at most `most`."""
        count: int = _LENGTH.unpack(self.raw(_LENGTH.size))[0]
        self._check(name, count, 0, most, "entries")
        return count

    def names(self, name: str) -> tuple[str, ...]:
        """What `join_names` wrote."""
        return tuple(self.text(name) for _ in range(self.count(name)))

    def end(self) -> None:
        """Nothing may follow."""
        if trailing := len(self._view) - self._position:
            raise MalformedMessageError(
                f"{self._what}: expected its end at byte {self._position}, found {trailing} more bytes; "
                "have it sent again"
            )

    def _check(self, name: str, found: int, least: int, most: int, unit: str) -> None:
        if not least <= found <= most:
            wanted = str(least) if least == most else f"{least} to {most}"
            raise MalformedMessageError(
                f"{self._what}, {name}: expected {wanted} {unit}, found {found} announced; have it sent again"
            )
