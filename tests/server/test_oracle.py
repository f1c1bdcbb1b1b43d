"""The correctness oracle: one study run three ways (`tests.server.oracle`) ends in the same weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from common.learning.graph import to_numpy
from common.learning.plan import build_plan
from common.study import Study
from common.wire.tensors import read_tensors
from tests.server.oracle import LARGEST_DIFFERENCE, LocalSites, run_native, run_plan, run_processes, write_sites

CASES_OF_SITE = {"alpha": 5, "beta": 3}


@pytest.mark.system
@pytest.mark.parametrize(
    ("dimensions", "algorithm", "mu", "normalization"),
    [  # each dimension, algorithm and normalization; not each with each: a case takes a minute or two
        (2, "fedprox", 0.5, "weight"),
        (3, "fedavg", None, "batch"),
    ],
)
def test_native_runtime_plan_and_processes_end_in_the_same_weights(
    tiny_study: Callable[..., Study],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dimensions: int,
    algorithm: str,
    mu: float | None,
    normalization: str,
) -> None:
    monkeypatch.setenv("TF_NUM_INTRAOP_THREADS", "1")  # the plan's, for the worker process of TFF's native runtime too
    # TFF's worker has a TensorFlow build of its own, whose rounding differs; small steps keep that from growing.
    rate = 7e-4 if normalization == "batch" else 3e-3
    study = tiny_study(
        dimensions=dimensions,
        depth=1,
        algorithm=algorithm,
        mu=mu,
        normalization=normalization,
        client="momentum",
        rate=rate,
    )
    study = dataclasses.replace(study, publishing=dataclasses.replace(study.publishing, variants=("float32",)))
    write_sites(tmp_path / "data", dimensions, CASES_OF_SITE)
    plan = build_plan(study)
    federation = LocalSites(study, tmp_path / "data")

    outcome, rows = run_native(plan, federation, tmp_path)
    native = read_tensors(tmp_path / "models" / f"{study.training.rounds:06d}.tensors")
    in_process = run_plan(plan, federation)
    run = run_processes(study, tmp_path)
    processes = read_tensors(run / "models" / f"{study.training.rounds:06d}.tensors")

    initial = to_numpy(plan.train.initialize())
    moved = max(float(np.abs(a - b).max()) for a, b in zip(in_process, initial, strict=False))
    assert moved > 1e-3, "the study must train, or the comparison says nothing"
    for one, two, three in zip(native, in_process, processes, strict=True):
        assert np.abs(one - two).max() <= LARGEST_DIFFERENCE
        np.testing.assert_array_equal(two, three)  # the same graphs, threads and order: the same bits
    assert outcome.rounds == study.training.rounds
    assert rows[-1]["validation"]["sites"] == len(CASES_OF_SITE)
