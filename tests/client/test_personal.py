"""A site that keeps its own normalization: what leaves it, what stays, and that a round done again is the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tifffile

from client.datasets import Cancelled, SiteDataset
from client.personal import PersonalStore, PersonalWorker
from client.selection import select_folder
from client.work import PlanWorker, site_worker
from common.errors import DataError, RunFolderError
from common.learning.graph import to_numpy
from common.learning.personal import PersonalLayers
from common.learning.plan import StudyPlan, build_plan
from common.models import build_network
from common.models.network import Network
from common.study import Study
from common.wire.tensors import Array

ROUNDS = 3  # the third is frozen


@pytest.fixture(scope="module")
def plan(tensorflow: None, tiny_study: Callable[..., Study]) -> StudyPlan:
    study = tiny_study(normalization="batch", rate=0.05)
    return build_plan(
        dataclasses.replace(
            study, training=dataclasses.replace(study.training, rounds=ROUNDS, personal="normalization")
        )
    )


@pytest.fixture(scope="module")
def network(plan: StudyPlan) -> Network:
    return build_network(plan.study)


@pytest.fixture(scope="module")
def dataset(plan: StudyPlan, tmp_path_factory: pytest.TempPathFactory) -> SiteDataset:
    folder = tmp_path_factory.mktemp("alpha")
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
    for index in range(5):
        rng = np.random.default_rng(index)
        label = np.zeros((20, 24), np.uint8)
        label[4:14, 5:15] = 1
        tifffile.imwrite(folder / "images" / f"{index}.tif", (label * 90 + rng.integers(0, 60, (20, 24))).astype("u1"))
        tifffile.imwrite(folder / "labels" / f"{index}.tif", label)
    return SiteDataset(plan.study, "alpha", select_folder(plan.study, folder))


@pytest.fixture(scope="module")
def layers(plan: StudyPlan, network: Network) -> PersonalLayers:
    return PersonalLayers.of(network, plan.train)


@pytest.fixture
def worker(plan: StudyPlan, dataset: SiteDataset, tmp_path: Path) -> PersonalWorker:
    made = site_worker(plan, dataset, tmp_path)
    assert isinstance(made, PersonalWorker)
    return made


def _ignore(batch: int, batches: int) -> None:
    del batch, batches


def _train(worker: PersonalWorker, number: int, broadcast: list[Array]) -> Sequence[Array]:
    """A round whose update the coordinator takes."""
    sent = worker.work("train", number, broadcast, _ignore)
    worker.sending(number)
    worker.sent(number)
    worker.answered(number, True)
    return sent


def _broadcast(plan: StudyPlan, rounds_done: int = 0) -> list[Array]:
    """What the first rounds broadcast where no site had any data: the weights stay, the round counts."""
    state = plan.train.initialize()
    for _ in range(rounds_done):
        state = plan.train.update(state, plan.train.report(*plan.train.zero()))[: len(state)]
    return to_numpy(plan.train.prepare(*state))


def _stored(folder: Path, pattern: str = "*/*") -> list[Path]:
    return sorted(folder.glob(f"personal/{pattern}.tensors"))


def _equal(one: Sequence[Array], two: Sequence[Array]) -> bool:
    return all(np.array_equal(left, right) for left, right in zip(one, two, strict=True))


def test_no_gain_bias_or_moment_leaves_the_site_and_all_else_is_what_the_plan_sends(
    plan: StudyPlan, network: Network, dataset: SiteDataset, worker: PersonalWorker, layers: PersonalLayers
) -> None:
    broadcast = _broadcast(plan)
    sent = worker.work("train", 1, broadcast, _ignore)
    plain = PlanWorker(plan, dataset).work("train", 1, broadcast, _ignore)
    private = {layers.updates[place] for place in network.normalization if place < len(network.trainable)}
    private |= set(layers.moments)
    assert len(private) == len(network.normalization)
    for place, (found, shared) in enumerate(zip(sent, plain, strict=True)):
        assert shared.any(), "the plan alone sends it"
        np.testing.assert_array_equal(found, np.zeros_like(shared) if place in private else shared)


def test_the_site_keeps_what_its_update_would_have_made_of_the_global_model(
    plan: StudyPlan, network: Network, dataset: SiteDataset, layers: PersonalLayers
) -> None:
    train = plan.train
    broadcast = _broadcast(plan)
    sent = PlanWorker(plan, dataset).work("train", 1, broadcast, _ignore)
    _, own = layers.kept(sent, layers.taken(broadcast))
    state, total = train.initialize(), train.zero()
    train.accumulate(total, sent)
    updated = to_numpy(train.update(state, train.report(*total)))
    trained = [updated[place] for place in network.normalization if place < len(network.trainable)]
    for found, expected in zip(own, trained, strict=False):
        np.testing.assert_allclose(found, expected, atol=1e-6)
    moments = [sent[place] / dataset.patches for place in layers.moments]
    for index in range(0, len(moments), 2):
        mean, variance = own[len(trained) + index : len(trained) + index + 2]
        np.testing.assert_allclose(mean, moments[index], rtol=1e-6)
        np.testing.assert_allclose(variance, moments[index + 1] - moments[index] ** 2, rtol=1e-3)


def test_the_site_goes_on_from_its_own_values_whatever_is_broadcast_in_their_place(
    plan: StudyPlan, network: Network, dataset: SiteDataset, tmp_path: Path
) -> None:
    results = []
    for shift in (0, 7):
        worker = site_worker(plan, dataset, tmp_path / str(shift))
        assert isinstance(worker, PersonalWorker)
        _train(worker, 1, _broadcast(plan))
        broadcast = _broadcast(plan, 1)
        for place in network.normalization:
            broadcast[place] = broadcast[place] + shift
        results.append(_train(worker, 2, broadcast))
        evaluated = _broadcast(plan)[: len(worker.expected("evaluate"))]
        results[-1] = [*results[-1], *worker.work("evaluate", 2, evaluated, _ignore)]
    assert _equal(results[0], results[1])


def test_a_round_asked_for_again_gives_the_same_bits_after_later_ones_too(
    plan: StudyPlan, worker: PersonalWorker, tmp_path: Path
) -> None:
    first = _train(worker, 1, _broadcast(plan))
    second = _train(worker, 2, _broadcast(plan, 1))
    kept = [path.read_bytes() for path in _stored(tmp_path)]
    assert len(kept) == 2
    assert kept[0] != kept[1]
    assert _equal(_train(worker, 1, _broadcast(plan)), first)
    assert len(_stored(tmp_path)) == 1, "what came of the later round is of a run that was cut off"
    assert _equal(_train(worker, 2, _broadcast(plan, 1)), second)
    assert [path.read_bytes() for path in _stored(tmp_path)] == kept


def test_frozen_rounds_train_gains_and_leave_the_sites_statistics_as_they_are(
    plan: StudyPlan, network: Network, worker: PersonalWorker, layers: PersonalLayers, tmp_path: Path
) -> None:
    for number in range(1, ROUNDS + 1):
        _train(worker, number, _broadcast(plan, number - 1))
    store = PersonalStore(_stored(tmp_path)[0].parent, layers.specs)
    before, after = store.after(2), store.after(3)
    assert before is not None
    assert after is not None
    measured = len(network.statistics)
    assert _equal(before[-measured:], after[-measured:])
    assert not any(np.array_equal(one, two) for one, two in zip(before[:-measured], after[:-measured], strict=True))


def test_the_global_models_normalization_stays_as_it_began(
    plan: StudyPlan, network: Network, worker: PersonalWorker
) -> None:
    train = plan.train
    state = train.initialize()
    initial = to_numpy(state)[: len(network.specs)]
    for number in (1, 2):
        total = train.zero()
        train.accumulate(total, _train(worker, number, to_numpy(train.prepare(*state))))
        state = train.update(state, train.report(*total))[: len(state)]
    for place, (before, after) in enumerate(zip(initial, to_numpy(state), strict=False)):
        assert np.array_equal(before, after) == (place in network.normalization)


def test_a_round_given_up_leaves_nothing_behind(plan: StudyPlan, worker: PersonalWorker, tmp_path: Path) -> None:
    def give_up(batch: int, batches: int) -> None:
        if batch == 2:
            raise Cancelled

    worker.work("train", 1, _broadcast(plan), give_up)
    assert not list(tmp_path.rglob("00*"))


def _keep(store: PersonalStore, number: int, own: list[Array]) -> None:
    store.hold(number, own)
    store.sent(number)
    store.answered(number, True)


def test_old_rounds_are_removed_and_a_damaged_one_is_named(tmp_path: Path, layers: PersonalLayers) -> None:
    store = PersonalStore(tmp_path / "own", layers.specs)
    own = [np.ones(spec.shape, np.float32) for spec in layers.specs]
    for number in range(1, 8):
        _keep(store, number, own)
    assert [path.name for path in sorted((tmp_path / "own").iterdir())] == [f"{n:06d}.tensors" for n in (4, 5, 6, 7)]
    assert store.after(3) is None
    (tmp_path / "own" / "000007.tensors").write_bytes(b"torn")
    with pytest.raises(DataError, match=r"000007.tensors: this site's own normalization cannot be used .* remove the"):
        store.after(9)
    assert store.after(6) is not None


def test_a_folder_that_cannot_be_used_is_told(tmp_path: Path, layers: PersonalLayers) -> None:
    (tmp_path / "file").write_bytes(b"")
    own = [np.ones(spec.shape, np.float32) for spec in layers.specs]
    with pytest.raises(RunFolderError, match="own normalization cannot be written"):
        PersonalStore(tmp_path / "file" / "own", layers.specs).hold(1, own)
    with pytest.raises(RunFolderError, match="own normalization cannot be read"):
        PersonalStore(tmp_path / "file", layers.specs).after(1)


def test_another_order_of_what_is_sent_is_refused(tensorflow: None, plan: StudyPlan, network: Network) -> None:
    assert plan.evaluate is not None
    with pytest.raises(ValueError, match="expected a round that"):
        PersonalLayers.of(network, plan.evaluate)


def test_a_study_without_personal_layers_is_worked_on_as_it_is(
    plan: StudyPlan, dataset: SiteDataset, tmp_path: Path
) -> None:
    study = dataclasses.replace(plan.study, training=dataclasses.replace(plan.study.training, personal="none"))
    assert isinstance(site_worker(dataclasses.replace(plan, study=study), dataset, tmp_path), PlanWorker)


def test_values_of_another_study_plan_or_run_are_not_gone_on_from(
    plan: StudyPlan, dataset: SiteDataset, tmp_path: Path
) -> None:
    renamed = dataclasses.replace(plan, study=dataclasses.replace(plan.study, name="other"))
    changed = dataclasses.replace(plan, digest=bytes(32))
    made = [site_worker(each, dataset, tmp_path) for each in (plan, renamed, changed)]
    workers = [worker.of_run(run) for worker in made if isinstance(worker, PersonalWorker) for run in (b"1", b"2")]
    fresh = workers[0].work("evaluate", 1, _broadcast(plan)[: len(made[0].expected("evaluate"))], _ignore)
    _train(workers[0], 1, _broadcast(plan))
    assert len(_stored(tmp_path, "*/*/*")) == 1
    found = [
        worker.work("evaluate", 1, _broadcast(plan)[: len(made[0].expected("evaluate"))], _ignore) for worker in workers
    ]
    assert not _equal(found[0], fresh)
    assert all(_equal(each, fresh) for each in found[1:])
    assert len(_stored(tmp_path, "*/*/*")) == 1
