"""A site's policy: how it is read, and what violates it."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from client import policy
from client.cli import main
from client.policy import (
    NO_POLICY,
    TEMPLATE,
    DifferentialPrivacy,
    Hours,
    Policy,
    Proposal,
    fetch_violations,
    parse_policy,
    read_policy,
    secure_policy,
    study_violations,
    task_violations,
    violations_text,
)
from client.study_privacy import StudyPrivacy, privacy_of
from common.cli import run_command
from common.errors import PolicyFileError
from common.secure_aggregation.session import SitePolicy
from common.study import SecureAggregation, Study

NOON = datetime.datetime(2026, 3, 2, 12, 0)


def keys(violations: list[policy.Violation]) -> list[str]:
    return [one.key for one in violations]


# The file. ----------------------------------------------------------------------------------------------------------


def test_an_empty_site_has_a_policy_that_asks_for_nothing(tiny_study: Callable[..., Study], tmp_path: Path) -> None:
    found = read_policy(tmp_path / "policy.yaml", required=False)
    assert (found.policy, found.path) == (NO_POLICY, None)
    assert study_violations(NO_POLICY, Proposal(tiny_study(), 0, "anywhere", {"train": 10**9})) == []
    assert task_violations(NO_POLICY, "train", 10**6, NOON) == []
    assert fetch_violations(NO_POLICY, "anywhere", "any") == []


def test_every_key_is_read_and_written_again() -> None:
    text = """
minimum_cases: 12
minimum_cohort: 4
secure_aggregation: required
differential_privacy: {maximum_epsilon: 8, at_delta: 1e-6, unit: any}
hours: "20:00-06:00"
tasks: [train]
coordinators: [Coordinator.Example.org, "2001:db8::1"]
maximum_rounds: 100
maximum_bytes_up: 50000000
models: [nuclei]
"""
    found = parse_policy(text)
    assert found == Policy(
        minimum_cases=12,
        minimum_cohort=4,
        secure_aggregation="required",
        differential_privacy=DifferentialPrivacy(maximum_epsilon=8.0, at_delta=1e-6, unit="any"),
        hours=Hours(20 * 60, 6 * 60),
        tasks=("train",),
        coordinators=("coordinator.example.org", "2001:db8::1"),
        maximum_rounds=100,
        maximum_bytes_up=50_000_000,
        models=("nuclei",),
    )
    assert parse_policy(found.to_yaml()) == found


def test_the_template_is_a_policy_and_so_are_its_comments() -> None:
    found = parse_policy(TEMPLATE)
    assert (found.minimum_cases, found.minimum_cohort, found.secure_aggregation) == (10, 3, "optional")
    lines = TEMPLATE[TEMPLATE.index("minimum_cases") :].splitlines()
    everything = parse_policy("\n".join(line.removeprefix("# ") for line in lines))
    assert everything.differential_privacy.maximum_epsilon == 8
    assert (str(everything.hours), everything.models) == ("20:00-06:00", ())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("minimum_case: 3\n", "minimum_case: unknown key; did you mean minimum_cases? Known here: "),
        ("tasks: [train]\nminimum_cohort: many\n", "expected a positive integer, found many (policy.yaml:2)"),
        ("secure_aggregation: yes\n", "secure_aggregation: expected required or optional, found yes (policy.yaml:1)"),
        ("hours: 8-20\n", 'hours: expected hours of the day, local time, in quotes, such as "20:00-06:00", found 8-20'),
        ('hours: "20:00-20:00"\n', "hours: expected hours of the day"),
        ('hours: "25:00-06:00"\n', "hours: expected hours of the day"),
        ("tasks: [predict]\n", "tasks[0]: expected train or evaluate, found predict (policy.yaml:1)"),
        ("coordinators: ['host:8443/x']\n", "coordinators[0]: expected a host name or address, without a port"),
        ("- one\n", "policy file: expected keys and values (minimum_cases, "),
        ("a: {\n", "policy file: not readable as YAML: "),
        ("", "policy.yaml: the policy file is empty, as one that was cut off; write the policy as"),
        (" \n\n", "the policy file is empty"),
        ("---\n", "policy file: expected keys and values (minimum_cases, "),
    ],
)
def test_what_is_wrong_is_said_with_its_line(text: str, message: str) -> None:
    with pytest.raises(PolicyFileError) as raised:
        parse_policy(text, "policy.yaml")
    assert message in str(raised.value)
    assert raised.value.exit_code == 2


def test_a_policy_whose_every_line_begins_with_a_hash_asks_for_nothing() -> None:
    commented = "".join(f"# {line}\n" for line in TEMPLATE.splitlines())
    assert parse_policy(commented + "\n  # the end", "policy.yaml") == NO_POLICY


def test_a_policy_that_somebody_named_must_be_there(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    with pytest.raises(PolicyFileError, match=r"policy\.yaml: there is no policy file; .*wardround-site policy init"):
        read_policy(path, required=True)
    path.write_bytes(b"minimum_cases: \xff")
    with pytest.raises(PolicyFileError, match="expected UTF-8 text"):
        read_policy(path, required=True)


# Studies. -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("minimum_cases: 8", "minimum_cases: at least 8 cases, this site has 7"),
        (
            "minimum_cohort: 3",
            "minimum_cohort: at least 3 sites in every sum, a round of this study counts with 2 (cohort.quorum)",
        ),
        (
            "secure_aggregation: required",
            "secure_aggregation: required, this study has none: the coordinator would see this site's own update",
        ),
        (
            "differential_privacy: {maximum_epsilon: 8}",
            "differential_privacy: epsilon at most 8 at delta 1e-05, this study has no differential privacy",
        ),
        ("coordinators: [b.org]", "coordinators: only b.org, this one is A.org"),
        ("maximum_rounds: 1", "maximum_rounds: at most 1 rounds, this study has 2"),
        ("maximum_bytes_up: 999", "maximum_bytes_up: at most 999 bytes an update, this one has 1,000"),
    ],
)
def test_a_study_that_violates_a_point_is_told_which(text: str, words: str, tiny_study: Callable[..., Study]) -> None:
    proposal = Proposal(tiny_study(), 7, "A.org", {"train": 1000, "evaluate": 10})
    assert violations_text(study_violations(parse_policy(text), proposal)) == [words]
    met = text.replace("8", "7").replace(": 3", ": 2").replace("b.org", "a.ORG").replace(": 1", ": 2")
    met = met.replace("999", "1000")
    if "required" not in text and "epsilon" not in text:
        assert study_violations(parse_policy(met), proposal) == []


def test_what_is_not_known_yet_is_not_held_against_a_study(tiny_study: Callable[..., Study]) -> None:
    found = parse_policy("minimum_cases: 8\ncoordinators: [b.org]\nmaximum_bytes_up: 9\n")
    assert study_violations(found, Proposal(tiny_study())) == []


def test_a_study_of_this_version_has_neither_protection(tiny_study: Callable[..., Study]) -> None:
    assert privacy_of(tiny_study()) == StudyPrivacy("none", "none", 0.0, 0.0, False)


@pytest.mark.parametrize(
    ("asked", "unit", "epsilon", "delta", "expected"),
    [
        ("{maximum_epsilon: 8}", "patient", 8.0, 1e-5, []),
        ("{maximum_epsilon: 8}", "patient", 8.1, 1e-5, ["differential_privacy.maximum_epsilon"]),
        ("{maximum_epsilon: 8}", "patient", 4.0, 1e-3, ["differential_privacy.maximum_epsilon"]),
        ("{maximum_epsilon: 8}", "site", 4.0, 1e-6, ["differential_privacy.unit"]),
        ("{maximum_epsilon: 8, unit: any}", "site", 4.0, 1e-6, []),
        ("{maximum_epsilon: 8, unit: any}", "none", 0.0, 0.0, ["differential_privacy"]),
    ],
)
def test_a_budget_is_held_to_the_ceiling(
    asked: str,
    unit: str,
    epsilon: float,
    delta: float,
    expected: list[str],
    tiny_study: Callable[..., Study],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(policy, "privacy_of", lambda study: StudyPrivacy("none", unit, epsilon, delta))
    found = parse_policy(f"differential_privacy: {asked}")
    assert keys(study_violations(found, Proposal(tiny_study()))) == expected


# Tasks. -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hours", "now", "inside", "seconds"),
    [
        ("20:00-06:00", (20, 0), True, 0),
        ("20:00-06:00", (5, 59), True, 0),
        ("20:00-06:00", (6, 0), False, 14 * 3600),
        ("20:00-06:00", (19, 59), False, 60),
        ("08:00-12:30", (12, 29), True, 0),
        ("08:00-12:30", (12, 30), False, 19 * 3600 + 1800),
        ("00:00-24:00", (13, 0), True, 0),
        ("20:00-24:00", (0, 0), False, 20 * 3600),
    ],
)
def test_hours_may_reach_over_midnight(hours: str, now: tuple[int, int], inside: bool, seconds: float) -> None:
    found = parse_policy(f'hours: "{hours}"').hours
    assert found is not None
    moment = datetime.datetime(2026, 3, 2, *now)
    assert (found.holds(moment), found.seconds_until(moment)) == (inside, seconds)
    assert str(found) == hours


def test_a_task_that_violates_a_point_is_told_which() -> None:
    found = parse_policy('hours: "20:00-06:00"\ntasks: [train]\nmaximum_rounds: 3\n')
    assert violations_text(task_violations(found, "evaluate", 4, NOON)) == [
        "tasks: only train, the coordinator asks to evaluate",
        "maximum_rounds: at most 3 rounds, the coordinator asks for round 4",
        "hours: 20:00-06:00 local time, it is 12:00",
    ]
    assert task_violations(found, "train", 3, NOON.replace(hour=22)) == []
    (late,) = task_violations(found, "train", 3, NOON)
    assert (late.reason, late.opens_in) == ("its site's policy forbids it: hours", 8 * 3600)


def test_models_of_other_studies_and_coordinators_are_not_fetched() -> None:
    found = parse_policy("models: [nuclei]\ncoordinators: [a.org]\n")
    assert fetch_violations(found, "a.org", "nuclei") == []
    assert fetch_violations(found, "a.org", None) == []
    assert keys(fetch_violations(found, "b.org", "liver")) == ["coordinators", "models"]
    assert violations_text(fetch_violations(parse_policy("models: []"), "b.org", "liver")) == [
        "models: published models of these studies: none; this one is of liver"
    ]


# The command. -------------------------------------------------------------------------------------------------------


def test_a_policy_is_made_checked_and_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "site" / "policy.yaml"
    assert main(["policy", "init", str(path)]) == 0
    assert path.read_text() == TEMPLATE
    assert main(["policy", "init", str(path)]) == 2
    assert "there is a file already" in capsys.readouterr().err
    assert main(["policy", "check", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: a policy without faults\n"
    monkeypatch.setenv("WARDROUND_SITE_POLICY", str(path))
    assert main(["policy", "show", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["minimum_cases"] == 10
    path.write_text("minimum_cases: none\n")
    assert main(["policy", "check", str(path)]) == 2
    assert f"minimum_cases: expected a positive integer, found none ({path}:1)" in capsys.readouterr().err


def test_a_study_is_held_against_a_policy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_study: Callable[..., Study]
) -> None:
    path, study = tmp_path / "policy.yaml", tmp_path / "study.yaml"
    study.write_text(tiny_study().to_yaml())
    path.write_text("minimum_cohort: 5\n")
    assert run_command(lambda: main(["policy", "check", str(path), "--study", str(study)])) == 12
    assert capsys.readouterr().out.splitlines() == [
        f"{path}: the study violates it:",
        "  minimum_cohort: at least 5 sites in every sum, a round of this study counts with 2 (cohort.quorum)",
    ]
    path.write_text("minimum_cohort: 2\n")
    assert main(["policy", "check", str(path), "--study", str(study)]) == 0


# Secure aggregation. --------------------------------------------------------------------------------------------------


def secure_study(tiny_study: Callable[..., Study], **keys: int) -> Study:
    study = tiny_study()
    settings = SecureAggregation(
        protocol="bonawitz", largest_update=1.0, largest_weight=100, **{"threshold": 4, "minimum_cohort": 4, **keys}
    )
    cohort = dataclasses.replace(study.cohort, sites=("a", "b", "c", "d", "e"), quorum=5)
    return dataclasses.replace(study, cohort=cohort, secure_aggregation=settings)


def test_a_study_with_secure_aggregation_meets_a_policy_that_requires_it(tiny_study: Callable[..., Study]) -> None:
    required = parse_policy("secure_aggregation: required\n")
    assert keys(study_violations(required, Proposal(tiny_study()))) == ["secure_aggregation"]
    assert study_violations(required, Proposal(secure_study(tiny_study))) == []


def test_a_threshold_of_no_more_than_two_thirds_is_refused_unless_the_policy_allows_it(
    tiny_study: Callable[..., Study],
) -> None:
    study = secure_study(tiny_study, threshold=3)
    assert violations_text(study_violations(NO_POLICY, Proposal(study))) == [
        "minimum_threshold: at least 4 sites to unmask a sum, in this study it takes 3 (secure_aggregation.threshold)"
    ]
    assert study_violations(parse_policy("minimum_threshold: 3\n"), Proposal(study)) == []
    assert keys(study_violations(parse_policy("minimum_threshold: 5\n"), Proposal(study))) == ["minimum_threshold"]


def test_the_minimum_cohort_is_held_against_what_a_secure_sum_needs(tiny_study: Callable[..., Study]) -> None:
    study = secure_study(tiny_study)  # its quorum is 5, yet sites may drop out while the sum is made
    assert violations_text(study_violations(parse_policy("minimum_cohort: 5\n"), Proposal(study))) == [
        "minimum_cohort: at least 5 sites in every sum, a round of this study counts with 4 "
        "(secure_aggregation.threshold)"
    ]
    assert study_violations(parse_policy("minimum_cohort: 4\n"), Proposal(study)) == []


def test_what_is_asked_of_each_sum_follows_from_the_policy(tiny_study: Callable[..., Study]) -> None:
    study = secure_study(tiny_study)
    assert secure_policy(NO_POLICY, study) == SitePolicy(minimum_cohort=3, minimum_threshold=4)
    asked = parse_policy("minimum_cohort: 5\nminimum_threshold: 3\n")
    assert secure_policy(asked, study) == SitePolicy(minimum_cohort=5, minimum_threshold=3)
