"""A run in MLflow: the study as parameters, figures by round, the published version as artifacts.

It reads the run folder in a thread of its own, and keeps what it has sent in `tracking.json` there: a server that was
gone gets what it has missed, and a coordinator that is started again goes on in the same MLflow run. Nothing of it
reaches a round. Figures of single cases stay here, as a case's name may say whose it is.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from common.errors import UsageError, WardroundError
from common.version import VERSION
from server.run_folder import write_atomically
from server.watching.options import Tracking
from server.watching.snapshot import RunSnapshot

SENT: Final = "tracking.json"
_log = logging.getLogger("wardround.tracking")
_LOOK_SECONDS: Final = 5.0
_LONGEST_PAUSE: Final = 300.0
_MOST_PARAMETERS: Final = 100  # in one request, as MLflow has it
_MOST_METRICS: Final = 1000
_MOST_LETTERS: Final = 500
_STATES: Final = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
_QUIETLY: Final = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
}


class Tracker:
    """Sends a run to MLflow while its coordinator runs.

    Parameters
    ----------
    options : where to; `mlflow` is given.
    read : the run as it is now.
    folder : the run folder.

    Raises
    ------
    UsageError : MLflow is not installed.
    """

    def __init__(self, options: Tracking, read: Callable[[], RunSnapshot], folder: Path) -> None:
        if importlib.util.find_spec("mlflow") is None:
            raise UsageError(
                "tracking.mlflow: MLflow is not installed; `pip install 'wardround[mlflow]'`, or leave it out"
            )
        self._options = options
        self._read = read
        self._path = folder / SENT
        self._sent: dict[str, Any] = {"uri": options.mlflow, "run": None, "round": 0, "versions": [], "state": None}
        with contextlib.suppress(OSError, ValueError):
            before = json.loads(self._path.read_text(encoding="utf-8"))
            if isinstance(before, dict) and before.get("uri") == options.mlflow:
                self._sent |= before
        self._client: Any = None
        self._complained = False
        self._ending = threading.Event()
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Sends from here on."""
        self._thread = threading.Thread(target=self._run, daemon=True, name="wardround-tracking")
        self._thread.start()

    def close(self, seconds: float = 30.0) -> None:
        """Sends what is left, for so long at most."""
        self._ending.set()
        if self._thread is not None and not self._done.wait(seconds):
            _log.warning(
                "MLflow at %s has not taken everything; the rest is sent at the next start", self._options.mlflow
            )

    def _run(self) -> None:
        pause = _LOOK_SECONDS
        while True:
            last = self._ending.is_set()
            try:
                self._send(self._read())
                pause, self._complained = _LOOK_SECONDS, False
            except Exception as error:  # whatever MLflow and its server may raise
                self._complain(error)
                pause = min(pause * 2, _LONGEST_PAUSE)
            if last:
                self._done.set()
                return
            self._ending.wait(pause)

    def _complain(self, error: Exception) -> None:
        """Says once that nothing gets through, until something does."""
        if not self._complained:
            words = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            _log.warning("MLflow at %s takes nothing (%s); it is tried again", self._options.mlflow, words)
        self._complained = True

    def _send(self, snapshot: RunSnapshot) -> None:
        """All that is new."""
        if snapshot.study is None:
            return
        client = self._connected()
        if self._sent["run"] is None:
            self._create(client, snapshot)
        run = str(self._sent["run"])
        for row in snapshot.rounds:
            if (number := int(row["round"])) > self._sent["round"]:
                now = int(time.time() * 1000)
                self._log_metrics(client, run, [(key, value, now, number) for key, value in figures(row)])
                self._keep(round=number)
        state = str(snapshot.status.get("state"))
        if self._options.artifacts:
            for version in snapshot.versions:
                if version["name"] not in self._sent["versions"]:
                    client.log_artifacts(run, version["folder"], f"published/{version['name']}")
                    self._keep(versions=[*self._sent["versions"], version["name"]])
        wanted = _STATES.get(state, "RUNNING")
        if wanted != self._sent["state"]:
            if wanted == "RUNNING":
                client.update_run(run, status=wanted)
            else:
                client.set_terminated(run, status=wanted)
            self._keep(state=wanted)

    def _connected(self) -> Any:
        if self._client is None:
            for name, value in _QUIETLY.items():
                os.environ.setdefault(name, value)
            logging.getLogger("mlflow").setLevel(logging.ERROR)
            from mlflow.tracking import MlflowClient

            self._client = MlflowClient(self._options.mlflow)
        return self._client

    def _create(self, client: Any, snapshot: RunSnapshot) -> None:
        assert snapshot.study is not None
        experiment = client.get_experiment_by_name(self._options.experiment)
        known = (
            experiment.experiment_id if experiment is not None else client.create_experiment(self._options.experiment)
        )
        tags = {"wardround.version": VERSION, "wardround.plan": str(snapshot.status.get("plan") or "")}
        name = f"{snapshot.study.name} {time.strftime('%Y-%m-%d %H:%M')}"
        run = client.create_run(known, tags=tags, run_name=name).info.run_id
        from mlflow.entities import Param

        parameters = [Param(key, value) for key, value in keys(json.loads(snapshot.study.canonical()))]
        for part in _parts(parameters, _MOST_PARAMETERS):
            client.log_batch(run, params=part)
        self._keep(run=run)

    def _log_metrics(self, client: Any, run: str, values: Sequence[tuple[str, float, int, int]]) -> None:
        from mlflow.entities import Metric

        for part in _parts([Metric(*value) for value in values], _MOST_METRICS):
            client.log_batch(run, metrics=part)

    def _keep(self, **fields: Any) -> None:
        self._sent |= fields
        with contextlib.suppress(WardroundError):  # of a full disk: it is sent once more after a restart
            write_atomically(self._path, json.dumps(self._sent), durable=False)


def figures(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers in a row of `rounds.csv` that are finite, without those of single cases.

    >>> list(figures({"round": 1, "holdout/dice": 0.5, "holdout/case/x/dice": 0.4, "slowest_site": "north"}))
    [('holdout/dice', 0.5)]
    """
    for column, value in row.items():
        if column == "round" or "/case/" in column or not isinstance(value, int | float) or not math.isfinite(value):
            continue
        yield re.sub(r"[^\w\-./ ]", "_", column), float(value)


def keys(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """A study's keys and values as MLflow's parameters.

    >>> list(keys({"study": "cells", "training": {"rounds": 3}}))
    [('study', 'cells'), ('training.rounds', '3')]
    """
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from keys(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            yield f"{prefix}{key}", text[:_MOST_LETTERS]


def _parts(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]
