"""The parts of a study file that protect: privacy and secure aggregation, and what they rule out elsewhere."""

from __future__ import annotations

import json

import pytest

from common.study import parse_study
from tests.common.studies import BASE, changed, problems

# Privacy. ----------------------------------------------------------------------------------------------------------

_PATIENT = BASE + "privacy:\n  unit: patient\n  epsilon: 8\n"


def test_a_study_without_privacy_keeps_the_canonical_text_that_it_had_before_there_was_any() -> None:
    assert "privacy" not in json.loads(parse_study(BASE).canonical())
    assert parse_study(BASE + "privacy: {unit: none}\n") == parse_study(BASE)
    assert parse_study(BASE + "privacy: {unit: none}\n").canonical() == parse_study(BASE).canonical()


def test_privacy_has_the_documented_defaults_and_counts_every_site_the_same() -> None:
    study = parse_study(_PATIENT)
    privacy = study.privacy
    assert (privacy.unit, privacy.epsilon, privacy.delta) == ("patient", 8.0, 1e-5)
    assert (privacy.noise_multiplier, privacy.clip_norm) == (1.0, 1.0)
    assert (privacy.patients_per_step, privacy.steps_per_round, privacy.crops_per_patient) == (8.0, 10, 1)
    assert study.training.weighting == "equal"
    assert parse_study(study.to_yaml()) == study
    site = parse_study(_PATIENT.replace("patient", "site"))
    assert (site.privacy.unit, site.privacy.steps_per_round) == ("site", 0)
    assert "steps_per_round" not in json.loads(site.canonical())["privacy"]
    assert parse_study(site.to_yaml()) == site


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("unit: hospital", "privacy.unit: expected none, patient or site, found hospital (s.yaml:20)"),
        ("unit: patient", "privacy.epsilon: expected a number above 0, the budget, found nothing (s.yaml:20)"),
        ("epsilon: 8", "privacy.epsilon: expected no value with unit: none (it belongs to patient or site), found 8"),
        ("unit: site\n  epsilon: 0", "privacy.epsilon: expected a number above 0 and of at most 1000, found 0"),
        ("unit: site\n  epsilon: 8\n  delta: 0.5", "privacy.delta: expected a number above 0 and of at most 0.1"),
        (
            "unit: patient\n  epsilon: 8\n  noise_multiplier: 0",
            "privacy.noise_multiplier: expected a number above 0 and of at most 1000, found 0",
        ),
        (
            "unit: site\n  epsilon: 8\n  patients_per_step: 4",
            "privacy.patients_per_step: expected no value with unit: site (it belongs to patient), found 4",
        ),
        ("unit: patient\n  epsilon: 8\n  noise: 1", "privacy.noise: unknown key"),
    ],
)
def test_wrong_privacy_keys_are_refused(text: str, expected: str) -> None:
    found = problems(BASE + f"privacy:\n  {text}\n")
    assert any(line.startswith(expected) for line in found), found


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "  depth: 3\n",
            "  depth: 3\n  normalization: batch\n",
            "model.normalization: expected no batch normalization with privacy.unit: patient",
        ),
        (
            "  rounds: 24\n",
            "  rounds: 24\n  weighting: examples\n",
            "training.weighting: expected equal with privacy.unit: patient",
        ),
        (
            "  rounds: 24\n",
            "  rounds: 24\n  clip_norm: 1\n",
            "training.clip_norm: expected null with privacy.unit: patient",
        ),
        (
            "  rounds: 24\n",
            "  rounds: 24\n  patches_per_epoch: 10\n",
            "training.patches_per_epoch: expected null with privacy.unit: patient",
        ),
        (
            "  rounds: 24\n",
            "  rounds: 24\n  local_epochs: 2\n",
            "training.local_epochs: expected 1 with privacy.unit: patient",
        ),
    ],
)
def test_what_privacy_rules_out_is_refused(old: str, new: str, expected: str) -> None:
    (found,) = problems(_PATIENT.replace(old, new))
    assert found.startswith(expected)


# Secure aggregation. --------------------------------------------------------------------------------------------------

FIVE = changed("sites: [west, east]", "sites: [west, east, north, south, middle]")


def secure(keys: str = "protocol: bonawitz", base: str = FIVE) -> str:
    return f"{base}secure_aggregation: {{{keys}}}\n"


def test_secure_aggregation_has_defaults_that_follow_from_the_cohort() -> None:
    assert not parse_study(FIVE).secure_aggregation.required
    found = parse_study(secure()).secure_aggregation
    assert found.required
    assert (found.threshold, found.minimum_cohort) == (4, 4)  # floor(2 * 5 / 3) + 1
    assert (found.largest_update, found.largest_weight) == (1.0, 10_000)


def test_the_largest_weight_follows_from_the_patches_where_the_study_says_how_many() -> None:
    base = FIVE.replace("  rounds: 24\n", "  rounds: 24\n  patches_per_epoch: 30\n  local_epochs: 2\n")
    assert parse_study(secure(base=base)).secure_aggregation.largest_weight == 60


def test_a_study_without_secure_aggregation_keeps_its_canonical_text() -> None:
    assert "secure_aggregation" not in json.loads(parse_study(FIVE).canonical())
    assert json.loads(parse_study(secure()).canonical())["secure_aggregation"]["threshold"] == 4


def test_a_secure_study_is_written_and_read_again() -> None:
    study = parse_study(secure("protocol: bonawitz, threshold: 3, minimum_cohort: 5, largest_update: 0.5"))
    assert parse_study(study.to_yaml()) == study


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            secure(base=BASE),
            "secure_aggregation.protocol: expected none with 2 sites: a sum of fewer than 3 updates hides none of "
            "them, found bonawitz (s.yaml:19)",
        ),
        (
            secure("protocol: bonawitz, threshold: 2"),
            "secure_aggregation.threshold: expected 3 to 5, more than half of the 5 sites of cohort.sites and at most "
            "all, found 2 (s.yaml:19)",
        ),
        (
            secure("protocol: bonawitz, minimum_cohort: 6"),
            "secure_aggregation.minimum_cohort: expected at most 5, the number of sites, found 6 (s.yaml:19)",
        ),
        (
            secure("threshold: 3"),
            "secure_aggregation.threshold: expected no value with protocol: none (it belongs to bonawitz), found 3 "
            "(s.yaml:19)",
        ),
        (
            secure(base=f"{FIVE}  quorum: 3\n"),
            "cohort.quorum: expected 4 or more, secure_aggregation's threshold (4) and minimum cohort (4), found 3 "
            "(s.yaml:19)",
        ),
        (
            secure(base=FIVE.replace("  depth: 3", "  depth: 3\n  normalization: batch")),
            "model.normalization: expected no batch normalization with secure_aggregation.protocol: bonawitz (its "
            "moments have no known range), found batch (s.yaml:10)",
        ),
    ],
)
def test_secure_aggregation_that_cannot_work_is_refused(text: str, problem: str) -> None:
    assert problems(text) == [problem]
