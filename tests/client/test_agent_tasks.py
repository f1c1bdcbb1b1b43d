"""The agent's tasks: fetched, worked on and sent, with damage on the line and receipts that are not its own."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable

import grpc
import numpy as np
import pytest

from common.errors import DataError, RunFolderError, WardroundError
from common.wire import federation_pb2 as pb
from common.wire.tensors import decode
from tests.client.stand_ins import (
    BROADCAST,
    ENVELOPE,
    PATIENCE,
    Coordinator,
    Running,
    Worker,
    again,
    eventually,
    of_another_round,
    of_another_site,
    refused,
    task,
)


@pytest.mark.parametrize(("kind", "name", "cases"), [(pb.TRAIN, "train", 3), (pb.EVALUATE, "evaluate", 1)])
def test_a_task_is_downloaded_worked_on_and_sent(
    coordinator: Coordinator, site: Running, worker: Worker, kind: int, name: str, cases: int
) -> None:
    coordinator.say(task=task(4, kind))
    eventually(lambda: coordinator.uploads)
    assert worker.begun == [(name, 4)]
    assert worker.broadcast[0] == np.float32(0.5)  # the scalar of the task, where the plan has it
    np.testing.assert_array_equal(worker.broadcast[1], np.arange(40_000, dtype=np.float32))
    ((header, data),) = coordinator.uploads
    assert (header.envelope, header.task, header.timing.cases) == (ENVELOPE, task(4, kind).name, cases)
    np.testing.assert_array_equal(decode(data)[0], np.full(5, 4, np.float32))
    eventually(lambda: site.state() == "waiting")
    assert coordinator.heard[0].hello.training_cases == 3
    assert header.broadcast_sha256 == hashlib.sha256(BROADCAST).digest()
    eventually(lambda: len(coordinator.stages()) == 3)
    assert coordinator.stages() == ["download", {"train": "training", "evaluate": "evaluation"}[name], "upload"]
    assert all(message.envelope == ENVELOPE for message in coordinator.heard)


def test_a_broadcast_that_is_here_already_is_not_downloadedagain(coordinator: Coordinator, site: Running) -> None:
    for number in (1, 2):
        coordinator.say(task=task(number))
        eventually(lambda number=number: len(coordinator.uploads) == number)
    assert coordinator.downloads == 1


_DAMAGED = {
    "altered": BROADCAST[:-3] + b"\xff" + BROADCAST[-2:],
    "cut off": BROADCAST[:70_000],
    "empty": b"",
    "too long": BROADCAST + b"x",
}


@pytest.mark.parametrize("damage", _DAMAGED)
def test_a_damaged_broadcast_is_fetchedagain(
    coordinator: Coordinator, site: Running, worker: Worker, damage: str
) -> None:
    coordinator.serves = [_DAMAGED[damage]] * 2
    coordinator.say(task=task(1))
    eventually(lambda: coordinator.uploads)
    assert coordinator.downloads == 3
    np.testing.assert_array_equal(worker.broadcast[1], np.arange(40_000, dtype=np.float32))


def test_a_broadcast_damaged_three_times_is_a_failure_and_the_site_stays(
    coordinator: Coordinator, site: Running, worker: Worker
) -> None:
    coordinator.serves = [BROADCAST[:70_000]] * 3
    coordinator.say(task=task(1))
    eventually(coordinator.failures)
    assert coordinator.failures() == ["broadcast or update were damaged on the line, several times"]
    assert worker.begun == []
    coordinator.say(task=task(2))
    eventually(lambda: coordinator.uploads)
    assert coordinator.streams == 1


def test_a_broadcast_of_a_round_that_is_over_is_no_failure(
    coordinator: Coordinator, site: Running, worker: Worker
) -> None:
    coordinator.serves = [grpc.StatusCode.NOT_FOUND]
    coordinator.say(task=task(1))
    eventually(lambda: coordinator.downloads)
    coordinator.say(task=task(2))
    eventually(lambda: coordinator.uploads)
    assert worker.begun == [("train", 2)]
    assert (coordinator.streams, coordinator.failures()) == (1, [])


@pytest.mark.parametrize("answer", [again, of_another_round, of_another_site])
def test_an_update_without_a_valid_receipt_is_sentagain(
    coordinator: Coordinator, site: Running, worker: Worker, answer: Callable[[pb.UploadReceipt], None]
) -> None:
    coordinator.answers = [answer, answer]
    coordinator.say(task=task(1))
    eventually(lambda: len(coordinator.uploads) == 3)
    assert coordinator.uploads[0] == coordinator.uploads[1] == coordinator.uploads[2]
    eventually(lambda: site.state() == "waiting")
    assert worker.begun == [("train", 1)]
    assert coordinator.failures() == []


def test_an_update_that_arrives_damaged_three_times_is_a_failure(coordinator: Coordinator, site: Running) -> None:
    coordinator.answers = [again] * 3
    coordinator.say(task=task(1))
    eventually(coordinator.failures)
    assert len(coordinator.uploads) == 3


def test_a_refused_update_is_not_sentagain(coordinator: Coordinator, site: Running) -> None:
    coordinator.answers = [refused]
    coordinator.say(task=task(1))
    eventually(lambda: coordinator.uploads)
    coordinator.say(task=task(2))
    eventually(lambda: len(coordinator.uploads) == 2)
    assert [header.task.round for header, _ in coordinator.uploads] == [1, 2]
    assert coordinator.failures() == []


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (DataError("image 0003.tif: cannot be read"), "its data can no longer be read"),
        (RunFolderError("wardround-alpha/personal: cannot be written"), "its work folder can no longer be used"),
    ],
    ids=["data", "work folder"],
)
def test_what_the_site_can_no_longer_use_is_told_without_a_name_and_ends_the_agent(
    coordinator: Coordinator, site: Running, worker: Worker, error: WardroundError, told: str
) -> None:
    worker.error = error
    coordinator.say(task=task(1))
    eventually(coordinator.failures)
    assert coordinator.failures() == [told]  # and no file of the site's
    with pytest.raises(type(error), match=re.escape(str(error))):
        site.end.result(PATIENCE)
