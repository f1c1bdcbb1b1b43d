"""A site's figures for Prometheus, made of its status files when they are asked for: for the hospital's own monitoring.

The names are the contract: docs/watching.md lists them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prometheus_client.metrics_core import Metric

from client.site_status import read_status
from common.errors import RunFolderError
from common.version import VERSION
from common.watching.endpoint import Endpoint
from common.watching.families import Families

_DAY = 86_400.0


def serve_metrics(address: str, works: Sequence[Path]) -> Endpoint:
    """Serves the figures of the sites with these work folders. Raises NetworkError, UsageError."""

    def statuses() -> list[Mapping[str, Any]]:
        return [status for work in works if (status := _status(work)) is not None]

    return Endpoint(address, lambda: site_metrics(statuses()), lambda: "", lambda: _unready(statuses))


def site_metrics(statuses: Sequence[Mapping[str, Any]]) -> Iterable[Metric]:
    """All figures of these sites, whose statuses are as `read_status` reads them."""
    families = Families()
    for status in statuses:
        _site(status, families)
    return families.all()


def _site(status: Mapping[str, Any], families: Families) -> None:
    site, now = str(status.get("site", "")), time.time()
    gauge = families.gauge
    study = str(status.get("study", ""))
    gauge("wardround_site_info", "The site, its study and its version", 1, site=site, study=study, version=VERSION)
    gauge("wardround_site_state", "1 for what the site does", 1, site=site, state=str(status.get("state", "")))
    gauge("wardround_site_line", "Whether the site has a line to the coordinator", status.get("connected"), site=site)
    gauge("wardround_site_round", "The round that the site was asked for last", status.get("round"), site=site)
    gauge("wardround_site_batch", "Batches that the site has begun", status.get("batch"), site=site)
    gauge("wardround_site_batches", "Batches of the site's work", status.get("batches"), site=site)
    last: Mapping[str, Any] = status.get("last") or {}
    for part, seconds in (last.get("seconds") or {}).items():
        part = "training" if part == "work" else part
        gauge("wardround_site_seconds", "Seconds of the site's last call", seconds, site=site, part=part)
    for kind in ("training", "validation"):
        cases = status.get(f"{kind}_cases")
        gauge("wardround_site_cases", "Cases of the site", cases, site=site, kind=kind)
    for direction, size in (status.get("bytes") or {}).items():
        text = "Bytes to (down) and from (up) the site since its process began"
        families.counter("wardround_site_bytes", text, size, site=site, direction=direction)
    for outcome, number in (status.get("answers") or {}).items():
        families.counter(
            "wardround_site_updates", "The site's updates by their receipt", number, site=site, outcome=outcome
        )
    if privacy := status.get("privacy"):
        gauge("wardround_site_epsilon", "Epsilon that the site has spent", privacy.get("epsilon"), site=site)
        gauge("wardround_site_epsilon_budget", "The study's privacy budget", privacy.get("budget"), site=site)
    if (until := status.get("certificate_expires")) is not None:
        days = (float(until) - now) / _DAY
        gauge("wardround_certificate_days", "Days until the certificate ends", days, whose=site)
    gauge("wardround_site_disk_free_bytes", "Free bytes of the work folder's disk", status.get("disk_free"), site=site)
    for alert in status.get("alerts") or ():
        labels = {"code": alert["code"], "severity": alert["severity"], "where": alert["where"]}
        gauge("wardround_alert", "1 for what somebody should know (docs/watching.md)", 1, **labels)


def _status(work: Path) -> dict[str, Any] | None:
    try:
        return read_status(work)
    except RunFolderError:
        return None


def _unready(statuses: Callable[[], Sequence[Mapping[str, Any]]]) -> str:
    away = [str(status["site"]) for status in statuses() if not status.get("connected")]
    return f"no line to the coordinator: {', '.join(away)}" if away else ""
