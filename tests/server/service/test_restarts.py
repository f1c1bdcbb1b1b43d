"""What becomes of updates: sums, attempts, full disks, and coordinators that are started again."""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from common.errors import RunFolderError
from common.wire import federation_pb2 as pb
from common.wire.tensors import read_tensors
from server.rounds import Stage
from tests.server.service.digits import (
    PATIENCE,
    PLAN,
    SITES,
    WHOLE,
    Coordinator,
    Site,
    Worker,
    eventually,
    refusal,
    summed,
    update_of,
)


def test_updates_are_summed_in_name_order_whatever_the_order_of_arrival(
    coordinator: Coordinator, alpha: Site, beta: Site, gamma: Site
) -> None:
    for number, order in enumerate(itertools.permutations([alpha, beta, gamma]), start=1):
        result = coordinator.open(number)
        for site in order:
            assert site.upload(number=number).accepted
        assert summed(result) == 123, [site.name for site in order]


def test_agents_and_federation_finish_rounds_together(
    coordinator: Coordinator, run: Callable[..., Future[str]]
) -> None:
    ends = [run(coordinator, site, Worker(site)) for site in SITES]
    assert [summed(coordinator.open(number)) for number in (1, 2)] == [123, 123]
    coordinator.finish()
    assert [end.result(PATIENCE) for end in ends] == ["over"] * 3


def test_a_site_that_was_left_behind_gives_up_the_old_round_for_the_new_one(
    coordinator: Coordinator, alpha: Site, beta: Site, run: Callable[..., Future[str]]
) -> None:
    worker = Worker("gamma", hold=True)
    run(coordinator, "gamma", worker)
    first = coordinator.open(1)
    eventually(lambda: worker.begun == [1])
    alpha.upload()
    beta.upload()
    coordinator.pass_deadline()
    assert summed(first) == 12
    second = coordinator.open(2)
    eventually(lambda: worker.begun == [1, 2])
    worker.go.set()
    alpha.upload(number=2)
    beta.upload(number=2)
    assert summed(second) == 123


def test_below_the_quorum_the_deadline_begins_another_attempt(
    coordinator: Coordinator, alpha: Site, beta: Site
) -> None:
    result = coordinator.open()
    alpha.upload()
    coordinator.pass_deadline()
    eventually(lambda: coordinator.federation.notice)
    assert "1 of the quorum of 2 answered" in coordinator.federation.notice
    (event,) = coordinator.journal.events("retried")
    assert (event["attempt"], event["missing"]) == (2, ["beta", "gamma"])
    beta.upload()
    coordinator.pass_deadline()
    assert summed(result) == 12


def test_a_journal_that_cannot_be_written_ends_the_round_and_acknowledges_nothing(
    coordinator: Coordinator, alpha: Site
) -> None:
    result = coordinator.open()
    with contextlib.closing(sqlite3.connect(coordinator.journal_file)) as database:
        database.execute(
            "CREATE TRIGGER full BEFORE INSERT ON events BEGIN SELECT RAISE(FAIL, 'database or disk is full'); END"
        )
    code, words = refusal(alpha.upload)
    assert code is grpc.StatusCode.UNAVAILABLE
    assert "the journal cannot be written (database or disk is full)" in words
    with pytest.raises(RunFolderError, match="the journal cannot be written"):
        result.result(PATIENCE)
    assert coordinator.stage("alpha") is not Stage.DONE


# Restarts. ----------------------------------------------------------------------------------------------------------


def _flip(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-7] + bytes([content[-7] ^ 1]) + content[-6:])


@pytest.mark.parametrize("restarts", [1, 2])
def test_acknowledged_updates_are_taken_up_after_a_restart(
    started: Callable[..., Coordinator], connect: Callable[..., Site], restarts: int
) -> None:
    coordinator = started()
    coordinator.open()
    assert connect(coordinator, "alpha").upload().accepted
    (file,) = coordinator.files()
    for _ in range(restarts):
        coordinator.stop()
        coordinator = started()
        result = coordinator.open()
    assert coordinator.files() == [file]
    assert coordinator.stage("alpha") is Stage.DONE
    assert connect(coordinator, "alpha").begin_upload(WHOLE).next().accepted
    for site in ("gamma", "beta"):
        assert connect(coordinator, site).upload().accepted
    assert summed(result) == 123


@pytest.mark.parametrize(
    "damage",
    [_flip, lambda path: path.write_bytes(WHOLE[:300]), lambda path: path.write_bytes(b""), Path.unlink],
    ids=["altered", "truncated", "empty", "gone"],
)
def test_a_damaged_update_is_asked_again_after_a_restart(
    started: Callable[..., Coordinator], connect: Callable[..., Site], damage: Callable[[Path], Any]
) -> None:
    first = started()
    first.open()
    for site in ("alpha", "beta"):
        assert connect(first, site).upload().accepted
    (file,) = first.updates.glob("*-alpha-*")
    first.stop()
    damage(file)

    second = started()
    result = second.open()
    assert (second.stage("alpha"), second.stage("beta")) == (Stage.WAITING, Stage.DONE)
    assert not file.exists()
    alpha = connect(second, "alpha")
    stream = alpha.attend()
    assert [type(stream.next()) for _ in range(2)] == [pb.Welcome, pb.Task]
    assert alpha.upload().accepted
    assert connect(second, "gamma").upload().accepted
    assert summed(result) == 123


def test_updates_of_another_state_of_the_model_are_not_taken_up_after_a_restart(
    started: Callable[..., Coordinator], connect: Callable[..., Site]
) -> None:
    first = started()
    first.open(weight=1.0)
    assert connect(first, "alpha").upload(weight=1.0).accepted
    first.stop()
    second = started()
    second.open(weight=2.0)
    assert second.stage("alpha") is Stage.WAITING
    alpha = connect(second, "alpha")
    assert "other weights" in alpha.upload(weight=1.0).reason
    assert alpha.upload(weight=2.0).accepted


def test_agents_find_a_restarted_coordinator_by_themselves_and_the_round_goes_on(
    started: Callable[..., Coordinator], run: Callable[..., Future[str]]
) -> None:
    first = started()
    first.open()
    workers = {site: Worker(site, hold=site != "beta") for site in SITES}
    ends = [run(first, site, worker) for site, worker in workers.items()]
    eventually(lambda: first.stage("beta") is Stage.DONE and workers["alpha"].begun and workers["gamma"].begun)
    first.stop()
    second = started(first.address.port)
    result = second.open()
    for worker in workers.values():
        worker.go.set()
    assert summed(result) == 123
    assert workers["beta"].begun == [1]  # its update was here before
    second.finish()
    assert [end.result(PATIENCE) for end in ends] == ["over"] * 3


def test_a_stored_update_is_what_the_site_sent(coordinator: Coordinator, alpha: Site) -> None:
    coordinator.open()
    alpha.upload()
    (file,) = coordinator.files()
    (event,) = coordinator.journal.events("received")
    assert event["file"] == file
    tensors = read_tensors(coordinator.updates / file, PLAN.train.sent, bytes.fromhex(event["sha256"]))
    np.testing.assert_array_equal(tensors[0], update_of("alpha")[0])
