"""A study that is watched, with real processes: metrics, alerts, logs and tables; and a site whose file goes bad."""

from __future__ import annotations

import json
import re
import shutil
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest

from server.watching.samples import read_samples
from tests.server.watching.test_webhook import SECRET, Receiver, receiving

pytestmark = pytest.mark.system

STUDY = """\
study: watched
seed: 3
task: {dimensions: 2, channels: 3, classes: [background, cell], labels: instances}
model: {filters: 4, depth: 1, head: sigmoid}
preprocessing: {patch: [32, 32]}
training: {rounds: 1, patches_per_epoch: 8, batch_size: 4}
cohort: {sites: [east, north], quorum: 1, deadline: 10m}
evaluation: {validation_fraction: 0}
publishing: {variants: [float32], tile: [64, 64]}
"""
NAME = "mustermann-1970"


@pytest.fixture(scope="module")
def watched(setting: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished run in which a file of north could not be read when its round came; and what was seen meanwhile."""
    made = setting(STUDY)
    made.data = shutil.copytree(made.data, tmp_path_factory.mktemp("watched") / "hospitals")
    made.identities("east", "north")
    for folder in ("images", "labels"):
        first = sorted((made.data / "north" / folder).iterdir())[0]
        first.rename(first.with_name(NAME + first.suffix))
    port, metrics, of_site, page = (free_port() for _ in range(4))
    made.address = f"127.0.0.1:{port}"
    place: list[Any] = [made.study]
    for site in ("east", "north"):
        place += ["--site", site, "--data", made.data / site, "--work", made.folder / "sites" / site]
        place += ["--identity", made.run.identity / "sites" / site]
    made.approve(*place)
    options = ["--cache-gb", "0", "--metrics", f"127.0.0.1:{of_site}", "--log-format", "json"]
    sites = made.start(
        "wardround-site", ["start", *place, "--coordinator", made.address, *options], made.folder / "sites.log"
    )
    north = made.folder / "sites" / "north" / "status.json"
    wait(lambda: north.exists() and "reconnecting" in north.read_text(), sites)
    assert scraped(of_site, "/readyz").startswith("no line to the coordinator: east, north")
    for path in (made.data / "north" / "images").glob(f"{NAME}*"):
        path.write_bytes(b"no image any more")
    (made.folder / "key").write_bytes(SECRET)
    (made.folder / "key").chmod(0o600)
    with receiving(503) as receiver:
        text = f"alerts: {{webhook: {receiver.url}, secret_file: {made.folder / 'key'}}}\n"
        (made.folder / "watching.yaml").write_text(text)
        watching = ["--metrics", f"127.0.0.1:{metrics}", "--watching", made.folder / "watching.yaml"]
        command: list[Any] = ["coordinator", made.study, "--run", made.run.path, "--listen", made.address, *watching]
        command += ["--log-format", "json", "--holdout", made.data / "holdout", "--page", f"127.0.0.1:{page}"]
        coordinator = made.start("wardround", command, made.folder / "coordinator.log")
        wait(lambda: "wardround_info" in scraped(metrics), coordinator)
        made.seen = made.page = ""
        while coordinator.lives():
            made.seen, made.page = scraped(metrics) or made.seen, scraped(page, "/") or made.page
            time.sleep(0.5)
        made.site_code, made.code = sites.end(), coordinator.end()
        made.told = told(receiver)
        made.page_after = scraped(page, "/")
    made.coordinator_log = coordinator.said()
    return made


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def scraped(port: int, path: str = "/metrics") -> str:
    """What is served there; "" where nobody answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return str(answer.read().decode())
    except urllib.error.HTTPError as error:
        return error.read().decode()
    except OSError:
        return ""


def wait(condition: Callable[[], bool], process: Any) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert process.lives() and time.monotonic() < end, process.said()[-3000:]
        time.sleep(0.1)


def told(receiver: Receiver) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = [json.loads(body) for _, body in receiver.requests]
    return messages


def test_the_study_goes_on_without_the_site(watched: Any) -> None:
    assert watched.code == 0, watched.coordinator_log[-3000:]
    assert watched.site_code == 3
    outcomes = {row["site"]: (row["outcome"], row["reason"]) for row in watched.rows("sites.csv")}
    assert outcomes == {"east": ("included", ""), "north": ("failed", "its data can no longer be read")}


def test_nothing_at_the_coordinator_names_the_file(watched: Any) -> None:
    assert NAME in (watched.folder / "sites.log").read_text()  # the hospital itself is told
    texts = {path: path.read_bytes() for path in watched.run.path.rglob("*") if path.is_file()}
    assert len(texts) > 20
    assert [path for path, content in texts.items() if NAME.encode() in content] == []
    assert NAME not in watched.coordinator_log + watched.seen + json.dumps(watched.told)


def test_alerts_reached_the_webhook_after_it_had_failed_once(watched: Any) -> None:
    assert watched.told[0] == watched.told[1]  # answered by 503 first
    raised = {message["alert"]["code"] for message in watched.told if message["event"] == "raised"}
    assert {"left-out", "finished"} <= raised
    assert {message["study"] for message in watched.told} == {"watched"}


def test_metrics_were_there_to_the_end(watched: Any) -> None:
    figures = dict(re.findall(r"^(wardround_\S+) (\S+)$", watched.seen, re.MULTILINE))
    assert figures["wardround_round"] == "1.0"
    assert float(figures['wardround_round_seconds{part="aggregation"}']) > 0
    assert figures['wardround_site_answers_total{outcome="failed",site="north"}'] == "1.0"
    assert float(figures['wardround_site_bytes_total{direction="up",site="east"}']) > 0


def test_the_page_was_there_as_long_as_the_run(watched: Any) -> None:
    assert "<h1" in watched.page and "watched" in watched.page
    assert watched.page_after == ""


def test_the_log_is_a_line_an_event_on_stderr_and_in_the_run(watched: Any, wardround: Callable[..., Any]) -> None:
    lines = [line for line in watched.coordinator_log.splitlines() if line.startswith("{")]
    said = [json.loads(line) for line in lines]
    assert {entry["study"] for entry in said} == {"watched"}
    assert sum(entry.get("event") == "round-done" for entry in said) == 1
    assert len(said) < 20
    command = ["wardround", "logs", "--run", watched.run.path, "--level", "debug", "--site", "north", "--json"]
    of_north = [json.loads(line) for line in wardround(*command).stdout.splitlines()]
    assert {"site-connected", "task-handed-out"} <= {entry.get("event") for entry in of_north}
    assert {entry["site"] for entry in of_north} == {"north"}


def test_the_parts_of_the_round_add_up_and_pictures_are_kept(watched: Any) -> None:
    (row,) = watched.rows("rounds.csv")
    parts = ("download", "training", "upload", "waiting", "aggregation")
    assert sum(float(row[f"seconds_{part}"]) for part in parts) == pytest.approx(float(row["seconds"]), abs=0.01)
    assert float(row["seconds_evaluation"]) > 0
    assert row["slowest_site"] == "east"
    samples = read_samples(watched.run.path, 1)
    assert {sample.site for sample in samples} == {"east", "north", None}
    assert all(view.difference.is_file() for sample in samples for view in sample.slices)
