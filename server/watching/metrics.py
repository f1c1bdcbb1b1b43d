"""A run's figures for Prometheus, made of a snapshot when they are asked for.

The names are the contract: docs/watching.md lists them, the dashboard and the alerts in `deploy/` use them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from prometheus_client.metrics_core import Metric

from common.errors import WardroundError
from common.version import VERSION
from common.watching.families import Families
from server.timings import ROUND_PARTS
from server.watching.snapshot import RunSnapshot, SnapshotReader
from server.watching.totals import Totals

FEWEST_CASES: Final = 5
"""Numbers of cases below this, or the study's `minimum_cases`, are not shown."""
_STATES = (
    "starting", "waiting for sites", "training", "evaluating", "publishing", "finished", "failed", "stopped", "repaired"
)  # fmt: skip
_STALLED_SECONDS = 60.0  # status.json is written every few seconds while a round is under way
_DAY = 86_400.0


def run_metrics(reader: SnapshotReader) -> Iterable[Metric]:
    """All figures of a run; none where there is no run yet."""
    try:
        snapshot = reader.read()
    except WardroundError:
        return []
    families = Families()
    _totals(snapshot, reader.totals, families)
    for make in (_study, _round, _sites, _figures, _privacy, _resources, _alerts):
        make(snapshot, families)
    return families.all()


def unhealthy(read: Callable[[], RunSnapshot]) -> str:
    """Why the coordinator seems to hang; "" where it does not."""
    try:
        status = read().status
    except WardroundError:
        return ""  # it has only just started
    age = time.time() - float(status.get("updated_at") or time.time())
    return f"the status is {age:.0f} s old" if status.get("kind") and age > _STALLED_SECONDS else ""


def unready(read: Callable[[], RunSnapshot]) -> str:
    """Why sites are not answered yet, or no more; "" where they are."""
    try:
        status = read().status
    except WardroundError as error:
        return str(error)
    state = str(status.get("state", "starting"))
    return f"the coordinator is {state}" if state in ("starting", "failed", "stopped") else ""


def _study(snapshot: RunSnapshot, families: Families) -> None:
    status = snapshot.status
    name = str(status.get("study", ""))
    families.gauge("wardround_info", "The study and the version that coordinates it", 1, study=name, version=VERSION)
    for state in _STATES:
        families.gauge("wardround_state", "1 for the state of the run", status.get("state") == state, state=state)
    families.gauge("wardround_rounds", "Rounds of the study", status.get("rounds"))


def _round(snapshot: RunSnapshot, families: Families) -> None:
    status = snapshot.status
    families.gauge("wardround_round", "The round under way, or the last one", status.get("round"))
    families.gauge("wardround_attempt", "Attempt of the round under way", status.get("attempt"))
    families.gauge("wardround_sites_needed", "Sites that the round needs", status.get("needed"))
    connected = sum(bool(site.get("connected")) for site in snapshot.sites)
    families.gauge("wardround_sites_connected", "Sites that are connected", connected)
    if (deadline := status.get("deadline_at")) is not None:
        left = max(0.0, float(deadline) - snapshot.read_at)
        families.gauge("wardround_deadline_seconds", "Seconds until the round's deadline", left)
    if snapshot.rounds:
        last = snapshot.rounds[-1]
        families.gauge("wardround_round_last_finished", "The newest round with figures", last.get("round"))
        for part in ROUND_PARTS:
            value = last.get(f"seconds_{part}")
            families.gauge("wardround_round_seconds", "Seconds of the last round by part", value, part=part)


def _sites(snapshot: RunSnapshot, families: Families) -> None:
    study = snapshot.study
    fewest = max(FEWEST_CASES, (study.cohort.minimum_cases or 0) if study is not None else 0)
    for site in snapshot.sites:
        name = str(site["name"])
        families.gauge("wardround_site_connected", "Whether the site is connected", site.get("connected"), site=name)
        stage = str(site.get("stage") or "waiting")
        families.gauge("wardround_site_stage", "1 for what the site does in the round", 1, site=name, stage=stage)
        families.gauge("wardround_site_batch", "Batches that the site has begun", site.get("batch"), site=name)
        families.gauge("wardround_site_batches", "Batches of the site's work", site.get("batches"), site=name)
        if (seen := site.get("last_seen_at")) is not None:
            ago = max(0.0, snapshot.read_at - float(seen))
            families.gauge("wardround_site_last_seen_seconds", "Seconds since the site was connected", ago, site=name)
        idle = site.get("no_progress_seconds") or 0
        families.gauge("wardround_site_idle_seconds", "Seconds without progress, from a minute on", idle, site=name)
        for kind in ("training", "validation"):
            cases = int(site.get(f"{kind}_cases") or 0)
            if cases >= fewest:
                families.gauge("wardround_site_cases", "Cases of the site, unless few", cases, site=name, kind=kind)
        for part, column in (("download", "download"), ("training", "work"), ("upload", "upload"), ("waiting",) * 2):
            value = (site.get("last") or {}).get(f"seconds_{column}")
            families.gauge("wardround_site_seconds", "Seconds of the site's last call", value, site=name, part=part)


def _totals(snapshot: RunSnapshot, totals: Totals, families: Families) -> None:
    for part in ROUND_PARTS:
        families.counter(
            "wardround_rounds_seconds", "Seconds of all rounds by part", totals.seconds.get(part), part=part
        )
    for name in (str(site["name"]) for site in snapshot.sites):
        for direction in ("down", "up"):
            families.counter(
                "wardround_site_bytes", "Bytes to (down) and from (up) the site in closed rounds",
                totals.bytes[name, direction], site=name, direction=direction,
            )  # fmt: skip
        for outcome in ("included", "failed", "missing"):
            families.counter(
                "wardround_site_answers", "The site's calls by what became of them",
                totals.answers[name, outcome], site=name, outcome=outcome,
            )  # fmt: skip


def _figures(snapshot: RunSnapshot, families: Families) -> None:
    last: Mapping[str, Any] = snapshot.rounds[-1] if snapshot.rounds else {}
    families.gauge("wardround_training_loss", "Training loss of the last round", last.get("train/loss"))
    families.gauge("wardround_training_patches", "Patches of the last round", last.get("train/patches"))
    for of in ("validation", "holdout"):
        families.gauge("wardround_dice", "Mean Dice of the last round", last.get(f"{of}/dice"), of=of)
    for column, value in last.items():
        of, *parts = column.split("/")
        if len(parts) > 1 and parts[0] == "class" and parts[2:] in ([], ["dice"]):
            families.gauge(
                "wardround_class_dice", "Dice of the last round by class", value, of=of, **{"class": parts[1]}
            )
        elif of == "holdout" and parts[:1] == ["site"] and parts[2:] == ["dice"]:
            families.gauge("wardround_origin_dice", "Holdout Dice by the images' site of origin", value, site=parts[1])
    best = snapshot.status.get("best") or {}
    families.gauge("wardround_best_round", "The best round so far", best.get("round"))


def _privacy(snapshot: RunSnapshot, families: Families) -> None:
    privacy = snapshot.privacy
    if not privacy:
        return
    spent = None if privacy.get("bound") == "upper" else privacy.get("epsilon")
    families.gauge("wardround_epsilon", "The most that any unit has spent of its budget", spent)
    families.gauge("wardround_epsilon_budget", "The study's privacy budget", privacy.get("budget"))
    for site, value in (privacy.get("sites") or {}).items():
        families.gauge("wardround_site_epsilon", "Epsilon that the site has spent", value, site=site)


def _resources(snapshot: RunSnapshot, families: Families) -> None:
    waiting = list(_updates(Path(snapshot.run) / "updates"))
    families.gauge("wardround_updates_held", "Updates on the coordinator's disk, whole or in part", len(waiting))
    families.gauge("wardround_updates_held_bytes", "Their bytes", sum(waiting))
    families.gauge("wardround_disk_free_bytes", "Free bytes of the run folder's disk", snapshot.disk_free)
    families.gauge("wardround_versions", "Published versions", len(snapshot.versions))
    ends = [("coordinator", snapshot.status.get("certificate_expires"))]
    ends += [(str(site["name"]), site.get("certificate_expires")) for site in snapshot.sites]
    for whose, until in ends:
        if until is not None:
            days = (float(until) - snapshot.read_at) / _DAY
            families.gauge("wardround_certificate_days", "Days until the certificate ends", days, whose=whose)


def _alerts(snapshot: RunSnapshot, families: Families) -> None:
    for alert in snapshot.alerts:
        labels = {"code": alert.code, "severity": alert.severity, "where": alert.where}
        families.gauge("wardround_alert", "1 for what somebody should know (docs/watching.md)", 1, **labels)


def _updates(folder: Path) -> Iterator[int]:
    """The sizes of the updates that lie in a folder."""
    try:
        for path in folder.iterdir():
            yield path.stat().st_size
    except OSError:  # one that was summed and removed meanwhile
        return
