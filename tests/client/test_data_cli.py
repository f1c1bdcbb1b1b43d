"""`wardround-site data`, as it is typed: what it prints, and with which exit code it ends."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile

from client.cli import main

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
STUDY = """
study: tiny
task:
  dimensions: 2
  channels: 1
  classes: [background, cell]
preprocessing: {patch: [16, 16]}
training: {rounds: 2}
cohort: {sites: [alpha], minimum_cases: 2}
"""


@pytest.fixture(autouse=True)
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "registry.sqlite"
    monkeypatch.setenv("WARDROUND_SITE_REGISTRY", str(path))
    return path


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(STUDY)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for kind in ("images", "labels"):
        (tmp_path / "data" / kind).mkdir(parents=True)
    for index, value in enumerate((1, 1, 4)):
        rng = np.random.default_rng(index)
        label = np.zeros((20, 24), np.uint8)
        label[4 : 8 + index, 5:15] = value
        tifffile.imwrite(tmp_path / "data" / "images" / f"P{index}.tif", rng.integers(0, 200, label.shape, np.uint8))
        tifffile.imwrite(tmp_path / "data" / "labels" / f"P{index}.tif", label)
    return tmp_path / "data"


def test_adding_says_what_was_found(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "add", "cells", str(folder), "--label-map", "cell: 1 -> 1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("cells: 3 cases of 3 patients, in pairs of images/ and labels/\n")
    assert "read as cell: 1 -> 1" in out and "2 of 3 cases usable" in out and "E204 1 time" in out
    assert main(["data", "list"]) == 0
    assert str(folder) in capsys.readouterr().out
    assert main(["data", "list", "--json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)
    assert listed["name"] == "cells" and listed["cases"] == 3 and listed["path"] == str(folder)


def test_checking_for_a_study_ends_in_3_where_too_little_is_left(
    folder: Path, study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["data", "add", "cells", str(folder)])
    capsys.readouterr()
    assert main(["data", "check", "cells", "--study", str(study)]) == 0
    out = capsys.readouterr().out
    assert "2 of 3 cases usable, 1 kept out" in out and "E204" in out and "found 4" in out
    (folder / "images" / "P0.tif").write_bytes(b"")
    assert main(["data", "check", "cells", "--study", str(study), "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert {"E104", "E204", "E404"} <= set(found["counts"]["by_code"])
    assert main(["data", "check", "cells"]) == 0  # for no study in particular, two cases are left


def test_a_folder_is_checked_without_being_registered(
    folder: Path, study: Path, registry: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "check", str(folder), "--study", str(study)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"Data set {folder}: 2 of 3 cases usable, 1 kept out")
    assert "at least 2 cases. Of the usable cases, 1 train and 1 validate." in out
    assert main(["check", str(study), "--data", str(folder)]) == 0
    assert capsys.readouterr().out == out and not registry.exists()
    main(["data", "add", "cells", str(folder)])
    capsys.readouterr()
    assert main(["check", str(study), "--data", "cells", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["counts"]["training"], found["counts"]["validation"]) == (1, 1)
    assert main(["check", str(study), "--data", str(folder), "--json"]) == 0
    assert main(["data", "list"]) == 0
    assert "cells" in capsys.readouterr().out
    (folder / "images" / "P0.tif").write_bytes(b"")
    assert main(["check", str(study), "--data", str(folder)]) == 3
    assert main(["check", str(study), "--data", str(folder / "nowhere")]) == 2


def test_a_folder_without_cases_is_not_registered_and_says_why_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["data", "add", "none", str(tmp_path / "empty")]) == 3
    out = capsys.readouterr().out
    assert "none: not registered, because there is no case in" in out
    assert "E502 error: empty holds no image that could be a case. Arrange the folder" in out
    assert main(["data", "check", "none"]) == 2
    capsys.readouterr()
    assert main(["data", "add", "none", str(tmp_path / "empty"), "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert found["registered"] is False and found["check"]["findings"][0]["code"] == "E502"


def test_adding_tells_what_is_wrong_with_the_folder_as_a_whole(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "patients.csv").write_text("case,patient\nP9,ann\n")
    assert main(["data", "add", "cells", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "E101 error: patients.csv: no case is called P9. Write the names as" in out


def test_the_html_report_is_private_and_names_the_findings(folder: Path, study: Path, tmp_path: Path) -> None:
    main(["data", "add", "cells", str(folder)])
    report = tmp_path / "report.html"
    report.write_text("of before")
    report.chmod(0o644)
    assert main(["data", "check", "cells", "--study", str(study), "--html", str(report)]) == 0
    text = report.read_text("utf-8")
    assert "E204" in text and "data:image/png;base64," in text
    assert report.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".report")] == []
    for refused in (tmp_path / "nowhere" / "report.html", Path("/dev/null"), tmp_path):
        assert main(["data", "check", "cells", "--html", str(refused)]) == 2
    assert Path("/dev/null").is_char_device()


def test_the_html_report_says_what_was_checked_and_how_it_is_read(folder: Path, study: Path, tmp_path: Path) -> None:
    maps = ["--label-map", "cell: 1 -> 1", "--channel-map", "FLAIR=dark"]
    main(["data", "add", "cells", str(folder), *maps])
    report = tmp_path / "report.html"
    assert main(["check", str(study), "--data", "cells", "--html", str(report)]) == 0
    text = report.read_text("utf-8")
    for shown in (str(folder), "tiny", "cell: 1 -&gt; 1", "FLAIR=dark", "0, the full resolution", time.strftime("%Y")):
        assert f"{shown}" in text[text.index("<dl>") : text.index("</dl>")]


def test_several_data_sets_are_checked_together_as_start_takes_them(
    folder: Path, study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["data", "add", "one", str(folder)])
    main(["data", "add", "two", str(folder)])
    capsys.readouterr()
    assert main(["check", str(study), "--data", "one,two", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["data_set"] == "one,two" and found["counts"]["cases"] == 6
    assert found["counts"]["by_code"]["E401"] == 3, "each is there twice"
    main(["data", "add", "mapped", str(folder), "--label-map", "4 -> 1"])
    assert main(["check", str(study), "--data", "one,mapped"]) == 3
    assert "is not that of one" in capsys.readouterr().err


def test_adding_shows_what_names_were_taken_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "brain").mkdir()
    for name in (f"{case}_{kind}" for case in "ab" for kind in ("t1 mit KM", "flair", "seg")):
        tifffile.imwrite(tmp_path / "brain" / f"{name}.tif", np.eye(20, dtype=np.uint8))
    main(["data", "add", "brain", str(tmp_path / "brain")])
    out = capsys.readouterr().out
    assert re.search(r"t1 mit KM +T1post +2\n", out) and re.search(r"seg +label +2\n", out)
    main(["data", "add", "again", str(tmp_path / "brain"), "--json"])
    taken = json.loads(capsys.readouterr().out)["taken_for"]
    assert {"description": "seg", "modality": None, "label": True, "count": 2} in taken
    assert {"description": "flair", "modality": "FLAIR", "label": False, "count": 2} in taken


def test_a_label_pattern_that_chooses_none_is_told_with_the_names_there_are(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "beside").mkdir()
    for name in ("a", "a_seg"):
        tifffile.imwrite(tmp_path / "beside" / f"{name}.tif", np.eye(20, dtype=np.uint8))
    main(["data", "add", "beside", str(tmp_path / "beside"), "--label", "nothere"])
    assert "W524 warning: --label 'nothere' matches none of the names: a.tif, a_seg.tif." in capsys.readouterr().out
    main(["data", "add", "pairs", str(folder), "--label", "nothere"])
    assert "W524 warning: --label 'nothere' is not looked at: the folder says" in capsys.readouterr().out


def test_showing_a_case_gives_files_geometry_and_counts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["data", "add", "cells", str(folder)])
    capsys.readouterr()
    assert main(["data", "show", "P2"]) == 0
    out = capsys.readouterr().out
    assert str(folder / "images" / "P2.tif") in out
    assert "1 x 20 x 24 voxels" in out and out.count("TIFF, uint8, 1 channel") == 2, "a label as the file stores it"
    assert "0: 420, 4: 60" in out  # 6 rows of 10 pixels are labelled, of 20 x 24
    assert main(["data", "show", "P2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["facts"]["label"]["counts"] == {"0": 420, "4": 60} and found["data_set"] == "cells"


def test_a_case_in_two_data_sets_asks_which(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["data", "add", "one", str(folder)])
    main(["data", "add", "two", str(folder)])
    assert main(["data", "show", "P0"]) == 2
    assert "in one, two; say which with --data" in capsys.readouterr().err
    assert main(["data", "show", "P0", "--data", "two"]) == 0
    capsys.readouterr()
    assert main(["data", "show", "P7"]) == 2
    assert "the nearest names are P2, P1, P0; see all" in capsys.readouterr().err
    assert main(["data", "show", "p0", "--data", "two"]) == 2
    assert "the nearest names are P0" in capsys.readouterr().err


def test_a_case_is_shown_with_what_a_study_finds_in_it(
    folder: Path, study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["data", "add", "cells", str(folder)])
    capsys.readouterr()
    assert main(["data", "show", "P2"]) == 0
    assert "E204" not in capsys.readouterr().out
    assert main(["data", "show", "P2", "--study", str(study)]) == 0
    assert "E204 error: label P2.tif: expected class indices 0 to 1, found 4." in capsys.readouterr().out


def test_the_list_says_how_labels_are_read_and_json_has_every_option(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--label-map", "cell: 1 -> 1", "--label", "gt", "--patient-pattern", "^(P[0-9])"]
    main(["data", "add", "cells", str(folder), *options])
    capsys.readouterr()
    main(["data", "list"])
    assert "cell: 1 -> 1" in capsys.readouterr().out
    main(["data", "list", "--json"])
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["label"], found["patient_pattern"], found["level"]) == ("gt", "^(P[0-9])", 0)


@pytest.mark.parametrize(
    "arguments",
    [
        ["data", "add", "cells", "FOLDER", "--label-map", "1", "-"],  # of --label-map 1 -> 1
        ["data", "add", "--label-map", "cell:", "4", "-", "cells", "FOLDER"],
    ],
)
def test_an_arrow_without_quotes_is_told(
    folder: Path, registry: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(folder) if word == "FOLDER" else word for word in arguments])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and not registry.exists()
    assert error.startswith("usage: wardround-site data add") and "must stand in quotes" in error


def test_an_unknown_argument_is_told_with_the_usage_of_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["data", "check", "cells", "--stduy", "x.yaml"])
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.startswith("usage: wardround-site data check") and "unrecognized arguments: --stduy x.yaml" in error


def test_removing_forgets_and_says_that_files_stay(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["data", "add", "cells", str(folder)])
    assert main(["data", "remove", "cells"]) == 0
    assert f"the files in {folder} are as they were" in capsys.readouterr().out
    assert (folder / "images" / "P0.tif").exists()
    assert main(["data", "remove", "cells"]) == 2


def test_a_name_does_nothing_to_the_terminal(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("images", "labels"):
        (folder / kind / "P0.tif").rename(folder / kind / "\x1b[31mred.tif")
    main(["data", "add", "cells", str(folder)])
    main(["data", "check", "cells"])
    assert main(["data", "show", "\x1b[31mred"]) == 0
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["--label-map", "cell: 1"],
        ["--channel-map", "FLAIR"],
        ["--channel-map", "FLAIR=("],
        ["--channel-map", "A=x", "--channel-map", "A=y"],
        ["--channel-map", "flair=T2", "--channel-map", "FLAIR=FLAIR"],
        ["--channel-map", "label=mask"],
        ["--patient-pattern", "P[0-9]"],
        ["--label", "["],
    ],
)
def test_options_that_mean_nothing_end_in_2_and_register_nothing(
    folder: Path, registry: Path, arguments: list[str]
) -> None:
    assert main(["data", "add", "cells", str(folder), *arguments]) == 2
    assert not registry.exists()


def test_without_a_registry_the_commands_say_so(registry: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "list"]) == 0
    assert "nothing is registered" in capsys.readouterr().out
    for arguments in (["check", "x"], ["show", "x"], ["remove", "x"]):
        assert main(["data", *arguments]) == 2
    assert not registry.exists()
    registry.write_bytes(b"not a database" * 99)
    assert main(["data", "list"]) == 7
    assert "move it away" in capsys.readouterr().err


def test_a_patient_pattern_that_misses_names_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["data", "add", "cells", str(folder), "--patient-pattern", "^(P[01])"])
    assert "the pattern finds none in 1 name, such as P2" in capsys.readouterr().out


def test_help_loads_nothing_that_reads_images() -> None:
    script = (
        "import sys\n"
        "from client.cli import main\n"
        "try:\n    main(['data', '--help'])\n"
        "except SystemExit:\n    pass\n"
        "heavy = {'tensorflow', 'numpy', 'pydicom', 'nibabel', 'scipy'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not DATA.is_dir(), reason=f"real images are not at {DATA}")
def test_a_real_archive_export_is_registered_with_its_true_spacing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "add", "brain", str(DATA / "brain_tumor_dicom")]) == 0
    out = capsys.readouterr().out
    assert "3 cases of 2 patients, DICOM by patient and session" in out
    assert "FLAIR 3, T1post 3, T1pre 3, T2 3" in out and "3 of 3 cases usable" in out
    assert main(["data", "show", "PGBM-003_19950329"]) == 0
    assert capsys.readouterr().out.count("22 x 320 x 280 voxels, 6.5 x 0.6875 x 0.6875 apart") == 5
