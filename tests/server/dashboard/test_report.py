"""Reports and comparisons: one file each that stands alone, and says what was found."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
from pathlib import Path

import pytest

from common.errors import RunFolderError, UsageError
from common.security.audit_files import LOG
from common.webpage.assets import script_hash
from server.cli import main
from server.dashboard.comparison import compare
from server.dashboard.history import History
from server.dashboard.pdf import VARIABLE, chromium, print_to_pdf
from server.dashboard.report import _members, plain_study
from server.run_folder import RunFolder
from server.watching.snapshot import SnapshotReader
from tests.server.dashboard.runs import SECURE, WrittenRun


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> WrittenRun:
    run = WrittenRun(tmp_path_factory.mktemp("finished") / "run", rounds=8, done=8, dimensions=3)
    run.audit()
    run.samples()
    run.finish()
    return run


@pytest.fixture(scope="module")
def report(finished: WrittenRun, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("report") / "report.html"
    assert main(["report", str(finished.folder.path), "--out", str(out)]) == 0
    return out.read_text()


class Links(html.parser.HTMLParser):
    """Whatever a page would fetch, and its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.scripts: list[str] = []
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.fetched += [str(found[name]) for name in ("src", "href", "srcset", "data") if found.get(name)]
        self._inside = tag == "script" and "type" not in found

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.scripts.append(data)


def test_a_report_is_one_file_that_fetches_nothing(report: str) -> None:
    links = Links(report)
    assert all(link.startswith(("data:", "#")) for link in links.fetched), links.fetched
    assert sum(link.startswith("data:image/png") for link in links.fetched) == 2 * 3 * 4
    assert '<link rel="stylesheet"' not in report and "@import" not in report.split("<script")[0]


def test_only_the_scripts_of_a_report_may_run_in_it(report: str) -> None:
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', report)
    assert policy is not None
    scripts = Links(report).scripts
    assert len(scripts) == 3
    assert all(script_hash(script) in policy[1] for script in scripts)
    assert "connect-src" not in policy[1] and "default-src 'none'" in policy[1]


def test_a_report_has_all_that_a_board_asks_for(report: str, finished: WrittenRun) -> None:
    for heading in (
        "Cohort", "Quality by round", "Sample predictions", "Where the time goes", "Published versions", "Privacy",
        "Audit", "Software", "Every setting of the study",
    ):  # fmt: skip
        assert f">{heading}</h2>" in report, heading
    assert "verified" in report and "coordinator coordinator" in report
    assert "int8" in report and "recommended" in report
    assert all(site in report for site in finished.names)
    assert "tensorflow 2.14" in report and "client_optimizer" in report
    assert '<details id="quality-tables" open>' in report


def test_a_report_of_a_log_that_was_changed_says_so(
    finished: WrittenRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished.folder.path, copy)
    log = copy / LOG
    log.write_bytes(log.read_bytes().replace(b"0.1.0", b"0.1.1", 1))
    verified = main(["audit", "verify", str(copy)])
    assert main(["report", str(copy), "--out", str(tmp_path / "r.html")]) == verified != 0
    assert str(tmp_path / "r.html") in capsys.readouterr().out
    text = (tmp_path / "r.html").read_text()
    assert "Not verified:" in text and ">verified<" not in text


def test_a_report_of_a_run_under_way_says_that_it_is_not_finished(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "run")
    assert main(["report", str(run.folder.path)]) == 0
    assert "This study is not finished:" in (run.folder.path / "report.html").read_text()


def test_a_report_of_secure_sums_claims_no_times_of_a_site(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "run", done=3, sections=SECURE)
    snapshot = SnapshotReader(run.folder.path).read()
    members = _members(run.folder.read_study(), snapshot, History.of(snapshot))
    assert {member["seconds"] for member in members} == {None}
    assert {member["included"] for member in members} == {3}


def test_what_is_no_run_has_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == RunFolderError.exit_code
    assert "no run here" in capsys.readouterr().err


def test_a_pdf_without_chromium_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "/nowhere/chromium")
    with pytest.raises(UsageError, match=r"no Chromium here .* install one, name it in"):
        print_to_pdf(tmp_path / "report.html")


def test_a_browser_that_does_not_print_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "false")
    with pytest.raises(RunFolderError, match=r"could not print .*exit code 1"):
        print_to_pdf(tmp_path / "report.html")


@pytest.mark.system
@pytest.mark.skipif(chromium() is None, reason="no Chromium is installed here")
def test_a_report_prints_to_pdf(finished: WrittenRun, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    assert main(["report", str(finished.folder.path), "--out", str(out), "--pdf"]) == 0
    pdf = out.with_suffix(".pdf").read_bytes()
    assert pdf.startswith(b"%PDF") and len(re.findall(rb"/Type\s*/Page\b", pdf)) >= 4


# Comparisons. ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[RunFolder]:
    folder = tmp_path_factory.mktemp("two")
    runs = [WrittenRun(folder / "short", rounds=8, done=8), WrittenRun(folder / "long", rounds=16, done=16)]
    runs[1].finish()
    return [run.folder for run in runs]


def test_settings_that_differ_are_named_and_no_others(two: list[RunFolder]) -> None:
    found = compare(two)
    assert found.names == ("short", "long")
    assert found.settings == (("training.rounds", (8, 16)),)


def test_final_figures_stand_beside_each_other_with_the_best_marked(two: list[RunFolder]) -> None:
    figures = {one.label: one for one in compare(two).figures}
    assert figures["rounds"].values == (8.0, 16.0) and figures["rounds"].best is None
    dice = figures["holdout Dice, best round"]
    assert dice.best == dice.values.index(max(value for value in dice.values if value is not None))
    assert figures["recommended file, bytes"].values == (None, 1_990_000)
    assert figures["recommended file, bytes"].shown == ("–", "1.99 MB")


def test_curves_lie_over_each_other_each_with_its_own_rounds(two: list[RunFolder]) -> None:
    chart = compare(two).charts["Holdout Dice"]
    assert [(trace["name"], trace["x"][-1]) for trace in chart["data"]] == [("short", 8), ("long", 16)]


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [WrittenRun(tmp_path / place / "run", done=2).folder for place in ("a", "b")]
    assert compare(runs).names == ("a/run", "b/run")
    assert compare([runs[0], runs[0]]).names == ("1 a/run", "2 a/run")
    assert compare(runs).settings == ()


def test_the_command_prints_json_and_writes_a_page(
    two: list[RunFolder], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths, out = [str(run.path) for run in two], tmp_path / "compared.html"
    assert main(["compare", *paths, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"] == {"training.rounds": {"short": 8, "long": 16}}
    assert main(["compare", *paths, "--out", str(out)]) == 0
    assert "training.rounds" in capsys.readouterr().out
    assert main(["compare", *(paths * 12)]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) > 120, "where there is no window a table is not folded"
    links = Links(out.read_text())
    assert all(link.startswith(("data:", "#")) for link in links.fetched)
    assert main(["compare", paths[0]]) == 2
    assert main(["compare", paths[0], str(tmp_path)]) == RunFolderError.exit_code


def test_every_setting_has_its_path(two: list[RunFolder]) -> None:
    settings = plain_study(two[0].read_study())
    assert settings["training.rounds"] == 8 and settings["task.classes"] == ["background", "tumour", "edema"]
