"""What does each augmentation cost?

Measured in milliseconds for a batch, on one thread: every augmentation alone with every example drawn, then the default
set and all of them as training runs them, each example drawn by chance. "forward" is, for comparison, one pass of
a U-Net of 8 filters over the same batch, without gradients: a training step takes about three times as long.

How to read it: medians over calls with different seeds. `flip`, `rotate` and `scale` are one operation on the whole
batch; they are shown with the chances they have in training. "share" is the cost relative to the forward pass.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks._report import Row, median, report
from benchmarks._study import benchmark_study
from common.learning.runtime import configure_tensorflow
from common.study import AUGMENTATIONS, Study

_BATCHES = {"2d": (8, 128, 128, 3), "3d": (2, 40, 56, 40, 1)}
_SHOWN = {"batch": "batch", "augmentation": "augmentation", "milliseconds": "ms a batch", "share": "of forward"}

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
    seconds = {step: _seconds(run, images, labels, calls) for step, run in steps.items()}
    for step, taken in seconds.items():
        yield {
            "batch": "x".join(map(str, shape)),
            "augmentation": step,
            "milliseconds": round(1000 * taken, 1),
            "share": round(taken / seconds["forward"], 3),
        }


def _steps(study: Study) -> dict[str, Step]:
    """What is timed, by name: functions of (images, labels, seed)."""
    from common.imaging.augmentation import VALUE_CHANGES, augment, elastic
    from common.models import build_network

    default = Study.__dataclass_fields__["augmentation"].default
    network = build_network(study)
    weights = network.initial_weights(0)

    def by_chance(names: tuple[str, ...]) -> Step:
        return lambda images, labels, seed: augment(images, labels, seed, names)

    steps: dict[str, Step] = {name: by_chance((name,)) for name in ("flip", "rotate", "scale")}
    steps["elastic"] = lambda images, labels, seed: elastic.deform(images, labels, seed, True, probability=1.0)
    for value_change in VALUE_CHANGES:
        change = value_change.change
        steps[value_change.name] = lambda images, labels, seed, change=change: (change(images, seed), labels)
    steps["default set"] = by_chance(default)
    steps["all"] = by_chance(AUGMENTATIONS)
    steps["forward"] = lambda images, labels, seed: network(weights, images)
    return steps


def _seconds(step: Step, images: Any, labels: Any, calls: int) -> float:
    import tensorflow as tf

    graph = tf.function(step, autograph=False)
    taken = []
    for number in range(calls + 2):
        seed = tf.constant([number, 1])
        started = time.perf_counter()
        tf.nest.map_structure(lambda tensor: tensor.numpy(), graph(images, labels, seed))
        taken.append(time.perf_counter() - started)
    return median(taken[2:])


if __name__ == "__main__":
    main()
