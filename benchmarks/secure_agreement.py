"""Does a study with secure sums on real images end where TensorFlow Federated's own test runtime takes it?

The nuclei study on its five sites, with fewer patches, rounds and filters, is run twice: as hospitals run it, a
coordinator and five site clients that mask their updates (`wardround simulate`), and by TFF's test runtime, which
computes the same secure sums of the same plan from the same patches by itself. Both use one thread an operation, so
that sums are taken in one order. Sites step by momentum instead of the study's Adam: TFF's runtime has a TensorFlow of
its own that rounds otherwise in the last bit, and Adam takes a whole step by a gradient that is little but rounding.

    difference   the largest of any weight after the last round; goal: 1e-6 or less
    moved        how far from its beginning the weight is that training moved most: what to hold the difference against
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from benchmarks._pooled import shipped_study
from benchmarks._report import report
from common.study import Study, parse_study

if TYPE_CHECKING:
    import tensorflow as tf

_NAME = "secure_agreement"
_SHOWN = {
    "sites": "sites",
    "rounds": "rounds",
    "rate": "rate",
    "weights": "weights",
    "difference": "difference",
    "moved": "moved",
    "loss": "loss",
    "loss_of_tff": "loss of TFF",
    "seconds": "s",
}


def main() -> None:
    """Runs both and reports the difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the nuclei's sites and `holdout`")
    parser.add_argument("--rounds", type=int, default=2, help="(default: 2)")
    parser.add_argument("--patches", type=int, default=40, help="of a site and round (default: 40)")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate at the sites (default: 1e-3)")
    parser.add_argument("--filters", type=int, default=8, help="of the network (default: 8)")
    options = parser.parse_args()
    # TFF ends its worker by this signal, which a shell that starts a command in the background has it ignore.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if min(options.rounds, options.patches, options.filters) < 1 or options.rate <= 0:
        parser.error("--rounds, --patches, --filters, --rate: expected positive numbers")
    data = options.data.resolve()
    if missing := [site for site in shipped_study("nuclei").cohort.sites if not (data / site).is_dir()]:
        parser.error(f"--data: {data} has no folder of {', '.join(missing)}")
    os.environ["TF_NUM_INTRAOP_THREADS"] = "1"  # before TensorFlow is loaded, here and in the simulation
    with tempfile.TemporaryDirectory(prefix="wardround-benchmark-") as folder:
        report(_NAME, [measure(_study(options), data, Path(folder))], _SHOWN)


def _study(options: argparse.Namespace) -> Study:
    content = yaml.safe_load(shipped_study("nuclei").to_yaml())
    content["model"]["filters"] = options.filters
    content["training"] |= {"rounds": options.rounds, "patches_per_epoch": options.patches}
    content["training"]["client_optimizer"] = {"name": "momentum", "learning_rate": options.rate}
    content["cohort"]["quorum"] = len(content["cohort"]["sites"])
    content["publishing"]["variants"] = ["float32"]
    content["secure_aggregation"] = {"protocol": "bonawitz"}
    return parse_study(yaml.safe_dump(content))


def measure(study: Study, data: Path, folder: Path) -> dict[str, Any]:
    """The row of a study on the sites in `data`; works in `folder`."""
    import numpy as np
    import tensorflow_federated as tff

    from common.learning.graph import to_numpy
    from common.learning.plan import build_plan
    from common.wire.tensors import read_tensors
    from server.tables import read_table
    from tests.server.oracle import LocalSites, in_memory, run_native, run_processes

    class OneImage(LocalSites):
        """Of its validation images the first: TFF's runtime takes a site's data as one array."""

        def validation(self, round_number: int) -> list[tf.data.Dataset]:
            del round_number
            return [in_memory(dataset.validation().take(1), 1) for dataset in self.sites.values()]

    started = time.perf_counter()
    (folder / "data").symlink_to(data)
    run = run_processes(study, folder, "--in-process", timeout=7200)
    last = f"{study.training.rounds:06d}.tensors"
    found = read_tensors(run / "models" / last)

    plan = build_plan(study)
    context = tff.backends.test.create_async_test_cpp_execution_context()
    _, rows = run_native(plan, OneImage(study, data), folder, context)
    expected = read_tensors(folder / "models" / last)
    began = to_numpy(plan.train.initialize())
    return {
        "sites": len(study.cohort.sites),
        "rounds": study.training.rounds,
        "rate": study.training.client_optimizer.learning_rate,
        "weights": sum(weights.size for weights in found),
        "difference": f"{max(float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True)):.2g}",
        "moved": round(max(float(np.abs(a - b).max()) for a, b in zip(found, began, strict=False)), 4),
        "loss": float(read_table(run.joinpath("rounds.csv")).rows[-1]["train/loss"]),
        "loss_of_tff": float(rows[-1]["train"]["loss"]),
        "seconds": round(time.perf_counter() - started, 1),
    }


if __name__ == "__main__":
    main()
