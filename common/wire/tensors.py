"""The one format in which tensors cross the wire and lie on disk.

A blob is::

    b"WRT1" | header length, u32 little-endian | header | zeros up to a multiple of 64
            | tensor 0 | zeros up to a multiple of 64 | tensor 1 | ... | tensor n-1

The header is compact UTF-8 JSON, a list of ``[dtype, shape]``; its length does not count the zeros after it. Tensors
are little-endian and in C order; each starts at a multiple of 64 bytes from the start of the blob (a cache line, and
what the vector units of today's CPUs ask for), so that readers alias the bytes of a message or of a mapped file
and copy nothing. A list of tensors has exactly one encoding, hence exactly one SHA-256 digest: a header that is not
written as this module writes it, and padding that is not zero, are refused.

The format detects malformed blobs, not altered values: whoever needs that compares the digest (`read_tensors`,
`BlobWriter.commit`).

Sources: the aligned data section and the chunked iteration over non-contiguous arrays follow NumPy's NPY format
(https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html), the JSON header follows safetensors
(https://github.com/huggingface/safetensors#format). Both were looked at; NPY holds one array a file, and safetensors
wants all tensors joined in memory before it writes.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import struct
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, overload

import numpy as np
import numpy.typing as npt

from common.disk import cannot_write, sync_folder
from common.errors import WireError
from common.failpoints import hit

Array = npt.NDArray[Any]
"""Of any dtype: which ones cross the wire is checked at run time."""

MAGIC: Final = b"WRT1"
ALIGNMENT: Final = 64
CHUNK_BYTES: Final = 256 * 1024
"""Size of the pieces in which a blob is sent. gRPC holds several a stream: larger ones cost memory and gain no time."""
MAX_MESSAGE_BYTES: Final = 4 * 1024 * 1024
"""The largest gRPC message that either side accepts."""
MAX_HEADER_BYTES: Final = 4 * 1024 * 1024
"""Room for about 100,000 tensors; a longer header is refused before it is read."""
PARTIAL_SUFFIX: Final = ".partial"
"""Ending of files that are still being written. After a crash, files with this ending may be deleted."""

ALLOWED_DTYPES: Final = frozenset(
    ["bool", "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
)

_PREFIX: Final = struct.Struct("<4sI")
_MAX_RANK: Final = 32  # NumPy 1.x
_MAX_TENSOR_BYTES: Final = 2**62  # NumPy counts bytes in a signed 64-bit integer, also where another axis is empty


@dataclass(frozen=True)
class TensorSpec:
    """Type of one tensor: NumPy's name of the dtype (one of `ALLOWED_DTYPES` on the wire) and the shape."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's values, padding not counted."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Stored:
    """A blob on disk: where, the SHA-256 digest of its bytes (32 bytes), and how many bytes it has."""

    path: Path
    digest: bytes
    size: int


def specs_of(arrays: Sequence[Array]) -> tuple[TensorSpec, ...]:
    """The specs of `arrays`, in order. Raises WireError for a dtype that does not cross the wire."""
    specs = tuple(TensorSpec(np.asarray(array).dtype.name, np.shape(array)) for array in arrays)
    for index, spec in enumerate(specs):
        _check_spec(index, spec)
    return specs


def encoded_size(specs: Sequence[TensorSpec]) -> int:
    """Bytes of the blob that holds tensors of `specs`. Raises WireError for a dtype that does not cross the wire."""
    for index, spec in enumerate(specs):
        _check_spec(index, spec)
    return _layout(specs, len(_header(specs)))[1]


def encode_chunks(arrays: Sequence[Array], chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes | memoryview]:
    """The blob of `arrays` in pieces of exactly `chunk_bytes` bytes (the last one may be shorter).

    The blob is never joined: a piece that lies within one contiguous little-endian tensor is a view of it, every other
    piece is copied, so at most about two pieces are held at a time, whatever the layout of the arrays. Views show the
    array as it is when they are read: do not change the arrays before the last piece has been used.

    Raises
    ------
    WireError
        At once, before the first piece: a tensor's dtype is not in `ALLOWED_DTYPES`.
    ValueError
        `chunk_bytes` is not positive.
    """
    if chunk_bytes <= 0:
        raise ValueError(f"chunk_bytes: expected a positive number of bytes, found {chunk_bytes}")
    tensors = [np.asarray(array) for array in arrays]
    return _join(_pieces(tensors, specs_of(tensors), chunk_bytes), chunk_bytes)


def decode(
    buffer: bytes | bytearray | memoryview | mmap.mmap,
    expected: Sequence[TensorSpec] | None = None,
    *,
    writable: bool = False,
) -> list[Array]:
    """The tensors of a blob, as views of `buffer` (which they keep alive); nothing is copied.

    With `expected`, number, dtypes and shapes must be exactly those. The views are read-only unless `writable`, which
    needs a writable buffer; TensorFlow can use writable memory without a copy.

    Raises
    ------
    WireError
        The blob is too short or too long, or anything in it is not as the module's text says, or not as `expected`.
        Every size is checked against the length of `buffer` before it is used.
    """
    try:
        view = memoryview(buffer)
        view = view if writable else view.toreadonly()
        view = view.cast("B") if view.nbytes else memoryview(b"")
    except (TypeError, ValueError) as error:
        raise WireError(f"tensor blob: expected contiguous bytes, found a buffer that is not ({error})") from error
    specs, header_bytes = _read_header(view)
    if expected is not None:
        _check_expected(specs, expected)
    offsets, size = _layout(specs, header_bytes)
    if len(view) != size:
        raise WireError(
            f"tensor blob: its header announces {size} bytes, found {len(view)}: it was torn or damaged on its way or "
            "on disk; send or fetch it again"
        )
    tensors: list[Array] = []
    end = _PREFIX.size + header_bytes
    for index, (spec, offset) in enumerate(zip(specs, offsets, strict=True)):
        _check_padding(view, end, offset)
        end = offset + spec.nbytes
        tensors.append(_view_tensor(view, index, spec, offset))
    _check_padding(view, end, size)
    return tensors


def write_tensors(path: Path, arrays: Sequence[Array]) -> Stored:
    """Write `arrays` to `path` so that after a crash there is the old file, or the new one, or none: never a part.

    Raises WireError for a dtype that does not cross the wire and RunFolderError where the file cannot be written.
    """
    chunks = encode_chunks(arrays)
    with BlobWriter(path) as writer:
        for chunk in chunks:
            writer.write(chunk)
        return writer.commit(writer.digest, writer.size)


def read_tensors(
    path: Path,
    expected: Sequence[TensorSpec] | None = None,
    digest: bytes | None = None,
    *,
    writable: bool = False,
) -> list[Array]:
    """The tensors of the file at `path`, as views of the mapped file: pages are read when they are used.

    Replace such a file (as `write_tensors` does), never change it in place: the views would change with it. What is
    written to `writable` views stays in this process.

    Raises
    ------
    WireError
        The file is missing or cannot be read, its SHA-256 is not `digest` (where given), or `decode` refuses it.
    """
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise WireError(f"{path}: expected tensors, found an empty file; restore it or run the round again")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY if writable else mmap.ACCESS_READ)
    except FileNotFoundError as error:
        raise WireError(f"{path}: expected a tensor file, found none; restore it or run the round again") from error
    except (OSError, ValueError) as error:
        raise WireError(f"{path}: the tensor file cannot be read ({error}); check its owner and the disk") from error
    if digest is not None:
        found = hashlib.sha256(mapped).digest()
        if found != digest:
            raise WireError(
                f"{path}: expected SHA-256 {digest.hex()}, found {found.hex()}: the file is torn or was changed; "
                "restore it or run the round again"
            )
    try:
        return decode(mapped, expected, writable=writable)
    except WireError as error:
        raise WireError(f"{path}: {error}") from error


class TensorFile(Sequence[Array]):
    """The tensors of a file, each mapped when it is asked for and let go with the array that is given.

    For readers that take tensor by tensor and must not hold them all. The arrays are writable, as `read_tensors` says.

    Raises
    ------
    WireError
        As `read_tensors`, when it is opened; on access, when the file can no longer be read.
    """

    def __init__(self, path: Path, expected: Sequence[TensorSpec]) -> None:
        read_tensors(path, expected)
        self._path = path
        self._specs = tuple(expected)
        self._offsets, _ = _layout(self._specs, len(_header(self._specs)))

    def __len__(self) -> int:
        return len(self._specs)

    @overload
    def __getitem__(self, index: int) -> Array: ...

    @overload
    def __getitem__(self, index: slice) -> list[Array]: ...

    def __getitem__(self, index: int | slice) -> Array | list[Array]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        spec, offset = self._specs[index], self._offsets[index]
        if spec.nbytes == 0:
            return np.empty(spec.shape, spec.dtype)
        before = offset % mmap.ALLOCATIONGRANULARITY
        try:
            with self._path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), before + spec.nbytes, access=mmap.ACCESS_COPY, offset=offset - before)
        except (OSError, ValueError) as error:
            raise WireError(
                f"{self._path}: the tensor file cannot be read ({error}); check its owner and the disk"
            ) from error
        return _view_tensor(memoryview(mapped), index, spec, before)


class BlobWriter:
    """Receives a blob piece by piece, as it comes from the network, and puts it in place once it is whole.

    The pieces go to a temporary file in the folder of `path`; `commit` verifies, makes it durable and renames it.
    Leaving the context without a commit removes the temporary file and leaves an older file at `path` as it was.
    Hashing and writing release the GIL. Not for use by two threads at once.

    Parameters
    ----------
    path
        Where the blob is to lie. Its folder must exist.
    limit
        The most bytes to accept, so that a peer cannot fill the disk; None accepts any number.

    Raises
    ------
    RunFolderError
        From every method: the folder or disk does not take the file.

    Example
    -------
    >>> with BlobWriter(folder / "update.wrt", limit=encoded_size(specs)) as writer:  # doctest: +SKIP
    ...     for message in stream:
    ...         writer.write(message.chunk)
    ...     stored = writer.commit(digest, size)
    """

    def __init__(self, path: Path, *, limit: int | None = None) -> None:
        self._path = path
        self._limit = limit
        self._hash = hashlib.sha256()
        self._size = 0
        self._committed = False
        try:
            descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL_SUFFIX)
        except OSError as error:
            raise cannot_write(path, error) from error
        self._temporary = Path(name)
        self._file = os.fdopen(descriptor, "wb")

    @property
    def digest(self) -> bytes:
        """SHA-256 of what was written so far, 32 bytes."""
        return self._hash.digest()

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._size

    def write(self, chunk: bytes | bytearray | memoryview) -> None:
        """Append a piece of any length. Raises WireError when the pieces exceed the writer's limit."""
        self._size += memoryview(chunk).nbytes
        if self._limit is not None and self._size > self._limit:
            raise WireError(f"{self._path.name}: expected at most {self._limit} bytes, received more; it was not kept")
        self._hash.update(chunk)
        try:
            self._file.write(chunk)
        except OSError as error:
            raise cannot_write(self._path, error) from error

    def commit(self, expected_digest: bytes, expected_size: int) -> Stored:
        """Put the blob in place, durable, if it has that SHA-256 digest and size; else raise WireError."""
        if self._size != expected_size:
            raise WireError(
                f"{self._path.name}: expected {expected_size} bytes, received {self._size}: it was torn on its way; "
                "send it again"
            )
        found = self._hash.digest()
        if found != expected_digest:
            raise WireError(
                f"{self._path.name}: expected SHA-256 {expected_digest.hex()}, received {found.hex()}: it was damaged "
                "on its way; send it again"
            )
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            hit("blob.before_rename")
            self._temporary.replace(self._path)
            self._committed = True
            hit("blob.renamed")
            sync_folder(self._path.parent)
        except OSError as error:
            raise cannot_write(self._path, error) from error
        return Stored(self._path, found, self._size)

    def __enter__(self) -> BlobWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._committed:
            return
        try:
            self._file.close()
        except OSError:
            pass  # what could not be written is thrown away just below
        finally:
            self._temporary.unlink(missing_ok=True)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _header(specs: Sequence[TensorSpec]) -> bytes:
    return json.dumps([[spec.dtype, list(spec.shape)] for spec in specs], separators=(",", ":")).encode()


def _layout(specs: Sequence[TensorSpec], header_bytes: int) -> tuple[list[int], int]:
    """Offset of every tensor, and the size of the blob (no padding after the last tensor's values)."""
    size = _aligned(_PREFIX.size + header_bytes)
    offsets = []
    for spec in specs:
        offsets.append(_aligned(size))
        size = offsets[-1] + spec.nbytes
    return offsets, size


def _check_spec(index: int, spec: TensorSpec) -> None:
    if spec.dtype not in ALLOWED_DTYPES:
        raise WireError(
            f"tensor {index}: expected a dtype among {', '.join(sorted(ALLOWED_DTYPES))}, found {spec.dtype!r}; "
            "convert it before sending"
        )
    if len(spec.shape) > _MAX_RANK:
        raise WireError(f"tensor {index}: expected at most {_MAX_RANK} axes, found {len(spec.shape)}")
    if any(length < 0 for length in spec.shape):
        raise WireError(f"tensor {index}: expected lengths of axes of 0 or more, found shape {spec.shape}")
    nbytes = np.dtype(spec.dtype).itemsize
    for length in spec.shape:
        nbytes *= max(length, 1)
        if nbytes > _MAX_TENSOR_BYTES:
            raise WireError(f"tensor {index}: expected at most 2^62 bytes, found a shape that needs more")


def _pieces(tensors: Sequence[Array], specs: Sequence[TensorSpec], chunk_bytes: int) -> Iterator[bytes | memoryview]:
    """The blob in pieces of any length, each no longer than a chunk or a view of a tensor."""
    header = _header(specs)
    if len(header) > MAX_HEADER_BYTES:
        raise WireError(f"tensor blob: expected a header of at most {MAX_HEADER_BYTES} bytes, found {len(header)}")
    offsets, _ = _layout(specs, len(header))
    prefix = _PREFIX.pack(MAGIC, len(header)) + header
    yield prefix.ljust(_aligned(len(prefix)), b"\0")
    position = _aligned(len(prefix))
    for tensor, spec, offset in zip(tensors, specs, offsets, strict=True):
        yield bytes(offset - position)
        position = offset + spec.nbytes
        little_endian = tensor.dtype.newbyteorder("<")
        if tensor.size == 0:
            continue
        if tensor.flags.c_contiguous and tensor.dtype == little_endian:
            yield tensor.reshape(-1).view(np.uint8).data
        else:
            # Buffered iteration converts a chunk at a time, where one conversion of the whole would hold a second copy.
            blocks = np.nditer(
                tensor,
                flags=["external_loop", "buffered", "zerosize_ok"],
                op_dtypes=[little_endian],
                order="C",
                casting="equiv",
                buffersize=max(1, chunk_bytes // tensor.itemsize),
            )
            for block in blocks:
                yield np.asarray(block).tobytes()


def _join(pieces: Iterator[bytes | memoryview], chunk_bytes: int) -> Iterator[bytes | memoryview]:
    """The same bytes cut at every multiple of `chunk_bytes`; copies only where a chunk spans several pieces."""
    pending = bytearray()
    for piece in pieces:
        view = memoryview(piece)
        start = 0
        if pending:
            start = min(chunk_bytes - len(pending), len(view))
            pending += view[:start]
            if len(pending) == chunk_bytes:
                yield bytes(pending)
                pending.clear()
        if not pending:
            while len(view) - start >= chunk_bytes:
                yield view[start : start + chunk_bytes]
                start += chunk_bytes
            pending += view[start:]
    if pending:
        yield bytes(pending)


def _read_header(view: memoryview) -> tuple[tuple[TensorSpec, ...], int]:
    """The checked specs, and the length of the header in bytes."""
    if len(view) < _PREFIX.size:
        raise WireError(
            f"tensor blob: expected at least {_PREFIX.size} bytes, found {len(view)}; send or fetch it again"
        )
    magic, length = _PREFIX.unpack_from(view)
    if magic != MAGIC:
        raise WireError(
            f"tensor blob: expected it to begin with {MAGIC!r}, found {magic!r}: these are not Wardround's tensors"
        )
    available = min(len(view) - _PREFIX.size, MAX_HEADER_BYTES)
    if length > available:
        raise WireError(f"tensor blob: expected a header of at most {available} bytes, found {length} announced")
    raw = bytes(view[_PREFIX.size : _PREFIX.size + length])
    try:
        entries = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise WireError(f"tensor blob: expected a JSON header, found {raw[:40]!r} ({type(error).__name__})") from error
    if not isinstance(entries, list):
        raise WireError(f"tensor blob: expected a header that is a list, found {raw[:40]!r}")
    specs = tuple(_parse_spec(index, entry) for index, entry in enumerate(entries))
    if _header(specs) != raw:
        raise WireError(
            f"tensor blob: expected the header {_header(specs)[:40]!r}, found {raw[:40]!r}, written otherwise"
        )
    return specs, length


def _parse_spec(index: int, entry: object) -> TensorSpec:
    match entry:
        # `type(...) is int`: true and false are integers to isinstance.
        case [str(dtype), list(shape)] if all(type(length) is int for length in shape):
            spec = TensorSpec(dtype, tuple(shape))
        case _:
            raise WireError(f"tensor {index}: expected [dtype, shape] in the header, found {ascii(entry)[:80]}")
    _check_spec(index, spec)
    return spec


def _check_expected(specs: Sequence[TensorSpec], expected: Sequence[TensorSpec]) -> None:
    for index, (found, wanted) in enumerate(zip(specs, expected, strict=False)):
        if found != wanted:
            raise WireError(f"tensor {index}: expected {wanted}, found {found}; both sides must run the same study")
    if len(specs) != len(expected):
        raise WireError(
            f"tensor blob: expected {len(expected)} tensors, found {len(specs)}; both sides must run the same study"
        )


def _check_padding(view: memoryview, start: int, stop: int) -> None:
    if any(view[start:stop]):
        raise WireError(f"tensor blob: expected zeros at bytes {start} to {stop}, found others; send or fetch it again")


def _view_tensor(view: memoryview, index: int, spec: TensorSpec, offset: int) -> Array:
    # Same bytes on a big-endian machine; there NumPy converts when it computes.
    dtype = np.dtype(spec.dtype).newbyteorder("<")
    if spec.nbytes == 0:
        empty: Array = np.empty(spec.shape, dtype)
        empty.flags.writeable = False
        return empty
    values = view[offset : offset + spec.nbytes]
    if spec.dtype == "bool" and np.frombuffer(values, np.uint8).max() > 1:
        raise WireError(f"tensor {index}: expected booleans of 0 or 1, found another value; send or fetch it again")
    return np.frombuffer(values, dtype).reshape(spec.shape)
