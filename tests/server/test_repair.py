"""`wardround repair`: what it finds in a run folder, what it does about it, and what it never does."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from common.errors import RunFolderError, UsageError
from common.security.audit import AuditLog
from common.security.audit_check import check_log
from common.security.audit_files import LOG
from common.study import parse_study
from common.wire.tensors import Stored, write_tensors
from server.cli import main
from server.journal import Journal, JournalDamagedError, read_history
from server.repair import examine, give_up, repair
from server.run_folder import RunFolder
from server.status import describe, status_text

STUDY = parse_study(
    """
study: cells
seed: 1
task: {dimensions: 2, channels: 1, classes: [background, cell]}
model: {filters: 4, depth: 2}
preprocessing: {patch: [16, 16]}
training: {rounds: 9}
cohort: {sites: [east, north, south], quorum: 2, deadline: 10m}
"""
)


def tensors(folder: Path, name: str, value: float) -> Stored:
    return write_tensors(folder / f"{name}.tensors", [np.full(50, value, np.float32)])


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run that was killed in round 4: 2 and 3 are saved, 4 is closed with east and north."""
    run = RunFolder(tmp_path / "run")
    run.prepare(STUDY)
    journal = Journal(run.journal)
    for number in (1, 2, 3, 4):
        journal.opened("train", number, STUDY.cohort.sites, bytes([number]) * 32)
        for site in ("east", "north"):
            journal.received("train", number, 1, site, tensors(run.updates, f"{number:06d}-train-{site}-ab", number))
        journal.closed("train", number, 1, ["east", "north"])
        if number < 4:
            journal.model(number, tensors(run.models, f"{number:06d}", number))
            journal.state(number, tensors(run.state, f"{number:06d}", number))
            for path in run.updates.glob(f"{number:06d}-*"):
                path.unlink()
    journal.close()
    (run.state / "000001.tensors").unlink()
    run.rounds.write_text("round,loss\r\n1,0.5\r\n2,0.4\r\n3,0.3\r\n")
    run.write_status({"state": "training", "round": 4})
    return run


def flip(path: Path) -> bytes:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return bytes(content)


def files(run: RunFolder) -> dict[str, bytes]:
    """All files that a repair must not change by itself; a reader of SQLite makes and removes its own."""
    names = [path for path in run.path.rglob("*") if path.is_file() and not path.name.endswith(("-shm", "-wal"))]
    return {str(path.relative_to(run.path)): path.read_bytes() for path in names}


def said(run: RunFolder) -> list[str]:
    return [f"{found.path}: {found.problem} -> {found.action}" for found in examine(run)]


def test_in_a_run_that_was_merely_killed_nothing_is_damaged(run: RunFolder) -> None:
    assert said(run) == []
    assert repair(run) == []


def test_a_dry_run_changes_nothing(run: RunFolder) -> None:
    flip(run.state / "000003.tensors")
    (run.path / ".status.json.abc.partial").write_text("half")
    before = files(run)
    assert len(said(run)) >= 3
    assert files(run) == before


def test_what_is_repaired_is_in_the_audit_log(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.closing(AuditLog(run.path, "coordinator")) as log:
        log.record("study-started")
    flip(max(run.state.glob("*.tensors")))
    examine(run)
    assert [entry.event for entry in check_log(run.path).entries] == ["study-started"]
    repair(run)
    _, repaired = check_log(run.path).entries
    assert repaired.event == "run-repaired" and repaired.actor == "coordinator"
    assert any(one.startswith("state/") for one in repaired.details["findings"])
    repair(run)  # nothing is damaged any more
    assert len(check_log(run.path).entries) == 2
    (run.path / "audit.log").write_text("spoilt\n")
    flip(max(run.state.glob("*.tensors")))
    repair(run)
    assert "not recorded: " in capsys.readouterr().err and (run.path / "audit.log").read_text() == "spoilt\n"


def test_a_damaged_state_goes_aside_and_the_run_back_to_the_round_before(run: RunFolder) -> None:
    damaged = flip(run.state / "000003.tensors")
    found = "\n".join(said(run))
    assert "state/000003.tensors: the state after round 3 is damaged: expected SHA-256" in found
    assert "go back to round 2: the rounds after it are done again, closed ones with the same sites" in found
    repair(run)
    assert (run.damaged / "000003.tensors").read_bytes() == damaged
    history = read_history(run.journal)
    assert history.saved == 2
    round_ = history.find("train", 3)
    assert round_ is not None
    assert round_.closed == ("east", "north")
    lost = ["the update of east for round 3 (train) is missing", "the update of north for round 3 (train) is missing"]
    assert [line.split(": ")[1].split(" -> ")[0] for line in said(run)] == lost


def test_without_any_state_the_run_begins_again_with_the_same_cohorts(run: RunFolder) -> None:
    for path in run.state.iterdir():
        path.unlink()
    assert "begin again with round 1" in "\n".join(said(run))
    repair(run)
    assert read_history(run.journal).saved == 0
    assert [found.closed for found in read_history(run.journal).rounds.values()] == [("east", "north")] * 4


def test_a_state_that_was_not_recorded_yet_is_better_than_to_go_back(run: RunFolder) -> None:
    flip(run.state / "000003.tensors")
    tensors(run.state, "000004", 4)
    assert "go on from the state after round 4" in "\n".join(said(run))
    repair(run)
    assert sorted(read_history(run.journal).states) == [1, 2, 4]
    assert said(run) == []


def test_a_damaged_update_goes_aside_and_its_site_is_asked_again(run: RunFolder) -> None:
    path = next(run.updates.glob("000004-train-north-*"))
    flip(path)
    assert (
        "asks north for it again, as the round is closed with it. If it never comes: `wardround repair --run "
        f"{run.path} --give-up north 4`" in said(run)[0]
    )
    repair(run)
    assert (run.damaged / path.name).exists()
    assert not path.exists()
    assert "the update of north for round 4 (train) is missing" in said(run)[0]


def test_a_damaged_model_goes_aside(run: RunFolder) -> None:
    flip(run.models / "000002.tensors")
    repair(run)
    assert [path.name for path in run.damaged.iterdir()] == ["000002.tensors"]


def test_what_is_left_over_is_removed(run: RunFolder) -> None:
    left = [run.updates / "000002-train-east-abcd.upload", run.updates / ".000004-train-east.x.partial"]
    left += [run.path / ".rounds.csv.x.partial", run.published / ".v1.abcd1234.partial" / "model.tflite"]
    left[-1].parent.mkdir()
    for path in left:
        path.write_bytes(b"half")
    kept = run.updates / "000004-train-south-abcd.upload"
    kept.write_bytes(b"half")
    repair(run)
    assert not [path for path in left if path.exists()]
    assert kept.exists()


def test_a_torn_table_keeps_its_whole_rows(run: RunFolder) -> None:
    run.rounds.write_bytes(run.rounds.read_bytes() + b"4,")
    assert "rounds.csv: a line is torn" in said(run)[0]
    repair(run)
    assert run.rounds.read_bytes() == b"round,loss\r\n1,0.5\r\n2,0.4\r\n3,0.3\r\n"
    assert (run.damaged / "rounds.csv").read_bytes().endswith(b"4,")


def test_a_damaged_version_goes_aside_whole(run: RunFolder) -> None:
    version = run.published / "v1"
    version.mkdir()
    (version / "model.tflite").write_bytes(b"model")
    listed = {"model.tflite": {"sha256": hashlib.sha256(b"model").hexdigest()}}
    (version / "manifest.json").write_text(json.dumps({"files": listed}))
    before = said(run)
    (version / "model.tflite").write_bytes(b"nodel")
    assert any(line.startswith("published/v1: the published version v1 is damaged") for line in said(run))
    repair(run)
    assert (run.damaged / "v1" / "model.tflite").read_bytes() == b"nodel"
    assert before == [] or "manifest" in before[0]


@pytest.mark.parametrize("name", ["status.json", "report.json", "report.pending.json", "study.yaml"])
def test_a_text_that_cannot_be_read_goes_aside(run: RunFolder, name: str) -> None:
    (run.path / name).write_bytes(b"{\xff: torn")
    assert said(run)[0].startswith(f"{name}: cannot be read")
    repair(run)
    assert (run.damaged / name).read_bytes() == b"{\xff: torn"
    assert said(run) == []


def overwrite_a_page(content: bytes) -> bytes:
    return content[:4096] + os.urandom(4096) + content[8192:]


@pytest.mark.parametrize("harm", [overwrite_a_page, lambda content: content[: len(content) // 2], lambda _: b"x" * 99])
def test_a_damaged_journal_is_salvaged_and_kept(run: RunFolder, harm: Callable[[bytes], bytes]) -> None:
    damaged = harm(run.journal.read_bytes())
    run.journal.write_bytes(damaged)
    with pytest.raises(JournalDamagedError):
        Journal(run.journal)
    assert said(run)[0].startswith("journal.sqlite: the journal is damaged (")
    repair(run)
    assert (run.damaged / "journal.sqlite").read_bytes() == damaged
    journal = Journal(run.journal)
    assert len(journal.events("salvaged")) == 1
    journal.close()
    assert not [line for line in said(run) if "journal" in line or "state" in line]
    assert [path.name for path in sorted(run.state.iterdir())] == ["000002.tensors", "000003.tensors"]


def test_a_lost_journal_leaves_the_states(run: RunFolder) -> None:
    run.journal.unlink()
    assert "the journal is missing" in said(run)[0]
    repair(run)
    assert len(list(run.state.iterdir())) == 2


def test_a_lost_update_that_never_comes_again_can_be_given_up(run: RunFolder) -> None:
    with pytest.raises(UsageError, match="the update is here"):
        give_up(run, "north", 4, dry_run=False)
    with pytest.raises(UsageError, match="round 3 is saved"):
        give_up(run, "north", 3, dry_run=False)
    with pytest.raises(UsageError, match="'west' is not in the cohort"):
        give_up(run, "west", 4, dry_run=False)
    with pytest.raises(UsageError, match="waits for no lost update of south"):
        give_up(run, "south", 4, dry_run=False)
    next(run.updates.glob("000004-train-north-*")).unlink()
    before = read_history(run.journal)
    sentences = give_up(run, "north", 4, dry_run=True)
    assert sentences == [
        "round 4 (train): without north it is below the quorum of 2; it is open again to every site",
        "This changes the result of round 4, and so of all rounds after it",
    ]
    assert read_history(run.journal) == before
    assert give_up(run, "north", 4, dry_run=False) == sentences
    round_ = read_history(run.journal).find("train", 4)
    assert round_ is not None
    assert (round_.closed, sorted(round_.received)) == (None, ["east"])


def test_to_go_on_without_a_site_says_that_this_changes_the_result_and_the_status_says_it_too(run: RunFolder) -> None:
    journal = Journal(run.journal)
    journal.opened("train", 5, STUDY.cohort.sites, b"\x05" * 32)
    for site in STUDY.cohort.sites:
        journal.received("train", 5, 1, site, tensors(run.updates, f"000005-train-{site}-ab", 5))
    journal.closed("train", 5, 1, STUDY.cohort.sites)
    journal.close()
    (run.updates / "000005-train-north-ab.tensors").unlink()
    run.write_status({"state": "training", "notice": "round 5 waits for north"})
    assert give_up(run, "north", 5, dry_run=False) == [
        "round 5 (train): goes on with east, south alone",
        "This changes the result of round 5, and so of all rounds after it",
    ]
    status = run.read_status()
    assert (status["state"], status["notice"]) == ("repaired", "")
    assert status["repair"] == "north was given up in round 5, which changes the result."


def test_a_site_whose_training_update_is_here_is_not_given_up_for_an_evaluation_that_nobody_asked_for(
    run: RunFolder,
) -> None:
    """As after a repair that went back: the evaluation comes by itself once all have trained again."""
    journal = Journal(run.journal)
    journal.opened("evaluate", 4, STUDY.cohort.sites, b"\x44" * 32)
    for site in ("east", "north"):
        journal.received("evaluate", 4, 1, site, tensors(run.updates, f"000004-evaluate-{site}-ab", 9))
    journal.closed("evaluate", 4, 1, ["east", "north"])
    journal.returned(3)
    journal.close()
    for site in ("east", "north"):
        (run.updates / f"000004-evaluate-{site}-ab.tensors").unlink()
    with pytest.raises(UsageError, match="the update is here"):
        give_up(run, "north", 4, dry_run=False)
    journal = Journal(run.journal)
    journal.opened("evaluate", 4, STUDY.cohort.sites, b"\x44" * 32)  # now it was asked for
    journal.close()
    (run.updates / "000004-train-east-ab.tensors").rename(run.path / "kept")
    with pytest.raises(UsageError, match="the update is here"):  # training waits for east, and comes first
        give_up(run, "north", 4, dry_run=False)
    (run.path / "kept").rename(run.updates / "000004-train-east-ab.tensors")
    assert give_up(run, "north", 4, dry_run=False)[0].startswith("round 4 (evaluate): without north")


def test_where_layers_are_personal_an_update_that_its_site_has_outdated_can_be_given_up(run: RunFolder) -> None:
    """It is here, but the coordinator asks for it again (`Federation`)."""
    journal = Journal(run.journal)
    journal.received("train", 3, 1, "north", tensors(run.updates, "000003-train-north-ab", 3))
    journal.close()
    with pytest.raises(UsageError, match="the update is here"):
        give_up(run, "north", 4, dry_run=True)
    training = dataclasses.replace(STUDY.training, personal="normalization")
    model = dataclasses.replace(STUDY.model, normalization="batch")
    run.study.write_text(dataclasses.replace(STUDY, training=training, model=model).to_yaml())
    assert "without north" in give_up(run, "north", 4, dry_run=True)[0]


def test_nothing_is_repaired_under_a_coordinator(run: RunFolder) -> None:
    with run.locked(), pytest.raises(RunFolderError, match="another coordinator runs this study"):
        repair(run)


def test_a_folder_that_is_no_run_is_left_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no run here"):
        repair(RunFolder(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("harm", ["state", "states", "update", "journal", "no journal", "table"])
def test_a_second_repair_finds_no_damage_and_says_what_is_awaited(
    run: RunFolder, harm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if harm == "state":
        flip(run.state / "000003.tensors")
    elif harm == "states":
        for path in run.state.iterdir():
            flip(path)
    elif harm == "update":
        flip(next(run.updates.glob("000004-train-north-*")))
    elif harm == "journal":
        run.journal.write_bytes(overwrite_a_page(run.journal.read_bytes()))
    elif harm == "no journal":
        run.journal.unlink()
    else:
        run.rounds.write_bytes(run.rounds.read_bytes() + b"4,")
    assert main(["repair", "--run", str(run.path)]) == 0
    assert "nothing is damaged" not in capsys.readouterr().out
    assert main(["repair", "--run", str(run.path), "--dry-run"]) == 0
    assert main(["repair", "--run", str(run.path)]) == 0
    text = capsys.readouterr().out
    assert text.count("nothing is damaged") == 2
    awaited = harm in ("state", "states", "update")
    assert ("Awaited from the sites when the coordinator runs, and no damage:" in text) == awaited
    assert ("the coordinator asks north for it again" in text) == awaited


def test_after_a_repair_the_status_shows_no_old_failure_and_only_figures_that_hold(run: RunFolder) -> None:
    last, best = {"round": 3, "train_loss": 0.3}, {"round": 2, "validation_dice": 0.8}
    run.write_status(
        {"study": "cells", "state": "failed", "error": "damaged", "notice": "n", "last": last, "best": best}
    )
    run.rounds.write_bytes(run.rounds.read_bytes() + b"4,")
    repair(run)
    status = run.read_status()
    assert (status["last"], status["best"]) == (last, best)
    flip(run.state / "000003.tensors")
    repair(run)
    status = run.read_status()
    assert (status["state"], status["error"], status["notice"], status["round"]) == ("repaired", "", "", 2)
    assert (status["last"], status["best"]) == (None, best)
    found = describe(status)
    assert found.cause.endswith("set aside what was damaged, in damaged/; the run goes on after round 2.")
    assert found.next_step == "Start the coordinator again with the same command."


def test_a_finished_study_stays_finished_unless_what_it_published_is_damaged(run: RunFolder) -> None:
    version = run.published / "v1"
    version.mkdir()
    (version / "manifest.json").write_text(json.dumps({"files": {}}))
    journal = Journal(run.journal)
    journal.note("trained", rounds=3, best_round=3)
    journal.note("published", version="v1")
    journal.close()
    run.report.write_text("{}")
    run.write_status({"state": "finished", "published": str(version)})
    run.rounds.write_bytes(run.rounds.read_bytes() + b"4,")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("server.repair.version_fault", lambda folder: "")
        repair(run)
    assert run.is_finished()
    (version / "manifest.json").write_text("{torn")
    repair(run)
    status = run.read_status()
    assert (status["state"], status["published"]) == ("repaired", None)
    assert "published/v1" not in status_text(status)


def test_a_repair_of_the_journal_says_what_that_means_for_the_run(run: RunFolder) -> None:
    run.journal.write_bytes(overwrite_a_page(run.journal.read_bytes()))
    assert "For the run: rounds whose state is saved stay as they are" in said(run)[0]
    assert "may close with other sites, which changes the result" in said(run)[0]


def test_the_command_says_what_it_would_do_and_does_it(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    flip(run.state / "000003.tensors")
    assert main(["repair", "--run", str(run.path), "--dry-run"]) == 7
    text = capsys.readouterr().out
    assert "state/000003.tensors: the state after round 3 is damaged: the file is torn or was changed\n" in text
    assert "Nothing of this was done yet" in text
    assert main(["repair", "--run", str(run.path), "--dry-run", "--json"]) == 7
    found = json.loads(capsys.readouterr().out)
    assert (found["dry_run"], found["findings"][0]["path"]) == (True, "state/000003.tensors")
    assert main(["repair", "--run", str(run.path)]) == 0
    assert "move it to damaged/" in capsys.readouterr().out


def test_the_command_says_whether_a_site_was_given_up_or_only_would_be(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    next(run.updates.glob("000004-train-north-*")).unlink()
    command = ["repair", "--run", str(run.path), "--give-up", "north", "4"]
    assert main([*command, "--dry-run"]) == 0
    assert "Nothing of this was done yet" in capsys.readouterr().out
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "This changes the result" in text and "This was done. Start the coordinator again" in text


def test_the_command_says_that_nothing_is_wrong(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["repair", "--run", str(run.path)]) == 0
    assert "nothing is damaged" in capsys.readouterr().out


def test_the_command_refuses_what_is_no_run_or_is_running(run: RunFolder, tmp_path: Path) -> None:
    assert main(["repair", "--run", str(tmp_path / "none")]) == 7
    assert main(["repair", "--run", str(run.path), "--give-up", "north", "none"]) == 2
    with run.locked():
        assert main(["repair", "--run", str(run.path), "--dry-run"]) == 7


def test_a_damaged_audit_log_is_told_and_left_as_it_is(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    log = AuditLog(run.path, "coordinator")
    for number in range(3):
        log.record("round-closed", round=number)
    log.close()
    content = (run.path / LOG).read_bytes().replace(b'"round":1', b'"round":7')
    (run.path / LOG).write_bytes(content)
    assert main(["repair", "--run", str(run.path), "--dry-run"]) == 7
    said = capsys.readouterr()
    assert "nothing is damaged" not in said.out
    assert "audit.log: the audit log is not what was written: entry 2" in said.err and "Traceback" not in said.err
    assert main(["repair", "--run", str(run.path), "--dry-run", "--json"]) == 7
    assert "not what was written" in json.loads(capsys.readouterr().out)["audit"]
    assert (run.path / LOG).read_bytes() == content
