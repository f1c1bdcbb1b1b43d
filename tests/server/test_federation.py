"""A federation that is stopped anywhere in a round and started again: what it goes on with, what it asks for again.

A round's result reads the sites' numbers as the digits of one, in the order in which they were added; nothing is
compiled, and no site is connected: the tests give the federation the updates themselves.
"""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorflow_federated as tff

from common.errors import RunFolderError
from common.security.audit import NO_AUDIT, Audit
from common.study import parse_study
from common.wire.tensors import TensorSpec, write_tensors
from server.federation import LEASE_SECONDS, Call, Connection, Federation, Pause, SiteData
from server.journal import Journal
from server.rounds import Kind, Stage

SITES = ("alpha", "beta", "gamma")
DIGITS = {"alpha": 1, "beta": 2, "gamma": 3}
STUDY = parse_study(
    """
study: digits
seed: 1
task: {dimensions: 2, channels: 1, classes: [background, cell]}
model: {filters: 4, depth: 2}
preprocessing: {patch: [16, 16]}
training: {rounds: 9}
cohort: {sites: [alpha, beta, gamma], quorum: 2, deadline: 10m}
"""
)
STATE = tff.to_type([("weights", (np.float32, [3])), ("rate", np.float32)])


class Digits:
    """A round of a plan."""

    process = SimpleNamespace(initialize=object(), next=object())
    state_type = STATE
    result_type = tff.to_type([("state", STATE), ("metrics", [("count", np.int32)])])
    sent = (TensorSpec("float32", (3,)), TensorSpec("int32", ()))
    secure = ()

    def initialize(self) -> list[Any]:
        return []

    def prepare(self, weights: Any, rate: Any) -> list[Any]:
        return [weights, rate]

    def zero(self) -> list[Any]:
        return [np.zeros(3, np.float32), np.int32(0)]

    def accumulate(self, total: list[Any], update: Sequence[Any]) -> None:
        total[:] = [total[0] * 10 + update[0], total[1] + update[1]]

    def report(self, total: Any, count: Any) -> list[Any]:
        return [total, count]

    def update(self, state: Sequence[Any], report: Sequence[Any]) -> list[Any]:
        return [report[0], state[1], report[1]]


PLAN: Any = SimpleNamespace(study=STUDY, train=Digits(), evaluate=None, digest=b"\x07" * 32)


class Coordinator:
    """A federation on a run folder. To make another on the same folder is to start again after a SIGKILL."""

    def __init__(self, run: Path, plan: Any = PLAN, audit: Audit = NO_AUDIT) -> None:
        self.updates = run / "updates"
        self.updates.mkdir(exist_ok=True)
        self.journal = Journal(run / "journal.sqlite")
        self.closed: list[Call] = []
        self.federation = Federation(plan, self.updates, self.journal, round_closed=self.closed.append, audit=audit)

    async def open(self, number: int = 1, *, weight: float = 0.0) -> asyncio.Task[Any]:
        """Begins a round, and waits until it is under way."""
        state = [np.full(3, weight, np.float32), np.float32(0.5)]
        argument = (state, [SiteData(site, number) for site in SITES])
        task = asyncio.create_task(self.federation.invoke(PLAN.train.process.next, argument))
        while not task.done() and (self.federation.call is None or self.federation.call.round.number != number):
            await asyncio.sleep(0.001)
        return task

    @property
    def call(self) -> Call:
        assert self.federation.call is not None
        return self.federation.call

    def send(self, site: str, digit: int | None = None) -> Path:
        """A site's update arrives; returns its file."""
        tensors = [np.full(3, digit or DIGITS[site], np.float32), np.int32(1)]
        temporary = write_tensors(self.updates / "arriving", tensors)
        path = self.federation.update_path(self.call, site, temporary.digest)
        temporary.path.rename(path)
        stored = type(temporary)(path, temporary.digest, temporary.size)
        self.federation.received(self.call, site, stored, cases=DIGITS[site], work=1.5)
        return path

    async def deadline(self) -> None:
        """The deadline passes."""
        self.call.deadline = 0.0
        self.call.announce()
        await asyncio.sleep(0.05)

    def events(self, name: str) -> list[dict[str, Any]]:
        return self.journal.events(name)

    def names(self) -> list[str]:
        return sorted(path.name[:18] for path in self.updates.iterdir())


def play(scene: Callable[[], Awaitable[None]]) -> None:
    """Runs a scene to its end."""
    asyncio.run(asyncio.wait_for(scene(), 60))  # type: ignore[arg-type]


async def killed(task: asyncio.Task[Any], coordinator: Coordinator) -> None:
    """The process ends here; what it had in memory is gone."""
    task.cancel()
    await asyncio.wait([task])
    coordinator.journal.close()


def digits(result: Any) -> int:
    return int(result["state"]["weights"][0])


def test_a_restart_goes_on_in_the_same_attempt_with_the_updates_it_has(tmp_path: Path) -> None:
    async def scene() -> None:
        first = Coordinator(tmp_path)
        task = await first.open()
        first.send("beta")
        await first.deadline()
        await first.deadline()
        assert first.call.round.attempt == 3
        await killed(task, first)

        again = Coordinator(tmp_path)
        task = await again.open()
        round_ = again.call.round
        assert (round_.attempt, round_.included, round_.missing) == (3, ["beta"], ["alpha", "gamma"])
        assert (round_.answers["beta"].cases, round_.answers["beta"].seconds_work) == (2, 1.5)
        again.send("gamma")
        await again.deadline()
        assert digits(await task) == 23
        assert again.closed[0].round.answers["beta"].cases == 2

    play(scene)


def test_a_round_that_was_closed_is_closed_again_with_the_same_cohort_whoever_else_is_there(tmp_path: Path) -> None:
    async def scene() -> None:
        first = Coordinator(tmp_path)
        task = await first.open()
        first.send("alpha")
        first.send("gamma")
        await first.deadline()
        assert digits(await task) == 13
        await killed(task, first)  # its state was not saved

        again = Coordinator(tmp_path)
        assert digits(await (await again.open())) == 13
        assert [event["included"] for event in again.events("closed")] == [["alpha", "gamma"]]
        assert [event["site"] for event in again.events("received")] == ["alpha", "gamma"]

    play(scene)


@pytest.mark.parametrize("harm", ["gone", "flipped"])
def test_of_a_closed_cohort_the_site_whose_update_is_lost_is_asked_alone(
    tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene() -> None:
        first = Coordinator(tmp_path)
        task = await first.open()
        first.send("alpha")
        lost = first.send("beta")
        await first.deadline()
        await task
        await killed(task, first)
        content = bytearray(lost.read_bytes())
        content[-1] ^= 1
        lost.unlink() if harm == "gone" else lost.write_bytes(content)

        again = Coordinator(tmp_path)
        connections = {site: Connection(site, "here") for site in SITES}
        for connection in connections.values():
            again.federation.connect(connection)
        task = await again.open()
        asked = [site for site, connection in connections.items() if connection.outbox.qsize()]
        assert asked == ["beta"]
        assert f"wardround repair --run {tmp_path} --give-up beta 1`" in again.federation.notice
        (said,) = [line for line in caplog.messages if "is lost" in line]
        assert said.endswith("; the site is asked for it again")
        assert "restore" not in said and "SHA-256" not in said and str(tmp_path) not in said
        assert (tmp_path / "damaged" / lost.name).exists() == (harm == "flipped")
        await again.deadline()
        assert (again.call.round.attempt, again.call.round.missing) == (2, ["beta"])
        again.send("beta")
        assert digits(await task) == 12

    play(scene)


def test_the_notice_of_a_closed_round_names_the_sites_that_are_still_missing_as_updates_come(tmp_path: Path) -> None:
    async def scene() -> None:
        first = Coordinator(tmp_path)
        task = await first.open()
        lost = [first.send(site) for site in SITES]
        await task
        await killed(task, first)
        for path in lost[:2]:
            path.unlink()

        again = Coordinator(tmp_path)
        again.federation.connect(Connection("beta", "here"))
        task = await again.open()
        told = again.federation.notice
        assert "it waits for alpha (not connected), beta (assigned), of whom" in told
        assert "If alpha never comes back: stop the coordinator, then `wardround repair --run" in told
        again.send("alpha")
        assert "it waits for beta (assigned), of whom" in again.federation.notice
        assert f"`wardround repair --run {tmp_path} --give-up beta 1`, which changes" in again.federation.notice
        await again.deadline()
        assert "it waits for beta" in again.federation.notice
        again.send("beta")
        assert digits(await task) == 123
        assert again.federation.notice == ""

    play(scene)


@pytest.mark.parametrize(("personal", "asked"), [("none", []), ("normalization", ["alpha"])])
@pytest.mark.parametrize("restarted", [False, True])
def test_what_a_site_sent_before_it_did_an_earlier_round_again_is_not_taken_where_layers_are_personal(
    tmp_path: Path, personal: str, asked: list[str], restarted: bool
) -> None:
    """The site goes on from what it kept of the earlier round: its later values went when it was asked for it."""
    training = dataclasses.replace(STUDY.training, personal=personal)
    plan = SimpleNamespace(**{**vars(PLAN), "study": dataclasses.replace(STUDY, training=training)})

    async def scene() -> None:
        first = Coordinator(tmp_path, plan)
        task = await first.open(1)
        lost = first.send("alpha")
        for site in ("beta", "gamma"):
            first.send(site)
        await task
        task = await first.open(2, weight=5.0)
        first.send("alpha")
        first.send("beta")
        await killed(task, first)
        lost.unlink()

        again = Coordinator(tmp_path, plan)
        task = await again.open(1)
        assert again.call.round.missing == ["alpha"]
        again.send("alpha")
        await task
        if restarted:
            again.journal.close()
            again = Coordinator(tmp_path, plan)
        task = await again.open(2, weight=5.0)
        assert again.call.round.missing == [*asked, "gamma"]
        for site in again.call.round.missing:
            again.send(site)
        assert digits(await task) == 123

    play(scene)


def test_a_round_on_other_weights_begins_anew(tmp_path: Path) -> None:
    async def scene() -> None:
        first = Coordinator(tmp_path)
        task = await first.open()
        first.send("alpha")
        first.send("beta")
        await first.deadline()
        await task
        await killed(task, first)

        again = Coordinator(tmp_path)
        task = await again.open(weight=1.0)
        assert (again.call.round.included, again.call.round.fixed) == ([], None)
        for site in SITES:
            again.send(site)
        assert digits(await task) == 123

    play(scene)


def test_updates_go_when_the_state_of_their_round_is_saved_and_no_earlier(tmp_path: Path) -> None:
    async def scene() -> None:
        coordinator = Coordinator(tmp_path)
        for number in (1, 2):
            task = await coordinator.open(number)
            for site in SITES:
                coordinator.send(site)
            (coordinator.updates / f"{number:06d}-train-alpha-0123456789abcdef.upload").write_bytes(b"half")
            await task
        assert len(coordinator.names()) == 8
        coordinator.federation.saved(1)
        assert {name[:6] for name in coordinator.names()} == {"000002"}
        assert len(coordinator.names()) == 4
        coordinator.federation.saved(2)
        assert not coordinator.names()

    play(scene)


def test_a_refused_update_fails_its_site_in_this_attempt_also_after_a_restart(tmp_path: Path) -> None:
    async def scene() -> None:
        first = Coordinator(tmp_path)
        task = await first.open()
        first.federation.refused(first.call, "beta", "not finite", b"\x01" * 32)
        first.federation.refused(first.call, "beta", "not finite", b"\x01" * 32)
        assert [(event["site"], event["reason"]) for event in first.events("refused")] == [("beta", "not finite")]
        await killed(task, first)

        again = Coordinator(tmp_path)
        connection = Connection("beta", "here")
        again.federation.connect(connection)
        task = await again.open()
        assert again.call.round.answers["beta"].stage is Stage.FAILED
        assert connection.outbox.empty()
        await again.deadline()
        assert connection.outbox.get_nowait() is again.call
        await killed(task, again)

    play(scene)


def test_a_refused_site_does_not_hold_up_a_round_that_has_its_quorum(tmp_path: Path) -> None:
    async def scene() -> None:
        coordinator = Coordinator(tmp_path)
        task = await coordinator.open()
        coordinator.send("alpha")
        coordinator.federation.refused(coordinator.call, "beta", "not finite")
        coordinator.send("gamma")
        assert digits(await task) == 13

    play(scene)


def test_late_updates_are_journaled_and_a_flood_of_them_is_not(tmp_path: Path) -> None:
    coordinator = Coordinator(tmp_path)
    for number in range(100):
        coordinator.federation.late("beta", Kind.TRAIN, 1, 1, "round 1 is closed", bytes([number]) * 32)
        coordinator.federation.late("beta", Kind.TRAIN, number, 1, "round is closed", b"")
    late = coordinator.events("late")
    assert late[0]["reason"] == "round 1 is closed"
    assert 2 <= len(late) <= 100
    coordinator.federation.late("alpha", Kind.TRAIN, 1, 1, "round 1 is closed", b"")
    assert coordinator.events("late")[-1]["site"] == "alpha"  # whoever else floods


def test_an_update_is_known_by_its_digest_after_its_round_and_after_a_restart(tmp_path: Path) -> None:
    async def scene() -> None:
        coordinator = Coordinator(tmp_path)
        task = await coordinator.open()
        broadcast = coordinator.call.broadcast.digest
        for site in SITES:
            coordinator.send(site)
        digest = coordinator.call.round.answers["beta"].update.digest  # type: ignore[union-attr]
        await task
        await killed(task, coordinator)
        for federation in (coordinator.federation, Coordinator(tmp_path).federation):
            assert federation.was_received("train", 1, "beta", digest, broadcast)
            assert not federation.was_received("train", 1, "alpha", digest, broadcast)
            assert not federation.was_received("train", 1, "beta", digest, b"\x00" * 32)

    play(scene)


def test_a_disk_that_takes_no_update_ends_the_round_with_its_error(tmp_path: Path) -> None:
    async def scene() -> None:
        coordinator = Coordinator(tmp_path)
        task = await coordinator.open()
        for site in SITES[:2]:
            coordinator.send(site)
        coordinator.federation.fail(RunFolderError("updates: cannot be written"))
        with pytest.raises(RunFolderError, match="updates: cannot be written"):
            await task

    play(scene)


def test_sites_are_told_of_a_pause_also_those_that_come_in_it(tmp_path: Path) -> None:
    async def scene() -> None:
        federation = Coordinator(tmp_path).federation
        early, late = Connection("alpha", "here"), Connection("beta", "here")
        federation.connect(early)
        federation.pause("stopped")
        federation.connect(late)
        assert [each.outbox.get_nowait() for each in (early, late)] == [Pause("stopped")] * 2

    play(scene)


def test_a_site_that_gets_no_further_is_shown_as_such_and_is_left_out_at_the_deadline(tmp_path: Path) -> None:
    async def scene() -> None:
        coordinator = Coordinator(tmp_path)
        federation = coordinator.federation
        connection = Connection("beta", "here")
        federation.connect(connection)
        task = await coordinator.open()
        federation.progressed("beta", Stage.TRAINING, 3, 40)
        assert federation.idle_seconds("beta") is None
        connection.progressed = time.monotonic() - LEASE_SECONDS - 15
        federation.progressed("beta", Stage.TRAINING, 3, 40)  # it lives, and gets no further
        assert federation.idle_seconds("beta") == pytest.approx(75, abs=1)
        assert federation.idle_seconds("alpha") is None  # it is not even connected
        federation.progressed("beta", Stage.TRAINING, 4, 40)
        assert federation.idle_seconds("beta") is None
        coordinator.send("alpha")
        coordinator.send("gamma")
        await coordinator.deadline()
        assert digits(await task) == 13
        task = await coordinator.open(2)
        assert coordinator.call.round.answers["beta"].stage is Stage.ASSIGNED  # it takes part again by itself
        await killed(task, coordinator)

    play(scene)


def test_a_folder_of_updates_that_cannot_be_tidied_is_told_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator = Coordinator(tmp_path)
    (coordinator.updates / "000001-train-alpha-00112233.tensors").write_bytes(b"")

    def read_only(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(RunFolderError, match="Read-only"):
        coordinator.federation.saved(1)


def test_a_call_that_is_over_holds_no_model(tmp_path: Path) -> None:
    async def scene() -> None:
        coordinator = Coordinator(tmp_path)
        task = await coordinator.open()
        call = coordinator.call
        for site in SITES:
            coordinator.send(site)
        await task
        assert not call.broadcast.tensors

    play(scene)
