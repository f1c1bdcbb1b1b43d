"""What a coordinator decides from its run folder before anything is compiled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from common.errors import RunFolderError
from common.wire.tensors import write_tensors
from server.coordinator import _check_state, _is_over
from server.journal import Journal
from server.run_folder import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run of two rounds that was trained and published."""
    run = RunFolder(tmp_path)
    run.state.mkdir()
    (run.published / "v1").mkdir(parents=True)
    (run.published / "v1" / "manifest.json").write_text("{}")
    journal = Journal(run.journal)
    for number in (1, 2):
        journal.state(number, write_tensors(run.state / f"{number:06d}.tensors", [np.full(9, number, np.float32)]))
    journal.note("trained", rounds=2, best_round=2)
    journal.note("published", version="v1")
    journal.close()
    run.report.write_text("{}")
    run.write_status({"state": "publishing"})
    return run


def check(run: RunFolder) -> None:
    journal = Journal(run.journal)
    _check_state(run, journal.history())
    journal.close()


def test_a_damaged_or_lost_newest_state_is_told_before_the_plan_is_compiled(run: RunFolder) -> None:
    check(run)
    newest = run.state / "000002.tensors"
    content = newest.read_bytes()
    newest.write_bytes(content[:-1] + b"x")
    with pytest.raises(RunFolderError, match=r"000002\.tensors: damaged .*`wardround repair --run .* --dry-run`"):
        check(run)
    newest.unlink()
    with pytest.raises(RunFolderError, match="the state after round 2 is gone; `wardround repair --run"):
        check(run)
    newest.write_bytes(content)
    (run.state / "000001.tensors").write_bytes(b"an older one is nothing to go on from")
    check(run)


@pytest.mark.parametrize("moved", ["published/v1", "report.json"])
@pytest.mark.parametrize("state", ["publishing", "finished", "repaired"])
def test_a_study_whose_version_or_report_was_moved_away_is_published_again(
    run: RunFolder, moved: str, state: str
) -> None:
    run.write_status({"state": state, "published": str(run.published / "v1")})
    (run.path / moved).rename(run.path / "damaged")
    assert not _is_over(run)
