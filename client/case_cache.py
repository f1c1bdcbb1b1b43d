"""A site's prepared cases on disk: a case is read, resampled and normalized once, not in every round.

An entry is one file: a tensor blob (`common.wire.tensors`: the grid as JSON, the image, the label) and a trailer with
the entry's key and the SHA-256 of all before it. Of the formats compared (`benchmarks/case_cache.py`: TFRecord, .npy,
.npz, zstd, this blob) the blob was chosen because it is mapped, so that a patch of a large volume is read without the
rest (which of the others .npy alone can), and because one file, which appears at once, holds image, label and grid.

What is in the folder may be lost at any moment and is then made again, so nothing here raises for the disk's sake: what
is torn, altered or another entry's is removed and made anew, and where the folder takes no more files the site goes on
without, after one warning.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import gc
import hashlib
import json
import logging
import mmap
import os
import re
import stat
import struct
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from client.case_layout import Layout
from common.errors import DataError, RunFolderError, WireError
from common.imaging.preprocessing import Prepared
from common.study import Study
from common.version import VERSION
from common.wire.tensors import PARTIAL_SUFFIX, Array, BlobWriter, decode, encode_chunks, encoded_size, specs_of

CACHE_FORMAT: Final = 1
"""Raise it when the same sources and settings come to mean another prepared case, or another file."""

_MAGIC: Final = b"WRCC"
_TRAILER: Final = struct.Struct("<4sIQ32s32s")  # magic, CACHE_FORMAT, bytes of the blob, key, digest of all before
_DIGEST_BYTES: Final = 32
_CHUNK_BYTES: Final = 2**20
_SUFFIX: Final = ".case"
_ENTRY: Final = re.compile(rf"[0-9a-f]{{64}}{re.escape(_SUFFIX)}")
_PARTIAL: Final = re.compile(rf"\.[0-9a-f]{{64}}{re.escape(_SUFFIX)}\..*{re.escape(PARTIAL_SUFFIX)}")
_LOCK: Final = "lock"
_OPEN_TO_OTHERS: Final = 0o077
_TURNS: Final = 64
_log = logging.getLogger("wardround.site")


def case_key(
    digests: Mapping[str, str],
    study: Study,
    *,
    label_map: Mapping[int, int] | None = None,
    level: int = 0,
) -> str:
    """What an entry is found by: SHA-256 of all that decides a prepared case, 64 hexadecimal digits.

    The study's task and preprocessing, and whether its head is distance, are part of it; its patch size is not, because
    patches are cut from prepared cases. The version of Wardround is, because another one may prepare otherwise.

    Parameters
    ----------
    digests : the content digests of the case's sources by what they are, as `CaseFacts.digests` has them.
    label_map : the site's label values to the study's; None, which is not an empty map, where they are the same.
    level : of the sources' pyramids, at which they are read.
    """
    settings = json.loads(study.canonical())
    del settings["preprocessing"]["patch"]
    content = {
        "format": CACHE_FORMAT,
        "version": VERSION,
        "sources": sorted(digests.items()),
        "task": settings["task"],
        "preprocessing": settings["preprocessing"],
        "distance": study.model.head == "distance",
        "label_map": None if label_map is None else sorted(label_map.items()),
        "level": level,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class CaseCache:
    """Prepared cases in a folder, those last used up to a number of bytes.

    May be used by several threads, and the folder by several processes (on one machine, or over a file system that
    locks files across machines).

    Parameters
    ----------
    folder : of the cache alone; made where it is missing, and closed to other users, because pixels lie in it.
    limit_bytes : how much the entries may take; 0 keeps none. Each process keeps to it whenever it adds an entry, so
        that processes that add entries in the same moment exceed it by these, until the next one is added.

    What is checked when an entry is used: always its size and its trailer (whose it is, of which format); the digest of
    the whole when this object uses it first, and again when the file is no longer the one that was checked. Last used
    is the file's access time, which is set explicitly, so mounting with `noatime` changes nothing.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder = folder
        self._limit = limit_bytes
        self._verified: dict[str, _Checked] = {}
        self._turns = [threading.Lock() for _ in range(_TURNS)]
        self._storing = limit_bytes > 0
        self._warned = False
        if not self._storing:
            with contextlib.suppress(OSError):
                self._remove_others(())
            return
        try:
            _make_private(folder)
            self._remove_leftovers()
            self._make_room(0)
        except OSError as error:
            self._store_no_more(error)

    def get(self, key: str, prepare: Callable[[], Prepared]) -> Prepared:
        """The prepared case of a key, from the folder or else from `prepare`, whose errors pass through.

        The arrays are read-only and may be views of a mapped file, of which only the pages in use are read; they stay
        valid when the entry is removed. Threads that ask for one key at once have it prepared once; processes may
        prepare it each.

        Raises
        ------
        ValueError : `key` is not one of `case_key`.
        """
        if not _ENTRY.fullmatch(key + _SUFFIX):
            raise ValueError(f"expected a key of 64 hexadecimal digits, found {key!r}")
        if self._limit <= 0:
            return _read_only(prepare())
        found = self._load(key)
        if found is not None:
            return found
        with self._turns[int(key[:8], 16) % _TURNS]:
            found = self._load(key)
            if found is not None:
                return found
            prepared = prepare()
            if self._storing:
                self._store(key, prepared)
        return _read_only(prepared)

    def keep_only(self, keys: Collection[str]) -> None:
        """Removes all other entries: the images of a case that was withdrawn, or prepared otherwise, do not stay.

        Raises
        ------
        DataError : the system does not let an entry be removed.
        """
        try:
            self._remove_others(keys)
        except OSError as error:
            raise DataError(
                f"{self._folder}: old entries of the cache of prepared cases cannot be removed ({error.strerror}); "
                "they hold images: check the folder's owner, or remove it"
            ) from error

    def make_room(self) -> int:
        """Removes all entries, as the disk is full and something needs it that cannot be made again.

        From here on the cache takes half of what it held, so that it does not fill the disk again.

        Returns
        -------
        How many bytes the entries had; 0 where there were none, or they cannot be removed.
        """
        try:
            held = sum(entry.size for entry in self._entries() if not entry.partial)
            self._remove_others(())
        except OSError:
            return 0
        if held:
            gc.collect()  # the system frees a mapped file when nobody reads it any more
            self._limit = min(self._limit, held // 2)
            _log.warning(
                "%s: the disk is full: the cache of prepared cases was emptied (%.3f GB), and takes half of that from "
                "here on. Cases are prepared again; free space, or start the site with a smaller --cache-gb",
                self._folder,
                held / 1e9,
            )
        return held

    # Reading. ----------------------------------------------------------------------------------------------------

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}{_SUFFIX}"

    def _load(self, key: str) -> Prepared | None:
        """The entry, or None where there is none that is whole; what is not whole is removed."""
        path = self._path(key)
        try:
            with path.open("rb", buffering=0) as file:
                return self._read(file, key)
        except FileNotFoundError:
            return None
        except (OSError, WireError, ValueError) as error:
            _log.info("%s: a prepared case is damaged and is made again (%s)", self._folder, error)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self._store_no_more(error)
        return None

    def _read(self, file: FileIO, key: str) -> Prepared:
        """Raises ValueError or WireError where the file is not the whole entry of `key`, OSError for the disk."""
        status = os.fstat(file.fileno())
        _touch(file.fileno(), status)
        blob_bytes = status.st_size - _TRAILER.size
        if blob_bytes <= 0 or not stat.S_ISREG(status.st_mode):
            raise ValueError(f"expected a file of more than {_TRAILER.size} bytes, found {status.st_size}")
        trailer = os.pread(file.fileno(), _TRAILER.size, blob_bytes)
        head = _trailer_head(blob_bytes, key)
        if trailer[:-_DIGEST_BYTES] != head:
            raise ValueError("its end is torn, of another format or of another case")
        identity = _Identity.of(status)
        checked = self._verified.get(key)
        if checked is None or checked.identity != identity:
            # Read, not mapped: a sector that the disk cannot read is then an error, where a mapped page kills.
            if _digest_of(file, blob_bytes, head) != trailer[-_DIGEST_BYTES:]:
                raise ValueError("its digest is not that of its content")
            checked = None
        mapped = mmap.mmap(file.fileno(), status.st_size, access=mmap.ACCESS_READ)
        if checked is None:
            description, *arrays = decode(memoryview(mapped)[:blob_bytes])
            prepared = Prepared.from_parts(arrays, json.loads(description.tobytes()))
            checked = self._verified[key] = _Checked(identity, Layout.of(prepared, mapped))
        return checked.layout.read(mapped)

    # Writing. ----------------------------------------------------------------------------------------------------

    def _store(self, key: str, prepared: Prepared) -> None:
        parts, description = prepared.to_parts()
        arrays: list[Array] = [np.frombuffer(json.dumps(description).encode(), np.uint8), *parts]
        blob_bytes = encoded_size(specs_of(arrays))
        size = blob_bytes + _TRAILER.size
        if size > self._limit:
            self._warn(f"a prepared case takes {size} bytes, more than the cache may hold ({self._limit}); raise it")
            return
        try:
            # Whoever removes leftovers has it alone for a moment; a second without it, and there is no entry for once.
            with self._lock(fcntl.LOCK_SH, tries=100) as held:
                if not held:
                    return
                self._make_room(size)
                self._write(key, arrays, blob_bytes)
                self._make_room(0)  # other processes may have added entries meanwhile
        except (OSError, RunFolderError) as error:
            self._store_no_more(error)

    def _write(self, key: str, arrays: Sequence[Array], blob_bytes: int) -> None:
        with BlobWriter(self._path(key)) as writer:
            for chunk in encode_chunks(arrays, _CHUNK_BYTES):
                writer.write(chunk)
            head = _trailer_head(blob_bytes, key)
            writer.write(head)
            writer.write(writer.digest)
            stored = writer.commit(writer.digest, writer.size)
        # The system's own times are milliseconds coarse: files written in a row would have no order.
        with contextlib.suppress(FileNotFoundError):  # another process may have removed it for room already
            _touch(stored.path, stored.path.stat())

    def _make_room(self, wanted: int) -> None:
        """Removes the entries used longest ago until `wanted` bytes more are within the limit.

        What others are writing counts. The folder is listed every time, as other processes add to it: 3 us an entry.
        """
        found = sorted(self._entries(), key=lambda entry: entry.used)
        total = wanted + sum(entry.size for entry in found)
        for entry in found:
            if total <= self._limit:
                return
            if entry.partial:
                continue
            entry.path.unlink(missing_ok=True)
            self._verified.pop(entry.path.name.removesuffix(_SUFFIX), None)
            total -= entry.size

    def _remove_others(self, keys: Collection[str]) -> None:
        with contextlib.suppress(FileNotFoundError):
            for entry in self._entries():
                key = entry.path.name.removesuffix(_SUFFIX)
                if not entry.partial and key not in keys:
                    entry.path.unlink(missing_ok=True)
                    self._verified.pop(key, None)

    def _entries(self) -> Iterator[_Entry]:
        """The cache's files, also those that are still being written; nothing else in the folder."""
        with os.scandir(self._folder) as found:
            for item in found:
                partial = _PARTIAL.fullmatch(item.name) is not None
                if partial or _ENTRY.fullmatch(item.name):
                    with contextlib.suppress(FileNotFoundError):  # another process has just removed it
                        status = item.stat(follow_symlinks=False)
                        yield _Entry(status.st_atime_ns, status.st_size, partial, Path(item.path))

    # Between processes. ------------------------------------------------------------------------------------------

    def _remove_leftovers(self) -> None:
        """Removes the partial files of killed writers; only while nobody writes."""
        with self._lock(fcntl.LOCK_EX) as held:
            if held:
                for entry in self._entries():
                    if entry.partial:
                        entry.path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _lock(self, kind: int, tries: int = 1) -> Iterator[bool]:
        """The lock that writers share, so that whoever has it alone knows that no file is being written.

        The system lets go of it when a process dies. Yields whether it was had: nobody waits for a process that may
        have been stopped.
        """
        descriptor = os.open(self._folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            yield any(_try_lock(descriptor, kind, 0.01 if turn else 0.0) for turn in range(tries))
        finally:
            os.close(descriptor)

    # Doing without. ----------------------------------------------------------------------------------------------

    def _store_no_more(self, error: Exception) -> None:
        self._storing = False
        self._warn(
            f"cannot be used ({error.__cause__ or error}); check its owner and free space, then start the site again"
        )

    def _warn(self, problem: str) -> None:
        if not self._warned:
            self._warned = True
            _log.warning(
                "%s: the cache of prepared cases: %s. Training goes on, slower: cases are prepared in every round",
                self._folder,
                problem,
            )


class _Identity(NamedTuple):
    """Which file this is, and whether it is still the one that was checked: what writing to it changes."""

    device: int
    inode: int
    size: int
    changed: int

    @staticmethod
    def of(status: os.stat_result) -> _Identity:
        return _Identity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class _Checked(NamedTuple):
    identity: _Identity
    layout: Layout


class _Entry(NamedTuple):
    used: int  # nanoseconds
    size: int
    partial: bool
    path: Path


def _try_lock(descriptor: int, kind: int, after: float) -> bool:
    time.sleep(after)
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _trailer_head(blob_bytes: int, key: str) -> bytes:
    return _TRAILER.pack(_MAGIC, CACHE_FORMAT, blob_bytes, bytes.fromhex(key), bytes(_DIGEST_BYTES))[:-_DIGEST_BYTES]


def _digest_of(file: FileIO, blob_bytes: int, head: bytes) -> bytes:
    digest = hashlib.sha256()
    left = blob_bytes
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    file.seek(0)
    while left and (count := file.readinto(buffer[: min(left, _CHUNK_BYTES)])):
        digest.update(buffer[:count])
        left -= count
    digest.update(head)
    return digest.digest()


def _touch(file: int | Path, status: os.stat_result) -> None:
    """Marks an entry as used now. Its modification time stays: it says whether the content is the one checked."""
    with contextlib.suppress(OSError):  # a read-only file system can still be read from
        os.utime(file, ns=(time.time_ns(), status.st_mtime_ns))


def _make_private(folder: Path) -> None:
    """Makes the folder and closes it to others. Raises OSError where others could read what is put into it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if stat.S_IMODE(folder.stat().st_mode) & _OPEN_TO_OTHERS:
        folder.chmod(0o700)
    if stat.S_IMODE(folder.stat().st_mode) & _OPEN_TO_OTHERS:
        raise PermissionError("other users may read the folder, and its file system does not let that be changed")


def _read_only(prepared: Prepared) -> Prepared:
    """The same case; what is changed by mistake would be changed for every later round."""
    image = prepared.image.view()
    image.flags.writeable = False
    label = None if prepared.label is None else prepared.label.view()
    if label is not None:
        label.flags.writeable = False
    return dataclasses.replace(prepared, image=image, label=label)
