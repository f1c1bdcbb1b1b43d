"""The gate before a site's work: tasks that the policy forbids are refused by name and never worked on."""

from __future__ import annotations

import datetime
import errno
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from client.approvals import Approvals, Subject
from client.gate import Refusal, SiteGate
from client.package import Package
from client.policy import Proposal
from common.errors import ApprovalError, PolicyError, PolicyFileError
from common.security.certificates import Identity
from common.study import Study
from common.wire import federation_pb2 as pb
from tests.client.stand_ins import (
    PATIENCE,
    Coordinator,
    Running,
    Worker,
    eventually,
    hold_at_work,
    task,
)


class Operator:
    """Whoever runs the site: decides, changes the policy, and waits for an hour of the day."""

    def __init__(self, folder: Path, study: Study) -> None:
        self.subject = Subject("alpha", study, Package("1.0", "ab" * 32, 3), "/srv/images")
        self.approvals = Approvals(folder, None)
        self.policy = folder / "policy.yaml"
        self.now = datetime.datetime(2026, 3, 2, 12, 0)
        self.approvals.record("approve", self.subject, by="Kim")

    def rules(self, text: str) -> None:
        self.policy.write_text(text)

    def gate(self, proposal: Proposal | None = None) -> SiteGate:
        return SiteGate(
            self.approvals,
            self.subject,
            self.policy,
            proposal or Proposal(self.subject.study, 4, "127.0.0.1", {"train": 1000}),
            policy_required=False,
            todo="run approve",
            now=lambda: self.now,
        )


@pytest.fixture
def operator(tmp_path: Path, tiny_study: Callable[..., Study]) -> Operator:
    (tmp_path / "site").mkdir()
    study = tiny_study()
    return Operator(tmp_path / "site", replace(study, training=replace(study.training, rounds=5)))


@pytest.fixture
def site(
    coordinator: Coordinator,
    identities: dict[str, Identity],
    worker: Worker,
    operator: Operator,
) -> Iterator[Running]:
    running = Running(coordinator.address, identities["alpha"], worker, gate=operator.gate())
    yield running
    running.agent.stop()
    running.end.exception(PATIENCE)


# A site that runs. --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "reason", "words"),
    [
        ("tasks: [evaluate]\n", "tasks", "tasks: only evaluate, the coordinator asks to train"),
        ("maximum_rounds: 2\n", "maximum_rounds", "maximum_rounds: at most 2 rounds, the coordinator asks for round 3"),
        ('hours: "20:00-06:00"\n', "hours", "hours: 20:00-06:00 local time, it is 12:00"),
        ("minimum_cases: 5\n", "minimum_cases", "minimum_cases: at least 5 cases, this site has 4"),
        ("minimum_cohort: 3\n", "minimum_cohort", "minimum_cohort: at least 3 sites in every sum"),
        ("secure_aggregation: required\n", "secure_aggregation", "secure_aggregation: required, this study has none"),
        ("differential_privacy: {maximum_epsilon: 1}\n", "differential_privacy", "this study has no differential"),
        ("maximum_bytes_up: 999\n", "maximum_bytes_up", "at most 999 bytes an update, this one has 1,000"),
        ("coordinators: [a.org]\n", "coordinators", "coordinators: only a.org, this one is 127.0.0.1"),
    ],
)
def test_a_task_that_violates_the_policy_is_refused_by_name_and_never_worked_on(
    coordinator: Coordinator,
    site: Running,
    worker: Worker,
    operator: Operator,
    caplog: pytest.LogCaptureFixture,
    rules: str,
    reason: str,
    words: str,
) -> None:
    operator.rules(rules)
    coordinator.say(task=task(3))
    eventually(coordinator.failures)
    assert coordinator.failures() == [f"its site's policy forbids it: {reason}"]
    eventually(lambda: site.state() == "refusing")
    assert words in site.said("notice")
    assert (worker.begun, coordinator.downloads, coordinator.uploads) == ([], 0, [])
    operator.policy.unlink()
    operator.rules("minimum_cases: 1\n")  # the operator allows it; the next task is done on the same line
    coordinator.say(task=task(4))
    eventually(lambda: coordinator.uploads)
    assert (worker.begun, coordinator.streams) == ([("train", 4)], 1)


def test_only_the_forbidden_kind_of_task_is_refused(
    coordinator: Coordinator,
    site: Running,
    worker: Worker,
    operator: Operator,
) -> None:
    operator.rules("tasks: [train]\n")
    coordinator.say(task=task(1, pb.EVALUATE))
    eventually(coordinator.failures)
    coordinator.say(task=task(1))
    eventually(lambda: coordinator.uploads)
    assert worker.begun == [("train", 1)]


def test_a_task_waits_for_the_hours_and_is_done_then(
    coordinator: Coordinator,
    site: Running,
    worker: Worker,
    operator: Operator,
) -> None:
    operator.rules('hours: "20:00-06:00"\n')
    operator.now = datetime.datetime(2026, 3, 2, 19, 59, 59)
    coordinator.say(task=task(1))
    eventually(coordinator.failures)
    assert worker.begun == []
    operator.now = datetime.datetime(2026, 3, 2, 20, 0)
    eventually(lambda: coordinator.uploads)
    assert worker.begun == [("train", 1)]
    assert coordinator.failures() == ["its site's policy forbids it: hours"]


def test_work_under_way_when_the_hours_end_is_finished(
    coordinator: Coordinator,
    site: Running,
    worker: Worker,
    operator: Operator,
) -> None:
    operator.rules('hours: "08:00-18:00"\n')
    hold_at_work(coordinator, worker)
    operator.now = datetime.datetime(2026, 3, 2, 18, 0)
    worker.go.set()
    eventually(lambda: coordinator.uploads)
    coordinator.say(task=task(2))
    eventually(coordinator.failures)
    assert worker.begun == [("train", 1)]


def test_an_update_that_is_here_when_the_hours_end_is_sent_after_the_line_broke(
    coordinator: Coordinator,
    site: Running,
    worker: Worker,
    operator: Operator,
) -> None:
    operator.rules('hours: "08:00-18:00"\n')
    coordinator.answers = [_break]
    coordinator.say(task=task(1))
    eventually(lambda: coordinator.streams == 2)
    operator.now = datetime.datetime(2026, 3, 2, 18, 0)
    coordinator.say(task=task(1))
    eventually(lambda: len(coordinator.uploads) == 2)
    assert (worker.begun, coordinator.failures()) == ([("train", 1)], [])
    eventually(lambda: site.state() == "waiting")
    coordinator.say(task=task(2))  # of which there is nothing yet
    eventually(coordinator.failures)
    assert worker.begun == [("train", 1)]


def _break(receipt: pb.UploadReceipt) -> None:
    raise RuntimeError("the line breaks")


def test_a_policy_that_is_tightened_during_training_holds_the_update_back(
    coordinator: Coordinator,
    site: Running,
    worker: Worker,
    operator: Operator,
) -> None:
    hold_at_work(coordinator, worker)
    operator.rules('hours: "20:00-06:00"\nmaximum_bytes_up: 999\n')
    worker.go.set()
    eventually(coordinator.failures)
    assert coordinator.failures() == ["its site's policy forbids it: maximum_bytes_up"]
    eventually(lambda: site.state() == "refusing")
    assert coordinator.uploads == []
    operator.rules("maximum_bytes_up: 1000\n")
    coordinator.say(task=task(1))
    eventually(lambda: coordinator.uploads)
    assert worker.begun == [("train", 1)]


@pytest.mark.parametrize("number", [0, 6, 5000])
def test_a_round_that_the_approved_study_does_not_have_is_refused(
    coordinator: Coordinator,
    site: Running,
    worker: Worker,
    operator: Operator,
    number: int,
) -> None:
    coordinator.say(task=task(number))
    eventually(coordinator.failures)
    assert coordinator.failures() == ["its site's operator approved no such round: training.rounds"]
    eventually(lambda: site.state() == "refusing")
    assert f"1 to 5 were approved, the coordinator asks for round {number}" in site.said("notice")
    coordinator.say(task=task(5))
    eventually(lambda: coordinator.uploads)
    assert worker.begun == [("train", 5)]


@pytest.mark.parametrize("during", ["waiting", "training"])
def test_a_study_that_is_rejected_while_the_site_runs_ends_it_and_nothing_more_leaves(
    coordinator: Coordinator,
    site: Running,
    worker: Worker,
    operator: Operator,
    during: str,
) -> None:
    if during == "training":
        hold_at_work(coordinator, worker)
    operator.approvals.record("reject", operator.subject, by="Lee")
    if during == "training":
        worker.go.set()
    else:
        coordinator.say(task=task(1))
    with pytest.raises(ApprovalError, match="was rejected by Lee"):
        site.end.result(PATIENCE)
    assert coordinator.failures() == ["its site's operator does not approve it any more"]
    assert coordinator.uploads == []
    assert len(worker.begun) == (during == "training")


@pytest.mark.parametrize("how", ["wrong", "gone"])
def test_a_policy_that_cannot_be_read_any_more_lets_nothing_pass(operator: Operator, how: str) -> None:
    operator.rules("minimum_cases: 1\n")
    gate = operator.gate()
    assert gate.refusal("train", 1) is None
    if how == "wrong":
        operator.rules("minimum_cases: few\n")
    else:
        operator.policy.unlink()
    found = gate.refusal("train", 1)
    assert found is not None and found.reason == "its site's policy cannot be read"
    assert str(operator.policy) in found.words and str(operator.policy) not in found.reason
    with pytest.raises(PolicyFileError):
        gate.check()


def test_nothing_that_a_coordinator_says_changes_the_policy(
    coordinator: Coordinator,
    site: Running,
    worker: Worker,
    operator: Operator,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "wardround.site")
    operator.rules("tasks: [evaluate]\n")
    before = operator.policy.read_bytes()
    coordinator.say(welcome=pb.Welcome(version="9.9", rounds=1))
    coordinator.say(pausing=pb.Pausing(reason="tasks: [train]"))
    for number in (1, 1, 2):
        coordinator.say(task=task(number))
        eventually(lambda number=number: coordinator.failures()[number - 1 :])
    assert set(coordinator.failures()) == {"its site's policy forbids it: tasks"}
    assert (worker.begun, operator.policy.read_bytes()) == ([], before)


# Before it runs. ----------------------------------------------------------------------------------------------------


def test_what_is_known_after_the_data_was_checked_and_the_plan_compiled_counts_too(operator: Operator) -> None:
    operator.rules("minimum_cases: 5\nmaximum_bytes_up: 2000\n")
    study = operator.subject.study
    gate = operator.gate(Proposal(study))
    gate.check()
    gate.complete(Proposal(study, 5, "127.0.0.1", {"train": 2000, "evaluate": 9}))
    with pytest.raises(PolicyError, match="minimum_cases: at least 5 cases, this site has 4"):
        gate.complete(Proposal(study, 4, "127.0.0.1", {"train": 2000}))
    with pytest.raises(
        PolicyError, match="maximum_bytes_up: at most 2,000 bytes an update, this one has 2,001"
    ) as raised:
        gate.complete(Proposal(study, 5, "127.0.0.1", {"train": 2001}))
    assert raised.value.exit_code == 12


def test_several_points_are_all_told_and_waiting_helps_only_against_the_hours(operator: Operator) -> None:
    operator.rules('hours: "20:00-06:00"\n')
    late = operator.gate().refusal("train", 1)
    assert late == Refusal(
        "its site's policy forbids it: hours",
        f"this site's policy forbids it: hours: 20:00-06:00 local time, it is 12:00 ({operator.policy})",
        8 * 3600.0,
    )
    operator.rules('hours: "20:00-06:00"\ntasks: [evaluate]\n')
    both = operator.gate().refusal("train", 1)
    assert both is not None and both.opens_in is None
    assert "tasks: only evaluate" in both.words and "hours: 20:00" in both.words


def test_a_policy_that_cannot_be_seen_is_told(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(path: Path) -> bool:  # as in a folder that the user may not search; root may search any
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", closed)
    with pytest.raises(PolicyFileError, match=r"policy\.yaml: the policy file cannot be read \(Permission denied\)"):
        operator.gate()
