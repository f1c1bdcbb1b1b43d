"""What a coordinator does to be watched while it runs: metrics, alerts to a webhook, tracking; in threads of its own.

All of it reads the run folder, as everybody else does. Nothing that is slow, gone or broken here reaches a round.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from common.errors import WardroundError
from common.watching.alert import Alert
from common.watching.endpoint import Endpoint
from common.watching.logs import about
from server.run_folder import RunFolder, write_atomically
from server.watching.alerts import COORDINATOR
from server.watching.metrics import run_metrics, unhealthy, unready
from server.watching.options import Options, load_options, read_secret
from server.watching.snapshot import SnapshotReader
from server.watching.tracking import Tracker
from server.watching.webhook import Webhook

_log = logging.getLogger("wardround.alerts")
SENT: Final = "alerts.json"
"""The file in a run folder that says which alerts were raised and are not resolved."""
_MOST_ROWS: Final = 4000  # of each table: a coordinator's memory does not grow with its rounds
_LOOK_SECONDS: Final = 2.0
_LOOKS_TO_RESOLVE: Final = 3  # what is gone for a moment is not resolved


@dataclass(frozen=True)
class Watching:
    """How a coordinator is watched: where metrics are served (None: nowhere), and the file of options."""

    metrics: str | None = None
    options: Options = field(default_factory=lambda: load_options(None))


class Watch:
    """Watches a run while its coordinator runs.

    Parameters
    ----------
    run : the run folder, prepared.
    study : the study's name.
    watching : how.

    Attributes
    ----------
    port : where metrics are served; None where they are not.

    Raises
    ------
    NetworkError, UsageError : the address of the metrics, the webhook's secret, or MLflow cannot be used.
    """

    def __init__(self, run: RunFolder, study: str, watching: Watching) -> None:
        self._run = run
        self._reader = SnapshotReader(run.path, most_rows=_MOST_ROWS)
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None
        options = watching.options
        secret = read_secret(Path(options.alerts.secret_file)) if options.alerts.secret_file else b""
        self._webhook = Webhook(options.alerts.webhook, secret, study) if options.alerts.webhook else None
        self._tracker = Tracker(options.tracking, self._reader.read, run.path) if options.tracking.mlflow else None
        self._bell = Bell(run.path / SENT, self._webhook)
        read = self._reader.read
        self._endpoint = (
            Endpoint(
                watching.metrics,
                functools.partial(run_metrics, self._reader),
                functools.partial(unhealthy, read),
                functools.partial(unready, read),
            )
            if watching.metrics is not None
            else None
        )
        self.port = self._endpoint.port if self._endpoint is not None else None
        with contextlib.suppress(WardroundError):  # of a full disk, which the rounds will tell
            options.write_rules(run)

    def begin(self) -> None:
        """The coordinator's own status is there: from here on alerts are looked for."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._look, daemon=True, name="wardround-watch")
            self._thread.start()
            if self._tracker is not None:
                self._tracker.begin()

    def close(self, seconds: float = 30.0) -> None:
        """A last look, and what waits to be sent, for so long at most."""
        end = time.monotonic() + seconds
        self._ending.set()
        if self._thread is not None:
            self._thread.join(timeout=max(0.0, min(5.0, end - time.monotonic())))
            self._thread = None
        if self._webhook is not None:
            self._webhook.close(max(0.0, min(5.0, end - time.monotonic())))
        if self._tracker is not None:
            self._tracker.close(max(0.0, end - time.monotonic()))
        if self._endpoint is not None:
            self._endpoint.close()
            self._endpoint = None

    def _look(self) -> None:
        while True:
            last = self._ending.wait(_LOOK_SECONDS)
            try:
                self._bell.ring(self._reader.read().alerts)
            except WardroundError as error:
                _log.debug("%s", error)
            except Exception as error:  # a defect here must not end the watching
                _log.warning("alerts cannot be looked for (%s: %s)", type(error).__name__, error)
            if last:
                return


class Bell:
    """Tells of every alert once when it is raised, and once when it is resolved; also after a restart, and by then
    what a process before could not send.

    Parameters
    ----------
    path : where it is kept which alerts are raised, and what the webhook has not taken yet.
    webhook : is told; None: the log alone is.
    """

    def __init__(self, path: Path, webhook: Webhook | None) -> None:
        self._path = path
        self._webhook = webhook
        self._absent: dict[str, int] = {}
        self._lock = threading.Lock()
        self._raised: dict[str, Alert] = {}
        self._waiting: list[tuple[str, Alert]] = []
        before: list[tuple[str, Alert]] = []
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            content = json.loads(path.read_text(encoding="utf-8"))
            self._raised = {alert.key: alert for alert in (Alert(**each) for each in content["raised"])}
            before = [(str(event), Alert(**alert)) for event, alert in content["waiting"]]
        for event, alert in before:
            self._tell(event, alert)

    def ring(self, alerts: tuple[Alert, ...]) -> None:
        """The alerts as they are now."""
        now = {alert.key: alert for alert in alerts}
        fresh = [alert for key, alert in now.items() if key not in self._raised]
        self._absent = {key: self._absent.get(key, 0) + 1 for key in self._raised if key not in now}
        over = [self._raised[key] for key, looks in self._absent.items() if looks >= _LOOKS_TO_RESOLVE]
        for alert in fresh:
            self._raised[alert.key] = alert
            level = logging.DEBUG if alert.severity == "info" else logging.WARNING
            words = alert.text().removeprefix(f"{alert.severity}: ")  # the line has a level
            _log.log(level, "alert: %s", words, extra=_about("alert-raised", alert))
            self._tell("raised", alert)
        for alert in over:
            del self._raised[alert.key], self._absent[alert.key]
            _log.info("resolved: %s", alert.what, extra=_about("alert-resolved", alert))
            self._tell("resolved", alert)
        if fresh or over:
            self._keep()

    def _tell(self, event: str, alert: Alert) -> None:
        if self._webhook is None:
            return
        message = (event, alert)
        with self._lock:
            self._waiting.append(message)

        def done() -> None:
            with self._lock:
                self._waiting.remove(message)
            self._keep()

        self._webhook.tell(event, alert, done)

    def _keep(self) -> None:
        with self._lock:
            content = {
                "raised": [asdict(alert) for alert in list(self._raised.values())],
                "waiting": [[event, asdict(alert)] for event, alert in self._waiting],
            }
            with contextlib.suppress(WardroundError):  # of a full disk: they are told once more after a restart
                write_atomically(self._path, json.dumps(content), durable=False)


def _about(event: str, alert: Alert) -> dict[str, Any]:
    """What the log says of an alert beside its words."""
    site = {} if alert.where == COORDINATOR else {"site": alert.where}
    number = {} if alert.round is None else {"round": alert.round}
    return about(event=event, code=alert.code, **site, **number)
