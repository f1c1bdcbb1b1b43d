"""A coordinator that goes away, pauses and comes back: the agent finds it again, and its work went on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from client import agent
from common.security.certificates import Identity
from common.wire import federation_pb2 as pb
from common.wire.channel import Address
from tests.client.stand_ins import (
    PROMPT,
    Coordinator,
    Running,
    Worker,
    eventually,
    hold_at_work,
    task,
)


def test_a_coordinator_that_goes_away_and_comes_back_is_found_again_and_the_work_went_on(
    start: Callable[..., Coordinator], coordinator: Coordinator, site: Running, worker: Worker
) -> None:
    hold_at_work(coordinator, worker)
    coordinator.stop()
    eventually(lambda: "cannot be reached" in site.said("notice"))
    assert site.state() == "training"
    back = start(coordinator.address.port)
    eventually(lambda: back.heard)
    assert back.heard[0].hello.training_cases == 3
    assert back.heard[0].hello.process == coordinator.heard[0].hello.process
    again = task(1)
    again.name.attempt = 2
    back.say(task=again)
    eventually(lambda: "training" in back.stages())
    worker.go.set()
    eventually(lambda: back.uploads)
    assert back.uploads[0][0].task.attempt == 2
    assert (worker.begun, worker.ended) == ([("train", 1)], [])
    assert back.downloads == 0


def test_work_that_ends_while_the_coordinator_is_away_is_sent_when_it_is_back(
    start: Callable[..., Coordinator], coordinator: Coordinator, site: Running, worker: Worker
) -> None:
    hold_at_work(coordinator, worker)
    coordinator.stop()
    worker.go.set()
    eventually(lambda: list(site.folder.glob("updates/*/update.json")))
    back = start(coordinator.address.port)
    back.say(task=task(1))
    eventually(lambda: back.uploads)
    assert worker.begun == [("train", 1)]
    eventually(lambda: not list(site.folder.glob("updates/*/update.*")))


def test_work_that_nobody_waits_for_any_more_when_the_coordinator_is_back_is_given_up(
    start: Callable[..., Coordinator], coordinator: Coordinator, site: Running, worker: Worker
) -> None:
    hold_at_work(coordinator, worker)
    coordinator.stop()
    back = start(coordinator.address.port)
    back.say(task=task(2))
    eventually(lambda: len(worker.begun) == 2)
    worker.go.set()
    eventually(lambda: back.uploads)
    assert worker.ended == [1]
    assert [header.task.round for header, _ in back.uploads] == [2]


def test_a_coordinator_that_pauses_is_told_of_and_dialled_on(
    start: Callable[..., Coordinator], coordinator: Coordinator, site: Running
) -> None:
    words = "the coordinator was stopped and will be back"
    coordinator.say(pausing=pb.Pausing(reason=words))
    eventually(lambda: site.said("notice") == words)
    coordinator.stop()
    eventually(lambda: site.said("notice").startswith(f"{words}; the coordinator at "))
    back = start(coordinator.address.port)
    eventually(lambda: back.heard and site.said("notice") == "")


def test_a_coordinator_that_is_not_there_is_dialled_for_ever_and_told_once_a_minute(
    identities: dict[str, Identity], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "wardround.site")
    site = Running(Address("127.0.0.1", 1), identities["alpha"], Worker())
    eventually(lambda: len(site.reports) >= 5)  # 1 for `connecting`, 4 failed dials
    words = "the coordinator at 127.0.0.1:1 cannot be reached: nothing listens there (connection refused)"
    assert site.reports[-1] == {"state": "reconnecting", "notice": words, "connected": False}
    assert caplog.messages == [f"{words}; trying until it answers"]
    monkeypatch.setattr(agent, "_SILENT_SECONDS", 0.0)
    site.agent._silent_until = 0.0  # the minute is over
    eventually(lambda: len(caplog.messages) >= 2)
    site.agent.stop()
    site.end.result(PROMPT)


@pytest.mark.parametrize("end", [None, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL], ids=str)
def test_a_stream_that_ends_is_opened_again(coordinator: Coordinator, site: Running, end: Any) -> None:
    coordinator.says.put(end)
    eventually(lambda: coordinator.streams == 2)
    coordinator.say(task=task(1))
    eventually(lambda: coordinator.uploads)
