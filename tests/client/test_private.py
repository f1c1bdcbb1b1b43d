"""A site's private rounds: what they spend, where that is kept, when the site stops, and what a restart changes."""

from __future__ import annotations

import json
import logging
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.datasets import Cancelled, site_dataset
from client.privacy_ledger import Ledger
from client.private import PrivateWorker
from client.site_status import status_text
from client.work import Keeper, Spender, site_worker
from common.errors import BudgetSpentError, DataError, RunFolderError
from common.learning.graph import to_numpy
from common.learning.plan import StudyPlan, build_plan
from common.privacy.accounting import NoisySteps, epsilon_of
from common.privacy.secrets import Secrets
from common.study import Study
from common.wire.tensors import Array
from tests.client.private_site import private_dataset, private_study, write_cases

PATIENTS = 5
RATE = 2 / PATIENTS
RUN = b"\x05" * 32


def _ignore(batch: int, batches: int) -> None:
    del batch, batches


def _epsilon(rounds: int) -> float:
    """By hand: rounds of four steps at noise 1."""
    return epsilon_of([NoisySteps(RATE, 1.0, 4 * rounds)], 1e-3)


@pytest.fixture(scope="module")
def study() -> Study:
    """Three rounds fit its budget and a fourth does not."""
    budget = (_epsilon(3) + _epsilon(4)) / 2
    return private_study(f"epsilon: {budget:.6f}, delta: 1e-3, patients_per_step: 2, steps_per_round: 4")


@pytest.fixture(scope="module")
def plan(tensorflow: None, study: Study) -> StudyPlan:
    return build_plan(study)


@pytest.fixture(scope="module")
def broadcast(plan: StudyPlan) -> list[Array]:
    return to_numpy(plan.train.prepare(*plan.train.initialize()))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_cases(tmp_path / "data", [f"case{number}" for number in range(PATIENTS)])
    return tmp_path / "data"


@pytest.fixture
def start(plan: StudyPlan, study: Study, data: Path, tmp_path: Path) -> Callable[..., PrivateWorker]:
    """Starts the site, as after a SIGKILL: only the disk is left of the one before."""

    def make(run: bytes = RUN, **options: Any) -> PrivateWorker:
        made = site_worker(plan, private_dataset(study, data), tmp_path / "work", **options)
        assert isinstance(made, PrivateWorker)
        return made.for_run(run)

    return make


def _same(one: Sequence[Array], two: Sequence[Array]) -> bool:
    return all(np.array_equal(left, right) for left, right in zip(one, two, strict=True))


def _secrets(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "work" / "privacy").glob("*/*"))


def test_the_site_refuses_the_round_that_would_pass_the_budget_and_trains_nothing_of_it(
    start: Callable[..., PrivateWorker], broadcast: list[Array], study: Study
) -> None:
    worker = start()
    batches: list[int] = []
    for number in (1, 2, 3):
        worker.work("train", number, broadcast, _ignore)
        assert worker.spent().epsilon == pytest.approx(_epsilon(number), rel=1e-9)
    assert worker.spent().epsilon <= study.privacy.epsilon
    with pytest.raises(BudgetSpentError, match=r"round 4: its privacy budget is spent\. Epsilon is .* would be"):
        worker.work("train", 4, broadcast, lambda batch, total: batches.append(batch))
    assert batches == []
    assert worker.spent().epsilon == pytest.approx(_epsilon(3))
    with pytest.raises(BudgetSpentError):  # nor after a restart, nor in another run of the study
        start().work("train", 4, broadcast, _ignore)
    with pytest.raises(BudgetSpentError):
        start(run=b"\x06" * 32).work("train", 1, broadcast, _ignore)


def test_a_round_that_is_done_again_after_a_kill_has_the_same_bits_and_counts_once(
    start: Callable[..., PrivateWorker], broadcast: list[Array]
) -> None:
    first = start().work("train", 1, broadcast, _ignore)
    worker = start()
    assert _same(first, worker.work("train", 1, broadcast, _ignore))
    assert worker.spent().epsilon == pytest.approx(_epsilon(1))
    start().work("train", 2, broadcast, _ignore)
    start().work("train", 3, broadcast, _ignore)
    assert _same(start().work("train", 3, broadcast, _ignore), start().work("train", 3, broadcast, _ignore))
    assert start().spent().epsilon == pytest.approx(_epsilon(3))


def test_the_same_round_from_other_weights_has_other_noise_and_counts_again(
    start: Callable[..., PrivateWorker], broadcast: list[Array]
) -> None:
    """Were the noise the same, the difference of the two updates would hold none of it."""
    worker = start()
    first = worker.work("train", 1, broadcast, _ignore)
    changed = [value.copy() for value in broadcast]
    changed[0].flat[0] = np.nextafter(changed[0].flat[0], np.float32(np.inf))
    second = worker.work("train", 1, changed, _ignore)
    difference = np.concatenate([(a - b).ravel() for a, b in zip(first, second, strict=True) if a.dtype == np.float32])
    assert np.abs(difference).max() > 1e-3
    assert worker.spent().epsilon == pytest.approx(_epsilon(2))


def test_the_same_round_of_other_patients_counts_again(
    plan: StudyPlan, study: Study, start: Callable[..., PrivateWorker], data: Path, broadcast: list[Array]
) -> None:
    start().work("train", 1, broadcast, _ignore)
    (data / "registry.sqlite").unlink()
    write_cases(data, [f"new{number}" for number in range(PATIENTS)], first=100)
    worker = start()
    worker.work("train", 1, broadcast, _ignore)
    assert len(Ledger(worker._folder).entries()) == 2


def test_another_run_and_another_site_have_noise_of_their_own(
    plan: StudyPlan, study: Study, data: Path, tmp_path: Path, broadcast: list[Array]
) -> None:
    sent = []
    for place in ("one", "two"):
        worker = site_worker(plan, private_dataset(study, data), tmp_path / place)
        sent.append(worker.work("train", 1, broadcast, _ignore))
    assert not _same(*sent)


def test_the_randomness_is_the_operating_systems(
    start: Callable[..., PrivateWorker], broadcast: list[Array], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[int] = []
    real = os.urandom

    def urandom(count: int) -> bytes:
        asked.append(count)
        return real(count)

    assert Secrets.__init__.__defaults__ == (os.urandom,)
    secrets = Secrets(tmp_path / "own", urandom)
    secret = secrets.of(1)
    assert asked == [32]
    assert secrets.of(1) == secret != secrets.of(2)


def test_a_secret_is_for_the_sites_eyes_only_and_goes_once_its_round_is_over(
    start: Callable[..., PrivateWorker], broadcast: list[Array], tmp_path: Path
) -> None:
    worker = start()
    worker.work("train", 1, broadcast, _ignore)
    (path,) = _secrets(tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    worker.work("train", 2, broadcast, _ignore)  # the first round's state may not be saved yet
    assert [path.name for path in _secrets(tmp_path)] == ["1.secret", "2.secret"]
    worker.work("train", 3, broadcast, _ignore)
    assert [path.name for path in _secrets(tmp_path)] == ["2.secret", "3.secret"]
    worker.finished()
    assert _secrets(tmp_path) == []
    assert len(Ledger(tmp_path / "work" / "privacy").entries()) == 3


def test_a_round_that_was_given_up_is_not_counted(start: Callable[..., PrivateWorker], broadcast: list[Array]) -> None:
    def cancel(batch: int, batches: int) -> None:
        if batch == 3:
            raise Cancelled

    worker = start()
    worker.work("train", 1, broadcast, cancel)  # what it returns is of a part; a job throws it away
    assert worker.spent().epsilon == 0.0


def test_a_line_that_was_torn_by_a_kill_is_dropped_and_a_damaged_ledger_stops_the_site(
    start: Callable[..., PrivateWorker], broadcast: list[Array], tmp_path: Path
) -> None:
    start().work("train", 1, broadcast, _ignore)
    path = tmp_path / "work" / "privacy" / "ledger.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:20])
    start().work("train", 2, broadcast, _ignore)
    assert [json.loads(line)["round"] for line in path.read_text().splitlines()] == [1, 2]
    path.write_bytes(b"{}\n" + whole)
    with pytest.raises(RunFolderError, match="ledger of the privacy spent is damaged"):
        start()


def test_a_ceiling_of_the_sites_own_counts_all_studies_of_its_work_folder(
    start: Callable[..., PrivateWorker], broadcast: list[Array], tmp_path: Path
) -> None:
    start().work("train", 1, broadcast, _ignore)
    path = tmp_path / "work" / "privacy" / "ledger.jsonl"
    path.write_text(path.read_text().replace('"study": "private"', '"study": "another"'))
    worker = start(epsilon_ceiling=(_epsilon(2) + _epsilon(3)) / 2)
    worker.work("train", 2, broadcast, _ignore)
    assert worker.spent().epsilon == pytest.approx(_epsilon(1))  # in this study
    with pytest.raises(BudgetSpentError, match="this site's own ceiling over all studies"):
        worker.work("train", 3, broadcast, _ignore)


def test_log_and_status_name_whom_the_noise_protects(
    start: Callable[..., PrivateWorker], broadcast: list[Array], caplog: pytest.LogCaptureFixture
) -> None:
    said: dict[str, Any] = {}
    with caplog.at_level(logging.INFO, "wardround.site"):
        start(report=said.update).work("train", 1, broadcast, _ignore)
    words = f"each of {PATIENTS} images (nothing is known of patients here)"
    assert f"privacy protects {words}; epsilon {_epsilon(1):.2f}" in caplog.text
    assert said["privacy"]["unit"] == "image"
    text = status_text({"site": "alpha", "study": "private", "state": "waiting", **said})
    assert f"privacy: epsilon {_epsilon(1):.2f} of" in text
    assert words in text


def test_a_site_without_patients_or_with_a_delta_that_means_nothing_does_not_start(
    plan: StudyPlan, study: Study, data: Path, tmp_path: Path
) -> None:
    import dataclasses

    dataset = private_dataset(study, data)
    loose = dataclasses.replace(
        plan, study=dataclasses.replace(study, privacy=dataclasses.replace(study.privacy, delta=0.2))
    )
    with pytest.raises(DataError, match=r"privacy\.delta: 0\.2 means nothing at 5 patients"):
        PrivateWorker(loose, dataset, tmp_path)
    dataset.patients = {}
    with pytest.raises(DataError, match="no case to train on"):
        PrivateWorker(plan, dataset, tmp_path)


def test_it_is_a_spender_and_no_keeper(start: Callable[..., PrivateWorker]) -> None:
    assert isinstance(start(), Spender)
    assert not isinstance(start(), Keeper)


def test_studies_without_patient_privacy_have_the_plain_data_set(data: Path) -> None:
    import dataclasses

    from client.private_dataset import PrivateSiteDataset
    from client.selection import select_folder
    from common.study import NO_PRIVACY

    plain = dataclasses.replace(private_study(), privacy=NO_PRIVACY)
    assert type(site_dataset(plain, "alpha", select_folder(plain, data))) is not PrivateSiteDataset
    assert type(site_dataset(private_study(), "alpha", select_folder(plain, data))) is PrivateSiteDataset
