"""A blob that arrives in pieces, with breaks, restarts and damage in between."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import RunFolderError, WireError
from common.wire.partial import PartialBlob

CONTENT = bytes(range(256)) * 40
DIGEST = hashlib.sha256(CONTENT).digest()


def _open(folder: Path, content: bytes = CONTENT) -> PartialBlob:
    return PartialBlob(folder / "blob.upload", hashlib.sha256(content).digest(), len(content))


@given(content=st.binary(max_size=500), breaks=st.lists(st.integers(1, 60), max_size=12), data=st.data())
def test_whatever_breaks_the_blob_ends_as_it_was_sent_and_no_byte_is_asked_for_twice(
    content: bytes, breaks: list[int], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, sent = Path(name), 0
        for size in [*breaks, len(content)]:  # of what comes before each break, cut into pieces
            with _open(folder, content) as blob:
                assert blob.position == sent
                end = min(len(content), sent + size)
                while sent < end:
                    piece = content[sent : sent + data.draw(st.integers(1, end - sent))]
                    blob.write(piece)
                    sent += len(piece)
                assert blob.position == sent
                assert blob.whole == (sent == len(content))
        with _open(folder, content) as blob:
            stored = blob.commit(folder / "blob.tensors")
        assert stored.path.read_bytes() == content
        assert (stored.digest, stored.size) == (hashlib.sha256(content).digest(), len(content))
        assert [path.name for path in folder.iterdir()] == ["blob.tensors"]


@given(kept=st.integers(1, len(CONTENT)), place=st.integers(0, len(CONTENT) - 1), bit=st.integers(0, 7))
def test_a_changed_bit_is_found_at_the_end_and_the_file_dropped(kept: int, place: int, bit: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with _open(folder) as blob:
            blob.write(CONTENT[:kept])
        before = bytearray(CONTENT[:kept])
        before[place % kept] ^= 1 << bit
        (folder / "blob.upload").write_bytes(before)
        with _open(folder) as blob:
            blob.write(CONTENT[blob.position :])
            with pytest.raises(WireError, match="damaged"):
                blob.commit(folder / "blob.tensors")
        assert list(folder.iterdir()) == []
        with _open(folder) as blob:
            assert blob.position == 0


def test_what_is_not_whole_is_kept(tmp_path: Path) -> None:
    with _open(tmp_path) as blob:
        blob.write(CONTENT[:100])
        with pytest.raises(WireError, match="received 100"):
            blob.commit(tmp_path / "blob.tensors")
    with _open(tmp_path) as blob:
        assert blob.position == 100


def test_more_bytes_than_announced_are_not_taken(tmp_path: Path) -> None:
    with _open(tmp_path) as blob, pytest.raises(WireError, match="received more"):
        blob.write(CONTENT + b"x")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_longer_than_the_blob_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "blob.upload").write_bytes(CONTENT * 2)
    with _open(tmp_path) as blob:
        assert blob.position == 0


def test_a_folder_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"blob\.upload: cannot be written"):
        _open(tmp_path / "none")
    with _open(tmp_path) as blob:
        blob.write(CONTENT)
        with pytest.raises(RunFolderError, match="cannot be written"):
            blob.commit(tmp_path / "none" / "blob.tensors")
