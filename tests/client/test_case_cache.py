"""A site's prepared cases on disk: whole or not at all, within the limit, closed to others, never in the way."""

from __future__ import annotations

import dataclasses
import logging
import os
import resource
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.case_cache import CaseCache, case_key
from common.imaging.preprocessing import Prepared, prepare_case
from common.imaging.volume import Volume, scaling_affine
from common.study import Study, parse_study
from common.wire.tensors import BlobWriter, Stored

LIMIT = 2**30
ROOT = Path(__file__).resolve().parents[2]


def _study(preprocessing: str = "patch: [16, 16]", task: str = "", rounds: int = 1) -> Study:
    return parse_study(
        f"""
        study: cached
        task: {{dimensions: 2, channels: 1, classes: [background, cell]{task}}}
        preprocessing: {{{preprocessing}}}
        training: {{rounds: {rounds}}}
        cohort: {{sites: [alpha]}}
        """
    )


def _prepared(number: int = 0, size: int = 24, *, label: bool = True) -> Prepared:
    rng = np.random.default_rng(number)

    def volume(array: np.ndarray) -> Volume:
        return Volume(array[np.newaxis, ..., np.newaxis], (1.0, 0.5, 0.25), scaling_affine((1.0, 0.5, 0.25)))

    image = volume(rng.integers(0, 255, (size, size + 4), np.uint8))
    classes = volume(rng.integers(0, 2, (size, size + 4), np.int32))
    return prepare_case([image], classes if label else None, _study())


def _key(number: int) -> str:
    return f"{number:064x}"


def _same(one: Prepared, two: Prepared) -> None:
    np.testing.assert_array_equal(one.image, two.image)
    np.testing.assert_array_equal(one.label, two.label)
    assert one.image.dtype == two.image.dtype == np.float32
    assert one.grid.to_json() == two.grid.to_json()


def _never() -> Prepared:
    raise AssertionError("prepared again")


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.case"))


def _run(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A site's process: Python with this module's names."""
    text = (
        "from tests.client.test_case_cache import *\nfrom tests.client.test_case_cache import _prepared, _key, _never\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", text + textwrap.dedent(code), *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_an_emptied_cache_gives_its_space_back_and_takes_half_of_it_from_then_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = CaseCache(tmp_path, LIMIT)
    for number in range(4):
        cache.get(_key(number), lambda number=number: _prepared(number))  # type: ignore[misc]
    in_use = cache.get(_key(3), _never)
    held = sum(path.stat().st_size for path in _entries(tmp_path))
    assert cache.make_room() == held
    assert _entries(tmp_path) == []
    assert "the cache of prepared cases was emptied" in caplog.messages[0]
    _same(in_use, _prepared(3))  # whoever reads a case still has it
    for number in range(4):
        _same(cache.get(_key(number), lambda number=number: _prepared(number)), _prepared(number))  # type: ignore[misc]
    assert len(_entries(tmp_path)) == 2
    assert CaseCache(tmp_path / "empty", LIMIT).make_room() == CaseCache(tmp_path / "none", 0).make_room() == 0


# What is kept. -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [True, False])
def test_a_case_is_prepared_once_and_comes_back_as_it_was_also_after_a_restart(tmp_path: Path, label: bool) -> None:
    made = _prepared(label=label)
    cache = CaseCache(tmp_path / "cache", LIMIT)
    _same(cache.get(_key(1), lambda: made), made)
    _same(cache.get(_key(1), _never), made)
    again = CaseCache(tmp_path / "cache", LIMIT).get(_key(1), _never)
    _same(again, made)
    assert again.label is None or label


def test_what_comes_back_cannot_be_changed_by_mistake(tmp_path: Path) -> None:
    cache = CaseCache(tmp_path, LIMIT)
    for prepare in (_prepared, _never):
        prepared = cache.get(_key(1), prepare)
        for array in (prepared.image, prepared.label):
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 1


def test_a_case_in_use_outlives_its_entry(tmp_path: Path) -> None:
    cache = CaseCache(tmp_path, LIMIT)
    cache.get(_key(1), _prepared)
    held = cache.get(_key(1), _never)
    cache.keep_only(())
    assert not _entries(tmp_path)
    _same(held, _prepared())


def test_a_patch_of_a_large_entry_reads_few_of_its_pages(tmp_path: Path) -> None:
    size = 1536  # 9 MB
    CaseCache(tmp_path, LIMIT).get(_key(1), lambda: _prepared(size=size))
    code = """
        import resource, sys
        cache = CaseCache(Path(sys.argv[1]), LIMIT)
        cache.get(_key(1), _never)  # the digest of the whole
        def mapped():
            pages = Path("/proc/self/smaps").read_text().split(".case")
            return sum(int(part.split("Rss:")[1].split()[0]) for part in pages[1:])
        prepared = cache.get(_key(1), _never)
        prepared.image[100:116, 100:116].sum()
        print(mapped())
    """
    output, _ = _run(code, tmp_path).communicate(timeout=60)
    assert 0 < int(output) < 2048, output  # kilobytes; the system maps some around each page that is used


def test_the_errors_of_preparing_pass_through_and_leave_nothing(tmp_path: Path) -> None:
    cache = CaseCache(tmp_path, LIMIT)
    with pytest.raises(AssertionError, match="prepared again"):
        cache.get(_key(1), _never)
    assert not _entries(tmp_path)
    _same(cache.get(_key(1), _prepared), _prepared())


@pytest.mark.parametrize("key", ["", "../" + "0" * 61, "0" * 63, "0" * 65, "G" * 64, "0" * 64 + "\n"])
def test_only_keys_name_entries(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        CaseCache(tmp_path, LIMIT).get(key, _prepared)


# Damage. -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    folder = tmp_path_factory.mktemp("damaged")
    CaseCache(folder, LIMIT).get(_key(1), lambda: _prepared(size=8))
    (entry,) = _entries(folder)
    return entry, entry.read_bytes()


@settings(max_examples=150)
@given(data=st.data())
def test_an_entry_with_any_bit_flipped_is_made_again(whole: tuple[Path, bytes], data: st.DataObject) -> None:
    entry, content = whole
    damaged = bytearray(content)
    damaged[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    _is_made_again(entry, content, bytes(damaged))


@settings(max_examples=50)
@given(data=st.data())
def test_a_torn_entry_is_made_again(whole: tuple[Path, bytes], data: st.DataObject) -> None:
    entry, content = whole
    kept = content[: data.draw(st.integers(0, len(content) - 1))]
    _is_made_again(entry, content, kept + data.draw(st.sampled_from([b"", bytes(len(content) - len(kept))])))


@settings(max_examples=20)
@given(more=st.binary(min_size=1, max_size=200))
def test_an_entry_that_grew_is_made_again(whole: tuple[Path, bytes], more: bytes) -> None:
    entry, content = whole
    _is_made_again(entry, content, content + more)


def _is_made_again(entry: Path, content: bytes, damaged: bytes) -> None:
    entry.write_bytes(damaged)
    made = _prepared(size=8)
    calls = []

    def prepare() -> Prepared:
        calls.append(1)
        return made

    cache = CaseCache(entry.parent, LIMIT)
    _same(cache.get(_key(1), prepare), made)
    assert len(calls) == (damaged != content)
    assert entry.read_bytes() == content
    _same(cache.get(_key(1), _never), made)


def test_damage_is_found_also_after_an_entry_was_used(tmp_path: Path) -> None:
    cache = CaseCache(tmp_path, LIMIT)
    cache.get(_key(1), _prepared)
    cache.get(_key(1), _never)
    (entry,) = _entries(tmp_path)
    content = bytearray(entry.read_bytes())
    content[len(content) // 2] ^= 1  # in the image
    other = tmp_path / "other"
    other.write_bytes(content)
    other.replace(entry)
    _same(cache.get(_key(1), _prepared), _prepared())
    assert entry.read_bytes() != content


def test_an_entry_under_the_name_of_another_is_not_served(tmp_path: Path) -> None:
    cache = CaseCache(tmp_path, LIMIT)
    cache.get(_key(1), lambda: _prepared(1))
    (entry,) = _entries(tmp_path)
    entry.rename(tmp_path / f"{_key(2)}.case")
    _same(cache.get(_key(2), lambda: _prepared(2)), _prepared(2))


def test_what_is_no_file_is_not_served_and_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / f"{_key(1)}.case").mkdir()
    (tmp_path / f"{_key(2)}.case").symlink_to(tmp_path / f"{_key(2)}.case")
    cache = CaseCache(tmp_path, LIMIT)
    for number in (1, 2, 1, 2):
        _same(cache.get(_key(number), lambda number=number: _prepared(number)), _prepared(number))


# Killed writers. ---------------------------------------------------------------------------------------------------


def test_a_writer_killed_at_any_moment_leaves_whole_entries_and_its_leftovers_go(tmp_path: Path) -> None:
    code = """
        import sys
        cache = CaseCache(Path(sys.argv[1]), LIMIT)
        print("ready", flush=True)
        for number in range(int(sys.argv[2]), 10**6):
            cache.get(_key(number), lambda: _prepared(number, 512))
    """
    leftovers = 0
    for turn in range(4):
        first = 1000 * turn
        writer = _run(code, tmp_path, first)
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
        time.sleep(0.1)
        for _ in range(3000):  # in the middle of a write, where that can be seen
            if list(tmp_path.glob(".*.partial")):
                break
            time.sleep(0.001)
        writer.kill()
        writer.communicate()
        leftovers += len(list(tmp_path.glob(".*.partial")))
        found = _entries(tmp_path)
        cache = CaseCache(tmp_path, LIMIT)
        assert not list(tmp_path.glob(".*.partial"))
        for entry in found:
            number = int(entry.stem, 16)
            _same(cache.get(entry.stem, _never), _prepared(number, 512))
    assert leftovers > 0, "no writer was killed while it wrote: the test shows nothing"


def test_the_partial_files_of_living_writers_stay(tmp_path: Path) -> None:
    import fcntl

    CaseCache(tmp_path, LIMIT).get(_key(1), _prepared)
    partial = tmp_path / f".{_key(2)}.case.abc.partial"
    partial.write_bytes(b"being written")
    with (tmp_path / "lock").open("r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # as another process holds it that writes
        CaseCache(tmp_path, LIMIT)
        assert partial.exists()
    CaseCache(tmp_path, LIMIT)
    assert not partial.exists()


# The limit. --------------------------------------------------------------------------------------------------------


def _size_of_one() -> int:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        CaseCache(Path(folder), LIMIT).get(_key(1), _prepared)
        return _entries(Path(folder))[0].stat().st_size


def _used(cache: CaseCache, *numbers: int) -> None:
    for number in numbers:
        cache.get(_key(number), lambda number=number: _prepared(number))


def _kept(folder: Path) -> set[int]:
    return {int(entry.stem, 16) for entry in _entries(folder)}


def test_the_least_recently_used_entries_go_when_the_limit_is_reached(tmp_path: Path) -> None:
    cache = CaseCache(tmp_path, 3 * _size_of_one())
    _used(cache, 1, 2, 3, 3, 2, 1, 3, 2, 1, 4)
    assert _kept(tmp_path) == {1, 2, 4}
    _used(cache, 2, 3)
    assert _kept(tmp_path) == {2, 3, 4}
    again = CaseCache(tmp_path, 3 * _size_of_one())  # the order outlives the process
    _used(again, 4, 5)
    assert _kept(tmp_path) == {3, 4, 5}


def test_using_an_entry_leaves_it_as_the_file_that_was_checked(tmp_path: Path) -> None:
    """Or every use by one process would have the others compute the digest again."""
    one, two = CaseCache(tmp_path, LIMIT), CaseCache(tmp_path, LIMIT)
    _used(one, 1)
    (entry,) = _entries(tmp_path)
    before = entry.stat()
    assert before.st_atime_ns > before.st_mtime_ns  # set when it was stored: the system's own times are too coarse
    _used(two, 1)
    _used(one, 1)
    after = entry.stat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)
    assert after.st_atime_ns > before.st_atime_ns


def test_a_lower_limit_holds_from_the_start_and_zero_keeps_nothing(tmp_path: Path) -> None:
    _used(CaseCache(tmp_path, LIMIT), 1, 2, 3)
    CaseCache(tmp_path, 2 * _size_of_one())
    assert _kept(tmp_path) == {2, 3}
    cache = CaseCache(tmp_path, 0)
    assert _kept(tmp_path) == set()
    _used(cache, 1)
    assert _kept(tmp_path) == set()
    CaseCache(tmp_path / "none", 0)
    assert not (tmp_path / "none").exists()


def test_what_others_add_and_write_counts(tmp_path: Path) -> None:
    one, two = (CaseCache(tmp_path, 3 * _size_of_one()) for _ in range(2))
    _used(one, 1, 2)
    _used(two, 3, 4)
    assert _kept(tmp_path) == {2, 3, 4}
    partial = tmp_path / f".{_key(9)}.case.abc.partial"
    partial.write_bytes(bytes(2 * _size_of_one()))
    os.utime(partial, (0, 0))
    _used(one, 5)
    assert _kept(tmp_path) == {5} and partial.exists()


def test_cases_that_are_no_longer_wanted_do_not_stay(tmp_path: Path) -> None:
    cache = CaseCache(tmp_path, LIMIT)
    _used(cache, 1, 2, 3)
    cache.keep_only([_key(2), _key(9)])
    assert _kept(tmp_path) == {2}


def test_files_that_are_not_the_caches_are_left_alone(tmp_path: Path) -> None:
    for name in ("notes.txt", "x.case", ".hidden.partial"):
        (tmp_path / name).write_bytes(bytes(10_000))
    cache = CaseCache(tmp_path, _size_of_one())
    _used(cache, 1, 2)
    cache.keep_only(())
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "x.case", ".hidden.partial", "lock"}


def test_a_case_larger_than_the_limit_is_served_and_pushes_nothing_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = CaseCache(tmp_path, 2 * _size_of_one())
    _used(cache, 1)
    for _ in range(2):
        _same(cache.get(_key(2), lambda: _prepared(2, 400)), _prepared(2, 400))
    assert _kept(tmp_path) == {1}
    assert len(caplog.messages) == 1 and "more than the cache may hold" in caplog.messages[0]
    _used(cache, 3)
    assert _kept(tmp_path) == {1, 3}


# Together. ---------------------------------------------------------------------------------------------------------


def test_threads_that_ask_for_one_case_have_it_prepared_once(tmp_path: Path) -> None:
    cache = CaseCache(tmp_path, LIMIT)
    calls: list[int] = []
    results: list[Prepared] = []
    gate = threading.Barrier(8)

    def prepare() -> Prepared:
        calls.append(1)
        time.sleep(0.05)
        return _prepared()

    def ask() -> None:
        gate.wait()
        results.append(cache.get(_key(1), prepare))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and len(results) == 8
    for result in results:
        _same(result, _prepared())


def test_processes_share_a_folder_and_keep_its_limit(tmp_path: Path) -> None:
    limit = 5 * _size_of_one()
    code = """
        import sys
        rng = np.random.default_rng(int(sys.argv[3]))
        cache = CaseCache(Path(sys.argv[1]), int(sys.argv[2]))
        for _ in range(150):
            number = int(rng.integers(10))
            found = cache.get(_key(number), lambda: _prepared(number))
            np.testing.assert_array_equal(found.image, _prepared(number).image)
        print("done")
    """
    sites = [_run(code, tmp_path, limit, seed) for seed in (1, 2)]
    outputs = [site.communicate(timeout=120)[0] for site in sites]
    assert outputs == ["done\n", "done\n"]
    CaseCache(tmp_path, limit)
    assert 0 < len(_kept(tmp_path)) <= 5
    assert not list(tmp_path.glob(".*"))


# Doing without. ----------------------------------------------------------------------------------------------------


def test_a_full_disk_means_no_cache_and_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = CaseCache(tmp_path, LIMIT)
    _used(cache, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (_size_of_one() - 1000, before[1]))  # writing fails in the middle
    try:
        for number in (2, 3):
            _same(cache.get(_key(number), lambda number=number: _prepared(number)), _prepared(number))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "free space" in caplog.messages[0] and str(tmp_path) in caplog.messages[0]
    assert [path.name for path in tmp_path.glob("*") if path.name != "lock"] == [f"{_key(1)}.case"]
    _same(cache.get(_key(1), _never), _prepared(1))  # what is there is still served


def test_a_folder_that_cannot_be_made_means_no_cache_and_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = CaseCache(tmp_path / "file" / "cache", LIMIT)
    for _ in range(2):
        _same(cache.get(_key(1), _prepared), _prepared())
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_a_folder_that_may_only_be_read_serves_what_it_has(caplog: pytest.LogCaptureFixture) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name, _as_a_user_without_rights(Path(name)) as folder:
        _used(CaseCache(folder, LIMIT), 1)
        folder.chmod(0o500)
        cache = CaseCache(folder, LIMIT)
        _same(cache.get(_key(1), _never), _prepared(1))
        for number in (2, 3):
            _same(cache.get(_key(number), lambda number=number: _prepared(number)), _prepared(number))
        assert _kept(folder) == {1}
        folder.chmod(0o700)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_a_folder_that_vanishes_means_no_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import shutil

    cache = CaseCache(tmp_path / "cache", LIMIT)
    _used(cache, 1)
    shutil.rmtree(tmp_path / "cache")
    for number in (1, 2):
        _same(cache.get(_key(number), lambda number=number: _prepared(number)), _prepared(number))
    assert len(caplog.records) == 1


class _as_a_user_without_rights:
    """Root may write anywhere: for a while, this process is somebody else, who owns the folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._user = os.geteuid()

    def __enter__(self) -> Path:
        if self._user == 0:
            os.chown(self._folder, 65534, 65534)
            os.seteuid(65534)
        return self._folder

    def __exit__(self, *error: object) -> None:
        os.seteuid(self._user)


# Privacy. ----------------------------------------------------------------------------------------------------------


def test_nobody_else_may_read_what_is_kept(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        open_folder = tmp_path / "open"
        open_folder.mkdir(mode=0o777)
        for folder in (tmp_path / "new" / "cache", open_folder):
            CaseCache(folder, LIMIT).get(_key(1), _prepared)
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    finally:
        os.umask(before)


# Keys. -------------------------------------------------------------------------------------------------------------

DIGESTS = {"image": "a" * 64, "label": "b" * 64}


def test_a_key_depends_on_what_decides_a_prepared_case_and_on_nothing_else() -> None:
    base = case_key(DIGESTS, _study())
    assert base == case_key(dict(reversed(DIGESTS.items())), _study(rounds=7))
    assert base == case_key(DIGESTS, _study("patch: [32, 32]"))
    assert base == case_key(DIGESTS, _study(), label_map=None, level=0)
    others = [
        case_key(DIGESTS | {"label": "c" * 64}, _study()),
        case_key({"image": "b" * 64, "label": "a" * 64}, _study()),
        case_key({"image": "a" * 64}, _study()),
        case_key({"image T1": "a" * 64, "label": "b" * 64}, _study()),
        case_key(DIGESTS, _study("patch: [16, 16], intensity: percentile")),
        case_key(DIGESTS, _study("patch: [16, 16], spacing: [0.5, 0.5]")),
        case_key(DIGESTS, _study(task=", labels: instances")),
        case_key(DIGESTS, _study(), label_map={}),
        case_key(DIGESTS, _study(), label_map={4: 1}),
        case_key(DIGESTS, _study(), label_map={1: 4}),
        case_key(DIGESTS, _study(), level=1),
    ]
    assert len({base, *others}) == 1 + len(others)


def test_a_key_does_not_change_from_process_to_process() -> None:
    output, _ = _run("print(case_key(DIGESTS, parse_study(sys.argv[1])))", _study().to_yaml()).communicate(timeout=60)
    assert output.strip() == case_key(DIGESTS, _study())


def test_a_patch_size_does_not_change_what_is_prepared() -> None:
    """Which is why it is not part of the key."""
    volume = Volume(np.arange(600.0).reshape(1, 20, 30, 1), (1.0, 1.0, 1.0), scaling_affine((1.0, 1.0, 1.0)))
    settings = "crop: foreground, spacing: [1.5, 1.5], intensity: percentile"
    small, large = (prepare_case([volume], None, _study(f"{settings}, patch: {p}")) for p in ([16, 16], [32, 32]))
    _same(small, large)
    assert dataclasses.replace(small).image.shape != (20, 30, 1)


def test_an_entry_that_another_process_removes_as_it_is_written_does_not_end_the_cache(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = CaseCache(tmp_path, LIMIT)
    commit = BlobWriter.commit

    def committed(writer: BlobWriter, digest: bytes, size: int) -> Stored:
        stored = commit(writer, digest, size)
        stored.path.unlink()
        return stored

    with monkeypatch.context() as removed_at_once:
        removed_at_once.setattr(BlobWriter, "commit", committed)
        _same(cache.get(_key(1), lambda: _prepared(1)), _prepared(1))
    _same(cache.get(_key(2), lambda: _prepared(2)), _prepared(2))
    assert not caplog.records
    _same(cache.get(_key(2), _never), _prepared(2))
