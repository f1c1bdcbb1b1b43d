"""The report of a data check: what it counts, that three forms say the same, and that no name breaks them."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from client.data_report import (
    DataReport,
    choose_cases,
    draw_thumbnails,
    render_html,
    render_json,
    render_text,
)
from client.data_summary import STAYS_HERE
from common.imaging.case import Case, Source
from common.imaging.checks import CaseFacts, Code, Finding, Requirements, examine_case

STUDY = Requirements(3, 1, ("background", "organ"), "classes", minimum_cases=3)
NASTY = "<script>alert(1)</script>&\"'\n\x1b[31m\udcff 病例"


def make_case(folder: Path, name: str, seed: int) -> Case:
    array = np.random.default_rng(seed).normal(100, 10, (9, 8, 4)).astype(np.float32)
    label = np.zeros(array.shape, np.uint8)
    label[2:5, 2 : 4 + seed % 4, 1:3] = 1
    paths = folder / f"{seed}.nii", folder / f"{seed}_seg.nii"
    for path, voxels in zip(paths, (array, label), strict=True):
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)
    return Case(name, name, {"": Source(paths[0])}, Source(paths[1]))


@pytest.fixture
def cases(tmp_path: Path) -> list[Case]:
    return [make_case(tmp_path, name, seed) for seed, name in enumerate(["a", "b", "c", "d"])]


def facts_of(cases: list[Case]) -> list[CaseFacts]:
    found = [examine_case(case)[0] for case in cases]
    return [facts for facts in found if facts is not None]


def report_of(cases: list[Case], findings: list[Finding], requirements: Requirements | None = None) -> DataReport:
    return DataReport.of("liver", [case.name for case in cases], facts_of(cases), findings, requirements)


def damaged(case: str) -> Finding:
    return Code.UNREADABLE.finding(f"image {case}.nii: cannot be read (unexpected end)", case=case, file=f"{case}.nii")


def empty(case: str) -> Finding:
    return Code.EMPTY_LABEL.finding(f"label {case}.nii: holds background alone", case=case, file=f"{case}.nii")


class Page(HTMLParser):
    """The text, the tags and the attributes of a page, as a browser would see them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"{tag} closed out of turn"

    def handle_data(self, data: str) -> None:
        self.words += data


def test_report_counts_what_is_usable(cases: list[Case]) -> None:
    report = report_of(cases, [empty("b"), damaged("c"), damaged("a"), damaged("c")])
    assert report.kept_out == ("a", "c") and report.usable == ("b", "d")
    assert list(report.by_code.items()) == [("E101", 2), ("W220", 1)], "errors first, the same thing once"
    assert report.is_fit
    assert report.headline == "2 of 4 cases usable, 2 kept out by errors."


def test_report_for_a_study_says_where_too_few_cases_are_left(cases: list[Case]) -> None:
    report = report_of(cases, [damaged("a"), damaged("b")], STUDY)
    assert report.by_code == {"E101": 2, "E404": 1} and not report.is_fit
    assert "at least 3 sound cases, found 2" in render_text(report)
    again = DataReport.of("liver", report.cases, report.facts, report.findings, STUDY)
    assert again == report, "a finding that is there already is not said twice"
    assert report_of(cases, [damaged("a")], STUDY).is_fit


def test_data_set_without_usable_cases_is_not_fit() -> None:
    assert not DataReport.of("empty", [], [], [Code.NO_CASES.finding("holds no image")]).is_fit
    assert not DataReport.of("empty", ["a"], [], [damaged("a")]).is_fit
    for render in (render_text, render_html, render_json):
        assert "empty" in render(DataReport.of("empty", [], [], []))


def test_all_three_forms_hold_every_finding_and_figure(cases: list[Case]) -> None:
    report = replace(report_of(cases, [damaged("a"), empty("b")], STUDY), split=(2, 1))
    text, page, data = render_text(report), Page(render_html(report)).words, json.loads(render_json(report))
    for finding in report.findings:
        for shown in (text, page):
            assert finding.code in shown and finding.message in shown and finding.advice in shown
    assert data["findings"] == [finding.to_json() for finding in report.findings]
    assert data["counts"] == {
        "cases": 4,
        "usable": 3,
        "kept_out": 1,
        "training": 2,
        "validation": 1,
        "errors": 1,
        "warnings": 1,
        "by_code": {"E101": 1, "W220": 1},
    }
    assert data["requirements"]["classes"] == ["background", "organ"]
    image, label = data["summaries"]
    assert image["shape"][0] == {"lowest": 4, "median": 4, "highest": 4} and label["values"] == {"0": 4, "1": 4}
    assert [CaseFacts.from_json(case) for case in data["cases"]] == list(report.facts)
    for shown in (text, page):
        assert "NIfTI" in shown and "float32" in shown
        assert STAYS_HERE in shown
        assert "Of the usable cases, 2 train and 1 validate." in shown


def test_text_is_short_where_findings_are_many(cases: list[Case]) -> None:
    findings = [damaged(f"case{i:03d}") for i in range(100)]
    report = DataReport.of("liver", [finding.case for finding in findings], [], findings)
    assert "(100)" in render_text(report) and "and 92 more" in render_text(report)
    assert len(render_text(report).splitlines()) < 20
    assert render_text(report, most_listed=None).count("cannot be read") == 100


def test_page_is_one_file_without_scripts_that_a_screen_reader_can_follow(cases: list[Case]) -> None:
    report = report_of(cases, [damaged("a"), empty("b")])
    page = Page(render_html(report, draw_thumbnails(report, {case.name: case for case in cases})))
    assert page.open == []
    names = [tag for tag, _ in page.tags]
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(names)
    for _, attributes in page.tags:
        for key, value in attributes.items():
            assert not key.startswith("on")
            if key in ("src", "href"):
                assert value is not None and value.startswith(("data:image/png;base64,", "#"))
    assert ("html", {"lang": "en"}) in page.tags and "main" in names and names.count("h1") == 1
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 4 and all(image["alt"] for image in images)
    assert all(attributes.get("scope") for tag, attributes in page.tags if tag == "th")
    assert names.count("caption") == names.count("table")
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(identifiers)) == len(identifiers)
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert links == ["#E101", "#W220"] and {link[1:] for link in links if link} <= set(identifiers)
    assert "prefers-color-scheme: dark" in page.words


def test_names_can_do_nothing_to_page_or_terminal(tmp_path: Path) -> None:
    case = make_case(tmp_path, NASTY, 0)
    finding = Code.UNREADABLE.finding(f"image {NASTY}: cannot be read", case=NASTY, file=NASTY)
    report = DataReport.of(NASTY, [NASTY], facts_of([case]), [finding])
    html = render_html(report, draw_thumbnails(report, {NASTY: case}))
    page = Page(html)
    assert "script" not in [tag for tag, _ in page.tags] and page.open == []
    assert "<script>alert(1)</script>&\"'" in page.words
    for shown in (html, render_text(report), render_json(report)):
        shown.encode("utf-8")
        assert "\x1b" not in shown
    assert "病例" in html and "病例" in render_text(report)
    lines = render_text(report).splitlines()
    assert sum("[31m" in line for line in lines) == sum("alert(1)" in line for line in lines), "a name is on one line"
    assert json.loads(render_json(report))["data_set"] == NASTY


def test_pictures_are_of_the_worst_cases_and_an_even_sample(cases: list[Case]) -> None:
    names = [f"n{i:02d}" for i in range(40)]
    findings = [empty("n30"), damaged("n20"), empty("n20"), damaged("n10")]
    report = DataReport.of("x", names, [], findings)
    chosen = choose_cases(report, 10)
    assert chosen[:3] == ["n20", "n10", "n30"] and len(set(chosen)) == 10
    assert chosen[3:] == sorted(chosen[3:]) and chosen[-1] > "n30" > "n05" > chosen[3]
    many = DataReport.of("x", names, [], [damaged(name) for name in names[:35]])
    assert sum(name in many.kept_out for name in choose_cases(many, 10)) == 5
    assert choose_cases(DataReport.of("x", [], [], [])) == []
    assert len(choose_cases(report, 100)) == 40


def test_cases_without_a_readable_image_have_no_picture(cases: list[Case]) -> None:
    cases[1].images[""].path.write_bytes(b"")
    report = report_of(cases, [damaged("b")])
    seen: list[tuple[int, int]] = []
    found = draw_thumbnails(
        report, {case.name: case for case in cases}, on_case=lambda done, total: seen.append((done, total))
    )
    assert set(found) == {"a", "c", "d"} and seen == [(0, 4), (1, 4), (2, 4), (3, 4)]
    html = render_html(report, found)
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    assert [base64.b64decode(picture) for picture in pictures] == [one[""] for one in found.values()]


def test_each_modality_has_a_picture_with_its_name(tmp_path: Path) -> None:
    case = make_case(tmp_path, "a", 0)
    names = ("CT", "FLAIR", "T1", "T2", "T3")
    case = replace(case, images={name: make_case(tmp_path, name, n).images[""] for n, name in enumerate(names)})
    report = DataReport.of("x", ["a"], [], [])
    found = draw_thumbnails(report, {"a": case})
    assert list(found["a"]) == ["CT", "FLAIR", "T1", "T2"], "four at most"
    assert len(set(found["a"].values())) == 4
    page = Page(render_html(report, found))
    texts = [str(attributes["alt"]) for tag, attributes in page.tags if tag == "img"]
    assert [text.partition(" of case a")[0] for text in texts] == ["CT", "FLAIR", "T1", "T2"]
    assert all(f"{name}" in page.words for name in names[:4])


def test_equal_checks_are_in_equal_order_whatever_their_findings_came_in(cases: list[Case]) -> None:
    pair = [
        Code.EMPTY_FILE.finding(f"{what} a.nii: has no bytes", case="a", file="a.nii") for what in ("label", "image")
    ]
    for findings in (pair, pair[::-1]):
        shown = [finding.message for finding in report_of(cases, findings).findings]
        assert shown == ["image a.nii: has no bytes", "label a.nii: has no bytes"]


def test_a_modality_that_no_case_has_stands_beside_the_verdict(cases: list[Case]) -> None:
    asked = replace(STUDY, modalities=("T1", "T2"), missing_modality="zero")
    report = DataReport.of("x", ["a", "b", "c"], [], [], asked, (2, 1), absent=["T2"])
    assert report.verdict == "The study can use it. Missing from every case: T2."
    assert json.loads(render_json(report))["absent"] == ["T2"]
    for shown in (render_text(report).splitlines()[0], Page(render_html(report)).words):
        assert report.verdict in shown


def test_a_row_of_a_table_is_called_once(cases: list[Case]) -> None:
    finding = Code.TABLE.finding("cases.csv row 5: has no case's name", case="cases.csv row 5", file="cases.csv")
    assert render_text(report_of(cases, [finding])).count("cases.csv row 5") == 1


def test_page_is_bounded_however_large_the_pictures(cases: list[Case]) -> None:
    report = report_of(cases, [])
    assert len(render_html(report, {name: {"": bytes(2_500_000)} for name in "abcd"})) < 9_000_000
