"""What private rounds spend: against figures worked out by hand, and against the library's own events."""

from __future__ import annotations

import math

import pytest
from dp_accounting import dp_event
from dp_accounting.rdp import RdpAccountant

from common.privacy.accounting import NoisySteps, epsilon_of, round_of_cohort, round_of_site, sampling_rate
from common.study import NO_PRIVACY, Privacy

PRIVACY = Privacy(
    unit="patient",
    epsilon=8.0,
    delta=1e-5,
    noise_multiplier=1.0,
    clip_norm=1.0,
    patients_per_step=8.0,
    steps_per_round=35,
    crops_per_patient=1,
)


@pytest.mark.parametrize(
    ("batch", "patients", "delta", "epsilon"), [(8, 259, 1 / 2590, 3.498), (4, 33, 1 / 330, 14.730)]
)
def test_420_steps_at_noise_1_spend_what_the_reference_says(
    batch: int, patients: int, delta: float, epsilon: float
) -> None:
    assert epsilon_of([NoisySteps(batch / patients, 1.0, 420)], delta) == pytest.approx(epsilon, abs=5e-4)


def test_rounds_add_up_to_the_same_as_their_steps_at_once() -> None:
    rounds = [round_of_site(PRIVACY, 259)] * 12
    assert rounds[0] == NoisySteps(8 / 259, 1.0, 35)
    assert epsilon_of(rounds, 1 / 2590) == epsilon_of([NoisySteps(8 / 259, 1.0, 420)], 1 / 2590)


def test_settings_that_changed_compose_as_the_library_composes_them() -> None:
    accountant = RdpAccountant()
    accountant.compose(dp_event.PoissonSampledDpEvent(0.1, dp_event.GaussianDpEvent(1.5)), 30)
    accountant.compose(dp_event.PoissonSampledDpEvent(0.2, dp_event.GaussianDpEvent(2.0)), 10)
    spent = [NoisySteps(0.1, 1.5, 20), NoisySteps(0.2, 2.0, 10), NoisySteps(0.1, 1.5, 10)]
    assert epsilon_of(spent, 1e-4) == pytest.approx(accountant.get_epsilon(1e-4), rel=1e-12)


def test_a_noisy_sum_over_all_sites_is_a_gaussian_mechanism() -> None:
    # RDP of Gaussians at order a: k a / (2 z^2); the library's conversion only improves on + log(1/delta) / (a - 1).
    rounds, noise, delta = 10, 4.0, 1e-5
    rho = rounds / (2 * noise**2)
    bound = rho + 2 * math.sqrt(rho * math.log(1 / delta))
    found = epsilon_of([round_of_cohort(Privacy(**_site(noise)))] * rounds, delta)
    assert 0.7 * bound < found < bound


def _site(noise: float) -> dict[str, object]:
    kept = {name: getattr(NO_PRIVACY, name) for name in ("patients_per_step", "steps_per_round", "crops_per_patient")}
    return {"unit": "site", "epsilon": 8.0, "delta": 1e-5, "noise_multiplier": noise, "clip_norm": 1.0, **kept}


def test_nothing_spends_nothing_and_no_noise_spends_everything() -> None:
    assert epsilon_of([], 1e-5) == 0.0
    assert epsilon_of([NoisySteps(0.1, 1.0, 0)], 1e-5) == 0.0
    assert epsilon_of([NoisySteps(0.1, 0.0, 1)], 1e-5) == math.inf


def test_a_site_with_fewer_patients_than_a_step_expects_takes_them_all() -> None:
    assert sampling_rate(PRIVACY, 5) == 1.0
    assert sampling_rate(PRIVACY, 16) == 0.5
