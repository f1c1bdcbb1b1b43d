"""The coordinator's side of privacy: who may still train, when a study ends early, and the noise of sums."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import stat
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff

from client.work import site_worker
from common.errors import BudgetSpentError
from common.learning.graph import leaf_types, to_numpy
from common.learning.noisy_sum import NoisyMeanFactory
from common.learning.plan import build_plan
from common.privacy.accounting import BUDGET_SPENT, NoisySteps, epsilon_of
from common.privacy.report import privacy_report, privacy_words
from common.study import NO_SECURE_AGGREGATION, Study, parse_study
from server.federation import Connection
from server.intake import Intake, Offer
from server.journal import Journal, read_history
from server.noise import Noise
from server.publishing.model_card import _privacy
from server.publishing.provenance import Provenance
from server.replay import RunHistory
from server.rounds import Kind
from server.status import describe, status_text
from server.tables import SiteLedger, read_table
from tests.client.private_site import private_dataset, private_study, write_cases
from tests.server.test_federation import PLAN, SITES, Coordinator, digits, killed, play
from tests.server.test_program import Disk, Models, study_of

SITE_STUDY = """
study: noisy
seed: 1
task: {dimensions: 2, channels: 1, classes: [background, cell]}
model: {filters: 4, depth: 1}
preprocessing: {patch: [16, 16]}
augmentation: []
training: {rounds: 9, client_optimizer: {name: sgd, learning_rate: 0.1}}
cohort: {sites: [alpha, beta, gamma], quorum: 2, deadline: 10m}
evaluation: {validation_fraction: 0}
privacy: {unit: site, epsilon: %g, delta: 1e-3, noise_multiplier: 4, clip_norm: 0.5}
"""


def _epsilon(sums: int) -> float:
    return epsilon_of([NoisySteps(1.0, 4.0, sums)], 1e-3)


def _site_study(rounds: int) -> Study:
    """A study whose budget is enough for so many rounds and for no more."""
    return parse_study(SITE_STUDY % ((_epsilon(rounds) + _epsilon(rounds + 1)) / 2))


# Patients: the sites refuse. ----------------------------------------------------------------------------------------


def test_a_round_goes_on_without_the_sites_that_have_spent_their_budget_while_the_quorum_is_met(tmp_path: Path) -> None:
    async def scene() -> None:
        coordinator = Coordinator(tmp_path)
        task = await coordinator.open()
        coordinator.send("alpha")
        coordinator.send("gamma")
        coordinator.federation.failed("beta", BUDGET_SPENT)
        assert digits(await task) == 13  # at once, and not at the deadline

    play(scene)


def test_a_round_that_the_quorum_has_no_budget_for_ends_the_study(tmp_path: Path) -> None:
    async def scene() -> None:
        coordinator = Coordinator(tmp_path)
        task = await coordinator.open()
        coordinator.send("alpha")
        coordinator.federation.failed("beta", BUDGET_SPENT)
        await asyncio.sleep(0.05)
        assert not task.done()
        coordinator.federation.failed("gamma", BUDGET_SPENT)
        with pytest.raises(BudgetSpentError, match=r"spent at beta, gamma, and round 1 needs 2 of 3 sites"):
            await task
        assert coordinator.federation.call is None
        reasons = [answer.reason for answer in coordinator.closed[0].round.answers.values()]
        assert reasons == ["", BUDGET_SPENT, BUDGET_SPENT]

    play(scene)


def test_a_site_without_budget_is_named_so_in_the_table_whatever_comes_after(tmp_path: Path) -> None:
    """The deadline passes, its line breaks, and it comes back: it has none left all the same."""

    async def scene() -> None:
        coordinator = Coordinator(tmp_path)
        task = await coordinator.open()
        coordinator.federation.failed("beta", BUDGET_SPENT)
        assert not coordinator.call.round.deadline()  # another attempt begins
        coordinator.federation.give_task("beta")
        coordinator.call.round.connected("beta")
        for site in ("alpha", "gamma"):
            coordinator.send(site)
        assert digits(await task) == 13
        SiteLedger(tmp_path / "sites.csv").record(coordinator.closed[0])
        rows = {row["site"]: (row["outcome"], row["reason"]) for row in read_table(tmp_path / "sites.csv").rows}
        assert rows["beta"] == ("failed", BUDGET_SPENT)

    play(scene)


def test_what_a_site_spent_on_an_update_that_is_not_taken_counts_too(tmp_path: Path) -> None:
    async def nothing() -> AsyncIterator[bytes]:
        return
        yield b""

    async def ask(position: int) -> None:
        raise AssertionError("it is not wanted")

    async def scene() -> None:
        coordinator = Coordinator(tmp_path)
        task = await coordinator.open()
        federation = coordinator.federation
        intake = Intake(federation)
        about: dict[str, Any] = {"size": 8, "cases": 1, "download": 0.0, "work": 0.0, "attempt": 1}
        late = Offer(site="beta", kind=Kind.TRAIN, number=1, sha256=bytes(32), broadcast=b"other", epsilon=2.5, **about)
        assert "computed from other weights" in (await intake.take(late, nothing(), ask)).refusal
        assert federation.spent == {"beta": 2.5}
        older = dataclasses.replace(late, epsilon=1.5, sha256=b"1" * 32)
        assert (await intake.take(older, nothing(), ask)).refusal
        size = dataclasses.replace(late, site="gamma", broadcast=coordinator.call.broadcast.digest, epsilon=3.0)
        assert "an update has" in (await intake.take(size, nothing(), ask)).refusal
        assert federation.spent == {"beta": 2.5, "gamma": 3.0}
        await killed(task, coordinator)
        assert read_history(tmp_path / "journal.sqlite").spent == {"beta": 2.5, "gamma": 3.0}

    play(scene)


def test_a_site_that_fails_otherwise_ends_no_study(tmp_path: Path) -> None:
    async def scene() -> None:
        coordinator = Coordinator(tmp_path)
        task = await coordinator.open()
        for site in ("alpha", "beta", "gamma"):
            coordinator.federation.failed(site, "its data can no longer be read")
        await asyncio.sleep(0.05)
        assert not task.done()
        await killed(task, coordinator)

    play(scene)


def test_what_sites_say_that_they_spent_is_in_the_journal_the_table_and_the_status(tmp_path: Path) -> None:
    async def scene() -> None:
        coordinator = Coordinator(tmp_path)
        task = await coordinator.open()
        for number, site in enumerate(SITES, start=1):
            path = coordinator.send(site)
            answer = coordinator.call.round.answers[site]
            assert answer.update is not None
            answer.update = None  # once more, with what it spent
            coordinator.federation.received(
                coordinator.call, site, _stored(path), cases=1, work=1.0, epsilon=float(number)
            )
        await task
        assert coordinator.federation.spent == {"alpha": 1.0, "beta": 2.0, "gamma": 3.0}
        ledger = SiteLedger(tmp_path / "sites.csv")
        ledger.record(coordinator.closed[0])
        assert [row["epsilon"] for row in read_table(tmp_path / "sites.csv").rows] == ["1.0", "2.0", "3.0"]
        assert ledger.summary(1)["epsilon"] == 3.0
        coordinator.journal.close()
        assert Coordinator(tmp_path).federation.spent == {"alpha": 1.0, "beta": 2.0, "gamma": 3.0}

    play(scene)


def _stored(path: Path) -> Any:
    import hashlib

    from common.wire.tensors import Stored

    return Stored(path, hashlib.sha256(path.read_bytes()).digest(), path.stat().st_size)


def test_studies_without_privacy_have_no_column_for_it(tmp_path: Path) -> None:
    async def scene() -> None:
        coordinator = Coordinator(tmp_path)
        task = await coordinator.open()
        for site in SITES:
            coordinator.send(site)
        await task
        ledger = SiteLedger(tmp_path / "sites.csv")
        ledger.record(coordinator.closed[0])
        assert "epsilon" not in read_table(tmp_path / "sites.csv").columns
        assert "epsilon" not in ledger.summary(1)
        assert coordinator.federation.privacy is None

    play(scene)


@pytest.mark.parametrize("spent_in", [3, 1])
def test_a_study_ends_with_the_rounds_before_the_one_that_no_budget_is_left_for(
    monkeypatch: pytest.MonkeyPatch, spent_in: int
) -> None:
    async def main() -> None:
        disk, models = Disk(), Models()
        disk.may_save.set()

        async def meanwhile(number: int) -> None:
            if number == spent_in:
                raise BudgetSpentError("the privacy budget is spent")

        run = study_of([None, None, None, None], disk, models, monkeypatch, meanwhile)  # type: ignore[list-item]
        if spent_in == 1:  # there is nothing to publish
            with pytest.raises(BudgetSpentError):
                await run
            return
        monkeypatch.setattr("server.program._evaluate", _no_metrics)
        outcome = await run
        assert (outcome.rounds, outcome.best_round) == (2, 2)
        assert outcome.ended == "the privacy budget is spent"
        assert 2 in models.kept  # of rounds without validation only the last one's model is kept

    asyncio.run(main())


async def _no_metrics(*arguments: Any) -> dict[str, Any]:
    return {}


def test_an_end_before_the_last_round_outlives_a_restart_and_a_repair_takes_it_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.sqlite")
    journal.ended(4, "the privacy budget is spent")
    assert journal.history().ended == "the privacy budget is spent"
    journal.returned(2)
    assert journal.history().ended == ""
    journal.close()


def test_two_private_rounds_of_two_sites_end_to_end(tensorflow: None, tmp_path: Path) -> None:
    study = private_study("epsilon: 50, delta: 1e-3, patients_per_step: 2, steps_per_round: 3, noise_multiplier: 0.8")
    plan = build_plan(study)
    assert plan.train.noise_seed is None
    workers = {}
    for site, patients in (("alpha", 4), ("beta", 6)):
        write_cases(tmp_path / site, [f"{site}{number}" for number in range(patients)])
        dataset = private_dataset(study, tmp_path / site, site=site)
        workers[site] = site_worker(plan, dataset, tmp_path / "work" / site)
    state = plan.train.initialize()
    begin = [value.copy() for value in to_numpy(state)]
    for number in (1, 2):
        broadcast = to_numpy(plan.train.prepare(*state))
        total = plan.train.zero()
        for worker in workers.values():
            update = worker.work("train", number, broadcast, lambda batch, batches: None)
            weights = [value for value in update if value.dtype == np.float32 and not value.ndim]
            assert [float(value) for value in weights] == [1.0]
            plan.train.accumulate(total, update)
        leaves = to_numpy(plan.train.update(state, plan.train.report(*total)))
        state, metrics = leaves[: len(begin)], leaves[len(begin) :]
        assert all(value.dtype.kind == "i" for value in metrics)  # no loss
        assert int(metrics[0]) == 6  # steps of both sites
    moved = max(np.abs(a - b).max() for a, b in zip(state, begin, strict=True) if a.dtype == np.float32)
    assert 0 < moved < 100
    for site, patients in (("alpha", 4), ("beta", 6)):
        by_hand = epsilon_of([NoisySteps(2 / patients, 0.8, 6)], 1e-3)
        assert workers[site].spent().epsilon == pytest.approx(by_hand)  # type: ignore[attr-defined]


# Sites: the coordinator adds noise. ---------------------------------------------------------------------------------

SPEC = [np.zeros((2, 3), np.float32), np.zeros(4, np.float32)]
TYPE = tff.to_type(((np.float32, [2, 3]), (np.float32, [4])))


def _updates() -> list[list[np.ndarray]]:
    rng = np.random.default_rng(5)
    return [[rng.normal(size=part.shape).astype(np.float32) * scale for part in SPEC] for scale in (0.1, 1.0, 5.0)]


def _mean(noise: float, seed: Sequence[int], updates: Sequence[Any]) -> np.ndarray:
    """The noisy mean of three sites with norm 0.5, by TFF's own runtime."""
    process = NoisyMeanFactory(0.5, noise, 3).create(TYPE, tff.TensorType(np.float32))
    state = process.initialize()
    state["seed"] = np.array(seed, np.int64)
    output = process.next(state, [tuple(update) for update in updates], [1.0, 7.0, 0.0])
    assert not np.asarray(output.state["seed"]).any()
    return np.concatenate([np.asarray(part).ravel() for part in output.result])


def test_the_noisy_mean_clips_each_site_and_ignores_weights_as_tffs_own_does() -> None:
    updates = _updates()
    found = _mean(0.0, (1, 2), updates)
    flat = [np.concatenate([part.ravel() for part in update]) for update in updates]
    by_hand = sum(update * min(1.0, 0.5 / np.linalg.norm(update)) for update in flat) / 3
    np.testing.assert_allclose(found, by_hand, atol=1e-6)
    stock = tff.aggregators.DifferentiallyPrivateFactory.gaussian_fixed(0.0, 3.0, 0.5).create(TYPE)
    theirs = stock.next(stock.initialize(), [tuple(update) for update in updates]).result
    np.testing.assert_allclose(found, np.concatenate([np.asarray(part).ravel() for part in theirs]), atol=1e-6)


def test_the_noise_of_a_sum_follows_from_its_seed_and_no_seed_gives_nothing() -> None:
    updates = _updates()
    quiet, first, again = (_mean(noise, (3, 4), updates) for noise in (0.0, 2.0, 2.0))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, _mean(2.0, (3, 5), updates))
    assert (first - quiet).std() == pytest.approx(2.0 * 0.5 / 3, rel=0.8)
    assert np.isnan(_mean(2.0, (0, 0), updates)).all()


class _Call:
    """A closed round of these updates."""

    def __init__(self, number: int, updates: dict[str, bytes], broadcast: bytes = b"w" * 32) -> None:
        answers = {site: SimpleNamespace(update=SimpleNamespace(digest=digest)) for site, digest in updates.items()}
        self.round = SimpleNamespace(number=number, included=sorted(updates), answers=answers)
        self.broadcast = SimpleNamespace(digest=broadcast, scalars=b"s")
        self.plan = SimpleNamespace(noise_seed=1)
        self.sum_digest = b""


@pytest.fixture
def noise(tmp_path: Path) -> Callable[[], Noise]:
    """The noise of a run with a budget for two rounds, as after a SIGKILL."""

    def make() -> Noise:
        return Noise(_site_study(2), tmp_path / "privacy", Journal(tmp_path / "journal.sqlite"))

    return make


def _seed(noise: Noise, call: _Call) -> bytes:
    state = noise.seeded(["weights", "seed", "rate"], call)  # type: ignore[arg-type]
    assert (state[0], state[2]) == ("weights", "rate")
    assert (state[1].dtype, state[1].shape) == (np.int64, (2,))
    return bytes(state[1].tobytes())


def test_a_sum_made_again_of_the_same_updates_has_the_same_noise_and_counts_once(noise: Callable[[], Noise]) -> None:
    call = _Call(1, {"alpha": b"a" * 32, "beta": b"b" * 32})
    first = _seed(noise(), call)
    again = noise()
    again.check(1)
    assert _seed(again, call) == first
    assert noise().epsilon == pytest.approx(_epsilon(1))


@pytest.mark.parametrize(
    "other",
    [
        _Call(1, {"alpha": b"a" * 32}),
        _Call(1, {"alpha": b"a" * 32, "beta": b"c" * 32}),
        _Call(1, {"alpha": b"a" * 32, "beta": b"b" * 32}, broadcast=b"x" * 32),
    ],
    ids=["another cohort", "another update", "other weights"],
)
def test_a_sum_of_anything_else_has_other_noise_and_counts_again(noise: Callable[[], Noise], other: _Call) -> None:
    one = noise()
    assert _seed(one, _Call(1, {"alpha": b"a" * 32, "beta": b"b" * 32})) != _seed(one, other)
    assert one.epsilon == pytest.approx(_epsilon(2))


def test_the_coordinator_stops_before_the_round_that_would_pass_the_budget(noise: Callable[[], Noise]) -> None:
    one = noise()
    for number in (1, 2):
        one.check(number)
        _seed(one, _Call(number, {"alpha": b"a" * 32}))
        one.saved(number)
    for stopped in (one, noise()):
        with pytest.raises(BudgetSpentError, match=r"budget is spent: epsilon is .* after round 3, at delta 0\.001"):
            stopped.check(3)
    assert one.epsilon <= _site_study(2).privacy.epsilon


def test_the_secret_of_the_noise_is_for_the_coordinator_alone_and_goes_once_the_round_is_saved(
    noise: Callable[[], Noise], tmp_path: Path
) -> None:
    one = noise()
    _seed(one, _Call(1, {"alpha": b"a" * 32}))
    (path,) = (tmp_path / "privacy").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.stat().st_size == 32
    one.saved(1)
    assert list((tmp_path / "privacy").iterdir()) == []
    assert os.urandom in one._secrets.__init__.__func__.__defaults__  # type: ignore[misc]


def test_the_plan_of_a_noisy_study_has_a_seed_and_sends_neither_weight_nor_loss(tensorflow: None) -> None:
    plan = build_plan(_site_study(2)).train
    place = plan.noise_seed
    assert place is not None
    leaf = leaf_types(plan.state_type)[place]
    assert (leaf.dtype, tuple(leaf.shape)) == (np.int64, (2,))
    assert all(spec.shape or spec.dtype != "float32" for spec in plan.sent)
    state = plan.initialize()
    broadcast = to_numpy(plan.prepare(*state))
    assert all(value.dtype != np.int64 for value in broadcast)  # the seed stays here
    element = (tf.TensorSpec([None, 16, 16, 1], tf.float32), tf.TensorSpec([None, 16, 16], tf.uint8))
    batch = (np.random.default_rng(0).normal(size=(2, 16, 16, 1)).astype(np.float32), np.ones((2, 16, 16), np.uint8))
    total = plan.zero()
    for _ in range(3):
        data = tf.data.Dataset.from_generator(lambda: iter([batch]), output_signature=element)
        plan.accumulate(total, plan.work(data, broadcast))
    results = []
    for seed in ((1, 2), (1, 2), (1, 3), (0, 0)):
        seeded = [np.array(seed, np.int64) if index == place else leaf for index, leaf in enumerate(state)]
        results.append(to_numpy(plan.update(seeded, plan.report(*total))))
    before, same, again, other, none = (
        [value for value in leaves if value.ndim > 1] for leaves in (to_numpy(state), *results)
    )
    for start, one, two, three, four in zip(before, same, again, other, none, strict=True):
        np.testing.assert_array_equal(one, two)
        assert not np.array_equal(one, three)
        np.testing.assert_array_equal(four, start)  # of the seed that everybody knows the mean is NaN, and is rejected


def test_a_federation_with_noise_seeds_the_state_of_training_rounds_and_stops(tmp_path: Path) -> None:
    async def scene() -> None:
        journal = Journal(tmp_path / "other.sqlite")
        own = Noise(_site_study(1), tmp_path / "privacy", journal)
        coordinator = Coordinator(tmp_path, SimpleNamespace(**{**vars(PLAN), "study": PLAN.study}))
        coordinator.federation._noise = own
        PLAN.train.noise_seed = 1
        for site in SITES:
            coordinator.federation.connect(Connection(site, "here"))
        task = await coordinator.open(1)
        for site in SITES:
            coordinator.send(site)
        result = await task
        assert np.asarray(result["state"]["rate"]).dtype == np.int64  # the seed went into its place
        coordinator.federation.saved(1)
        with pytest.raises(BudgetSpentError):
            await (await coordinator.open(2))

    play(scene)


# What is said. ------------------------------------------------------------------------------------------------------


def test_the_unit_is_named_wherever_epsilon_is() -> None:
    study = private_study("epsilon: 8")
    report = privacy_report(study, {"beta": 2.5, "alpha": 1.25}, 0.0)
    assert report is not None
    assert (report["unit"], report["epsilon"], report["sites"]) == ("patient", 2.5, {"alpha": 1.25, "beta": 2.5})
    words = "epsilon at least 2.50 of 8 spent at delta 1e-05, which protects each patient of each site"
    assert privacy_words(report) == words
    card = "\n\n".join(_privacy(study, report))
    assert words in card
    assert "| alpha | 1.250 |" in card
    validated = dataclasses.replace(study, evaluation=dataclasses.replace(study.evaluation, validation_fraction=0.2))
    assert "Validation is not covered" in "\n".join(_privacy(validated, report))
    assert "Validation is not covered" not in card
    text = status_text({"state": "training", "running": True, "study": "s", "round": 1, "privacy": report})
    assert f"{words} (alpha 1.25; beta 2.50)" in text
    assert privacy_report(parse_study(SITE_STUDY % 9), {}, 3.0)["epsilon"] == 3.0  # type: ignore[index]


def test_the_budget_that_hidden_spending_does_not_pass_is_an_upper_bound() -> None:
    secure = dataclasses.replace(NO_SECURE_AGGREGATION, protocol="bonawitz")
    study = dataclasses.replace(private_study("epsilon: 8"), secure_aggregation=secure)
    report = privacy_report(study, {}, 0.0)
    assert report is not None and "sites" not in report
    assert privacy_words(report).startswith("epsilon at most 8.00 of 8 spent")


def test_status_says_why_a_study_ended_early() -> None:
    status = {
        "study": "s",
        "state": "finished",
        "rounds": 9,
        "published": "p",
        "ended": {"round": 4, "reason": "the privacy budget is spent at beta"},
    }
    found = describe(status)
    assert found.headline == "s: finished after 4 of 9 rounds"
    assert found.cause.startswith("It ended early: the privacy budget is spent at beta. The model is published in p.")


def test_a_journal_that_was_begun_anew_counts_at_least_the_saved_rounds(
    noise: Callable[[], Noise], tmp_path: Path
) -> None:
    """What repair adopts of a run whose journal was lost: states, and no draw. The budget is for two rounds."""
    journal = Journal(tmp_path / "journal.sqlite")
    for number in (1, 2):
        path = tmp_path / f"state-{number}"
        path.write_bytes(bytes([number]))
        journal.state(number, _stored(path))
    assert noise().epsilon == pytest.approx(_epsilon(2))
    with pytest.raises(BudgetSpentError):
        noise().check(3)
    assert RunHistory(states={2: "b"}, noised=frozenset("xyz")).sums == 3


def test_papers_name_the_sites_of_a_privacy_report_by_their_pseudonyms() -> None:
    report = {"epsilon": 3.0, "sites": {"alpha": 1.0, "beta": 3.0}}
    written = Provenance(pseudonyms={"alpha": "site-9", "beta": "site-1"}).of_privacy(report)
    assert list(written["sites"].items()) == [("site-1", 3.0), ("site-9", 1.0)]
    assert "sites" not in Provenance().of_privacy({"epsilon": 1.0})
