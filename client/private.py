"""Patient-level private training at a site: its own accounting, its own randomness, and its own hard stop.

The site trusts nobody with its budget. From its own number of patients it works out what a round would spend, by its
own copy of the study, and does not begin one that would pass the budget; it says so to the coordinator by name.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from client.privacy_ledger import Entry, Ledger, now
from client.private_dataset import PrivateSiteDataset, SecretDraw
from client.work import OnBatch, PlanWorker, Spent
from common.errors import BudgetSpentError, DataError
from common.privacy.accounting import epsilon_of, round_of_site
from common.privacy.secrets import Secrets
from common.version import VERSION
from common.wire.tensors import Array, TensorSpec

if TYPE_CHECKING:
    from common.learning.plan import StudyPlan

_log = logging.getLogger("wardround.site")
_KEPT_ROUNDS = 2  # the state of the round before the last is saved when a round begins; that of the last may not be


class PrivateWorker:
    """A worker for studies with `privacy.unit: patient`; a `Spender`.

    Parameters
    ----------
    plan : the study's.
    dataset : the site's patients.
    folder : `privacy` of the site's work folder.
    ceiling : the most epsilon that all studies of this work folder may spend together, at the study's delta; None
        leaves it at each study's own budget.
    report : called with what `wardround-site status` shows.
    run : tells runs of the study apart.

    Raises
    ------
    DataError : the site has no patient to train on, or too many for the study's delta.
    RunFolderError : what was spent before cannot be read.
    """

    def __init__(
        self,
        plan: StudyPlan,
        dataset: PrivateSiteDataset,
        folder: Path,
        *,
        ceiling: float | None = None,
        report: Callable[[dict[str, Any]], None] = lambda status: None,
        run: bytes = b"",
    ) -> None:
        privacy, patients = plan.study.privacy, len(dataset.patients)
        if not patients:
            raise DataError("private training: this site has no case to train on; add some, or leave the study")
        if privacy.delta * patients >= 1:
            raise DataError(
                f"privacy.delta: {privacy.delta:g} means nothing at {patients} patients, where it must be well below "
                f"{1 / patients:.2g}; the study needs a smaller one"
            )
        self._plan, self._dataset, self._folder, self._ceiling = plan, dataset, folder, ceiling
        self._report, self._run = report, run.hex()[:16]
        self._worker = PlanWorker(plan, dataset)
        self._ledger = Ledger(folder)
        self._secrets = Secrets(folder / f"{plan.study.name}-{plan.digest.hex()[:16]}-{self._run}")
        self._round = round_of_site(privacy, patients)
        self.digest = plan.digest
        self.training_cases = self._worker.training_cases
        self.validation_cases = self._worker.validation_cases
        self._tell()

    def for_run(self, run: bytes) -> PrivateWorker:
        """See `Spender`."""
        return PrivateWorker(
            self._plan, self._dataset, self._folder, ceiling=self._ceiling, report=self._report, run=run
        )

    def expected(self, kind: str) -> Sequence[TensorSpec]:
        """See `Worker`."""
        return self._worker.expected(kind)

    def cases(self, kind: str) -> int:
        """See `Worker`."""
        return self._worker.cases(kind)

    def work(self, kind: str, round_number: int, broadcast: Sequence[Array], on_batch: OnBatch) -> Sequence[Array]:
        """See `Worker`.

        Raises
        ------
        BudgetSpentError : the round would pass the budget; nothing was trained.
        """
        if kind != "train":
            return self._worker.work(kind, round_number, broadcast, on_batch)
        self._secrets.forget(round_number - _KEPT_ROUNDS)
        key = self._key(round_number, broadcast)
        draw = hashlib.sha256(b"draw" + key).hexdigest()[:32]
        if not self._ledger.has(draw):
            self._check(round_number)
        whole = True

        def step(index: int) -> None:
            nonlocal whole
            try:
                on_batch(index + 1, self._dataset.training_batches)
            except BaseException:
                whole = False
                raise

        self._dataset.failure = None
        update = self._plan.train.work(self._dataset.private_training(SecretDraw(key), step), broadcast)
        if self._dataset.failure is not None:
            raise self._dataset.failure
        if whole and not self._ledger.has(draw):  # before it can leave
            self._ledger.append(self._entry(round_number, draw))
            self._tell()
        return update

    def spent(self) -> Spent:
        """See `Spender`."""
        delta = self._plan.study.privacy.delta
        return Spent(self._epsilon(self._ledger.entries(self._plan.study.name)), delta)

    def finished(self) -> None:
        """See `Spender`."""
        self._secrets.forget()

    def _key(self, round_number: int, broadcast: Sequence[Array]) -> bytes:
        """From what the round's randomness follows: its secret, and all that decides what is computed with it."""
        digest = hashlib.sha256(self._secrets.of(round_number))
        digest.update(self._plan.digest + self._dataset.digest + round_number.to_bytes(8, "big") + VERSION.encode())
        for value in broadcast:
            digest.update(f"{value.dtype.str}{value.shape}".encode())
            digest.update(value.tobytes())
        return digest.digest()

    def _check(self, round_number: int) -> None:
        """Raises BudgetSpentError where this round is one too many."""
        study = self._plan.study
        following = self._entry(round_number, "")
        limits = [(study.privacy.epsilon, self._ledger.entries(study.name), "the study's budget")]
        if self._ceiling is not None:
            limits.append((self._ceiling, self._ledger.entries(), "this site's own ceiling over all studies"))
        for limit, entries, whose in limits:
            before, after = self._epsilon(entries), self._epsilon([*entries, following])
            if after > limit:
                raise BudgetSpentError(
                    f"round {round_number}: its privacy budget is spent. Epsilon is {before:.2f} now and would be "
                    f"{after:.2f} after the round, at delta {study.privacy.delta:g}; {whose} is {limit:g}. This site "
                    "trains no more in this study"
                )

    def _epsilon(self, entries: Sequence[Entry]) -> float:
        return epsilon_of([entry.spent for entry in entries], self._plan.study.privacy.delta)

    def _entry(self, round_number: int, draw: str) -> Entry:
        spent, name = self._round, self._plan.study.name
        patients = len(self._dataset.patients)
        return Entry(
            name, self._run, round_number, draw, patients, spent.rate, spent.noise_multiplier, spent.steps, now()
        )

    def _tell(self) -> None:
        privacy, dataset = self._plan.study.privacy, self._dataset
        alone, cases = dataset.images_alone, self.training_cases
        words = f"each of {len(dataset.patients)} patients"
        if alone == cases:
            words = f"each of {cases} images (nothing is known of patients here)"
        elif alone:
            words += f" ({alone} of {cases} images name no patient, and count as one each)"
        spent = self.spent().epsilon
        _log.info(
            "privacy protects %s; epsilon %.2f of %g spent, delta %g", words, spent, privacy.epsilon, privacy.delta
        )
        self._report(
            {
                "privacy": {
                    "unit": "image" if alone == cases else "patient",
                    "protects": words,
                    "epsilon": round(spent, 4),
                    "budget": privacy.epsilon,
                    "ceiling": self._ceiling,
                    "delta": privacy.delta,
                }
            }
        )
