"""What does each augmentation cost?

Measured in milliseconds for a batch, on one thread: every augmentation alone with every example varied (of `flip`, each
axis by chance), then the default set and all of them as training runs them, each example drawn by chance. "nothing" is
what the batch costs without any variation: the handing over and copying. "forward" is, for comparison, one pass of
a U-Net of 8 filters over the same batch, without gradients: a training step takes about three times as long.

How to read it: medians over calls with different seeds; by chance, means, because calls differ. "CPU" is the processor
time of all threads, which is what training loses. The first call, which compiles, is not in them; "compiling" is what
it took. "share" is the CPU time relative to that of the forward pass.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks._report import Row, median, report
from benchmarks._study import benchmark_study
from common.learning.runtime import configure_tensorflow
from common.study import AUGMENTATIONS, Study

_BATCHES = {"2d": (8, 128, 128, 3), "3d": (2, 40, 56, 40, 1)}
_SHOWN = {
    "batch": "batch",
    "augmentation": "augmentation",
    "milliseconds": "ms a batch",
    "cpu_milliseconds": "CPU ms",
    "share": "of forward",
    "compiling_seconds": "compiling s",
}
_BY_CHANCE = ("default set", "all")

Step = Callable[[Any, Any, Any], Any]


def main() -> None:
    """Measures the batches asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", nargs="+", choices=tuple(_BATCHES), default=list(_BATCHES), help="(default: both)")
    parser.add_argument("--calls", type=int, default=30, help="calls of each (default: 30)")
    options = parser.parse_args()
    if options.calls < 1:
        parser.error("expected a positive number of calls")
    configure_tensorflow(1)
    report("augmentation_cost", [row for name in options.batches for row in rows(name, options.calls)], _SHOWN)


def rows(name: str, calls: int) -> Iterator[Row]:
    """A row for each augmentation on one kind of batch."""
    import tensorflow as tf

    shape = _BATCHES[name]
    random = np.random.default_rng(0)
    images = tf.constant(random.standard_normal(shape), tf.float32)
    labels = tf.constant(random.integers(0, 2, shape[:-1]), tf.uint8)
    study = benchmark_study(filters=8, depth=3, patch=shape[1:-1], channels=shape[-1], batch_size=shape[0])
    steps = _steps(study)
    taken = {step: _taken(run, images, labels, calls, step in _BY_CHANCE) for step, run in steps.items()}
    for step, (seconds, spent, first) in taken.items():
        yield {
            "batch": "x".join(map(str, shape)),
            "augmentation": step,
            "milliseconds": round(1000 * seconds, 2),
            "cpu_milliseconds": round(1000 * spent, 2),
            "share": round(spent / taken["forward"][1], 3),
            "compiling_seconds": round(first, 2),
        }


def _steps(study: Study) -> dict[str, Step]:
    """What is timed, by name: functions of (images, labels, seed)."""
    from common.imaging.augmentation import VALUE_CHANGES, augment
    from common.models import build_network

    default: Any = Study.__dataclass_fields__["augmentation"].default
    network = build_network(study)
    weights = network.initial_weights(0)

    def varied(names: tuple[str, ...], *, always: bool) -> Step:
        return lambda images, labels, seed: augment(images, labels, seed, names, always=always)

    moves = ("flip", "rotate", "scale", "elastic")
    steps: dict[str, Step] = {"nothing": lambda images, labels, seed: (images, labels)}
    for name in (*moves, *(change.name for change in VALUE_CHANGES)):
        steps[name] = varied((name,), always=True)
    steps["default set"] = varied(default, always=False)
    steps["all"] = varied(AUGMENTATIONS, always=False)
    steps["forward"] = lambda images, labels, seed: network(weights, images)
    return steps


def _taken(step: Step, images: Any, labels: Any, calls: int, by_chance: bool) -> tuple[float, float, float]:
    """Seconds and CPU seconds of a call, and the seconds of the first."""
    import tensorflow as tf

    graph = tf.function(step, autograph=False)
    seconds, spent = [], []
    for number in range(calls + 2):
        seed = tf.constant([number, 1])
        started, used = time.perf_counter(), time.process_time()
        tf.nest.map_structure(lambda tensor: tensor.numpy(), graph(images, labels, seed))
        seconds.append(time.perf_counter() - started)
        spent.append(time.process_time() - used)
    typical = statistics.mean if by_chance else median
    return typical(seconds[2:]), typical(spent[2:]), seconds[0]


if __name__ == "__main__":
    main()
