"""A site that is killed, cut off or out of disk: what it has done already is not done again."""

from __future__ import annotations

import hashlib
import queue
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from common.errors import RunFolderError
from common.security.certificates import Identity
from common.wire import federation_pb2 as pb
from common.wire.tensors import decode, encode_chunks
from tests.client.stand_ins import (
    BROADCAST,
    PATIENCE,
    Coordinator,
    Running,
    Worker,
    again,
    eventually,
    refused,
    task,
)

UPDATE = b"".join(encode_chunks([np.full(5, 1, np.float32)]))


@pytest.fixture
def begin(
    coordinator: Coordinator,
    identities: dict[str, Identity],
    tmp_path: Path,
) -> Iterator[Callable[[Worker], Running]]:
    """Starts the site, one after the other on the same work folder."""
    made: list[Running] = []

    def run(worker: Worker) -> Running:
        eventually(lambda: not coordinator.open)  # a stream that it has not seen end would swallow what it says next
        made.append(Running(coordinator.address, identities["alpha"], worker, tmp_path))
        return made[-1]

    yield run
    for one in made:
        one.stop()


def _break(receipt: pb.UploadReceipt) -> None:
    raise RuntimeError("the line breaks")  # before the receipt is sent


def _held(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("updates/*/*"))


def test_a_broken_download_goes_on_where_it_was(coordinator: Coordinator, begin: Callable[..., Running]) -> None:
    coordinator.serves = [BROADCAST[:50_000]]
    coordinator.breaks = [grpc.StatusCode.UNAVAILABLE]
    worker = Worker()
    begin(worker)
    coordinator.say(task=task(1))
    eventually(lambda: coordinator.streams == 2)
    coordinator.say(task=task(1))
    eventually(lambda: coordinator.uploads)
    assert coordinator.offsets == [0, 50_000]
    np.testing.assert_array_equal(worker.broadcast[1], np.arange(40_000, dtype=np.float32))


def test_a_site_started_again_goes_on_with_its_download_and_keeps_the_newest_broadcast(
    coordinator: Coordinator,
    begin: Callable[..., Running],
    tmp_path: Path,
) -> None:
    coordinator.serves = [BROADCAST[:50_000]]
    coordinator.breaks = [grpc.StatusCode.UNAVAILABLE]
    first = begin(Worker())
    coordinator.say(task=task(1))
    eventually(lambda: coordinator.streams == 2)
    first.stop()
    begin(Worker())
    coordinator.say(task=task(1))
    eventually(lambda: coordinator.uploads)
    assert coordinator.offsets == [0, 50_000]
    assert [path.name for path in (tmp_path / "broadcast").iterdir()] == [
        f"{hashlib.sha256(BROADCAST).hexdigest()}.tensors"
    ]


def test_a_kept_broadcast_that_was_damaged_is_fetched_again(
    coordinator: Coordinator,
    begin: Callable[..., Running],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = begin(Worker())
    coordinator.say(task=task(1))
    eventually(lambda: first.state() == "waiting")
    first.stop()
    (path,) = (tmp_path / "broadcast").iterdir()
    path.write_bytes(b"\0" * len(BROADCAST))
    worker = Worker()
    begin(worker)
    coordinator.say(task=task(2))
    eventually(lambda: len(coordinator.uploads) == 2)
    assert coordinator.offsets == [0, 0]
    said = [line for line in caplog.messages if "the broadcast that was kept is damaged, and is fetched again" in line]
    assert len(said) == 1 and str(path) in said[0]
    np.testing.assert_array_equal(worker.broadcast[1], np.arange(40_000, dtype=np.float32))


def test_an_update_without_an_answer_is_sent_by_the_site_started_again_and_not_trained(
    coordinator: Coordinator,
    begin: Callable[..., Running],
    tmp_path: Path,
) -> None:
    coordinator.answers = [_break]
    first = begin(Worker())
    coordinator.say(task=task(1))
    eventually(lambda: coordinator.uploads)
    first.stop()
    assert _held(tmp_path) == ["update.json", "update.tensors"]
    again = Worker()
    site = begin(again)
    coordinator.say(task=task(1))
    eventually(lambda: site.state() == "waiting")
    assert again.begun == []
    assert [data for _, data in coordinator.uploads] == [UPDATE] * 2
    assert coordinator.uploads[0][0].timing == coordinator.uploads[1][0].timing
    assert _held(tmp_path) == []


def test_only_what_the_coordinator_lacks_is_sent(coordinator: Coordinator, begin: Callable[..., Running]) -> None:
    coordinator.holds = [50]
    site = begin(Worker())
    coordinator.say(task=task(1))
    eventually(lambda: site.state() == "waiting")
    ((header, data),) = coordinator.uploads
    assert data == UPDATE[50:]
    assert (header.blob.size, header.blob.sha256) == (len(UPDATE), hashlib.sha256(UPDATE).digest())


def test_nothing_of_an_update_that_the_coordinator_has_is_sent(
    coordinator: Coordinator,
    begin: Callable[..., Running],
    tmp_path: Path,
) -> None:
    coordinator.taken = {hashlib.sha256(UPDATE).digest()}
    site = begin(Worker())
    coordinator.say(task=task(1))
    eventually(lambda: site.state() == "waiting")
    assert coordinator.uploads == []
    assert len(coordinator.offered) == 1
    assert _held(tmp_path) == []


@pytest.mark.parametrize("beyond", [len(UPDATE), 2**63], ids=str)
def test_a_coordinator_that_asks_for_bytes_beyond_the_end_gets_none(
    coordinator: Coordinator,
    begin: Callable[..., Running],
    beyond: int,
) -> None:
    coordinator.holds = [beyond] * 3
    begin(Worker())
    coordinator.say(task=task(1))
    eventually(coordinator.failures)
    assert all(not data for _, data in coordinator.uploads)


def test_an_update_is_not_sent_for_a_task_on_other_weights(
    coordinator: Coordinator,
    begin: Callable[..., Running],
) -> None:
    coordinator.answers = [_break]
    first = begin(Worker())
    coordinator.say(task=task(1))
    eventually(lambda: coordinator.uploads)
    first.stop()
    again = Worker()
    begin(again)
    other = task(1)
    other.scalars = b"".join(encode_chunks([np.float32(0.25)]))
    coordinator.say(task=other)
    eventually(lambda: len(coordinator.uploads) == 2)
    assert again.begun == [("train", 1)]


@pytest.mark.parametrize("name", ["update.tensors", "update.json"])
@pytest.mark.parametrize(
    "damage",
    [
        Path.unlink,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b"[1]"),
    ],
    ids=["gone", "empty", "torn", "other"],
)
def test_a_damaged_update_is_trained_again(
    coordinator: Coordinator,
    begin: Callable[..., Running],
    tmp_path: Path,
    name: str,
    damage: Callable[[Path], Any],
) -> None:
    coordinator.answers = [_break]
    first = begin(Worker())
    coordinator.say(task=task(1))
    eventually(lambda: coordinator.uploads)
    first.stop()
    (path,) = tmp_path.glob(f"updates/*/{name}")
    damage(path)
    again = Worker()
    site = begin(again)
    coordinator.say(task=task(1))
    eventually(lambda: site.state() == "waiting")
    assert again.begun == [("train", 1)]
    assert [data for _, data in coordinator.uploads] == [UPDATE] * 2


@pytest.mark.parametrize("answers", [[refused], [again] * 3], ids=["refused", "damaged on the line"])
def test_an_update_that_was_refused_does_not_stay(
    coordinator: Coordinator,
    begin: Callable[..., Running],
    tmp_path: Path,
    answers: list[Any],
) -> None:
    coordinator.answers = list(answers)
    worker = Worker()
    begin(worker)
    coordinator.say(task=task(1))
    eventually(lambda: len(coordinator.uploads) == len(answers))
    eventually(lambda: _held(tmp_path) == [])
    coordinator.say(task=task(1))
    eventually(lambda: len(worker.begun) == 2)


def test_nothing_stays_when_the_study_is_over(
    coordinator: Coordinator,
    begin: Callable[..., Running],
    tmp_path: Path,
) -> None:
    coordinator.answers = [_break]
    site = begin(Worker())
    coordinator.say(task=task(1))
    eventually(lambda: coordinator.streams == 2)
    coordinator.say(finished=pb.Finished(reason="over"))
    assert site.end.result(PATIENCE) == "over"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("folder", ["broadcast", "updates"])
def test_a_work_folder_that_takes_nothing_is_told_and_ends_the_agent(
    coordinator: Coordinator,
    begin: Callable[..., Running],
    tmp_path: Path,
    folder: str,
) -> None:
    (tmp_path / folder).write_bytes(b"")
    site = begin(Worker())
    coordinator.say(task=task(1))
    eventually(coordinator.failures)
    assert coordinator.failures() == ["its work folder can no longer be used"]
    with pytest.raises(RunFolderError, match=folder):
        site.end.result(PATIENCE)


def test_several_agents_of_one_process_keep_their_updates_apart(
    coordinator: Coordinator,
    begin: Callable[..., Running],
    tmp_path: Path,
    identities: dict[str, Identity],
    start: Callable[..., Coordinator],
) -> None:
    other = start()
    one = begin(Worker())
    two = Running(other.address, identities["alpha"], Worker(), tmp_path / "two")
    asked: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number, each in ((1, coordinator), (2, other)):
        each.answers = [_break]
        each.say(task=task(number))
        asked.put(number)
    eventually(lambda: coordinator.streams == 2 and other.streams == 2)
    for number, each in ((1, coordinator), (2, other)):
        each.say(task=task(number))
    eventually(lambda: one.state() == two.state() == "waiting")
    two.stop()
    assert [float(decode(data)[0][0]) for _, data in coordinator.uploads] == [1, 1]
    assert [float(decode(data)[0][0]) for _, data in other.uploads] == [2, 2]
