"""A study with secure sums ends where TFF's own test runtime takes it, and near where it ends without them."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow_federated as tff

from common.learning.graph import to_numpy
from common.learning.plan import build_plan
from common.secure_aggregation.study_session import update_bits
from common.study import NO_SECURE_AGGREGATION, SecureAggregation, Study
from common.wire.tensors import read_tensors
from tests.server.oracle import LARGEST_DIFFERENCE, LocalSites, run_native, run_plan, run_processes, write_sites

CASES_OF_SITE = {"alpha": 5, "beta": 3, "delta": 4, "epsilon": 2, "gamma": 3}
NEAR = 1e-5
"""Of the plain study: rounding to so many steps that sums have 32 bits, grown by what training makes of it."""


@pytest.mark.system
def test_five_sites_with_secure_sums_end_as_tff_says(
    tiny_study: Callable[..., Study], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TF_NUM_INTRAOP_THREADS", "1")
    study = tiny_study(depth=1, client="momentum", rate=3e-3)
    settings = SecureAggregation(
        protocol="bonawitz", threshold=4, minimum_cohort=4, largest_update=1.0, largest_weight=100
    )
    study = dataclasses.replace(
        study,
        cohort=dataclasses.replace(study.cohort, sites=tuple(CASES_OF_SITE), quorum=5),
        publishing=dataclasses.replace(study.publishing, variants=("float32",)),
        secure_aggregation=settings,
    )
    write_sites(tmp_path / "data", 2, CASES_OF_SITE)
    run = run_processes(study, tmp_path, "--in-process", timeout=1500)
    last = f"{study.training.rounds:06d}.tensors"
    found = read_tensors(run / "models" / last)

    plan = build_plan(study)
    sites = LocalSites(study, tmp_path / "data")
    test_context = tff.backends.test.create_async_test_cpp_execution_context()
    _, rows = run_native(plan, sites, tmp_path, test_context)
    expected = read_tensors(tmp_path / "models" / last)

    assert plan.evaluate is not None and plan.evaluate.secure
    trained = len([spec for spec in plan.train.broadcast if spec.shape])
    assert sum(spec.bits == update_bits(len(plan.study.cohort.sites)) for spec in plan.train.secure) >= trained

    plain_plan = build_plan(dataclasses.replace(study, secure_aggregation=NO_SECURE_AGGREGATION))
    plain = run_plan(plain_plan, sites)
    moved = max(
        float(np.abs(a - b).max()) for a, b in zip(plain, to_numpy(plain_plan.train.initialize()), strict=False)
    )
    assert moved > 1e-3, "the study must train, or the comparison says nothing"
    for one, two, three in zip(found, expected, plain, strict=True):
        assert np.abs(one - two).max() <= LARGEST_DIFFERENCE
        assert np.abs(one - three).max() <= NEAR

    with (run / "rounds.csv").open(newline="") as file:
        row = list(csv.DictReader(file))[-1]
    assert float(row["train/loss"]) == pytest.approx(float(rows[-1]["train"]["loss"]), abs=1e-4)
    assert float(row["validation/dice"]) == pytest.approx(float(rows[-1]["validation"]["dice"]), abs=1e-4)
    assert int(row["validation/sites"]) == len(CASES_OF_SITE)
    with (run / "sites.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            assert (row["outcome"], row["cases"], row["seconds_work"]) == ("included", "", "0.0")
