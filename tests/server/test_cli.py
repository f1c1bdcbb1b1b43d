"""The `wardround` command from outside: fast answers, exit codes that scripts can rely on, and no traceback ever."""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import common.errors
from common.cli import EXIT_CODES, STOPPED, run_command
from common.errors import DataError, IdentityError, WardroundError
from common.study import Study, parse_study
from server.cli import main
from server.coordinator import _LastRow
from server.results import _chosen_round
from server.run_folder import RunFolder
from server.simulation.hospitals import example_study
from server.status import last_round

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
    for code in (0, *range(2, 11), 70, 130, 141, 143):
        assert re.search(rf"^  {code} +\S", text, re.MULTILINE)


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


@pytest.mark.parametrize(("state", "code"), [("failed", 10), ("stopped", 0), ("finished", 0), ("repaired", 0)])
def test_watch_ends_on_how_the_run_ended(run: RunFolder, state: str, code: int) -> None:
    run.write_status({"study": "cells", "state": state, "pid": 1, "sites": {}})
    assert main(["watch", "--run", str(run.path)]) == code


def test_an_unknown_run_is_an_error_of_the_run_folder(tmp_path: Path) -> None:
    for command in ("status", "watch", "evaluate", "publish"):
        found = wardround(command, "--run", tmp_path / "nowhere")
        assert (found.returncode, found.stdout) == (7, "")
        assert found.stderr.startswith("error: ") and "give the folder of" in found.stderr
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
    hosts = ["--host", "rounds.example.org", "--host", "10.0.0.1"]
    again = json.loads(wardround("certificates", path, "--out", out, *hosts, "--json").stdout)
    assert len(again["kept"]) == 6
    assert (out / "coordinator" / "identity.key").read_bytes() == key
    other = wardround("certificates", path, "--out", out, "--host", "other")
    assert other.returncode == 5
    assert "is not for other" in other.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_coordinator_that_is_stopped_says_once_how_to_go_on(number: signal.Signals, tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(example_study())
    assert wardround("certificates", path, "--out", tmp_path, "--host", "localhost").returncode == 0
    command = [sys.executable, "-m", "server.cli", "coordinator", path, "--run", tmp_path / "run"]
    options = ["--listen", "127.0.0.1:0", "--identity", tmp_path / "coordinator"]
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            said = [next(line for line in process.stderr if "listening on" in line)]
            process.send_signal(number)
            said += process.stderr.readlines()
            assert process.wait(30) == STOPPED
        finally:
            process.kill()
    assert [line for line in said if "stopped" in line] == [line for line in said if "same command to go on" in line]
    assert sum("stopped" in line for line in said) == 1
    shown = wardround("status", "--run", tmp_path / "run").stdout
    assert shown.startswith("cells: stopped\n") and "  sites " not in shown


@pytest.fixture
def rounds_of_a_run(run: RunFolder) -> RunFolder:
    run.rounds.write_text("round,train/loss,validation/dice\n1,0.5,0.625\n2,0.4,0.75\n3,0.4,nan\n4,0.4,\n")
    return run


@pytest.mark.parametrize(("number", "dice"), [(1, 0.625), (2, 0.75), (3, None), (4, None), (5, None)])
def test_a_round_that_is_asked_for_comes_with_its_validation_dice(
    number: int, dice: float | None, rounds_of_a_run: RunFolder, study: Study
) -> None:
    assert _chosen_round(study, rounds_of_a_run, number) == (number, dice)


def test_without_rounds_or_validation_there_is_no_validation_dice(run: RunFolder, study: Study) -> None:
    assert _chosen_round(study, run, 1) == (1, None)
    run.rounds.write_text("round,train/loss\n1,0.5\n")
    assert _chosen_round(study, run, 1) == (1, None)


def test_the_coordinator_logs_a_round_as_the_simulation_shows_it(
    run: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "wardround.coordinator")
    told: dict[str, Any] = {}
    row = {"train": {"loss": 1.3012}, "validation": {"dice": 0.5}, "holdout": {"dice": math.nan}, "seconds": 55.01}
    asyncio.run(_LastRow(SimpleNamespace(set=told.update), run, 8, None).release(row, 1))
    assert caplog.messages == ["round 1 of 8: training loss 1.301, validation Dice 0.500, 55.0 s"]
    assert caplog.messages == [last_round({**told, "rounds": 8})]


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
    assert {0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 70, 130, 141, 143} == set(EXIT_CODES)


def test_help_knows_the_codes_of_the_operations_document_and_of_every_error() -> None:
    text = (Path(__file__).parents[2] / "docs/operations.md").read_text().partition("## Exit codes")[2]
    assert [int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)] == list(EXIT_CODES)
    errors = [error for error in vars(common.errors).values() if isinstance(error, type)]
    codes = {error.exit_code for error in errors if issubclass(error, WardroundError) and error is not WardroundError}
    assert codes <= set(EXIT_CODES)
    assert "cannot be reached" not in EXIT_CODES[4]  # a site dials on


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


def test_a_simulation_hands_the_options_of_its_coordinator_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr("server.simulation.launcher.simulate", lambda study, **options: given.update(options) or 0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "watching.yaml").write_text("alerts: {silent: 5s}\n")
    assert main(["simulate", "--metrics", "9464", "--watching", "watching.yaml", "--allow-unsigned"]) == 0
    found = ["--metrics", "9464", "--watching", str(tmp_path / "watching.yaml"), "--allow-unsigned"]
    assert given["coordinator_options"] == found
    (tmp_path / "watching.yaml").write_text("alerts: {silnt: 5s}\n")
    given.clear()
    assert main(["simulate", "--watching", "watching.yaml"]) == 2
    assert given == {}
