"""What a site's own people see of it: alerts, the tally of what moved, and metrics over a real HTTP endpoint."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from client.alerts import site_alerts
from client.metrics import serve_metrics
from client.outbox import PendingUpdate, TaskKey
from client.site_status import SiteStatus, read_status, status_text
from client.tally import Tally

STATUS: dict[str, Any] = {"site": "north", "study": "cells", "state": "training", "running": True, "connected": True}


def codes(now: float = 1000.0, disk_free: int | None = 10**12, **fields: Any) -> dict[str, str]:
    found = site_alerts(STATUS | fields, now=now, disk_free=disk_free)
    return {alert.code: f"{alert.severity}: {alert.what}" for alert in found}


def test_a_site_that_works_alerts_nobody() -> None:
    assert codes() == {}


def test_each_cause_has_its_alert() -> None:
    assert codes(connected=False, connected_since=900.0) == {
        "coordinator-silent": "warning: north has had no line to the coordinator for 100 s."
    }
    assert codes(connected=False, connected_since=990.0) == {}
    assert codes(disk_free=10**9)["disk-low"] == "warning: The disk of north has 1.00 GB left."
    assert "critical" in codes(certificate_expires=999.0)["certificate-ending"]
    assert "warning" in codes(certificate_expires=90_000.0)["certificate-ending"]
    privacy = {"epsilon": 7.9, "budget": 8.0}
    assert codes(privacy=privacy)["budget-ending"].startswith("warning: north has spent epsilon 7.90")
    assert list(codes(state="failed", running=False, notice="why", next_step="do")) == ["site-failed"]


def test_the_status_shows_alerts_in_words_and_for_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.site_status._free", lambda folder: 10**9)
    with SiteStatus(tmp_path, "cells", "north") as status:
        status({"state": "training", "connected": False})
        read = read_status(tmp_path)
    assert [alert["code"] for alert in read["alerts"]] == ["disk-low"]
    assert "warning: The disk of north has 1.00 GB left." in status_text(read)
    json.dumps(read)


def test_since_when_a_state_holds_is_kept_until_it_changes(tmp_path: Path) -> None:
    with SiteStatus(tmp_path, "cells", "north") as status:
        status({"connected": False})
        first = read_status(tmp_path)["connected_since"]
        status({"connected": False, "batch": 3})
        assert read_status(tmp_path)["connected_since"] == first
        status({"connected": True})
        assert read_status(tmp_path)["connected_since"] > first


def pending(tmp_path: Path) -> PendingUpdate:
    return PendingUpdate(TaskKey("train", 3, "ab", "cd"), tmp_path, b"", 1000, 20, 1.5, 40.25, "")


def test_what_moved_adds_up(tmp_path: Path) -> None:
    tally = Tally()
    tally.downloaded(500)
    tally.downloaded(0)
    tally.uploaded(1000)
    tally.uploaded(400)  # the line broke, and the rest went once more
    assert tally.answered(pending(tmp_path), 2.0, accepted=True) == {
        "bytes": {"down": 500, "up": 1400},
        "answers": {"taken": 1, "refused": 0},
        "last": {
            "kind": "train", "round": 3, "cases": 20, "accepted": True,
            "seconds": {"download": 1.5, "work": 40.25, "upload": 2.0},
        },
    }  # fmt: skip


def fetched(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_metrics_and_conditions_are_served(tmp_path: Path) -> None:
    with SiteStatus(tmp_path, "cells", "north") as status:
        endpoint = serve_metrics("0", [tmp_path])
        try:
            assert fetched(endpoint.port, "/healthz") == (200, "ok\n")
            assert fetched(endpoint.port, "/readyz") == (503, "no line to the coordinator: north\n")
            expires = time.time() + 10.5 * 86_400
            status(
                {
                    "state": "training",
                    "connected": True,
                    "round": 3,
                    "training_cases": 20,
                    "certificate_expires": expires,
                }
            )
            status(Tally().answered(pending(tmp_path), 2.0, accepted=True))
            assert fetched(endpoint.port, "/readyz") == (200, "ok\n")
            code, text = fetched(endpoint.port, "/metrics")
            assert code == 200
            lines = text.splitlines()
            assert 'wardround_site_round{site="north"} 3.0' in lines
            assert 'wardround_site_seconds{part="training",site="north"} 40.25' in lines
            assert 'wardround_site_updates_total{outcome="taken",site="north"} 1.0' in lines
            assert 'wardround_site_state{site="north",state="training"} 1.0' in lines
            assert any(line.startswith('wardround_certificate_days{whose="north"} 10.4') for line in lines)
            assert any(line.startswith("process_resident_memory_bytes") for line in lines)
            assert fetched(endpoint.port, "/anything")[0] == 404
        finally:
            endpoint.close()
