"""What ends an agent's work: a newer task, the end of the study, its operator."""

from __future__ import annotations

import logging
import time

import pytest

from common.security.certificates import Identity
from common.wire import federation_pb2 as pb
from common.wire.channel import Address
from tests.client.stand_ins import (
    PATIENCE,
    PROMPT,
    STOPPED,
    Coordinator,
    Running,
    Worker,
    eventually,
    hold_at_work,
    task,
)


@pytest.mark.parametrize("swallow", [False, True], ids=["raising", "returning"])
def test_a_newer_task_ends_the_work_on_an_older_one(
    coordinator: Coordinator, site: Running, worker: Worker, swallow: bool
) -> None:
    worker.swallow = swallow  # as data sets do: the work ends early and returns something
    hold_at_work(coordinator, worker)
    coordinator.say(task=task(2))
    eventually(lambda: len(worker.begun) == 2)
    assert worker.ended == [1]
    worker.go.set()
    eventually(lambda: coordinator.uploads)
    assert [header.task.round for header, _ in coordinator.uploads] == [2]
    assert (coordinator.streams, coordinator.failures()) == (1, [])


def test_of_several_newer_tasks_the_newest_is_done(coordinator: Coordinator, site: Running, worker: Worker) -> None:
    hold_at_work(coordinator, worker)
    for number in (2, 3, 4):
        coordinator.say(task=task(number))
    eventually(lambda: worker.begun[-1] == ("train", 4))
    worker.go.set()
    eventually(lambda: coordinator.uploads)
    assert [header.task.round for header, _ in coordinator.uploads] == [4]


def test_the_end_of_the_study_ends_the_work_and_the_agent(
    coordinator: Coordinator, site: Running, worker: Worker
) -> None:
    hold_at_work(coordinator, worker)
    coordinator.say(finished=pb.Finished(reason="study digits is complete"))
    assert site.end.result(PATIENCE) == "study digits is complete"
    assert worker.ended == [1]
    assert coordinator.uploads == []
    assert site.state() == "finished"


def test_a_stop_ends_work_at_once(
    coordinator: Coordinator, site: Running, worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "wardround.site")
    hold_at_work(coordinator, worker)
    site.agent.stop()
    assert site.end.result(PROMPT) == ""
    assert worker.ended == [1]
    assert coordinator.uploads == []
    assert coordinator.left() == ["stopped by its operator"]
    assert caplog.messages[-1] == STOPPED
    assert not any("given up" in message for message in caplog.messages)


def test_a_stop_ends_the_wait_for_a_task_at_once(coordinator: Coordinator, site: Running) -> None:
    eventually(lambda: site.state() == "connected")
    site.agent.stop()
    assert site.end.result(PROMPT) == ""
    assert coordinator.left() == ["stopped by its operator"]


def test_a_stop_does_not_wait_for_a_batch_that_takes_long(
    coordinator: Coordinator, site: Running, worker: Worker
) -> None:
    worker.stuck.clear()
    coordinator.say(task=task(1))
    eventually(lambda: worker.begun)
    site.agent.stop()
    assert site.end.result(PROMPT) == ""
    worker.stuck.set()


def test_a_stop_does_not_wait_for_a_line_that_is_stuck(coordinator: Coordinator, site: Running) -> None:
    coordinator.answers = [lambda receipt: time.sleep(PROMPT + 2)]
    coordinator.say(task=task(1))
    eventually(lambda: coordinator.uploads)
    site.agent.stop()
    assert site.end.result(PROMPT) == ""
    assert list(site.folder.glob("updates/*/update.json"))


def test_a_stop_ends_the_search_for_a_coordinator_at_once(
    identities: dict[str, Identity], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "wardround.site")
    site = Running(Address("127.0.0.1", 1), identities["alpha"], Worker())  # nobody is there
    eventually(lambda: site.state() == "reconnecting")
    site.agent.stop()
    assert site.end.result(PROMPT) == ""
    assert caplog.messages[-1] == STOPPED
