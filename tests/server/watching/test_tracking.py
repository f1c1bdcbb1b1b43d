"""A run in MLflow: a real server, one that is not there, and one that comes back."""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.errors import UsageError
from server.run_folder import RunFolder
from server.watching.options import Tracking
from server.watching.snapshot import SnapshotReader
from server.watching.tracking import SENT, Tracker
from tests.server.watching.runs import round_row, run_folder, status, write_rows

pytest.importorskip("mlflow", reason="MLflow is not installed (wardround[mlflow])")
PATIENCE = 240.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an MLflow server with a store of its own."""
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder / 'mlflow.db'}",
        "--artifacts-destination",
        str(folder / "a"),
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + PATIENCE
        while not _answers(address):
            assert process.poll() is None and time.monotonic() < end, (folder / "log").read_text()[-2000:]
            time.sleep(0.5)
        yield address
    finally:
        import os
        import signal

        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def tracked(run: RunFolder, uri: str, seconds: float = PATIENCE) -> None:
    """One process's tracking, from its beginning to its end."""
    tracker = Tracker(Tracking(mlflow=uri, experiment="tests"), SnapshotReader(run.path).read, run.path)
    tracker.begin()
    tracker.close(seconds)


def test_a_run_is_tracked_over_a_restart_to_its_published_version(tmp_path: Path, server: str) -> None:
    from mlflow.tracking import MlflowClient

    run = run_folder(tmp_path)
    case = {"holdout/case/patient-7-east/dice": 0.4}
    write_rows(run.rounds, [round_row(1) | case, round_row(2, train__loss="nan", holdout__dice=0.8) | case])
    run.write_status(status(state="stopped"))
    tracked(run, server)
    client = MlflowClient(server)
    number = json.loads((run.path / SENT).read_text())["run"]
    assert client.get_run(number).info.status == "KILLED"

    write_rows(tmp_path / "more.csv", [round_row(n) | case for n in (1, 2)] + [round_row(3, holdout__dice=0.9) | case])
    (tmp_path / "more.csv").replace(run.rounds)
    version = run.published / "v1"
    version.mkdir()
    (version / "manifest.json").write_text('{"version": "v1"}')
    (version / "model.tflite").write_bytes(b"model")
    run.write_status(status(state="finished", published=str(version)))
    tracked(run, server)

    found = client.get_run(number)
    assert json.loads((run.path / SENT).read_text())["run"] == number
    assert found.info.status == "FINISHED"
    assert found.data.params["training.rounds"] == "9"
    assert found.data.params["study"] == "cells"
    assert [(m.step, m.value) for m in client.get_metric_history(number, "holdout/dice")] == [
        (1, 0.7),
        (2, 0.8),
        (3, 0.9),
    ]
    assert [m.step for m in client.get_metric_history(number, "train/loss")] == [1, 3]
    assert not any("patient-7" in key for key in found.data.metrics)
    artifacts = {each.path for each in client.list_artifacts(number, "published/v1")}
    assert artifacts == {"published/v1/manifest.json", "published/v1/model.tflite"}


def test_a_server_that_is_not_there_costs_one_warning_and_no_waiting(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_folder(tmp_path)
    write_rows(run.rounds, [round_row(1)])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with caplog.at_level(logging.WARNING, "wardround.tracking"):
        tracked(run, f"http://127.0.0.1:{port}")
    assert [record.levelname for record in caplog.records if record.name == "wardround.tracking"] == ["WARNING"]
    assert "takes nothing" in caplog.text
    assert not (run.path / SENT).exists()  # nothing was sent, and nothing is taken for sent


def test_without_mlflow_it_is_said_how_to_have_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.watching.tracking.importlib.util.find_spec", lambda name: None)
    read: Any = None
    with pytest.raises(UsageError, match=r"pip install 'wardround\[mlflow\]'"):
        Tracker(Tracking(mlflow="http://127.0.0.1:5000"), read, tmp_path)
