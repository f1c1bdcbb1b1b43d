"""The `wardround` command from outside: fast answers, exit codes that scripts can rely on, and no traceback ever."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from common.cli import EXIT_CODES, run_command
from common.errors import DataError, IdentityError
from common.study import Study, parse_study
from server.run_folder import RunFolder
from server.simulation.hospitals import example_study

HEAVY = ("tensorflow", "tensorflow_federated", "grpc", "numpy")


def wardround(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "server.cli", *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=60
    )


def modules_of(*arguments: str | Path) -> set[str]:
    """The packages that a call of the command has imported when it ends."""
    code = (
        "import sys\nfrom server.cli import main\ntry:\n    main()\nexcept SystemExit:\n    pass\n"
        "print('|'.join(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    run = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=True)
    return set(run.stdout.splitlines()[-1].split("|"))


@pytest.fixture
def study() -> Study:
    return parse_study(example_study())


@pytest.fixture
def run(tmp_path: Path, study: Study) -> RunFolder:
    folder = RunFolder(tmp_path / "runs" / "first")
    folder.prepare(study)
    folder.write_status({"study": "cells", "state": "training", "pid": 1, "round": 2, "rounds": 8, "sites": {}})
    return folder


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["simulate", "--help"]])
def test_help_and_version_load_nothing_heavy(arguments: list[str]) -> None:
    assert not modules_of(*arguments) & set(HEAVY)


def test_status_loads_nothing_heavy(run: RunFolder) -> None:
    assert not modules_of("status", "--run", run.path) & set(HEAVY)


def test_help_lists_every_command_and_every_exit_code() -> None:
    text = wardround("--help").stdout
    for word in ("simulate", "coordinator", "certificates", "status", "watch", "evaluate", "publish"):
        assert re.search(rf"^    {word}\s", text, re.MULTILINE)
    for code in (0, *range(2, 11), 70, 130):
        assert f"\n  {code} " in text


def test_status_of_a_killed_coordinator_says_how_to_go_on(run: RunFolder) -> None:
    found = wardround("status", "--run", run.path)
    assert found.returncode == 0
    assert found.stdout.startswith("cells: not running, last seen training in round 2 of 8\n")
    assert "same command" in found.stdout


def test_status_takes_the_newest_run(tmp_path: Path, run: RunFolder, study: Study) -> None:
    other = RunFolder(tmp_path / "runs" / "another")
    other.prepare(study)
    for path in other.path.iterdir():
        os.utime(path, (1, 1))
    assert wardround("status", cwd=tmp_path).stdout.rstrip().endswith("runs/first")


def test_status_as_json_holds_status_sentences_and_quorum(run: RunFolder) -> None:
    found = json.loads(wardround("status", "--json", "--run", run.path).stdout)
    assert (found["format"], found["round"], found["running"], found["quorum"]) == (1, 2, False, 4)
    assert found["description"]["next_step"].startswith("Start the coordinator again")
    assert set(found["sites"]) == {"central", "east", "north", "south", "west"}


def test_watch_of_a_run_that_is_over_ends(run: RunFolder) -> None:
    found = wardround("watch", "--run", run.path)
    assert found.returncode == 0
    assert "not running" in found.stdout


def test_an_unknown_run_is_an_error_of_the_run_folder(tmp_path: Path) -> None:
    for command in ("status", "watch", "evaluate", "publish"):
        found = wardround(command, "--run", tmp_path / "nowhere")
        assert (found.returncode, found.stdout) == (7, "")
        assert found.stderr.startswith("error: ") and "--run" in found.stderr
    assert wardround("status", cwd=tmp_path).returncode == 7


@pytest.mark.parametrize(
    "arguments",
    [[], ["dance"], ["coordinator"], ["evaluate", "--round", "0"], ["certificates", "no-such.yaml", "--out", "o"]],
)
def test_bad_usage_ends_in_2(arguments: list[str], tmp_path: Path) -> None:
    found = wardround(*arguments, cwd=tmp_path)
    assert found.returncode == 2
    assert "usage: wardround" in found.stderr


def test_a_bad_study_ends_in_2_and_names_every_problem(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(example_study().replace("rounds: 24", "rounds: -3").replace("depth: 3", "depth: 30"))
    calls: tuple[list[str | Path], ...] = (
        ["coordinator", path, "--run", tmp_path / "run"],
        ["simulate", path, "--data", tmp_path],
        ["certificates", path, "--out", tmp_path / "out", "--host", "localhost"],
    )
    for arguments in calls:
        found = wardround(*arguments)
        assert found.returncode == 2
        assert "training.rounds" in found.stderr and "model.depth" in found.stderr
        assert "Traceback" not in found.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["bad.yaml"]


def test_a_simulation_names_the_sites_that_have_no_folder(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(example_study())
    data = tmp_path / "data"
    for site in ("central", "east", "north"):
        (data / site).mkdir(parents=True)
    found = wardround("simulate", path, "--data", data, "--run", tmp_path / "run")
    assert found.returncode == 3
    assert "no folder for south and west" in found.stderr
    assert not (tmp_path / "run").exists()


def test_a_simulation_of_a_study_asks_for_its_images(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(example_study())
    assert wardround("simulate", path).returncode == 2
    assert wardround("simulate", "--data", tmp_path).returncode == 2


def test_a_run_of_another_study_is_refused(run: RunFolder, tmp_path: Path, study: Study) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(example_study().replace("rounds: 24", "rounds: 9"))
    for site in study.cohort.sites:
        (tmp_path / "data" / site).mkdir(parents=True)
    found = wardround("simulate", path, "--data", tmp_path / "data", "--run", run.path)
    assert found.returncode == 7
    assert "differs" in found.stderr


def test_evaluation_asks_for_a_holdout(run: RunFolder, tmp_path: Path) -> None:
    assert wardround("evaluate", "--run", run.path).returncode == 2
    found = wardround("evaluate", "--run", run.path, "--holdout", tmp_path / "nowhere")
    assert found.returncode == 3


def test_certificates_are_made_once_and_say_where_they_go(tmp_path: Path, study: Study) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(example_study())
    out = tmp_path / "certificates"
    first = wardround("certificates", path, "--out", out, "--host", "rounds.example.org", "--host", "10.0.0.1")
    assert first.returncode == 0
    for site in study.cohort.sites:
        assert f"{out / 'sites' / site}\n" in first.stdout
        assert (out / "sites" / site / "identity.key").stat().st_mode & 0o777 == 0o600
    assert "safe channel" in first.stdout
    key = (out / "coordinator" / "identity.key").read_bytes()
    again = json.loads(wardround("certificates", path, "--out", out, "--host", "other", "--json").stdout)
    assert len(again["kept"]) == 6
    assert (out / "coordinator" / "identity.key").read_bytes() == key


def test_a_reader_that_goes_away_is_no_error(run: RunFolder) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        found = subprocess.run(
            [sys.executable, "-m", "server.cli", "status", "--run", run.path], stdout=pipe, stderr=subprocess.PIPE
        )
    assert (found.returncode, found.stderr) == (141, b"")


# How any command ends. ---------------------------------------------------------------------------------------------


def raises(error: BaseException) -> Callable[[], int]:
    def main() -> int:
        raise error

    return main


def test_every_failure_has_its_code_and_a_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda: 0) == 0
    assert run_command(raises(DataError("x.tif: torn; restore it"))) == 3
    assert run_command(raises(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "error: x.tif: torn; restore it\nstopped\n"
    assert {0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 70, 130} <= set(EXIT_CODES)


def test_the_cause_that_a_user_can_act_on_leads_out_of_a_group() -> None:
    group = BaseExceptionGroup("tasks", [ValueError(), BaseExceptionGroup("more", [IdentityError("expired")])])
    assert run_command(raises(group)) == 5


def test_a_defect_leaves_its_traceback_in_a_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert run_command(raises(ZeroDivisionError("division by zero"))) == 70
    said = capsys.readouterr().err
    (log,) = tmp_path.iterdir()
    assert said == (
        f"internal error: ZeroDivisionError: division by zero; this is a defect of Wardround; details in {log}\n"
    )
    assert "Traceback" in log.read_text() and "test_cli.py" in log.read_text()


def test_a_defect_in_a_thread_shows_no_traceback_either(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("threading.excepthook", threading.excepthook)

    def main() -> int:
        thread = threading.Thread(target=raises(ZeroDivisionError("in a thread")))
        thread.start()
        thread.join()
        return 0

    assert run_command(main) == 0
    said = capsys.readouterr().err
    assert said.startswith("internal error: ZeroDivisionError: in a thread") and "Traceback" not in said
