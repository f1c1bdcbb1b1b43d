"""The noise of privacy at the level of sites: its secret, what it spends, and the hard stop before a round too many.

The noise of a round's sum follows from a secret of the coordinator's operating system, the weights that the round began
from and the very updates that are summed. So a coordinator that is killed and sums the same updates again adds the same
noise, which counts once; where anything differs the noise does too, and counts again: two sums under one noise would
differ by a site's update alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import BudgetSpentError
from common.privacy.accounting import epsilon_of, round_of_cohort
from common.privacy.secrets import Secrets
from common.study import Study
from server.calls import Call
from server.journal import Journal


class Noise:
    """What the sums of a run are noised with.

    Parameters
    ----------
    study : has `privacy.unit: site`.
    folder : where the secrets of rounds that are not saved lie.
    journal : where each draw is recorded before it is used.

    Raises
    ------
    RunFolderError : from every method: folder or journal cannot be read or written.
    """

    def __init__(self, study: Study, folder: Path, journal: Journal) -> None:
        self._study = study
        self._journal = journal
        self._secrets = Secrets(folder)
        history = journal.history()
        self._draws = set(history.noised)
        self._forgotten = history.sums - len(history.noised)  # by a journal that had to be begun anew
        self._known: dict[int, float] = {}

    @property
    def epsilon(self) -> float:
        """What all sums so far have spent together."""
        return self._epsilon(len(self._draws) + self._forgotten)

    def check(self, number: int) -> None:
        """Raises BudgetSpentError where this round would pass the budget, unless its noise may be drawn already."""
        if not self._secrets.has(number):
            self._allow(number)

    def seeded(self, state: Sequence[Any], call: Call) -> list[Any]:
        """A round's state with the seed of its noise in its place, counted and durable.

        Raises
        ------
        BudgetSpentError : the round would pass the budget; nothing is counted.
        """
        round_ = call.round
        key = hashlib.sha256(self._secrets.of(round_.number))
        key.update(call.broadcast.digest + call.broadcast.scalars)
        if call.sum_digest:  # of a secure sum no update is known; the sum is kept, and made once
            key.update(b"sum\0" + call.sum_digest)
        for site in () if call.sum_digest else round_.included:
            update = round_.answers[site].update
            assert update is not None, "it is included"
            key.update(site.encode() + b"\0" + update.digest)
        draw = hashlib.sha256(b"draw" + key.digest()).hexdigest()[:32]
        if draw not in self._draws:
            self._allow(round_.number)
            self._journal.noised(round_.number, draw)
            self._draws.add(draw)
        seed = np.frombuffer(key.digest()[:16], np.int64)
        place = call.plan.noise_seed
        assert place is not None, "the plan of such a study adds noise"
        return [seed if index == place else leaf for index, leaf in enumerate(state)]

    def saved(self, number: int) -> None:
        """The state of this round is on disk: its sum is not made again."""
        self._secrets.forget(number)

    def _allow(self, number: int) -> None:
        privacy = self._study.privacy
        after = self._epsilon(len(self._draws) + self._forgotten + 1)
        if after > privacy.epsilon:
            raise BudgetSpentError(
                f"the privacy budget is spent: epsilon is {self.epsilon:.2f} now and would be {after:.2f} after round "
                f"{number}, at delta {privacy.delta:g}; privacy.epsilon is {privacy.epsilon:g}"
            )

    def _epsilon(self, sums: int) -> float:
        if sums not in self._known:
            spent = [round_of_cohort(self._study.privacy)] * sums
            self._known[sums] = epsilon_of(spent, self._study.privacy.delta)
        return self._known[sums]
