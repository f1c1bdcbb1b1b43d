"""What privacy is spent: epsilon at delta of noisy sums, by Rényi differential privacy (library `dp-accounting`).

A step is a sum of clipped contributions with Gaussian noise, of which each contributor is part by chance, independently
of the others (Poisson sampling). Neighbouring data sets differ by one contributor, added or removed. Steps compose, and
so do the rounds that they make up (Abadi et al. 2016, arXiv:1607.00133; Mironov et al. 2019, arXiv:1908.10530):

    >>> round(epsilon_of([NoisySteps(rate=8 / 259, noise_multiplier=1.0, steps=420)], delta=1 / 2590), 2)
    3.5

The bound holds for whoever sees every single step. TensorFlow is not needed here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from common.study import Privacy

BUDGET_SPENT = "its privacy budget is spent"
"""The reason with which a site refuses a round. The coordinator does not ask that site again in that round."""

UNITS = {
    "patient": "each patient of each site",
    "site": "each site with all of its patients",
}
"""Whom the noise protects, in words for people, by `privacy.unit`."""


@dataclass(frozen=True)
class NoisySteps:
    """So many equal steps.

    Attributes
    ----------
    rate : the chance of a contributor to be part of a step, above 0; 1 where all are part of all.
    noise_multiplier : standard deviation of the noise, in units of the norm that contributions are clipped to.
    """

    rate: float
    noise_multiplier: float
    steps: int = 1


def epsilon_of(spent: Iterable[NoisySteps], delta: float) -> float:
    """Epsilon at `delta` of all these steps together; 0 of none, infinite of any without noise."""
    from dp_accounting import dp_event
    from dp_accounting.rdp import RdpAccountant

    counts: dict[tuple[float, float], int] = {}
    for part in spent:
        if part.steps:
            key = (part.rate, part.noise_multiplier)
            counts[key] = counts.get(key, 0) + part.steps
    if not counts:
        return 0.0
    if any(noise <= 0 for _, noise in counts):
        return math.inf
    accountant = RdpAccountant()
    for (rate, noise), steps in sorted(counts.items()):
        event: dp_event.DpEvent = dp_event.GaussianDpEvent(noise)
        if rate < 1:
            event = dp_event.PoissonSampledDpEvent(rate, event)
        accountant.compose(event, steps)
    return float(accountant.get_epsilon(delta))


def sampling_rate(privacy: Privacy, patients: int) -> float:
    """The chance of a patient to be part of a step, of a site with so many patients."""
    return min(1.0, privacy.patients_per_step / patients)


def round_of_site(privacy: Privacy, patients: int) -> NoisySteps:
    """What a round of patient-level training spends at a site with so many patients."""
    return NoisySteps(sampling_rate(privacy, patients), privacy.noise_multiplier, privacy.steps_per_round)


def round_of_cohort(privacy: Privacy) -> NoisySteps:
    """What a noisy sum over all sites spends; every site counts as asked in every round."""
    return NoisySteps(1.0, privacy.noise_multiplier)
