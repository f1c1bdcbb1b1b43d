"""All that a coordinator receives and stores of rounds that are trained and validated for real.

Of a study with secure sums nothing of any one site is in it; of the same study without, the same detector finds each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.work import PlanWorker
from common.learning.graph import unflatten
from common.learning.plan import StudyPlan, build_plan
from common.study import NO_SECURE_AGGREGATION, SecureAggregation, Study
from common.wire.tensors import Array
from tests.server.oracle import LocalSites, write_sites
from tests.server.secure_cohort import SITES, Coordinator, Identities, RunningSite

LONG = 900.0  # seconds: training for real, on a machine that does much else


class Remembering:
    """A worker that keeps what its work gave, by task."""

    def __init__(self, worker: PlanWorker) -> None:
        self._worker = worker
        self.digest = worker.digest
        self.training_cases, self.validation_cases = worker.training_cases, worker.validation_cases
        self.expected, self.cases = worker.expected, worker.cases
        self.kept: dict[str, list[Array]] = {}

    def work(self, kind: str, *rest: Any) -> Sequence[Array]:
        found = self._worker.work(kind, *rest)
        self.kept[kind] = [np.array(value) for value in found]
        return found


def detected(content: bytes, tensors: Sequence[Array]) -> int:
    """How many of a site's tensors show in what a coordinator has: four of a tensor's bytes in a row, or all of it.

    Tensors of small or round numbers are everywhere, and show nothing; large ones are looked for by three numbers.
    """
    count = 0
    for tensor in tensors:
        flat = tensor.reshape(-1)
        probe = flat[len(flat) // 2 :][:3].tobytes()
        if len(set(probe)) >= 3 and len(probe) >= 4:
            count += probe in content
    return count


def rounds(plan: StudyPlan, sites: LocalSites, identities: Identities, folder: Path) -> tuple[bytes, dict[str, Any]]:
    """A round of training and one of validation; what the coordinator has of them, and what each site's work gave."""
    assert plan.evaluate is not None
    coordinator = Coordinator(folder / "run", identities, plan=plan)
    workers = {name: Remembering(PlanWorker(plan, sites.sites[name])) for name in SITES}
    running = [RunningSite(name, coordinator, identities, folder / "sites", worker=workers[name]) for name in SITES]
    stored = b""
    try:
        for part in (plan.train, plan.evaluate):
            state = unflatten(part.initialize(), part.state_type)
            coordinator.invoke(part.process.next, state, 1).result(LONG)
            stored += b"".join(path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file())
    finally:
        for site in running:
            site.stop()
        coordinator.stop()
    return b"".join(coordinator.heard) + stored, {name: worker.kept for name, worker in workers.items()}


@pytest.mark.system
def test_a_trained_round_shows_nothing_of_one_site(tiny_study: Callable[..., Study], tmp_path: Path) -> None:
    study = tiny_study(depth=1, client="momentum", rate=3e-3)
    settings = SecureAggregation(
        protocol="bonawitz", threshold=4, minimum_cohort=4, largest_update=1.0, largest_weight=100
    )
    secure = dataclasses.replace(
        study,
        cohort=dataclasses.replace(study.cohort, sites=SITES, quorum=5, deadline_seconds=3600.0),
        secure_aggregation=settings,
    )
    write_sites(tmp_path / "data", 2, dict.fromkeys(SITES, 4))
    identities = Identities(tmp_path / "identities")
    plain = dataclasses.replace(secure, secure_aggregation=NO_SECURE_AGGREGATION)

    found = {}
    for name, one in (("secure", secure), ("plain", plain)):
        plan = build_plan(one)
        content, kept = rounds(plan, LocalSites(one, tmp_path / "data"), identities, tmp_path / name)
        found[name] = {
            (site, kind): detected(content, tensors) for site, work in kept.items() for kind, tensors in work.items()
        }
    both = {(site, kind) for site in SITES for kind in ("train", "evaluate")}
    assert set(found["secure"]) == set(found["plain"]) == both
    assert not any(found["secure"].values())
    assert all(found["plain"][site, "train"] for site in SITES), found["plain"]
    assert any(found["plain"][site, "evaluate"] for site in SITES), found["plain"]  # a Dice of 0 shows nothing
