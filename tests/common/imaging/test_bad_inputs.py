"""Every bad input has its code, none stops the check, and the sound cases beside it stay usable."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common.errors import DataError
from common.imaging.case import Case
from common.imaging.checks import BY_CODE, CaseFacts, Finding, examine_case, examine_cases, kept_out
from common.imaging.discovery import discover
from tests.common.imaging import bad_dicom  # noqa: F401  (adds to the corpus)
from tests.common.imaging.bad_inputs import AFFINE, CORPUS, THREE, BadInput, Place, case_of, neighbours, organ, voxels

WHATEVER_THE_STUDY = {"E101", "E103", "E104", "E106", "E107", "E108", "E111", "E112", "E113", "E114", "E116", "E202"}
Series = Callable[..., list[Path]]


@pytest.fixture
def place(tmp_path: Path, write_series: Series) -> Place:
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    return Place(tmp_path, write_series)


def check(cases: list[Case], bad: BadInput) -> list[Finding]:
    """As a site does it."""
    facts: list[CaseFacts] = []
    findings: list[Finding] = []
    for case in cases:
        examined, found = examine_case(case, bad.requirements, bad.label_map)
        facts += [examined] if examined else []
        findings += found
    return findings + examine_cases(facts, bad.validation)


def test_corpus_holds_enough_kinds() -> None:
    assert len(CORPUS) >= 40
    assert len({bad.name for bad in CORPUS}) == len(CORPUS)
    assert all(code in BY_CODE for bad in CORPUS for code in bad.codes)


@pytest.mark.parametrize("bad", CORPUS, ids=[bad.name for bad in CORPUS])
def test_bad_input_has_its_code_and_leaves_its_neighbours_alone(place: Place, bad: BadInput) -> None:
    good = neighbours(place, bad.requirements)
    built = bad.build(place)
    findings = check([*built, *good], bad)
    codes = {finding.code for finding in findings}
    assert codes == bad.codes, findings
    # Only what is bad is spoken of, except by what is about two cases.
    assert not kept_out(findings) & {case.name for case in good}
    out = kept_out(findings) & {case.name for case in built}
    assert bool(out) == any(code.startswith("E") for code in bad.codes)
    for finding in findings:
        assert finding.message and not finding.message.endswith(".") and "\n" not in finding.message
        assert finding.advice.endswith(".")
        assert str(place.folder) not in finding.message
        json.dumps(finding.to_json())


@pytest.mark.parametrize("bad", CORPUS, ids=[bad.name for bad in CORPUS])
def test_bad_input_is_survived_without_a_study_and_in_a_folder(place: Place, bad: BadInput) -> None:
    good = {case.name for case in neighbours(place, bad.requirements)}
    bad.build(place)
    discovery = discover(place.folder)
    findings = list(discovery.findings)
    facts = []
    for case in discovery.cases:
        examined, found = examine_case(case)
        facts += [examined] if examined else []
        findings += found
    findings += examine_cases(facts)
    assert good <= {case.name for case in discovery.cases} - kept_out(findings)
    # What is wrong whatever the study is not accepted either; what discovery passes over is no case.
    if any(code in bad.codes for code in WHATEVER_THE_STUDY):
        assert "bad" not in {case.name for case in discovery.cases} - kept_out(findings)


@pytest.fixture
def stranger() -> Iterator[Path]:
    """A folder in which this process has the rights of nobody special."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        is_root = os.geteuid() == 0
        yield folder
        if is_root:
            os.seteuid(0)


def test_unreadable_files_and_folders_have_their_code(stranger: Path, write_series: Series) -> None:
    for name in ("images", "labels"):
        (stranger / name).mkdir()
    at = Place(stranger, write_series)
    good = neighbours(at, THREE)
    closed = case_of(at.nifti(at.image("bad.nii.gz"), voxels()), at.nifti(at.label("bad.nii.gz"), organ()), "file")
    write_series(at.image("series"), voxels(1), AFFINE)
    series = case_of(at.image("series"), at.label("bad.nii.gz"), "folder")
    inside = case_of(at.image("inner") / "bad.nii.gz", at.label("bad.nii.gz"), "inside")
    at.image("inner").mkdir()
    at.nifti(inside.images[""].path, voxels(2))
    bad = BadInput("closed", frozenset({"E105"}), lambda at: [])
    check(good, bad)  # loads what is loaded late, while it may be read
    for path, mode in ((at.image("bad.nii.gz"), 0), (at.image("series"), 0), (at.image("inner"), 0)):
        path.chmod(mode)
    if os.geteuid() == 0:
        os.seteuid(65534)
    try:
        if os.access(at.image("bad.nii.gz"), os.R_OK, effective_ids=True):
            pytest.skip("this user may read everything")
        findings = check([closed, series, inside, *good], bad)
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        for path in (at.image("series"), at.image("inner")):
            path.chmod(0o755)
    assert sorted((finding.code, finding.case) for finding in findings) == [
        ("E105", "file"),
        ("E105", "folder"),
        ("E105", "inside"),
    ]


def test_name_that_is_no_text_does_not_stop_the_check(place: Place) -> None:
    good = neighbours(place, THREE)
    name = os.fsdecode(b"patient \xff.nii.gz")
    try:
        image = place.nifti(place.image("odd.nii.gz"), voxels()).rename(place.image(name))
    except OSError:
        pytest.skip("this file system takes valid names alone")
    label = place.nifti(place.label("odd.nii.gz"), organ())
    findings = check([case_of(image, label, "odd"), *good], BadInput("name", frozenset(), lambda at: []))
    assert not kept_out(findings)


def test_reader_that_fails_in_its_own_way_costs_its_case_alone(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    from common.imaging import source_checks

    def broken(*arguments: object, **options: object) -> None:
        raise RecursionError("deep\nas the sea")

    case = case_of(place.nifti(place.image("bad.nii.gz"), voxels()), None)
    monkeypatch.setattr(source_checks, "read_image", broken)
    facts, findings = examine_case(case, THREE)
    assert facts is None
    assert [finding.code for finding in findings] == ["E101", "E201"]
    assert findings[0].message == "image bad.nii.gz: cannot be read (deep)"


def test_every_message_of_a_reader_says_what_and_what_to_do(place: Place) -> None:
    """The checks divide a reader's error into message and advice; a reader's own advice goes before the code's."""
    path = place.nifti(place.image("bad.nii"), voxels(0, (1, 12, 10)))
    _, findings = examine_case(case_of(path, None), THREE)
    assert findings[0].message == "image bad.nii: expected a 3D volume, found a single slice"
    assert findings[0].advice.startswith("Save the whole volume")


def test_folder_that_does_not_exist_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        discover(tmp_path / "nowhere")
