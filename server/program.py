"""The training program: the loop over rounds, written against `tff.program` alone, so that it runs on any TFF platform.

Wardround runs it on `server.federation`; the tests run the same loop on TFF's native runtime.
"""

from __future__ import annotations

import asyncio
import collections
import copy
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow_federated as tff

from common.errors import BudgetSpentError, RoundSkippedError

Metrics = Mapping[str, Any]

NO_WORSE = 0.001
"""How far below the highest a later round's validation Dice may be for the round to be taken nevertheless: so much is
chance, and its weights were trained longer and at a lower rate."""


@dataclass(frozen=True)
class Outcome:
    """Where a study ended: the rounds done, and the round whose model the sites' validation chose (see `NO_WORSE`).

    `ended` is why it ended before its last round; "" where it did not.
    """

    rounds: int
    best_round: int
    best_score: float | None
    ended: str = ""


@dataclass(frozen=True)
class Learning:
    """The study's processes: training, and evaluation at the sites or None where they keep no validation cases."""

    train: tff.learning.templates.LearningProcess
    evaluate: tff.learning.templates.LearningProcess | None


async def _not_told(number: int, best_round: int, score: float | None) -> None:
    """Where nobody wants to know what is saved."""


@dataclass(frozen=True)
class Releases:
    """Where results go: metrics to every manager of `metrics`, weights worth keeping to `model`.

    `saved` is awaited when a round's state is saved, and when a saved one was loaded: with the round, the best round so
    far and its validation Dice. What only rounds up to this one need may go then. Nothing of later ones: the next round
    is under way, and may have released its model already.
    """

    metrics: Sequence[tff.program.ReleaseManager]
    model: tff.program.ReleaseManager
    saved: Callable[[int, int, float | None], Awaitable[None]] = _not_told


async def run_study(
    learning: Learning,
    *,
    training_data: tff.program.FederatedDataSource,
    validation_data: tff.program.FederatedDataSource | None,
    rounds: int,
    classes: Sequence[str],
    states: tff.program.ProgramStateManager,
    releases: Releases,
    evaluate_holdout: Callable[[Any], Awaitable[Metrics]] | None = None,
    annotate: Callable[[int], Metrics] = lambda number: {},
    start: Sequence[Any] | None = None,
) -> Outcome:
    """Train from the last saved state, or from the beginning, to the last round.

    Where the platform raises BudgetSpentError for a round, the study ends with the rounds before it; the error is
    raised where there are none. Where it raises RoundSkippedError, the study goes on with the state before the round,
    which has a row without metrics; a validation that is skipped leaves the best round as it was.

    Parameters
    ----------
    learning : the compiled processes.
    training_data, validation_data : what the sites train on and are evaluated on, a selection a round.
    rounds : the number of the last round.
    classes : names of the foreground classes, for the metrics.
    states : where the state to go on from is saved after every round.
    releases : where metrics and weights go.
    evaluate_holdout : maps the weights to the coordinator's own metrics.
    annotate : what the platform knows of a round (sites, seconds), put before its metrics.
    start : the weights to begin from, in the order in which they are released; None: those of the process.
    """
    tff.program.check_in_federated_context()
    initial = await tff.program.materialize_value(learning.train.initialize())
    if start is not None:
        # Optimizers begin anew: what they remember is of another study's updates.
        chosen = _model_of(learning.train, start)
        initial = await tff.program.materialize_value(learning.train.set_model_weights(initial, chosen))
    beginning = collections.OrderedDict(
        state=initial,
        training_data=training_data.iterator(),
        validation_data=validation_data.iterator() if validation_data is not None else np.int32(0),
        best_round=np.int32(0),
        best_score=np.float32(-1.0),
        highest=np.float32(-1.0),
    )
    saved, done = await states.load_latest(beginning)
    program = beginning if saved is None else saved
    del initial, beginning, saved  # each holds a model; the loop keeps one
    if done:
        await releases.saved(done, int(program["best_round"]), _score(program))
    saving = asyncio.create_task(_nothing())
    ended = ""
    for number in range(done + 1, rounds + 1):
        data = program["training_data"].select()
        trained = tff.program.materialize_value(learning.train.next(program["state"], data))
        try:
            state, metrics = await _beside(saving, trained)
        except BudgetSpentError as error:
            if number == 1:
                raise
            rounds, ended = number - 1, str(error)
            break
        except RoundSkippedError:
            state, metrics = program["state"], None
        weights = await tff.program.materialize_value(learning.train.get_model_weights(state))
        evaluated = asyncio.gather(
            _evaluate(learning.evaluate, weights, program["validation_data"], classes, metrics is None),
            evaluate_holdout(_tensors(weights)) if evaluate_holdout is not None and metrics is not None else _nothing(),
        )
        validation, holdout = await _beside(saving, evaluated)
        score = validation.get("dice")
        better = {} if metrics is None or validation.get("skipped") else best_after(program, number, score)
        program["state"] = state
        program.update(better)
        if (better and score is not None) or number == rounds:
            await releases.model.release(_tensors(weights), number)
        row = collections.OrderedDict(annotate(number))
        if metrics is not None:
            row["train"] = metrics["client_work"]["train"]
        if "dice" in validation:
            row["validation"] = validation
        if holdout:
            row["holdout"] = holdout
        await asyncio.gather(*(manager.release(row, number) for manager in releases.metrics))
        await saving
        # The next round begins while this one's state is written; what a crash loses then is computed again to the same
        # bits, from the same updates.
        snapshot = collections.OrderedDict((key, copy.copy(value)) for key, value in program.items())
        saving = asyncio.create_task(_save(states, snapshot, number, releases))
        saving.add_done_callback(_heard)
        del state, weights, snapshot, trained, evaluated
    await saving
    if not program["best_round"]:  # no round was both trained and validated: the last one's model is kept
        program["best_round"] = np.int32(rounds)
    best = int(program["best_round"])
    if _score(program) is None and (ended or best != rounds):
        # It was not known to be the last that is trained: the budget is spent, or those after it were skipped.
        weights = await tff.program.materialize_value(learning.train.get_model_weights(program["state"]))
        await releases.model.release(_tensors(weights), best)
    return Outcome(rounds, best, _score(program), ended)


def best_after(program: Mapping[str, Any], number: int, score: float | None) -> Mapping[str, Any]:
    """What a round changes of "best_round", "best_score" (its own) and "highest" (of all so far, -1 at first).

    Nothing where it is worse by `NO_WORSE` or more; a round without a score, as sites do not validate, is never worse.
    """
    if score is None:
        return {"best_round": np.int32(number)}
    if score <= program["highest"] - NO_WORSE:
        return {}
    own = np.float32(score)
    return {"best_round": np.int32(number), "best_score": own, "highest": max(program["highest"], own)}


async def _save(
    states: tff.program.ProgramStateManager, program: Mapping[str, Any], number: int, releases: Releases
) -> None:
    """Saves; only then may go what the state before still needs."""
    await states.save(program, number)
    await releases.saved(number, int(program["best_round"]), _score(program))


def _heard(task: asyncio.Task[Any]) -> None:
    """Python complains of errors that nobody asked for; another one has ended the study then."""
    if not task.cancelled():
        task.exception()


async def _beside(saving: asyncio.Task[Any], work: Awaitable[Any]) -> Any:
    """The result of `work`; where `saving` fails meanwhile, its error at once, as nobody should wait a round for it."""
    working = asyncio.ensure_future(work)
    try:
        await asyncio.wait({working, saving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            await saving
        return await working
    finally:
        working.cancel()


def _tensors(weights: tff.learning.models.ModelWeights) -> list[Any]:
    """A model's weights as they are kept and published: what is trained, then the statistics."""
    return [*weights.trainable, *weights.non_trainable]


def _model_of(process: tff.learning.templates.LearningProcess, weights: Sequence[Any]) -> Any:
    """`_tensors`, the other way round."""
    trained = len(process.get_model_weights.type_signature.result.trainable)
    return tff.learning.models.ModelWeights(tuple(weights[:trained]), tuple(weights[trained:]))


def _score(program: Mapping[str, Any]) -> float | None:
    """The best validation score so far; None where sites do not validate."""
    score = float(program["best_score"])
    return score if score >= 0 else None


async def _evaluate(
    process: tff.learning.templates.LearningProcess | None,
    weights: Any,
    data: Any,
    classes: Sequence[str],
    skip: bool,
) -> Metrics:
    """The sites' validation of these weights: Dice over classes and of each; every site counts the same.

    `skip`: weights that were validated before; the selection is taken nevertheless, as rounds are counted by it.
    """
    if process is None:
        return {}
    selection = data.select()
    if skip:
        return {"skipped": True}
    state = process.set_model_weights(process.initialize(), weights)
    try:
        _, metrics = await tff.program.materialize_value(process.next(state, selection))
    except RoundSkippedError:
        return {"skipped": True}
    found = metrics["client_work"]["eval"]["current_round_metrics"]
    dice = np.atleast_1d(found["dice"])
    return collections.OrderedDict(
        dice=float(np.mean(dice)),
        sites=int(found["sites"]),
        **{"class": collections.OrderedDict((name, float(value)) for name, value in zip(classes, dice, strict=True))},
    )


async def _nothing() -> Any:
    return {}
