"""The tensor format: every list of tensors comes back bit for bit, and nothing else is taken for one."""

import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common.errors import RunFolderError, WireError
from common.wire.tensors import (
    ALLOWED_DTYPES,
    BlobWriter,
    Stored,
    TensorFile,
    TensorSpec,
    decode,
    encode_chunks,
    encoded_size,
    read_tensors,
    specs_of,
    write_tensors,
)

DTYPES = st.sampled_from(sorted(ALLOWED_DTYPES)).flatmap(
    lambda name: st.sampled_from([np.dtype(name), np.dtype(name).newbyteorder(">")])
)


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    """Arrays of any dtype and shape, as they lie in memory or seen through a transpose, a step or a flip."""
    dtype = draw(DTYPES)
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=7))
    size = int(np.prod(shape, dtype=int))
    raw = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).bytes(size * dtype.itemsize)
    if dtype.kind == "b":
        raw = bytes(byte & 1 for byte in raw)
    array = np.frombuffer(raw, dtype).reshape(shape) if size else np.empty(shape, dtype)
    if array.ndim == 0:
        return array
    return draw(st.sampled_from([array, array.T, array[::2], array[::-1], np.asfortranarray(array), array[..., 1:]]))


def blob_of(tensors: list[np.ndarray]) -> bytes:
    return b"".join(encode_chunks(tensors))


def blob_with_header(header: bytes, data: bytes = b"") -> bytes:
    prefix = b"WRT1" + struct.pack("<I", len(header)) + header
    return prefix.ljust(-(-len(prefix) // 64) * 64, b"\0") + data


SAMPLE = [
    np.arange(6, dtype=np.float32).reshape(2, 3),
    np.array(7, np.int64),
    np.zeros((0, 4), np.uint8),
    np.array([True, False, True]),
]


@settings(max_examples=200)
@given(st.lists(arrays(), max_size=5), st.integers(1, 700))
def test_any_tensors_come_back_bit_for_bit(tensors: list[np.ndarray], chunk_bytes: int) -> None:
    chunks = [bytes(chunk) for chunk in encode_chunks(tensors, chunk_bytes)]
    blob = b"".join(chunks)
    assert all(len(chunk) == chunk_bytes for chunk in chunks[:-1])
    assert 0 < len(chunks[-1]) <= chunk_bytes
    assert len(blob) == encoded_size(specs_of(tensors))
    decoded = decode(blob, specs_of(tensors))
    assert len(decoded) == len(tensors)
    for before, after in zip(tensors, decoded, strict=True):
        assert after.shape == before.shape
        assert after.dtype == before.dtype.newbyteorder("<")
        assert not after.flags.writeable
        # Bytes, not values: NaNs and negative zeros count.
        assert after.tobytes() == before.astype(before.dtype.newbyteorder("<")).tobytes()
    assert blob_of(decoded) == blob


def test_blob_is_laid_out_as_documented() -> None:
    blob = blob_of([np.array([1.0, -2.0], np.float32), np.array(3, np.int16)])
    header = b'[["float32",[2]],["int16",[]]]'  # 30 bytes: the prefix ends at 38, the data begins at 64
    expected = b"WRT1" + b"\x1e\0\0\0" + header + bytes(26)
    expected += b"\0\0\x80\x3f\0\0\0\xc0" + bytes(56)  # 1.0 and -2.0, then zeros up to 128
    expected += b"\x03\0"
    assert blob == expected


def test_decoded_tensors_alias_the_buffer_and_are_aligned() -> None:
    blob = np.frombuffer(bytearray(blob_of(SAMPLE)), np.uint8)
    for tensor in decode(memoryview(blob)):
        if tensor.size:
            assert np.shares_memory(tensor, blob)
            offset = tensor.__array_interface__["data"][0] - blob.__array_interface__["data"][0]
            assert offset % 64 == 0


def test_chunks_within_a_tensor_are_views_of_it() -> None:
    tensor = np.zeros(10_000, np.float32)
    chunks = list(encode_chunks([tensor], 1024))
    views = [chunk for chunk in chunks if isinstance(chunk, memoryview)]
    assert len(views) == 39 - 1  # 40,064 bytes are 39 whole chunks and a rest; the first holds the header too
    assert all(np.shares_memory(np.frombuffer(view, np.uint8), tensor) for view in views)


@pytest.mark.parametrize("order", ["contiguous", "transposed", "big-endian"])
def test_encoding_holds_no_second_copy_of_a_large_tensor(order: str) -> None:
    import tracemalloc

    tensor = np.zeros((2048, 2048), ">f4" if order == "big-endian" else "<f4")  # 16 MiB
    tensor = tensor.T[::2] if order == "transposed" else tensor
    tracemalloc.start()
    for _ in encode_chunks([tensor], 256 * 1024):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 256 * 1024


@pytest.mark.parametrize(
    "tensor", [np.array(["a"]), np.array([1j]), np.array([None]), np.zeros(1, "M8[s]"), np.zeros(1, "i4,f4")]
)
def test_other_dtypes_are_refused_before_anything_is_sent(tensor: np.ndarray) -> None:
    with pytest.raises(WireError, match=r"tensor 1: expected a dtype among bool, .* found"):
        encode_chunks([np.zeros(1), tensor])


def test_blob_cut_at_any_byte_is_refused() -> None:
    blob = blob_of(SAMPLE)
    for length in range(len(blob)):
        with pytest.raises(WireError):
            decode(blob[:length])
    with pytest.raises(WireError, match=f"announces {len(blob)} bytes, found {len(blob) + 1}"):
        decode(blob + b"\0")


def test_every_flipped_bit_of_header_and_padding_is_refused() -> None:
    blob = blob_of(SAMPLE)
    data = set()
    for tensor in decode(blob):
        if tensor.size:
            start = tensor.__array_interface__["data"][0] - np.frombuffer(blob, np.uint8).__array_interface__["data"][0]
            data |= set(range(start, start + tensor.nbytes))
    for position in set(range(len(blob))) - data:
        for bit in range(8):
            flipped = bytearray(blob)
            flipped[position] ^= 1 << bit
            with pytest.raises(WireError):
                decode(flipped, specs_of(SAMPLE))


@settings(max_examples=300)
@given(st.data())
def test_damaged_blobs_raise_nothing_but_wire_errors(data: st.DataObject) -> None:
    blob = bytearray(blob_of(SAMPLE))
    for _ in range(data.draw(st.integers(1, 4))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    try:
        decoded = decode(blob)
    except WireError:
        return
    assert blob_of(decoded) == blob  # values were changed, or nothing: it is a blob


@settings(max_examples=300)
@given(st.binary(max_size=300), st.booleans())
def test_random_bytes_are_refused(noise: bytes, with_header: bool) -> None:
    with pytest.raises(WireError):
        decode(blob_with_header(noise[:100], noise[100:]) if with_header else noise)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["float32", "int8", ""]),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=3), children, max_size=2),
    max_leaves=12,
)


@settings(max_examples=300)
@given(json_values, st.binary(max_size=64))
def test_any_json_header_is_a_blob_or_a_wire_error(value: object, data: bytes) -> None:
    blob = blob_with_header(json.dumps(value, separators=(",", ":")).encode(), data)
    try:
        decoded = decode(blob)
    except WireError:
        return
    assert blob_of(decoded) == blob


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b'[["float32",[-1]]]', "0 or more"),
        (b'[["float32",[0,-1]]]', "0 or more"),
        (b'[["float32",[4611686018427387904,4]]]', "2^62 bytes"),
        (b'[["float32",[0,99999999999999999999999]]]', "2^62 bytes"),
        (b'[["float32",[1099511627776]]]', "announces 4398046511168 bytes"),
        (b'[["float32",' + json.dumps([1] * 33).encode() + b"]]", "at most 32 axes"),
        (b'[["float32",[' + b"9" * 5000 + b"]]]", "expected a JSON header"),
        (b'[["float32",[true]]]', r"expected [dtype, shape]"),
        (b'[["float32",[1.0]]]', r"expected [dtype, shape]"),
        (b'[["object",[1]]]', "expected a dtype among"),
        (b'[["bfloat16",[1]]]', "expected a dtype among"),
        (b'[["float32", [1]]]', "written otherwise"),
        (b'{"float32":[1]}', "a header that is a list"),
        (b"[" * 100_000, "expected a JSON header"),
        (b"\xff\xfe", "expected a JSON header"),
        (b"", "expected a JSON header"),
    ],
)
def test_malformed_headers_say_what_was_expected(header: bytes, message: str) -> None:
    with pytest.raises(WireError) as refusal:
        decode(blob_with_header(header, bytes(4)))
    assert message in str(refusal.value)


def test_announced_header_length_is_not_trusted() -> None:
    with pytest.raises(WireError, match="found 4294967295 announced"):
        decode(b"WRT1" + b"\xff\xff\xff\xff" + b"[]")


def test_booleans_other_than_zero_and_one_are_refused() -> None:
    blob = bytearray(blob_of([np.array([True, False])]))
    blob[-1] = 2
    with pytest.raises(WireError, match="tensor 0: expected booleans of 0 or 1"):
        decode(blob)


def test_mismatch_with_the_plan_names_the_tensor_and_both_types() -> None:
    expected = list(specs_of(SAMPLE))
    expected[1] = TensorSpec("int32", (5,))
    with pytest.raises(WireError, match=r"tensor 1: expected int32\[5\], found int64\[\]"):
        decode(blob_of(SAMPLE), expected)
    with pytest.raises(WireError, match="expected 3 tensors, found 4"):
        decode(blob_of(SAMPLE), specs_of(SAMPLE)[:3])


def test_file_holds_the_blob_and_is_read_back_without_copying(tmp_path: Path) -> None:
    stored = write_tensors(tmp_path / "update.wrt", SAMPLE)
    blob = blob_of(SAMPLE)
    assert (tmp_path / "update.wrt").read_bytes() == blob
    assert stored == Stored(tmp_path / "update.wrt", hashlib.sha256(blob).digest(), len(blob))
    tensors = read_tensors(stored.path, specs_of(SAMPLE), stored.digest)
    stored.path.unlink()  # the mapping lives as long as the tensors do
    for before, after in zip(SAMPLE, tensors, strict=True):
        np.testing.assert_array_equal(before, after)
        assert not after.flags.writeable


def test_missing_torn_and_changed_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "update.wrt"
    with pytest.raises(WireError, match=r"update\.wrt: expected a tensor file, found none"):
        read_tensors(path)
    stored = write_tensors(path, SAMPLE)
    blob = path.read_bytes()
    for torn in (b"", blob[:-1], blob + b"\0"):
        path.write_bytes(torn)
        with pytest.raises(WireError, match=r"update\.wrt"):
            read_tensors(path)
    flipped = bytearray(blob)
    flipped[128] ^= 1  # a value: only the digest can tell
    path.write_bytes(flipped)
    read_tensors(path)
    with pytest.raises(WireError, match=f"expected SHA-256 {stored.digest.hex()}, found"):
        read_tensors(path, digest=stored.digest)
    with pytest.raises(WireError, match="cannot be read"):
        read_tensors(tmp_path)


def test_received_blob_is_put_in_place_whole(tmp_path: Path) -> None:
    blob = blob_of(SAMPLE)
    with BlobWriter(tmp_path / "update.wrt") as writer:
        for chunk in encode_chunks(SAMPLE, 50):
            writer.write(chunk)
        assert not (tmp_path / "update.wrt").exists()
        stored = writer.commit(hashlib.sha256(blob).digest(), len(blob))
    assert [path.name for path in tmp_path.iterdir()] == ["update.wrt"]
    assert stored.path.read_bytes() == blob


@pytest.mark.parametrize("failure", ["digest", "size", "limit", "abandoned", "exception"])
def test_failed_reception_leaves_the_folder_as_it_was(tmp_path: Path, failure: str) -> None:
    old = write_tensors(tmp_path / "update.wrt", [np.zeros(3)])
    before = old.path.read_bytes()
    blob = blob_of(SAMPLE)
    digest = hashlib.sha256(blob).digest()
    error = {"abandoned": None, "exception": KeyError}.get(failure, WireError)

    def receive() -> None:
        with BlobWriter(old.path, limit=len(blob) - 1 if failure == "limit" else None) as writer:
            writer.write(blob)
            if failure == "exception":
                raise KeyError
            if failure != "abandoned":
                writer.commit(bytes(32) if failure == "digest" else digest, len(blob) + (failure == "size"))

    if error is None:
        receive()
    else:
        with pytest.raises(error):
            receive()
    assert [path.name for path in tmp_path.iterdir()] == ["update.wrt"]
    assert old.path.read_bytes() == before


def test_folder_that_does_not_exist_is_an_error_for_the_user(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="cannot be written"):
        write_tensors(tmp_path / "none" / "update.wrt", SAMPLE)


def test_full_disk_is_an_error_for_the_user(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="No space left"), BlobWriter(tmp_path / "update.wrt") as writer:
        writer._file.close()
        writer._file = Path("/dev/full").open("wb")  # noqa: SIM115  accepts nothing, as a full disk does
        writer.write(bytes(1_000_000))
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_file_gives_each_tensor_when_it_is_asked_for(tmp_path: Path) -> None:
    tensors = [np.arange(5000, dtype=np.float32).reshape(50, 100), np.array(7, np.int32), np.empty((0, 3))]
    path = tmp_path / "update"
    write_tensors(path, tensors)
    file = TensorFile(path, specs_of(tensors))
    assert len(file) == 3
    for index, array in enumerate(tensors):
        found = file[index]
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)
    np.testing.assert_array_equal(file[-1:][0], tensors[-1])
    file[0][:] = 0  # stays with the reader, not in the file
    np.testing.assert_array_equal(file[0], tensors[0])
    path.unlink()
    with pytest.raises(WireError, match="cannot be read"):
        file[0]
    with pytest.raises(WireError, match="found none"):
        TensorFile(path, specs_of(tensors))
