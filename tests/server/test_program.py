"""Which round's model a study publishes, and what the loop keeps while it writes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorflow_federated as tff

from common.errors import RoundSkippedError, RunFolderError
from server.program import Releases, best_after, run_study


def chosen(scores: Sequence[float | None]) -> tuple[int, float]:
    """The round that the program goes through these scores with as the best, and its score."""
    program = {"best_round": 0, "best_score": -1.0, "highest": -1.0}
    for number, score in enumerate(scores, start=1):
        program |= best_after(program, number, score)
    return int(program["best_round"]), float(program["best_score"])


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.5, 0.8, 0.7], 2),
        ([0.8821, 0.8812, 0.8820, 0.8817], 4),
        ([0.8821, 0.8790], 1),
        # Each is hardly worse than the one before, the last is much worse than the highest.
        ([0.8900, 0.8895, 0.8886, 0.8879, 0.8872], 2),
        ([0.0, 0.0], 2),
    ],
)
def test_of_rounds_that_differ_by_chance_the_last_is_taken(scores: Sequence[float], expected: int) -> None:
    assert chosen(scores) == (expected, pytest.approx(scores[expected - 1]))


def test_where_sites_do_not_validate_the_last_round_is_taken() -> None:
    assert chosen([None, None, None]) == (3, -1.0)


class Disk:
    """A program state manager on which a state takes as long as the test lets it."""

    def __init__(self, *, fails: bool = False) -> None:
        self.may_save = asyncio.Event()
        self.fails = fails

    async def load_latest(self, structure: Any) -> tuple[Any, int]:
        return None, 0

    async def save(self, program: Any, version: int) -> None:
        if self.fails:
            raise RunFolderError("state: cannot be written")
        await self.may_save.wait()


class Models:
    """A release manager of models in memory, with the removal that the coordinator asks for."""

    def __init__(self) -> None:
        self.kept: list[int] = []
        self.removals: list[tuple[int, int]] = []

    async def release(self, value: Any, key: int) -> None:
        self.kept.append(key)

    async def saved(self, number: int, best_round: int, score: float | None) -> None:
        self.removals.append((number, best_round))
        self.kept = [kept for kept in self.kept if kept == best_round or kept > number]


class Data:
    """A data source of nothing."""

    def iterator(self) -> Data:
        return self

    def select(self, k: int | None = None) -> None:
        return None


def study_of(
    scores: Sequence[float], disk: Disk, models: Models, monkeypatch: pytest.MonkeyPatch, meanwhile: Any, *rows: Any
) -> Any:
    """Runs the program on computations that are made up; `meanwhile` is awaited within each round of training."""
    weights = SimpleNamespace(trainable=[np.float32(1)], non_trainable=[])
    rounds = iter(scores)

    async def train(state: int, data: Any) -> Any:
        await meanwhile(state + 1)
        return state + 1, {"client_work": {"train": {"loss": 0.5}}}

    async def evaluate(*arguments: Any) -> Any:
        return {"dice": next(rounds)}

    async def value(structure: Any) -> Any:
        return await structure if asyncio.iscoroutine(structure) else structure

    monkeypatch.setattr(tff.program, "check_in_federated_context", lambda: None)
    monkeypatch.setattr(tff.program, "materialize_value", value)
    monkeypatch.setattr("server.program._evaluate", evaluate)
    process = SimpleNamespace(initialize=lambda: 0, next=train, get_model_weights=lambda state: weights)
    return run_study(
        SimpleNamespace(train=process, evaluate=None),  # type: ignore[arg-type]
        training_data=Data(),
        validation_data=None,
        rounds=len(scores),
        classes=["cell"],
        states=disk,
        releases=Releases(rows, models, models.saved),  # type: ignore[arg-type]
    )


def test_on_a_slow_disk_the_newly_best_model_outlives_the_state_of_the_round_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        disk, models = Disk(), Models()
        kept: list[list[int]] = []

        async def meanwhile(number: int) -> None:
            if number == 3:  # the state of round 1 was written all through round 2
                kept.append(list(models.kept))

        class Rows:
            async def release(self, value: Any, key: int) -> None:
                if key == 2:  # the model of round 2 is released, the state of round 1 is not saved
                    assert models.kept == [1, 2]
                    disk.may_save.set()

        outcome = await study_of([0.5, 0.8, 0.4], disk, models, monkeypatch, meanwhile, Rows())
        assert outcome.best_round == 2
        assert models.removals[0] == (1, 1)
        assert kept[0][-1] == 2
        assert models.kept == [2]

    asyncio.run(main())


def test_a_disk_that_takes_no_state_ends_the_study_within_the_next_round(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async def meanwhile(number: int) -> None:
            if number == 2:
                await asyncio.Event().wait()  # the sites take hours

        with pytest.raises(RunFolderError, match="cannot be written"):
            await asyncio.wait_for(study_of([0.5, 0.8], Disk(fails=True), Models(), monkeypatch, meanwhile), 20)

    asyncio.run(main())


def study_with_skips(
    rounds: int, skipped: set[int], evaluation: Any, monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, list[tuple[int, list[str]]], dict[int, int]]:
    """A study whose training counts in its only weight: the outcome, the rows, and the models that were released."""
    rows: list[tuple[int, list[str]]] = []
    models: dict[int, int] = {}
    numbers = iter(range(1, rounds + 1))

    class Rows:
        async def release(self, value: Any, key: int) -> None:
            rows.append((key, sorted(value)))

    class Kept:
        async def release(self, value: Any, key: int) -> None:
            models[key] = int(value[0])

    async def train(state: int, data: Any) -> Any:
        if (number := next(numbers)) in skipped:
            raise RoundSkippedError(f"round {number} is skipped")
        return state + 1, {"client_work": {"train": {"loss": 0.5}}}

    async def value(structure: Any) -> Any:
        return await structure if asyncio.iscoroutine(structure) else structure

    async def study() -> Any:
        disk = Disk()
        disk.may_save.set()
        training = SimpleNamespace(
            initialize=lambda: 0,
            next=train,
            get_model_weights=lambda state: SimpleNamespace(trainable=[np.float32(state)], non_trainable=[]),
        )
        return await run_study(
            SimpleNamespace(train=training, evaluate=evaluation),  # type: ignore[arg-type]
            training_data=Data(),
            validation_data=Data() if evaluation is not None else None,  # type: ignore[arg-type]
            rounds=rounds,
            classes=["cell"],
            states=disk,  # type: ignore[arg-type]
            releases=Releases([Rows()], Kept()),  # type: ignore[list-item, arg-type]
        )

    monkeypatch.setattr(tff.program, "check_in_federated_context", lambda: None)
    monkeypatch.setattr(tff.program, "materialize_value", value)
    return asyncio.run(study()), rows, models


def test_a_round_that_is_skipped_changes_nothing_and_the_next_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    validated = iter(range(1, 5))

    async def evaluate(state: Any, data: Any) -> Any:
        number = next(validated)
        if number == 3:
            raise RoundSkippedError("round 4 is skipped")
        found = {"dice": np.float32(number / 10), "sites": 3}
        return state, {"client_work": {"eval": {"current_round_metrics": found}}}

    evaluation = SimpleNamespace(initialize=lambda: 0, next=evaluate, set_model_weights=lambda state, weights: state)
    outcome, rows, models = study_with_skips(4, {2}, evaluation, monkeypatch)

    # Round 2 is not trained, hence not validated either; the validation of round 4 is lost.
    assert rows == [(1, ["train", "validation"]), (2, []), (3, ["train", "validation"]), (4, ["train"])]
    assert models == {1: 1, 3: 2, 4: 3}
    assert (outcome.best_round, outcome.rounds) == (3, 4)


@pytest.mark.parametrize(("skipped", "best"), [({3}, 2), ({2, 3}, 1), ({2}, 3), ({1, 2, 3}, 3)])
def test_without_validation_the_last_round_that_was_trained_is_kept_also_where_later_ones_are_skipped(
    skipped: set[int], best: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome, _, models = study_with_skips(3, skipped, None, monkeypatch)
    assert outcome.best_round == best
    assert models[best] == 3 - len(skipped)
