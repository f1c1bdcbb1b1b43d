"""A coordinator's metrics: figures of the run folder, few cases never shown, names tied to what deploy/ uses."""

from __future__ import annotations

import http.client
import json
import re
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from client.metrics import site_metrics
from common.errors import NetworkError
from server.watching.metrics import run_metrics
from server.watching.snapshot import SnapshotReader
from server.watching.watch import Watch, Watching
from tests.server.watching.runs import coordinated, round_row, run_folder, site, status, write_rows

DEPLOY = Path(__file__).resolve().parents[3] / "deploy"
PARTS = {f"seconds_{part}": 10.0 for part in ("download", "training", "upload", "waiting", "aggregation", "evaluation")}


def whole_run(tmp_path: Path) -> Any:
    """A run with something of everything."""
    run = run_folder(tmp_path)
    more = {"validation/class/cell": 0.6, "holdout/class/cell/dice": 0.7, "holdout/site/north/dice": 0.65}
    rows = [round_row(1) | PARTS | more, round_row(2, holdout__dice=0.5) | PARTS | more | {"train/patches": 64}]
    write_rows(run.rounds, rows)
    calls = [
        {"round": number, "kind": "train", "site": name, "outcome": "included", "bytes_down": 100, "bytes_up": 7}
        | {"seconds_download": 1, "seconds_work": 2, "seconds_upload": 3, "seconds_waiting": 4}
        for number in (1, 2)
        for name in ("east", "north", "south")
    ]
    write_rows(run.sites, calls)
    privacy = {"unit": "patient", "epsilon": 7.5, "budget": 8, "sites": {"north": 7.5}}
    ends = time.time() + 20 * 86_400
    sites = {"east": site(training_cases=4), "north": site(certificate_expires=ends), "south": site()}
    run.write_status(status(sites=sites, privacy=privacy, certificate_expires=ends, best={"round": 1}))
    run.updates.joinpath("one.tensors").write_bytes(b"12345")
    return run


def values(port: int) -> dict[str, float]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    return {
        sample.name + json.dumps(sample.labels, sort_keys=True): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_running_coordinator_serves_its_figures(tmp_path: Path) -> None:
    run = whole_run(tmp_path)
    with run.locked():
        watch = Watch(run, "cells", Watching(metrics="127.0.0.1:0"))
        assert watch.port is not None
        try:
            found = values(watch.port)
        finally:
            watch.close()
    assert found["wardround_round{}"] == 3
    assert found['wardround_round_seconds{"part": "training"}'] == 10
    assert found['wardround_rounds_seconds_total{"part": "training"}'] == 20
    assert found['wardround_site_bytes_total{"direction": "down", "site": "north"}'] == 200
    assert found['wardround_dice{"of": "holdout"}'] == 0.5
    assert found['wardround_class_dice{"class": "cell", "of": "holdout"}'] == 0.7
    assert found['wardround_origin_dice{"site": "north"}'] == 0.65
    assert found['wardround_site_stage{"site": "north", "stage": "training"}'] == 1
    assert found['wardround_alert{"code": "dice-fell", "severity": "warning", "where": "holdout"}'] == 1
    assert found["wardround_updates_held_bytes{}"] == 5
    assert found['wardround_site_epsilon{"site": "north"}'] == 7.5
    assert 19 < found['wardround_certificate_days{"whose": "north"}'] < 20
    assert found["process_resident_memory_bytes{}"] > 1e6
    assert found['wardround_site_cases{"kind": "training", "site": "north"}'] == 20
    assert 'wardround_site_cases{"kind": "training", "site": "east"}' not in found  # 4 are too few to be shown


def test_ready_means_that_sites_are_answered(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    run.write_status(status(state="starting", kind=None))
    watch = Watch(run, "cells", Watching(metrics="127.0.0.1:0"))
    try:
        assert watch.port is not None
        connection = http.client.HTTPConnection("127.0.0.1", watch.port, timeout=10)
        said = {}
        for state in ("starting", "training"):
            run.write_status(status(state=state, kind=None))
            connection.request("GET", "/readyz")
            answer = connection.getresponse()
            said[state] = answer.status, answer.read().decode()
        assert said == {"starting": (503, "the coordinator is starting\n"), "training": (200, "ok\n")}
    finally:
        watch.close()


def test_a_coordinator_that_hangs_is_not_healthy(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    with coordinated(run, updated_at=time.time() - 300):
        watch = Watch(run, "cells", Watching(metrics="127.0.0.1:0"))
        try:
            assert watch.port is not None
            connection = http.client.HTTPConnection("127.0.0.1", watch.port, timeout=10)
            connection.request("GET", "/healthz")
            assert connection.getresponse().status == 503
        finally:
            watch.close()


def test_a_port_in_use_is_said_with_its_option(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(NetworkError, match=r"--metrics 127\.0\.0\.1:\d+: cannot listen there"),
    ):
        Watch(run, "cells", Watching(metrics=f"127.0.0.1:{taken.getsockname()[1]}"))


def exposed(tmp_path: Path) -> set[str]:
    """The names of all metrics of both sides."""
    run = whole_run(tmp_path)
    with run.locked():
        families = [*run_metrics(SnapshotReader(run.path))]
    site_status = {
        "site": "north", "study": "cells", "state": "training", "connected": True, "round": 3, "batch": 1, "batches": 2,
        "last": {"seconds": {"work": 1.0}}, "training_cases": 9, "bytes": {"up": 1}, "answers": {"taken": 1},
        "privacy": {"epsilon": 1.0, "budget": 8.0}, "certificate_expires": 1.0, "disk_free": 1,
        "alerts": [{"code": "disk-low", "severity": "warning", "where": "north"}],
    }  # fmt: skip
    families += site_metrics([site_status])
    return {sample.name for family in families for sample in family.samples}


def used(text: str) -> set[str]:
    return set(re.findall(r"\bwardround_[a-z_]+", text))


def test_what_is_deployed_and_documented_uses_the_metrics_that_there_are(tmp_path: Path) -> None:
    names = exposed(tmp_path) | {"wardround_deadline_seconds"}
    dashboard = (DEPLOY / "grafana" / "wardround.json").read_text()
    assert json.loads(dashboard)["panels"]
    rules = (DEPLOY / "prometheus" / "alerts.yml").read_text()
    assert yaml.safe_load(rules)["groups"]
    expressions = [target["expr"] for panel in json.loads(dashboard)["panels"] for target in panel.get("targets", ())]
    assert used(" ".join(expressions)) <= names
    assert used(rules) <= names
    assert len(used(" ".join(expressions))) >= 12


def test_the_documentation_lists_every_metric(tmp_path: Path) -> None:
    page = (DEPLOY.parent / "docs" / "watching.md").read_text()
    listed = set(re.findall(r"`(wardround_[a-z_]+)", page))
    assert listed == exposed(tmp_path) | {"wardround_deadline_seconds"}
