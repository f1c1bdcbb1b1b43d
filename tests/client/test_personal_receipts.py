"""Which rounds' own values a site keeps: those of updates that the coordinator took, wherever the site is killed.

No network is trained here. The worker's normalization is one number, which a round doubles and adds its own number to,
so that values tell which rounds they went through: from 0.5, round 1 gives 2, round 2 after it 6, alone 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from client import personal
from client.personal import PersonalStore, PersonalWorker
from client.work import Keeper
from common import failpoints
from common.errors import RunFolderError
from common.learning.personal import PersonalLayers
from common.security.certificates import Identity, ensure_simulation_identities, load_identity
from common.wire import federation_pb2 as pb
from common.wire.tensors import Array, TensorSpec, decode
from tests.client.stand_ins import (
    PATIENCE,
    PLAN,
    Coordinator,
    Running,
    again,
    eventually,
    refused,
    task,
)

START = 0.5
LAYERS = PersonalLayers(
    trained=(0,), statistics=range(2, 2), specs=(TensorSpec("float32", ()),), updates=range(2), moments=range(3, 3)
)
BROADCAST: list[Array] = [np.asarray(START, np.float32), np.zeros(3, np.float32)]


class Doubling:
    """What a round sends beside the private step is the value that it began from."""

    digest = PLAN
    training_cases = 3
    validation_cases = 1

    def expected(self, kind: str) -> Sequence[TensorSpec]:
        return (TensorSpec("float32", ()), TensorSpec("float32", (40_000,)))

    def cases(self, kind: str) -> int:
        return 1

    def work(self, kind: str, round_number: int, broadcast: Sequence[Array], on_batch: Any) -> Sequence[Array]:
        own, one = broadcast[0], np.asarray(1, np.float32)
        if kind == "evaluate":
            return [np.asarray(own)]
        return [np.asarray(own - (2 * own + round_number), np.float32), np.full(3, own, np.float32), one, one]


def doubling(folder: Path) -> PersonalWorker:
    return PersonalWorker(Doubling(), LAYERS, folder)


def through(*rounds: int) -> float:
    """The value of a site whose updates of these rounds were taken."""
    value = START
    for number in rounds:
        value = 2 * value + number
    return value


def value_after(folder: Path, number: int) -> float:
    own = PersonalStore(folder, LAYERS.specs).after(number)
    return START if own is None else float(own[0])


def test_on_a_full_disk_the_own_values_are_written_with_the_room_that_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failpoints, "_actions", failpoints.parse("blob.before_rename=error:ENOSPC"))

    def make_room() -> int:
        monkeypatch.setattr(failpoints, "_actions", {})
        return 1

    worker = PersonalWorker(Doubling(), LAYERS, tmp_path / "own", make_room).of_run(b"\x01" * 32)
    worker.work("train", 1, BROADCAST, lambda batch, batches: None)
    assert worker.held(1)


# A site that is killed. -----------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The power goes: nothing on disk changes from here on until the site is started again."""


class Clock:
    """Counts what could be the last thing that a site does."""

    def __init__(self) -> None:
        self.start(-1)

    def start(self, end: int) -> None:
        """From here on the site lives for so many ticks; below 0, for good."""
        self.now, self.end, self.dead = 0, end, False

    def tick(self) -> None:
        self.dead = self.dead or self.now == self.end
        self.now += 1
        if self.dead:
            raise Killed


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Ticks before every change of a file's name."""
    made = Clock()
    replace, unlink = Path.replace, Path.unlink

    def replaced(path: Path, target: Path) -> Path:
        made.tick()
        return replace(path, target)

    def unlinked(path: Path, missing_ok: bool = False) -> None:
        made.tick()
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "replace", replaced)
    monkeypatch.setattr(Path, "unlink", unlinked)
    return made


class Study:
    """A coordinator of three rounds as a site sees it; `taken` are the rounds whose update of the site it holds."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.taken: list[int] = []
        self.next = 1

    def attend(self, worker: PersonalWorker) -> None:
        """The site does what it is asked until the study is over."""
        while self.next <= 3:
            number = self.next
            if number not in self.taken:
                worker.work("train", number, BROADCAST, lambda batch, batches: None)
                worker.sending(number)
                self.clock.tick()  # amid the update
                worker.sent(number)
                self.taken.append(number)
                self.clock.tick()  # before the receipt
                worker.answered(number, True)
            worker.work("evaluate", number, BROADCAST, lambda batch, batches: None)
            self.next += 1


def _lives(clock: Clock, folder: Path, *, late: bool) -> Iterator[tuple[list[int], float]]:
    """A site killed at every point in turn, as the rounds taken and its value at the end; `late`: each is one more."""
    for end in range(200):
        study, own = Study(clock), folder / str(end)
        clock.start(end)
        try:
            study.attend(doubling(own))
            return  # lived on: there is no such point
        except Killed:
            clock.start(-1)
        if late and study.next not in study.taken:
            study.next += 1  # the round closed without the site
        study.attend(doubling(own))
        yield study.taken, value_after(own, 3)
    pytest.fail("the study does not end")


def test_a_site_killed_at_any_point_and_back_in_time_ends_in_the_same_values(clock: Clock, tmp_path: Path) -> None:
    lives = list(_lives(clock, tmp_path, late=False))
    assert len(lives) == 15  # five points a round
    assert lives == [([1, 2, 3], through(1, 2, 3))] * len(lives)


def test_a_site_killed_at_any_point_and_back_too_late_keeps_no_round_that_was_not_taken(
    clock: Clock, tmp_path: Path
) -> None:
    lives = list(_lives(clock, tmp_path, late=True))
    assert {tuple(taken) for taken, _ in lives} == {(1, 2, 3), (2, 3), (1, 3), (1, 2)}
    assert all(value == through(*taken) for taken, value in lives), lives


def test_what_a_killed_site_left_half_written_goes(clock: Clock, tmp_path: Path) -> None:
    clock.start(0)  # before the file that is whole gets its name
    with pytest.raises(Killed):
        PersonalStore(tmp_path, LAYERS.specs).hold(1, [np.asarray(START, np.float32)])
    clock.start(-1)
    assert len(list(tmp_path.iterdir())) == 1
    PersonalStore(tmp_path, LAYERS.specs).asked(1, trains=True)
    assert list(tmp_path.iterdir()) == []


# A run that goes back, or another one. --------------------------------------------------------------------------------


def _take(worker: PersonalWorker, number: int, accepted: bool = True) -> None:
    worker.work("train", number, BROADCAST, lambda batch, batches: None)
    worker.sending(number)
    worker.sent(number)
    worker.answered(number, accepted)


def test_a_round_asked_for_again_and_then_refused_leaves_the_values_before_it(tmp_path: Path) -> None:
    worker = doubling(tmp_path)
    for number in (1, 2, 3):
        _take(worker, number)
    _take(worker, 2, accepted=False)
    assert value_after(tmp_path, 9) == through(1)


def test_a_run_that_begins_anew_leaves_nothing_of_the_one_before(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        _take(doubling(tmp_path), number)
    _take(doubling(tmp_path), 1, accepted=False)
    assert value_after(tmp_path, 9) == START


# The agent. -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path, identities: dict[str, Identity]) -> Callable[[], Path]:
    """The folder of the agent's run, once it is made."""

    def find() -> Path:
        found = list(tmp_path.glob("personal/*"))
        return found[0] if len(found) == 1 else tmp_path / "none"

    return find


@pytest.fixture
def site(
    coordinator: Coordinator,
    identities: dict[str, Identity],
    tmp_path: Path,
) -> Iterator[Running]:
    running = Running(coordinator.address, identities["alpha"], doubling(tmp_path / "personal"))  # type: ignore[arg-type]
    yield running
    running.agent.stop()
    running.end.exception(PATIENCE)


def began(coordinator: Coordinator) -> list[tuple[int, float]]:
    """The round of every update, and the value that it began from."""
    return [(header.task.round, float(decode(data)[1][0])) for header, data in coordinator.uploads]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_values_are_kept_once_the_receipt_accepts_the_update(
    coordinator: Coordinator,
    site: Running,
    own: Callable[[], Path],
) -> None:
    held: list[list[str]] = []
    coordinator.answers = [lambda receipt: held.append(names(own()))]
    coordinator.say(task=task(1))
    eventually(lambda: names(own()) == ["000001.tensors"])
    assert held == [["000001.sent"]]
    coordinator.say(task=task(2))
    eventually(lambda: len(coordinator.uploads) == 2)
    assert began(coordinator) == [(1, START), (2, through(1))]


def test_values_of_a_refused_update_are_not_gone_on_from(
    coordinator: Coordinator,
    site: Running,
    own: Callable[[], Path],
) -> None:
    for number, answer in ((1, None), (2, refused), (3, None)):
        coordinator.answers = [answer] if answer else []
        coordinator.say(task=task(number))
        eventually(lambda number=number: len(coordinator.uploads) == number)
    assert began(coordinator) == [(1, START), (2, through(1)), (3, through(1))]
    eventually(lambda: names(own()) == ["000001.tensors", "000003.tensors"])
    assert value_after(own(), 3) == through(1, 3)


def test_values_of_an_update_that_arrives_damaged_three_times_are_dropped(
    coordinator: Coordinator,
    site: Running,
    own: Callable[[], Path],
) -> None:
    held: list[list[str]] = []

    def damaged(receipt: pb.UploadReceipt) -> None:
        held.append(names(own()))
        again(receipt)

    coordinator.answers = [damaged] * 3
    coordinator.say(task=task(1))
    eventually(coordinator.failures)
    assert held == [["000001.sent"]] * 3
    eventually(lambda: names(own()) == [])
    coordinator.say(task=task(2))
    eventually(lambda: len(coordinator.uploads) == 4)
    assert began(coordinator)[-1] == (2, START)


@pytest.mark.parametrize("kind", [pb.EVALUATE, pb.TRAIN], ids=["evaluate", "train"])
@pytest.mark.parametrize("taken", [True, False], ids=["taken", "not taken"])
def test_where_no_receipt_arrives_the_next_task_says_whether_the_update_was_taken(
    coordinator: Coordinator,
    site: Running,
    own: Callable[[], Path],
    taken: bool,
    kind: int,
) -> None:
    def lost(receipt: pb.UploadReceipt) -> None:
        if taken:
            coordinator.taken.add(coordinator.offered[-1].blob.sha256)
        coordinator.says.put(grpc.StatusCode.UNAVAILABLE)
        raise RuntimeError("the line breaks")  # before the receipt is sent

    coordinator.answers = [lost]
    coordinator.say(task=task(1))
    eventually(lambda: coordinator.streams == 2)
    assert names(own()) == ["000001.sent"]
    if not taken:
        coordinator.say(task=task(1))
        eventually(lambda: len(coordinator.uploads) == 2)
    coordinator.say(task=task(1 if kind == pb.EVALUATE else 2, kind))
    eventually(lambda: len(coordinator.uploads) == 3 - taken)
    eventually(lambda: names(own())[0] == "000001.tensors")
    assert value_after(own(), 1) == through(1)
    if kind == pb.TRAIN:
        assert began(coordinator)[-1] == (2, through(1))


def _lost(receipt: pb.UploadReceipt) -> None:
    raise RuntimeError("the line breaks")  # before the receipt is sent


@pytest.mark.parametrize("taken", [True, False], ids=["taken", "not taken"])
def test_a_site_started_again_asks_whether_its_last_update_was_taken_before_it_goes_on(
    coordinator: Coordinator,
    identities: dict[str, Identity],
    site: Running,
    own: Callable[[], Path],
    tmp_path: Path,
    taken: bool,
) -> None:
    """An update that is whole at the coordinator may still be refused: only it can say so."""
    coordinator.answers = [_lost]
    coordinator.say(task=task(1))
    eventually(lambda: coordinator.streams == 2)
    site.stop()
    eventually(lambda: not coordinator.open)
    assert names(own()) == ["000001.sent"]
    if taken:
        coordinator.taken.add(coordinator.offered[-1].blob.sha256)
    again = Running(coordinator.address, identities["alpha"], doubling(tmp_path / "personal"), site.folder)  # type: ignore[arg-type]
    try:
        coordinator.say(task=task(2))
        eventually(lambda: len(coordinator.uploads) == 2)
        assert began(coordinator)[-1] == (2, through(1) if taken else START)
        assert [header.task.round for header in coordinator.offered] == [1, 1, 2]
    finally:
        again.stop()


@pytest.mark.parametrize("taken", [True, False], ids=["taken", "not taken"])
def test_a_site_that_comes_back_after_the_study_hears_what_became_of_its_last_update(
    coordinator: Coordinator,
    site: Running,
    own: Callable[[], Path],
    taken: bool,
) -> None:
    coordinator.answers = [_lost]
    coordinator.say(task=task(1))
    eventually(lambda: coordinator.streams == 2)
    if taken:
        coordinator.taken.add(coordinator.offered[-1].blob.sha256)
    coordinator.say(finished=pb.Finished(reason="over"))
    assert site.end.result(PATIENCE) == "over"
    assert names(own()) == (["000001.tensors"] if taken else [])
    assert not [path for path in site.folder.rglob("*") if path.is_file()]


def test_an_update_is_sent_again_with_the_values_that_belong_to_it(
    coordinator: Coordinator,
    identities: dict[str, Identity],
    site: Running,
    own: Callable[[], Path],
    tmp_path: Path,
) -> None:
    coordinator.answers = [_lost]
    coordinator.say(task=task(1))
    eventually(lambda: coordinator.streams == 2)
    site.stop()
    eventually(lambda: not coordinator.open)
    worker = doubling(tmp_path / "personal")
    worker._worker.work = None  # type: ignore[assignment,method-assign]
    again = Running(coordinator.address, identities["alpha"], worker, site.folder)  # type: ignore[arg-type]
    try:
        coordinator.say(task=task(1))
        eventually(lambda: names(own()) == ["000001.tensors"])
        assert len(coordinator.uploads) == 2
        assert value_after(own(), 1) == through(1)
    finally:
        again.stop()


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"other")], ids=["gone", "other"])
def test_an_update_whose_values_do_not_belong_to_it_is_trained_again(
    coordinator: Coordinator,
    identities: dict[str, Identity],
    site: Running,
    own: Callable[[], Path],
    tmp_path: Path,
    damage: Callable[[Path], Any],
) -> None:
    coordinator.answers = [_lost]
    coordinator.say(task=task(1))
    eventually(lambda: coordinator.streams == 2)
    site.stop()
    eventually(lambda: not coordinator.open)
    damage(own() / "000001.sent")
    again = Running(coordinator.address, identities["alpha"], doubling(tmp_path / "personal"), site.folder)  # type: ignore[arg-type]
    try:
        coordinator.say(task=task(1))
        eventually(lambda: names(own()) == ["000001.tensors"])
        assert began(coordinator) == [(1, START)] * 2
        assert value_after(own(), 1) == through(1)
    finally:
        again.stop()


def test_of_two_runs_of_one_study_and_plan_neither_goes_on_from_the_others_values(
    start: Callable[..., Coordinator],
    coordinator: Coordinator,
    site: Running,
    own: Callable[[], Path],
    tmp_path: Path,
) -> None:
    coordinator.say(task=task(1))
    eventually(lambda: names(own()) == ["000001.tensors"])
    ensure_simulation_identities(tmp_path / "identities", "digits", ["alpha"], ["127.0.0.1"])
    other = Coordinator(load_identity(tmp_path / "identities" / "coordinator"))
    identity = load_identity(tmp_path / "identities" / "sites" / "alpha")
    again = Running(other.address, identity, doubling(tmp_path / "personal"))  # type: ignore[arg-type]
    try:
        other.say(task=task(2))  # it was not there for the first
        eventually(lambda: other.uploads)
        assert began(other) == [(2, START)]
        eventually(lambda: len(list(tmp_path.glob("personal/*/*.tensors"))) == 2)
    finally:
        again.agent.stop()
        again.end.exception(PATIENCE)
        other.stop()


def test_a_folder_that_cannot_be_written_as_the_update_ends_is_told_and_the_update_not_taken(
    coordinator: Coordinator,
    site: Running,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(self: PersonalStore, round_number: int) -> None:
        raise RunFolderError("alpha/personal: the disk is full")

    monkeypatch.setattr(personal.PersonalStore, "sent", full)
    coordinator.answers = [again]  # as for every update that ends without its digest
    coordinator.say(task=task(1))
    with pytest.raises(RunFolderError, match="the disk is full"):
        site.end.result(PATIENCE)
    assert coordinator.failures() == ["its work folder can no longer be used"]


def test_a_personal_worker_is_a_keeper_and_a_plain_one_is_not(tmp_path: Path) -> None:
    assert isinstance(doubling(tmp_path), Keeper)
    assert not isinstance(Doubling(), Keeper)
