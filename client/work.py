"""What a site computes for a task: the plan's `work` on its own data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from common.secure_aggregation.masking import InputSpec, payload_bytes
from common.wire.tensors import Array, TensorSpec, encoded_size

if TYPE_CHECKING:
    from pathlib import Path

    from client.datasets import SiteDataset
    from common.learning.plan import RoundPlan, StudyPlan
    from common.study import Study

OnBatch = Callable[[int, int], None]


class Worker(Protocol):
    """What the agent needs of whoever does the work; a benchmark puts something else in its place."""

    digest: bytes
    training_cases: int
    validation_cases: int

    def expected(self, kind: str) -> Sequence[TensorSpec]:
        """The types of the broadcast of a "train" or "evaluate" task."""

    def work(self, kind: str, round_number: int, broadcast: Sequence[Array], on_batch: OnBatch) -> Sequence[Array]:
        """The tensors to send. `on_batch(k, n)` is called as batch k of n begins and may raise to end the work.

        Raises
        ------
        DataError : a case can no longer be read.
        RunFolderError : the work folder cannot be read or written.
        """

    def cases(self, kind: str) -> int:
        """How many cases the task's work is on."""


@runtime_checkable
class Keeper(Protocol):
    """A worker that keeps something from round to round: it must know of which run, and what became of its updates.

    Its methods raise RunFolderError where the work folder cannot be read or written.
    """

    def of_run(self, run: bytes) -> Worker:
        """The worker for the run that these bytes identify; it knows nothing of other runs."""

    def held(self, round_number: int) -> bytes:
        """What identifies the values kept for a round's update that has no answer yet; b"" where there are none."""

    def sending(self, round_number: int) -> None:
        """The coordinator does not hold the update, and asks for bytes of it; called each time that it does."""

    def sent(self, round_number: int) -> None:
        """The update's last bytes are about to go out: from here on the coordinator may hold it."""

    def answered(self, round_number: int, accepted: bool) -> None:
        """Whether the coordinator took the update."""


@dataclass(frozen=True)
class Spent:
    """The privacy that a site has spent in a study so far: epsilon at delta."""

    epsilon: float
    delta: float


@runtime_checkable
class Spender(Protocol):
    """A worker whose training spends a privacy budget. Its `work` raises BudgetSpentError where a round would pass it.

    Its methods raise RunFolderError where the work folder cannot be read or written.
    """

    def for_run(self, run: bytes) -> Worker:
        """The worker for the run that these bytes identify."""

    def spent(self) -> Spent:
        """What all rounds that may have left have spent together."""

    def finished(self) -> None:
        """The study is over."""


class PlanWorker:
    """Trains and evaluates by the plan on a site's data set."""

    def __init__(self, plan: StudyPlan, dataset: SiteDataset) -> None:
        self._plan = plan
        self._dataset = dataset
        self.digest = plan.digest
        self.training_cases = len(dataset.training_cases)
        self.validation_cases = len(dataset.validation_cases)

    def expected(self, kind: str) -> Sequence[TensorSpec]:
        """See `Worker`."""
        return self._round_plan(kind).broadcast

    def work(self, kind: str, round_number: int, broadcast: Sequence[Array], on_batch: OnBatch) -> Sequence[Array]:
        """See `Worker`."""
        self._dataset.failure = None
        if kind == "train":
            total = self._dataset.training_batches
            data = self._dataset.training(round_number, lambda index: on_batch(index + 1, total))
        else:
            total = self.validation_cases
            data = self._dataset.validation(lambda index: on_batch(index + 1, total))
        update = self._round_plan(kind).work(data, broadcast)
        if self._dataset.failure is not None:
            raise self._dataset.failure
        return update

    def cases(self, kind: str) -> int:
        """See `Worker`."""
        return self.training_cases if kind == "train" else self.validation_cases

    def _round_plan(self, kind: str) -> RoundPlan:
        plan = self._plan.train if kind == "train" else self._plan.evaluate
        assert plan is not None, "a study without validation has no evaluate tasks"
        return plan


def site_plan(study: Study) -> StudyPlan:
    """The study's plan as this machine computes it fastest, where the study lets it choose."""
    from common.learning.plan import build_plan
    from common.models import operations_for

    return build_plan(study, operations_for(study))


def update_bytes(plan: StudyPlan) -> dict[str, int]:
    """The size of what is sent for a task, by its kind, to the byte; of masked updates the most, without a header."""
    rounds = {"train": plan.train, "evaluate": plan.evaluate}
    sites = len(plan.study.cohort.sites)
    return {
        kind: payload_bytes(one.secure, sites) if one.secure else encoded_size(one.sent)
        for kind, one in rounds.items()
        if one is not None
    }


def secure_specs(plan: StudyPlan) -> dict[str, Sequence[InputSpec]]:
    """Shapes and bit widths of what is summed securely for a task, by its kind."""
    rounds = {"train": plan.train, "evaluate": plan.evaluate}
    return {kind: one.secure for kind, one in rounds.items() if one is not None}


def site_worker(
    plan: StudyPlan,
    dataset: SiteDataset,
    folder: Path,
    *,
    epsilon_ceiling: float | None = None,
    report: Callable[[dict[str, Any]], None] = lambda status: None,
) -> Worker:
    """Who does a site's work.

    Parameters
    ----------
    dataset : as `client.cli` made it: a `PrivateSiteDataset` where the study has `privacy.unit: patient`.
    folder : the site's own, where personal layers and the ledger of privacy are kept.
    epsilon_ceiling, report : see `PrivateWorker`.

    Raises
    ------
    DataError, RunFolderError : see `PrivateWorker`.
    """
    if plan.study.privacy.unit == "patient":
        from client.private import PrivateWorker
        from client.private_dataset import PrivateSiteDataset

        assert isinstance(dataset, PrivateSiteDataset), "made for another study"
        return PrivateWorker(plan, dataset, folder / "privacy", ceiling=epsilon_ceiling, report=report)
    worker = PlanWorker(plan, dataset)
    if plan.study.training.personal == "none":
        return worker
    from client.personal import PersonalWorker
    from common.learning.personal import PersonalLayers
    from common.models import build_network

    layers = PersonalLayers.of(build_network(plan.study), plan.train)
    own = folder / "personal" / f"{plan.study.name}-{plan.digest.hex()[:16]}"
    return PersonalWorker(worker, layers, own, dataset.make_room)
