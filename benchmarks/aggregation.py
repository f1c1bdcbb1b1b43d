"""What does it cost to add one update to the sum?

Compared in the same run, alternating: the coordinator's way (the plan's `accumulate`, the update read from its file as
the coordinator reads it) and NumPy's `total += weight * update` in place, the arrays read from the same file in the
same way. A third column is NumPy with the update in memory already.

How to read it: medians in seconds over the repetitions, of one update of all weights; "ratio" is the plan's time
divided by NumPy's over the same file. The file was written just before, so it is in the page cache, as a received
update is. "difference" is the largest one between the two sums at the end, relative to the largest value of the sum.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._report import median, report
from benchmarks._study import benchmark_study
from common.learning.runtime import configure_tensorflow
from common.wire.tensors import Array, TensorFile, TensorSpec, read_tensors, write_tensors

_SHOWN = {
    "filters": "filters",
    "parameters": "weights",
    "plan_seconds": "plan s",
    "numpy_seconds": "NumPy s",
    "memory_seconds": "NumPy in memory s",
    "ratio": "ratio",
    "difference": "difference",
}


def main() -> None:
    """Measures every size asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--filters", type=int, nargs="+", default=[64], help="sizes of the U-Net (default: 64)")
    parser.add_argument("--repetitions", type=int, default=15, help="updates added in each way (default: 15)")
    parser.add_argument("--threads", type=int, default=1, help="TensorFlow's threads, as in a study (default: 1)")
    parser.add_argument("--folder", type=Path, help="where the update is written (default: a temporary folder)")
    options = parser.parse_args()
    if options.repetitions < 1:
        parser.error("--repetitions: expected at least 1")
    configure_tensorflow(options.threads)
    rows = []
    for filters in options.filters:
        with tempfile.TemporaryDirectory(prefix="wardround-benchmark-", dir=options.folder) as folder:
            rows.append(measure(filters, options.repetitions, options.threads, Path(folder) / "update.tensors"))
    report("aggregation", rows, _SHOWN)


def measure(filters: int, repetitions: int, threads: int, path: Path) -> dict[str, Any]:
    """One row: as many updates added in each way, in turns; the first of each is not timed."""
    from common.learning.graph import to_numpy
    from common.learning.plan import build_plan

    plan = build_plan(benchmark_study(filters=filters, threads=threads)).train
    write_tensors(path, _update(plan.sent))
    total = plan.zero()
    sums = [np.zeros(spec.shape, spec.dtype) for spec in plan.sent]
    in_memory = [np.array(array) for array in read_tensors(path)]
    spare = [np.zeros(spec.shape, spec.dtype) for spec in plan.sent]
    seconds: dict[str, list[float]] = {"plan": [], "numpy": [], "memory": []}
    for _ in range(repetitions + 1):
        started = time.perf_counter()
        plan.accumulate(total, TensorFile(path, plan.sent))
        seconds["plan"].append(time.perf_counter() - started)
        started = time.perf_counter()
        _add(sums, read_tensors(path, expected=plan.sent, writable=True))
        seconds["numpy"].append(time.perf_counter() - started)
        started = time.perf_counter()
        _add(spare, in_memory)
        seconds["memory"].append(time.perf_counter() - started)
    difference = max(float(np.abs(a - b).max()) for a, b in zip(sums, to_numpy(total), strict=True))
    largest = max(float(np.abs(array).max()) for array in sums if array.ndim)
    medians = {name: median(values[1:]) for name, values in seconds.items()}
    return {
        "filters": filters,
        "parameters": sum(int(np.prod(spec.shape)) for spec in plan.sent if spec.shape),
        **{f"{name}_seconds": value for name, value in medians.items()},
        "ratio": round(medians["plan"] / medians["numpy"], 3),
        "difference": f"{difference / largest:.0e}",
    }


def _update(specs: Sequence[TensorSpec]) -> list[Array]:
    """An update as a site sends it: values as small as a real one's, and 1 for every scalar (the weight among them)."""
    random = np.random.default_rng(0)
    return [
        random.standard_normal(spec.shape, np.float32) * np.float32(1e-3) if spec.shape else np.ones((), spec.dtype)
        for spec in specs
    ]


def _add(sums: Sequence[Array], update: Sequence[Array]) -> None:
    weight = update[-1]
    for total, array in zip(sums, update, strict=True):
        total += (weight * array).astype(total.dtype, copy=False)


if __name__ == "__main__":
    main()
