"""A coordinator that is asked to stop, or whose disk fails: what it says, and that nothing is lost."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.failpoints import VARIABLE
from common.security.certificates import ensure_simulation_identities
from server.journal import read_history
from tests.system.ports import free_port
from tests.system.test_faults import EVERY_ROW, rows_of_sites

pytestmark = pytest.mark.system


def test_a_coordinator_that_is_asked_to_stop_does_so_at_once_and_goes_on_where_it_was(
    undisturbed: Any, setting: Callable[[str], Any], tiny_study: str
) -> None:
    study = setting(tiny_study)
    study.identities("east", "north")
    listen = f"127.0.0.1:{free_port()}"
    first = study.coordinator(listen=listen, holdout=True)
    east, north = study.site("east"), study.site("north")
    study.until(lambda status: status["round"] == 2 and status["sites"]["east"]["stage"] == "training", first)
    asked = time.monotonic()
    first.signal(signal.SIGTERM)
    assert (first.end(), time.monotonic() - asked < 5) == (143, True)
    assert study.status()["state"] == "stopped"
    again = study.coordinator(listen=listen, holdout=True)
    assert [process.end() for process in (again, east, north)] == [0, 0, 0], again.said()
    assert study.weights() == undisturbed[0].weights()
    assert rows_of_sites(study) == EVERY_ROW
    assert all(int(row["cases"]) > 0 for row in study.rows("sites.csv"))
    assert "Traceback" not in first.said()


_ASKED_AS_IT_ENDS = """
import asyncio, os, pathlib, signal, sys
from server import coordinator
from server.run_folder import RunFolder
from common.study import load_study

class Server:
    async def stop(self, grace):
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(60)

async def at_its_end(*arguments):
    return 0

coordinator.bind = lambda address, identity, access: (Server(), 1)
coordinator._coordinate = at_its_end
study, run, identity = pathlib.Path(sys.argv[1]), RunFolder(pathlib.Path(sys.argv[2])), pathlib.Path(sys.argv[3])
sys.exit(coordinator.run(load_study(study), run, coordinator.Setup("127.0.0.1:1", identity)))
"""


def test_a_coordinator_that_is_asked_to_stop_as_it_ends_does_so_without_a_traceback(
    tmp_path: Path, tiny_study: str
) -> None:
    study, identities = tmp_path / "study.yaml", tmp_path / "identities"
    study.write_text(tiny_study)
    ensure_simulation_identities(identities, "tiny", ["east", "north"], ["127.0.0.1"])
    places = [str(place) for place in (study, tmp_path / "run", identities / "coordinator")]
    ended = subprocess.run(
        [sys.executable, "-c", _ASKED_AS_IT_ENDS, *places], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, "Traceback" in ended.stderr) == (143, False), ended.stderr


def test_a_full_disk_ends_the_coordinator_in_a_sentence_and_the_study_goes_on_after_it(
    undisturbed: Any, setting: Callable[[str], Any], tiny_study: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = setting(tiny_study)
    study.identities("east", "north")
    listen = f"127.0.0.1:{free_port()}"
    sites = None
    for place in ("state.before", "sites_csv.before@2", "publish.before"):  # the same study, full three times
        with monkeypatch.context() as patched:
            patched.setenv(VARIABLE, f"{place}=error:ENOSPC")
            full = study.coordinator(listen=listen, holdout=True)
        sites = sites or study.site("east", "north")
        assert full.end() == 7, full.said()
        last = full.said().splitlines()[-1]
        assert last.startswith("error: ")
        assert "No space left on device" in last
        assert "Traceback" not in full.said()
        assert "No space left on device" in study.status()["error"]
    again = study.coordinator(listen=listen, holdout=True)
    assert sites is not None
    assert [again.end(), sites.end()] == [0, 0], again.said()
    assert study.weights() == undisturbed[0].weights()
    assert rows_of_sites(study) == EVERY_ROW
    assert [path.name for path in study.run.published.iterdir()] == ["v1"]


def test_a_version_is_published_once_also_where_the_coordinator_is_killed_right_after(
    setting: Callable[[str], Any], short_study: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = setting(short_study)
    study.identities("east", "north")
    listen = f"127.0.0.1:{free_port()}"
    for place in ("publish.renamed", "report.written"):
        with monkeypatch.context() as patched:
            patched.setenv(VARIABLE, f"{place}=kill")
            process = study.coordinator(listen=listen)
        if not study.run.published.exists() or not list(study.run.published.iterdir()):
            study.site("east", "north")
        assert process.end() == -signal.SIGKILL, process.said()
    assert study.coordinator(listen=listen).end() == 0
    assert [path.name for path in study.run.published.iterdir()] == ["v1"]
    assert read_history(study.run.journal).published == "v1"
    assert study.status()["state"] == "finished"
