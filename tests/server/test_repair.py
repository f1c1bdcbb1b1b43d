"""`wardround repair`: what it finds in a run folder, what it does about it, and what it never does."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from common.errors import RunFolderError, UsageError
from common.study import parse_study
from common.wire.tensors import Stored, write_tensors
from server.cli import main
from server.journal import Journal, JournalDamagedError, read_history
from server.repair import examine, give_up, repair
from server.run_folder import RunFolder

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
        "asks north for it again, as the round is closed with it. If it never comes: `--give-up north 4`"
        in said(run)[0]
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
    assert sentences == ["round 4 (train): without north it is below the quorum of 2; it is open again to every site"]
    assert read_history(run.journal) == before
    assert give_up(run, "north", 4, dry_run=False) == sentences
    round_ = read_history(run.journal).find("train", 4)
    assert round_ is not None
    assert (round_.closed, sorted(round_.received)) == (None, ["east"])


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


def test_the_command_says_what_it_would_do_and_does_it(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    flip(run.state / "000003.tensors")
    assert main(["repair", "--run", str(run.path), "--dry-run"]) == 0
    assert "state/000003.tensors: the state after round 3 is damaged" in capsys.readouterr().out
    assert main(["repair", "--run", str(run.path), "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["dry_run"], found["findings"][0]["path"]) == (True, "state/000003.tensors")
    assert main(["repair", "--run", str(run.path)]) == 0
    assert "move it to damaged/" in capsys.readouterr().out


def test_the_command_says_that_nothing_is_wrong(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["repair", "--run", str(run.path)]) == 0
    assert "nothing is damaged" in capsys.readouterr().out


def test_the_command_refuses_what_is_no_run_or_is_running(run: RunFolder, tmp_path: Path) -> None:
    assert main(["repair", "--run", str(tmp_path / "none")]) == 7
    assert main(["repair", "--run", str(run.path), "--give-up", "north", "none"]) == 2
    with run.locked():
        assert main(["repair", "--run", str(run.path), "--dry-run"]) == 7
