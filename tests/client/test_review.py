"""`wardround-site review`, `approve` and `reject`: what the operator is shown and what becomes of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from client.cli import main
from client.package import installed_package
from client.review import leaving, privacy_words
from client.study_privacy import privacy_of
from common.cli import run_command
from common.security.audit_check import check_log
from common.security.authorities import trusted_authority
from common.security.certificates import ensure_simulation_identities
from common.study import SecureAggregation, Study
from tests.client.private_site import TEXT, private_study


class Site:
    """A site on disk and its commands, as an operator would type them."""

    def __init__(self, folder: Path, study: Study, capsys: pytest.CaptureFixture[str]) -> None:
        self.study = folder / "study.yaml"
        self.study.write_text(study.to_yaml())
        self.data = folder / "images"
        for part in ("images", "labels"):
            (self.data / part).mkdir(parents=True)
        for number in range(4):
            for part in ("images", "labels"):
                tifffile.imwrite(self.data / part / f"patient-{number:03d}.tif", np.zeros((24, 24), np.uint8))
        ensure_simulation_identities(folder / "identities", study.name, ["alpha", "beta"], ["localhost"])
        self.identity = folder / "identities" / "sites" / "alpha"
        self.work = folder / "work"
        self.policy = self.work / "policy.yaml"
        self.approvals = self.work / "approvals.jsonl"
        self._capsys = capsys

    def __call__(self, command: str, *more: str, data: bool = True) -> tuple[int, str, str]:
        """Exit code, output and errors of a command on this site."""
        arguments = [command, str(self.study), "--work", str(self.work), "--identity", str(self.identity), *more]
        if data:
            arguments += ["--data", str(self.data)]
        code = run_command(lambda: main(arguments))
        found = self._capsys.readouterr()
        return code, found.out, found.err

    def start(self) -> tuple[int, str]:
        """Exit code and message of a start, which nobody answers."""
        code, _, errors = self("start", "--site", "alpha", "--coordinator", "localhost:1")
        return code, errors

    def rules(self, text: str) -> None:
        self.work.mkdir(exist_ok=True)
        self.policy.write_text(text)


@pytest.fixture
def site(
    tmp_path: Path,
    tiny_study: Callable[..., Study],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Site:
    monkeypatch.chdir(tmp_path)  # where nobody registered data
    monkeypatch.delenv("WARDROUND_SITE_POLICY", raising=False)
    return Site(tmp_path, tiny_study(), capsys)


# The review. --------------------------------------------------------------------------------------------------------


def test_the_review_says_what_would_run_on_which_data_and_what_leaves(site: Site) -> None:
    code, page, _ = site("review")
    text = " ".join(page.split())
    assert code == 0
    for words in (
        "Study tiny, at site alpha",
        "unet for 2D images, 7,482 weights",
        "background, cell (classes)",
        "2; in each this site trains on 6 patches of its own",
        "2 (alpha, beta); a round counts with 2",
        f"folder {site.data}: 4 cases, 4 with a label, patients not known",
        "an update of 7,482 weights = 29,928 bytes",
        "images, labels, or parts of them",
        "personal layers not used: all layers are shared",
        "differential privacy not used: nothing bounds what an update says of one patient",
        "secure aggregation not used: the coordinator can read this site's own update",
        f"package {installed_package().digest} (Wardround",
        "There is none: whatever is approved may run. `wardround-site policy init` makes one.",
        "none: this study was not approved here",
    ):
        assert words in text
    assert "patient-" not in page
    assert not site.work.exists()


def test_the_number_of_weights_is_that_of_the_network(site: Site, tiny_study: Callable[..., Study]) -> None:
    from common.network_sizes import size_of

    shown = json.loads(site("review", "--json")[1])
    assert shown["weights"] == size_of(tiny_study()).weights
    assert shown["update_bytes"] == 4 * shown["weights"]


def test_the_review_names_patients_nowhere_and_counts_them(site: Site) -> None:
    registry = ["--registry", str(site.work.parent / "registry.sqlite")]
    main(["data", "add", "mri", str(site.data), "--patient-pattern", "^patient-(.)", *registry])
    arguments = ["review", str(site.study), "--site", "alpha", "--data", "mri", *registry]
    site._capsys.readouterr()
    assert main(arguments) == 0
    page = site._capsys.readouterr().out
    assert f"data set mri ({site.data}): 4 cases, 4 with a label, 1 patient\n" in page
    assert "patient-" not in page


def test_the_review_says_which_points_of_the_policy_are_violated(site: Site) -> None:
    site.rules("minimum_cases: 5\nsecure_aggregation: required\ncoordinators: [a.org]\n")
    code, page, _ = site("review", "--coordinator", "b.org:8443")
    assert code == 12
    assert f"{site.policy}: the study violates 3 points of it, and would not run." in page
    assert "minimum_cases: at least 5 cases, this site has 4" in page
    assert "coordinators: only a.org, this one is b.org" in page


def test_the_review_knows_earlier_decisions_and_what_has_changed_since(site: Site) -> None:
    site("approve", "--by", "Dr. Kim", "--note", "as agreed")
    assert "approved by Dr. Kim on 2" in (page := site("review")[1]) and ": as agreed" in page
    site.study.write_text(site.study.read_text().replace("rounds: 2", "rounds: 9"))
    page = site("review")[1]
    assert "but changed since then; it has to be approved again:\n    training.rounds: 2 -> 9" in page
    site("reject", "--by", "Dr. Lee", data=False)
    assert "rejected by Dr. Lee on 2" in site("review")[1]


def test_the_review_without_a_place_says_what_it_did_not_look_at(site: Site) -> None:
    assert main(["review", str(site.study), "--data", str(site.data)]) == 0
    assert "not looked at: --work was not given" in site._capsys.readouterr().out


def test_the_review_of_a_private_study_says_what_its_training_is_and_sends(site: Site) -> None:
    keys = "epsilon: 3, delta: 1e-5, patients_per_step: 2, steps_per_round: 4, crops_per_patient: 3"
    site.study.write_text(private_study(keys).to_yaml())
    text = " ".join(site("review")[1].split())
    assert (
        "6; in each this site trains 4 steps on patches of its own; in each, every patient takes part by chance, 2 are "
        "expected, with 3 patches each sites" in text
    )
    assert "bytes, with this site's noise; with it the privacy spent so far (epsilon at delta), the numbers of" in text
    assert "loss" not in text
    assert "loss" not in json.loads(site("review", "--json")[1])["leaves"]["each round"]


def test_the_review_of_a_study_whose_sites_are_hidden_promises_no_loss(site: Site) -> None:
    site.study.write_text(TEXT.replace("unit: patient", "unit: site") % "epsilon: 3, delta: 1e-5")
    text = " ".join(site("review")[1].split())
    assert "bytes, clipped; with it the numbers of batches and cases, and the seconds that it took" in text
    assert "loss" not in text


@pytest.mark.slow
def test_the_plans_digest_is_compiled_where_it_is_asked_for(site: Site, tiny_study: Callable[..., Study]) -> None:
    from common.learning.plan import build_plan

    shown = json.loads(site("review", "--json", "--plan")[1])
    assert shown["digests"]["plan"] == build_plan(tiny_study()).digest.hex()


_WITHOUT = """
import sys
for name in ("tensorflow", "tensorflow_federated"):
    sys.modules[name] = None
from client.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_review_and_approval_load_no_tensorflow(site: Site) -> None:
    place = [str(site.study), "--data", str(site.data), "--work", str(site.work), "--site", "alpha"]
    for command in (["review", *place], ["approve", *place, "--by", "Kim"]):
        done = subprocess.run([sys.executable, "-c", _WITHOUT, *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


# Decisions. ---------------------------------------------------------------------------------------------------------


def test_an_approval_holds_what_was_shown(site: Site) -> None:
    shown = json.loads(site("review", "--json")[1])
    code, out, _ = site("approve", "--by", "Dr. Kim")
    assert code == 0
    assert f"alpha: study tiny is approved by Dr. Kim.\nRecorded in {site.approvals}, line 1, signed by this" in out
    assert f"Next: wardround-site start {site.study} --site alpha --data {site.data}" in out
    record = json.loads(site.approvals.read_text())
    assert record["shown"] == shown
    assert "patient-" not in site.approvals.read_text()


def test_a_study_that_violates_the_policy_is_not_approved(site: Site) -> None:
    site.rules("minimum_cases: 5\n")
    code, _, errors = site("approve", "--by", "Kim")
    assert code == 12
    assert errors == (
        "error: alpha: study tiny violates this site's policy, so it was not approved: minimum_cases: at least 5 "
        f"cases, this site has 4 ({site.policy}); ask whoever runs the study to change it, or change the policy\n"
    )
    assert not site.approvals.exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["approve", "--data", "."], 2, "the following arguments are required: --by"),
        (["approve", "--data", ".", "--by", " "], 2, "expected a name"),
        (["approve", "--data", ".", "--by", "Kim"], 2, "nothing says which site this is; give --identity or --site"),
        (["approve", "--data", ".", "--by", "Kim", "--site", "gamma"], 2, "site gamma: not in the study's cohort"),
        (["review", "--data", "nowhere"], 2, "--data nowhere: neither a registered data set nor a folder"),
        (["review", "--data", ".", "--data", "."], 0, ""),
        (["review", "--data", ".", "--data", ".", "--site", "alpha"], 2, "give each the same number of times"),
        (["review", "--data", ".", "--policy", "none.yaml"], 2, "none.yaml: there is no policy file"),
    ],
)
def test_calls_that_cannot_work_are_told(site: Site, arguments: list[str], code: int, words: str) -> None:
    command, *more = arguments

    def call() -> int:
        try:
            return main([command, str(site.study), *more])
        except SystemExit as ended:  # of argparse
            assert isinstance(ended.code, int)
            return ended.code

    assert run_command(call) == code
    assert words in site._capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "option", "words"),
    [
        ("review", "--data", "--data images-\ufffd: expected UTF-8"),
        ("approve", "--data", "--data images-\ufffd: expected UTF-8"),
        ("start", "--data", "--data images-\ufffd: expected UTF-8"),
        ("approve", "--note", "--note images-\ufffd: expected UTF-8"),
        ("reject", "--note", "--note images-\ufffd: expected UTF-8"),
        ("approve", "--policy", "policy images-\ufffd: expected UTF-8"),
    ],
)
def test_what_no_record_could_hold_is_told(
    site: Site, passed: list[str], command: str, option: str, words: str
) -> None:
    name = os.fsdecode(b"images-\xff")
    Path(name).mkdir()
    more = {
        "review": [],
        "start": ["--site", "alpha", "--coordinator", "localhost:1"],
        "approve": ["--by", "Kim"],
        "reject": ["--by", "Kim"],
    }[command]
    given = option != "--data"
    code, _, errors = site(command, option, name, *more, data=given and command != "reject")
    assert code == 2
    assert words in errors
    assert not site.approvals.exists()


def test_the_identity_of_another_site_decides_nothing(site: Site) -> None:
    code, _, errors = site("approve", "--by", "Kim", "--site", "beta")
    assert code == 5
    assert "the certificate is of site 'alpha', not of site 'beta'" in errors


def test_several_sites_are_approved_at_once_and_none_where_one_may_not_be(site: Site, tmp_path: Path) -> None:
    def approve() -> int:
        arguments = ["approve", str(site.study), "--by", "simulation"]
        for name in ("alpha", "beta"):
            arguments += ["--site", name, "--data", str(site.data), "--work", str(tmp_path / name)]
        return run_command(lambda: main(arguments))

    (tmp_path / "beta").mkdir()
    (tmp_path / "beta" / "policy.yaml").write_text("minimum_cases: 5\n")
    assert approve() == 12
    assert not (tmp_path / "alpha" / "approvals.jsonl").exists()
    (tmp_path / "beta" / "policy.yaml").unlink()
    assert approve() == 0
    assert json.loads((tmp_path / "beta" / "approvals.jsonl").read_text())["by"] == "simulation"


# Starting. ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names the sites that got past their approval, and ends their start there."""
    from client import cli
    from common.errors import DataError

    found: list[str] = []

    def dataset(study: Study, site: str, *_: Any) -> None:
        found.append(site)
        raise DataError("the test looks no further")

    monkeypatch.setattr(cli, "_dataset", dataset)
    return found


def test_a_site_starts_nothing_that_was_not_approved_and_says_what_to_run(site: Site, passed: list[str]) -> None:
    code, errors = site.start()
    assert code == 11
    place = f"{site.study} --data {site.data} --identity {site.identity} --work {site.work}"
    assert errors == (
        "error: alpha: study tiny has not been approved here, so nothing is run; look at it with\n"
        f"  wardround-site review {place}\n"
        "and, if it may run, approve it with\n"
        f"  wardround-site approve {place} --by NAME\n"
    )
    assert passed == []
    assert "has not been approved here" in json.loads((site.work / "status.json").read_text())["notice"]


def test_an_approved_study_is_started(site: Site, passed: list[str]) -> None:
    site("approve", "--by", "Kim")
    assert site.start()[0] == 3
    assert passed == ["alpha"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda site, patch: site.study.write_text(site.study.read_text().replace("seed: 11", "seed: 4")),
            "seed: 11 -> 4",
        ),
        (
            lambda site, patch: patch.setattr("client.package.installed_package", lambda: package(site)),
            "its files differ",
        ),
        (lambda site, patch: (site("reject", "--by", "Lee", data=False), None)[1], "was rejected by Lee"),
        (
            lambda site, patch: site.approvals.write_text(site.approvals.read_text().replace("Kim", "Lee")),
            ":1: the record was tampered with",
        ),
        (lambda site, patch: site.approvals.unlink(), "has not been approved here"),
    ],
    ids=["study", "package", "rejected", "tampered", "gone"],
)
def test_what_changed_after_the_approval_is_not_started(
    site: Site, passed: list[str], monkeypatch: pytest.MonkeyPatch, change: Callable[..., None], words: str
) -> None:
    site("approve", "--by", "Kim")
    change(site, monkeypatch)
    code, errors = site.start()
    assert (code, passed) == (11, [])
    assert words in errors


def package(site: Site) -> Any:
    from client.package import Package

    return Package(json.loads(site.approvals.read_text())["package"], "ef" * 32, 9)


def test_a_policy_that_was_tightened_after_the_approval_is_kept(site: Site, passed: list[str]) -> None:
    site("approve", "--by", "Kim")
    site.rules("secure_aggregation: required\n")
    code, errors = site.start()
    assert (code, passed) == (12, [])
    assert "study tiny violates this site's policy, so nothing is run: secure_aggregation: required" in errors


def test_a_coordinator_that_the_policy_does_not_name_is_not_dialled(site: Site, passed: list[str]) -> None:
    site.rules("coordinators: [coordinator.example.org]\n")
    site("approve", "--by", "Kim")
    code, errors = site.start()
    assert (code, passed) == (12, [])
    assert "coordinators: only coordinator.example.org, this one is localhost" in errors


def test_models_of_other_studies_are_not_fetched(site: Site, tmp_path: Path) -> None:
    site.rules("models: [nuclei]\n")
    arguments = [
        "fetch",
        "--coordinator",
        "localhost:1",
        "--identity",
        str(site.identity),
        "--out",
        str(tmp_path / "m"),
    ]
    code = run_command(lambda: main([*arguments, "--work", str(site.work), "--study", "liver"]))
    assert code == 12
    assert "models: published models of these studies: nuclei; this one is of liver" in site._capsys.readouterr().err
    assert not (tmp_path / "m").exists()


# What is recorded of it. --------------------------------------------------------------------------------------------


def _audited(site: Site, *events: str) -> list[tuple[str, Any]]:
    """Event and details of the entries of these kinds in the site's audit log, which is whole."""
    log = check_log(site.work, trusted_authority(site.identity / "ca.crt"))
    assert log.signed_by is not None and log.signed_by.name == "alpha"
    return [(entry.event, entry.details) for entry in log.entries if entry.event in events]


def test_decisions_and_refused_starts_are_in_the_audit_log(site: Site, passed: list[str]) -> None:
    site("approve", "--by", "Dr. Kim")
    site.rules("minimum_cohort: 3\n")
    site.start()
    site("reject", "--by", "Dr. Lee", data=False)
    site.start()
    decided = json.loads(site.approvals.read_text().splitlines()[0])
    about = {"study": "tiny", "study_sha256": decided["study_digest"], "package_sha256": decided["package_digest"]}
    assert _audited(site, "approved", "rejected", "start-refused") == [
        ("approved", {**about, "by": "Dr. Kim"}),
        ("start-refused", {"study": "tiny", "reason": "PolicyError"}),
        ("rejected", {**about, "by": "Dr. Lee"}),
        ("start-refused", {"study": "tiny", "reason": "ApprovalError"}),
    ]


def test_a_study_is_not_approved_where_that_cannot_be_recorded_and_is_rejected_all_the_same(site: Site) -> None:
    site.work.mkdir()
    (site.work / "audit.log").write_text("something else\n")
    assert site("approve", "--by", "Kim")[0] == 7
    assert not site.approvals.exists()
    assert site("reject", "--by", "Kim", data=False)[0] == 7
    assert json.loads(site.approvals.read_text())["decision"] == "reject"


@pytest.fixture
def ceilings(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """What the sites' workers get as ceiling of epsilon, in a start that ends before anybody is dialled."""
    found: list[float | None] = []

    def worker(*_: Any, epsilon_ceiling: float | None, **__: Any) -> Any:
        found.append(epsilon_ceiling)
        return types.SimpleNamespace(digest=b"plan", training_cases=3, validation_cases=1)

    monkeypatch.setattr("client.cli._dataset", lambda *_: types.SimpleNamespace(make_room=lambda: 0))
    monkeypatch.setattr("common.learning.runtime.configure_tensorflow", lambda threads: None)
    monkeypatch.setattr("client.work.site_plan", lambda study: None)
    monkeypatch.setattr("client.work.update_bytes", lambda plan: {"train": 29_928})
    monkeypatch.setattr("client.work.site_worker", worker)
    monkeypatch.setattr("client.cli._run", lambda *_: 0)
    return found


def test_by_which_approval_and_policy_a_site_started_is_in_the_audit_log(
    site: Site, ceilings: list[float | None]
) -> None:
    site("approve", "--by", "Kim")
    site("approve", "--by", "Kim", "--note", "again")
    assert site.start()[0] == 0
    site.rules("minimum_cases: 2\n")
    assert site.start()[0] == 0
    policy = hashlib.sha256(b"minimum_cases: 2\n").hexdigest()
    assert _audited(site, "start-allowed") == [
        ("start-allowed", {"study": "tiny", "approval": 2, "policy_sha256": ""}),
        ("start-allowed", {"study": "tiny", "approval": 2, "policy_sha256": policy}),
    ]


@pytest.mark.parametrize(
    ("policy", "option", "expected"),
    [
        ("differential_privacy: {maximum_epsilon: 4}\n", [], 4.0),
        ("differential_privacy: {maximum_epsilon: 4}\n", ["--epsilon-ceiling", "3.5"], 3.5),
        ("differential_privacy: {maximum_epsilon: 4}\n", ["--epsilon-ceiling", "9"], 4.0),
        ("minimum_cases: 1\n", ["--epsilon-ceiling", "9"], 9.0),
        ("minimum_cases: 1\n", [], None),
    ],
)
def test_the_policys_epsilon_bounds_all_studies_of_the_site_together(
    site: Site,
    ceilings: list[float | None],
    policy: str,
    option: list[str],
    expected: float | None,
) -> None:
    site.study.write_text(private_study("epsilon: 3, delta: 1e-5").to_yaml())
    site.rules(policy)
    assert site("approve", "--by", "Kim")[0] == 0
    assert site("start", "--site", "alpha", "--coordinator", "localhost:1", *option)[0] == 0
    assert ceilings == [expected]


def test_a_review_says_what_secure_aggregation_hides_and_what_not(tiny_study: Callable[..., Study]) -> None:
    study = tiny_study()
    settings = SecureAggregation(
        protocol="bonawitz", threshold=4, minimum_cohort=4, largest_update=1.0, largest_weight=100
    )
    cohort = dataclasses.replace(study.cohort, sites=("a", "b", "c", "d", "e"), quorum=5)
    secure = dataclasses.replace(study, cohort=cohort, secure_aggregation=settings)
    words = privacy_words(privacy_of(secure))["secure aggregation"]
    assert words == (
        "the coordinator can read sums alone: of updates, losses, counts and Dice. It sees which sites took part, "
        "when, and for how long; and what a sum itself says of its sites is not hidden"
    )
    found = leaving(secure, 1000, 4000)
    assert found["once"] == "this site's name and the version of Wardround; no number of cases"
    assert "under masks an update of 1,000 weights, its weight, the training loss" in found["each round"]
    assert "at most 4,000 bytes" in found["each round"]  # 32 bits a weight
    assert "batch" not in found["meanwhile"] and "number" not in found["evaluations"]
