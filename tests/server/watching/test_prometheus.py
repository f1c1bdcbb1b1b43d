"""Prometheus itself, as hospitals run it, scrapes both sides by the configuration in deploy/."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from client.metrics import serve_metrics
from client.site_status import SiteStatus
from server.watching.watch import Watch, Watching
from tests.server.watching.test_metrics import DEPLOY, whole_run

PROMETHEUS = shutil.which("prometheus")
PATIENCE = 120.0


@pytest.mark.skipif(PROMETHEUS is None, reason="prometheus is not installed (Debian: apt install prometheus)")
def test_prometheus_scrapes_coordinator_and_site(tmp_path: Path) -> None:
    run = whole_run(tmp_path)
    with run.locked(), SiteStatus(tmp_path / "work", "cells", "north") as status:
        status({"state": "training", "connected": True, "round": 3})
        watch = Watch(run, "cells", Watching(metrics="127.0.0.1:0"))
        endpoint = serve_metrics("127.0.0.1:0", [tmp_path / "work"])
        ports = {"wardround": watch.port, "wardround-site": endpoint.port}
        process = started(tmp_path, ports)
        try:
            api = f"http://127.0.0.1:{process[1]}/api/v1/query?query="
            found = until(lambda: asked(api, "up"), lambda answer: answer == {"wardround": 1.0, "wardround-site": 1.0})
            assert found == {"wardround": 1.0, "wardround-site": 1.0}
            assert asked(api, 'wardround_dice{of="holdout"}') == {"wardround": 0.5}
            assert asked(api, "wardround_site_round") == {"wardround-site": 3.0}
            assert asked(api, 'wardround_alert{code="dice-fell"}') == {"wardround": 1.0}
        finally:
            process[0].terminate()
            process[0].wait()
            endpoint.close()
            watch.close()


def started(tmp_path: Path, ports: dict[str, int | None]) -> tuple[subprocess.Popen[bytes], int]:
    """Prometheus with the deployed configuration, at these ports; and its own port."""
    config: dict[str, Any] = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    config["global"]["scrape_interval"] = "1s"
    assert {job["job_name"] for job in config["scrape_configs"]} == set(ports)
    for job in config["scrape_configs"]:
        job["static_configs"] = [{"targets": [f"127.0.0.1:{ports[job['job_name']]}"]}]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    shutil.copy(DEPLOY / "prometheus" / "alerts.yml", tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    command = [
        str(PROMETHEUS),
        f"--config.file={tmp_path / 'prometheus.yml'}",
        f"--storage.tsdb.path={tmp_path / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (tmp_path / "prometheus.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log), port


def asked(api: str, query: str) -> dict[str, float]:
    """The answer to a query by job; {} before Prometheus answers."""
    try:
        with urllib.request.urlopen(api + urllib.parse.quote(query), timeout=10) as answer:
            result = json.load(answer)["data"]["result"]
    except OSError:
        return {}
    return {each["metric"]["job"]: float(each["value"][1]) for each in result}


def until(ask: Any, condition: Any) -> Any:
    """The first answer that meets the condition, or the last one."""
    end = time.monotonic() + PATIENCE
    while not condition(found := ask()) and time.monotonic() < end:
        time.sleep(0.3)
    return found
