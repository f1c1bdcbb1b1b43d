"""Decisions of a site's operator: recorded, signed, verified, and what they say of a study and a package."""

from __future__ import annotations

import base64
import concurrent.futures
import dataclasses
import errno
import fcntl
import hashlib
import json
import resource
import shutil
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from client import approvals, package
from client.approvals import Approvals, Subject, study_changes
from client.package import Package, installed_package, package_in
from common.errors import ApprovalError, IdentityError, RunFolderError
from common.security.certificates import ensure_simulation_identities
from common.security.signing import load_signer
from common.study import Study, parse_study

TODO = "run approve"


@pytest.fixture
def subject(tiny_study: Callable[..., Study]) -> Subject:
    return Subject("alpha", tiny_study(), Package("1.0", "ab" * 32, 3), "/srv/images")


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The identity folders of the study's sites, by name."""
    folder = tmp_path_factory.mktemp("identities")
    ensure_simulation_identities(folder, "tiny", ["alpha", "beta"], ["localhost"])
    return folder / "sites"


@pytest.fixture
def identity(sites: Path, tmp_path: Path) -> Path:
    """The identity of site alpha, to be spoiled."""
    return Path(shutil.copytree(sites / "alpha", tmp_path / "identity"))


@pytest.fixture(params=[False, True], ids=["unsigned", "signed"])
def decided(request: pytest.FixtureRequest, tmp_path: Path, identity: Path) -> Approvals:
    """The decisions of a site whose identity has a key, or none."""
    return Approvals(tmp_path / "work", identity if request.param else tmp_path)


def changed(study: Study, *pairs: tuple[str, str]) -> Study:
    text = study.to_yaml()
    for before, after in pairs:
        assert before in text
        text = text.replace(before, after)
    return parse_study(text)


# What is covered. ---------------------------------------------------------------------------------------------------


def test_nothing_runs_before_somebody_approved_it(decided: Approvals, subject: Subject) -> None:
    with pytest.raises(ApprovalError) as raised:
        decided.require(subject, todo=TODO)
    assert str(raised.value) == "alpha: study tiny has not been approved here, so nothing is run; run approve"
    assert raised.value.exit_code == 11


def test_an_approved_study_runs(decided: Approvals, subject: Subject) -> None:
    decided.record("approve", subject, by="Dr. Kim", note="as agreed", shown={"weights": 7})
    record = decided.require(subject, todo=TODO)
    content = record.content
    assert (record.by, content["note"], content["shown"]) == ("Dr. Kim", "as agreed", {"weights": 7})
    assert content["study_digest"] == hashlib.sha256(subject.study.canonical().encode()).hexdigest()
    assert (content["package"], content["package_digest"]) == ("1.0", "ab" * 32)
    assert ("signature" in content) == decided.signs
    assert stat.S_IMODE(decided.path.stat().st_mode) == 0o600


def test_a_study_written_otherwise_that_means_the_same_is_the_same(decided: Approvals, subject: Subject) -> None:
    decided.record("approve", subject, by="Kim")
    same = replace(subject, study=changed(subject.study, ("seed: 11", "seed: 11 # of everything")))
    decided.require(same, todo=TODO)


def test_a_changed_study_is_refused_with_the_keys_that_differ(decided: Approvals, subject: Subject) -> None:
    decided.record("approve", subject, by="Kim")
    study = changed(subject.study, ("rounds: 2", "rounds: 9"), ("seed: 11", "seed: 12"))
    with pytest.raises(ApprovalError) as raised:
        decided.require(replace(subject, study=study), todo=TODO)
    day = decided.records()[0].day
    assert str(raised.value) == (
        f"alpha: study tiny: what Kim approved on {day} is not what would run, so nothing is run: seed: 11 -> 12; "
        "training.rounds: 2 -> 9; run approve"
    )


@pytest.mark.parametrize(
    ("package", "words"),
    [
        (Package("1.1", "cd" * 32, 3), "Wardround: version 1.0 -> 1.1"),
        (Package("1.0", "cd" * 32, 3), "Wardround: version 1.0 as before, but its files differ (abababababababab -> "),
    ],
    ids=["version", "files"],
)
def test_a_changed_package_is_refused(decided: Approvals, subject: Subject, package: Package, words: str) -> None:
    decided.record("approve", subject, by="Kim")
    with pytest.raises(ApprovalError) as raised:
        decided.require(replace(subject, package=package), todo=TODO)
    assert words in str(raised.value)
    decided.record("approve", replace(subject, package=package), by="Kim")
    decided.require(replace(subject, package=package), todo=TODO)
    decided.require(subject, todo=TODO)  # a process that still runs the older one was approved, too


def test_other_data_is_refused(decided: Approvals, subject: Subject) -> None:
    decided.record("approve", subject, by="Kim")
    with pytest.raises(ApprovalError, match="data: /srv/images -> /srv/everything"):
        decided.require(replace(subject, data="/srv/everything"), todo=TODO)


def test_an_approval_of_another_site_is_none(decided: Approvals, subject: Subject) -> None:
    decided.record("approve", replace(subject, site="beta"), by="Kim")
    with pytest.raises(ApprovalError, match="alpha: study tiny has not been approved here"):
        decided.require(subject, todo=TODO)


def test_a_rejected_study_is_refused_with_whatever_package_until_it_is_approved_again(
    decided: Approvals, subject: Subject
) -> None:
    decided.record("approve", subject, by="Kim")
    decided.record("reject", replace(subject, data=""), by="Lee", note="too many rounds")
    for other in (subject.package, Package("1.1", "cd" * 32, 3)):
        with pytest.raises(ApprovalError, match=r"was rejected by Lee on 20..-..-.. \(too many rounds\)"):
            decided.require(replace(subject, package=other), todo=TODO)
    decided.record("approve", subject, by="Kim")
    assert decided.require(subject, todo=TODO).number == 3


def test_what_has_changed_is_said_by_key() -> None:
    before = {"a": {"b": 1, "c": [1, 2]}, "d": "x"}
    after = {"a": {"b": 2, "c": [1, 2]}, "e": True}
    assert study_changes(before, after) == ["a.b: 1 -> 2", 'd: "x" -> not given', "e: not given -> true"]
    assert study_changes(before, before) == []


# Tampering. ---------------------------------------------------------------------------------------------------------


def _rewritten(line: str) -> str:
    """As somebody would who knows how the digest is made, but has no key."""
    content = json.loads(line)
    content["by"] = "Dr. Lee"
    content["digest"] = hashlib.sha256(approvals._message(content)).hexdigest()
    return json.dumps(content, sort_keys=True, ensure_ascii=False)


_TAMPERING: dict[str, tuple[Callable[[list[str]], list[str]], str]] = {
    "a word": (lambda lines: [lines[0].replace('"by": "Kim"', '"by": "Lee"'), *lines[1:]], ":1: the record was"),
    "a decision": (lambda lines: [*lines[:2], lines[2].replace('"reject"', '"approve"')], ":3: the record was"),
    "a record gone": (lambda lines: [lines[0], lines[2]], ":2: the record was tampered with or damaged: a record"),
    "the order": (lambda lines: [lines[1], lines[0], lines[2]], ":1: the record was"),
    "a record twice": (lambda lines: [lines[0], *lines], ":2: the record was"),
    "torn": (lambda lines: [*lines[:2], lines[2][:50]], ":3: the record was tampered with or damaged: it is no record"),
    "no record": (lambda lines: ["[]", *lines], ":1: the record was tampered with or damaged: it is no record"),
    "one before, with its digest": (lambda lines: [_rewritten(lines[0]), *lines[1:]], ":2: the record was"),
}


@pytest.mark.parametrize("how", _TAMPERING)
def test_a_record_that_was_tampered_with_is_refused(decided: Approvals, subject: Subject, how: str) -> None:
    decided.record("approve", subject, by="Kim")
    decided.record("approve", subject, by="Kim", note="again")
    decided.record("reject", subject, by="Kim")
    tamper, words = _TAMPERING[how]
    lines = decided.path.read_text().splitlines()
    decided.path.write_text("\n".join(tamper(lines)) + "\n")
    with pytest.raises(ApprovalError) as raised:
        decided.require(subject, todo=TODO)
    assert f"{decided.path}{words}" in str(raised.value)
    with pytest.raises(ApprovalError):  # and nothing is written after it
        decided.record("approve", subject, by="Kim")


def _rewrite(signing: Approvals, **changes: Any) -> None:
    """Changes keys of the only record that no digest covers; None takes one away."""
    content = {**json.loads(signing.path.read_text()), **changes}
    kept = {key: value for key, value in content.items() if value is not None}
    signing.path.write_text(json.dumps(kept, sort_keys=True, ensure_ascii=False) + "\n")


def test_a_forged_record_is_refused_where_the_identity_signs(tmp_path: Path, subject: Subject, identity: Path) -> None:
    signing = Approvals(tmp_path, identity)
    signing.record("approve", subject, by="Kim")
    line = signing.path.read_text().splitlines()[0]
    signing.path.write_text(_rewritten(line) + "\n")
    with pytest.raises(ApprovalError, match=r"line 1: the signature is not one that site 'alpha' gave .*; run approve"):
        signing.require(subject, todo=TODO)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"signature": None, "certificate": None}, "is not signed, and this site's identity"),
        ({"certificate": None}, "is not signed, and this site's identity"),
        ({"signature": None}, "is not signed, and this site's identity"),
        ({"certificate": 7}, "is not signed, and this site's identity"),
        ({"signature": "A"}, ": its signature is none"),
        ({"signature": "\u00e9"}, ": its signature is none"),
        ({"signature": "AAAA"}, ": the signature is not one that site 'alpha' gave"),
        ({"certificate": "one"}, ": expected a PEM certificate"),
    ],
)
def test_a_signature_that_was_taken_away_or_spoiled_is_missed(
    tmp_path: Path, subject: Subject, identity: Path, changes: dict[str, Any], words: str
) -> None:
    signing = Approvals(tmp_path, identity)
    signing.record("approve", subject, by="Kim")
    _rewrite(signing, **changes)
    with pytest.raises(ApprovalError) as raised:
        signing.require(subject, todo=TODO)
    assert words in str(raised.value)
    assert str(raised.value).endswith(TODO)


def test_a_record_that_was_made_without_a_key_is_refused_once_there_is_one(
    tmp_path: Path, subject: Subject, identity: Path
) -> None:
    Approvals(tmp_path, None).record("approve", subject, by="Kim")
    with pytest.raises(ApprovalError, match=r"line 1 is not signed, and this site's identity .*; run approve"):
        Approvals(tmp_path, identity).require(subject, todo=TODO)


def test_the_signature_of_another_site_is_refused(
    tmp_path: Path, subject: Subject, identity: Path, sites: Path
) -> None:
    Approvals(tmp_path, sites / "beta").record("approve", subject, by="Kim")
    with pytest.raises(ApprovalError, match=r"line 1: signed by site 'beta', expected site 'alpha'"):
        Approvals(tmp_path, identity).require(subject, todo=TODO)


def test_a_signature_that_another_authority_vouches_for_is_refused(
    tmp_path: Path, subject: Subject, identity: Path
) -> None:
    ensure_simulation_identities(tmp_path / "others", "tiny", ["alpha"], ["localhost"])
    Approvals(tmp_path, tmp_path / "others" / "sites" / "alpha").record("approve", subject, by="Kim")
    with pytest.raises(ApprovalError, match=r"line 1: .* was not issued by the authority that is trusted here"):
        Approvals(tmp_path, identity).require(subject, todo=TODO)


def test_what_the_site_signed_for_another_purpose_approves_nothing(
    tmp_path: Path, subject: Subject, identity: Path
) -> None:
    signing = Approvals(tmp_path, identity)
    content = signing.record("approve", subject, by="Kim").content
    other = load_signer(identity).sign("audit head", approvals._message(content))
    _rewrite(signing, signature=base64.b64encode(other).decode())
    with pytest.raises(ApprovalError, match="the signature is not one that site 'alpha' gave for this content"):
        signing.require(subject, todo=TODO)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "signing.key").write_text("a key"), r"signing\.key: expected"),
        (lambda folder: (folder / "signing.key").chmod(0o644), r"signing\.key: the private key has mode 0644"),
        (lambda folder: (folder / "signing.crt").unlink(), r"signing\.crt: does not exist"),
        (lambda folder: shutil.copy(folder / "identity.crt", folder / "signing.crt"), "signing.key"),
    ],
    ids=["no key", "open to others", "no certificate", "another certificate"],
)
def test_a_key_that_must_not_sign_records_nothing(
    tmp_path: Path, subject: Subject, identity: Path, spoil: Callable[[Path], Any], words: str
) -> None:
    spoil(identity)
    with pytest.raises(IdentityError, match=words):
        Approvals(tmp_path, identity).record("approve", subject, by="Kim")
    assert Approvals(tmp_path, identity).records() == []


# Writing. -----------------------------------------------------------------------------------------------------------


def test_a_line_that_was_being_written_is_no_decision_and_locks_nobody_out(
    decided: Approvals, subject: Subject
) -> None:
    decided.record("approve", subject, by="Kim")
    whole = decided.path.read_bytes()
    decided.record("reject", subject, by="Lee")
    decided.path.write_bytes(decided.path.read_bytes()[:-1])
    assert [record.decision for record in decided.records()] == ["approve"]
    assert decided.require(subject, todo=TODO).number == 1
    decided.record("reject", subject, by="Lee", note="once more")
    assert decided.path.read_bytes().startswith(whole)
    assert [record.decision for record in decided.records()] == ["approve", "reject"]


@pytest.mark.parametrize("failing", ["write", "fsync"])
def test_a_decision_that_cannot_be_written_leaves_the_file_as_it_was(
    decided: Approvals, subject: Subject, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    decided.record("approve", subject, by="Kim")
    before = decided.path.read_bytes()
    if failing == "write":
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, limit[1]))
    else:
        monkeypatch.setattr(approvals.os, "fsync", _full)
    try:
        with pytest.raises(RunFolderError):
            decided.record("reject", subject, by="Lee")
    finally:
        if failing == "write":
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    monkeypatch.undo()
    assert decided.path.read_bytes() == before


def _full(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_whoever_reads_waits_for_a_record_that_is_being_written(decided: Approvals, subject: Subject) -> None:
    decided.record("approve", subject, by="Kim")
    with decided.path.open("rb") as file, concurrent.futures.ThreadPoolExecutor() as pool:
        fcntl.flock(file, fcntl.LOCK_EX)
        reading = pool.submit(decided.records)
        with pytest.raises(concurrent.futures.TimeoutError):
            reading.result(0.2)
        fcntl.flock(file, fcntl.LOCK_UN)
        assert len(reading.result(10)) == 1


# The package. -------------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("client/a.py", "common/b/c.py", "common/b/__pycache__/c.pyc", "server/d.py", "docs/e.md"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path


@pytest.mark.parametrize("name", ["client/a.py", "common/b/c.py", "common/b/c.so", "client/new.py"])
def test_a_change_of_any_file_that_a_site_runs_is_another_package(tree: Path, name: str) -> None:
    before = package_in(tree)
    (tree / name).write_text("changed")
    assert package_in(tree).digest != before.digest


def test_a_file_that_moves_is_another_package(tree: Path) -> None:
    before = package_in(tree)
    (tree / "client/a.py").rename(tree / "common/a.py")
    assert package_in(tree).digest != before.digest


@pytest.mark.parametrize("name", ["server/d.py", "docs/e.md", "common/b/__pycache__/c.pyc", "client/__pycache__/x.pyc"])
def test_what_a_site_does_not_run_is_not_in_its_digest(tree: Path, name: str) -> None:
    before = package_in(tree)
    (tree / name).parent.mkdir(exist_ok=True)
    (tree / name).write_text("changed")
    assert package_in(tree) == before


def test_the_installed_package_is_the_one_that_runs() -> None:
    found = installed_package()
    assert found.files > 100
    assert found == package_in(Path(approvals.__file__).parents[1])


def test_a_package_that_is_renewed_while_the_site_starts_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    package.require_unchanged()
    before = installed_package()
    monkeypatch.setattr(package, "installed_package", lambda: dataclasses.replace(before, digest="0" * 64))
    with pytest.raises(ApprovalError, match="has changed while the site was starting"):
        package.require_unchanged()
