"""Does training in bfloat16 pay on this CPU, and does it cost Dice?

The same U-Net takes the same training steps with float32 and with bfloat16 convolutions
(`common.models.bfloat16`), in turns in one process, from the same weights on the same batches: nuclei 2D (8 patches of
128x128x3) and hippocampus 3D (2 of 40x56x40x1). With --data DIR and --steps N both then train for N steps on the nuclei
pooled, and are evaluated in float32 on the validation and the holdout cases.

How to read it: medians over the repetitions; "ratio" is float32's seconds a step divided by bfloat16's, so more than 1
means that bfloat16 is faster. "automatic" is what `training.precision: auto` would choose here, "instructions" what the
CPU has for bfloat16, by Linux' names: without any it is emulated.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from pathlib import Path

import numpy as np

from benchmarks._pooled import (
    Data,
    Row,
    Trainer,
    dice_of,
    each_case,
    predictor,
    prepare,
    segment,
    shipped_study,
    train,
)
from benchmarks._report import median, report
from common.errors import DataError
from common.learning.runtime import configure_tensorflow
from common.study import Study

_SHOWN = {
    "case": "case",
    "filters": "filters",
    "threads": "threads",
    "float32_images": "float32 images/s",
    "bfloat16_images": "bfloat16 images/s",
    "ratio": "ratio",
    "automatic": "automatic",
    "instructions": "instructions",
}
_SHOWN_DICE = {
    "precision": "precision",
    "steps": "steps",
    "validation": "validation",
    "holdout": "holdout",
    "seconds": "seconds",
}


def main() -> None:
    """Measures the speed, and the Dice where steps are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--filters", type=int, nargs="+", default=[16], help="filters of the U-Nets (default: 16)")
    parser.add_argument("--studies", nargs="+", choices=("nuclei", "hippocampus"), default=["nuclei", "hippocampus"])
    parser.add_argument("--repetitions", type=int, default=8, help="steps of each that are timed (default: 8)")
    parser.add_argument("--threads", type=int, default=2, help="TensorFlow's threads, of both (default: 2)")
    parser.add_argument("--data", type=Path, help="the folder of the nuclei's sites and `holdout`")
    parser.add_argument("--steps", type=int, default=0, help="train both for so many steps (default: 0, speed alone)")
    parser.add_argument("--seed", type=int, default=0, help="of the training (default: 0)")
    options = parser.parse_args()
    if min(options.repetitions, options.threads, *options.filters) < 1 or options.steps < 0:
        parser.error("expected positive numbers")
    if options.steps and options.data is None:
        parser.error("--steps: give the folder that holds the sites' folders and `holdout` as --data")
    configure_tensorflow(options.threads)
    rows = [
        speed(_with_filters(shipped_study(name), filters), options.repetitions, options.threads)
        for filters in options.filters
        for name in options.studies
    ]
    report("bfloat16", rows, _SHOWN)
    if options.steps:
        try:
            data = Data.load(shipped_study("nuclei"), options.data)
        except DataError as error:
            parser.error(str(error))
        report("bfloat16_dice", quality(data, options.steps, options.seed, options.threads), _SHOWN_DICE)


def _with_filters(study: Study, filters: int) -> Study:
    return dataclasses.replace(study, model=dataclasses.replace(study.model, filters=filters))


def speed(study: Study, repetitions: int, threads: int) -> Row:
    """One row: training steps of both, in turns on the same batch."""
    import tensorflow as tf

    from common.models import BFLOAT16, NATIVE, build_network
    from common.models.bfloat16 import fast_bfloat16

    network = build_network(study)
    random = np.random.default_rng(0)
    shape = (study.training.batch_size, *study.preprocessing.patch)
    images = tf.constant(random.standard_normal((*shape, study.task.channels), np.float32))
    labels = tf.constant(random.integers(0, len(study.task.classes), shape, np.uint8))
    trainers = {
        name: Trainer(study, network, repetitions + 2, 0, operations)
        for name, operations in (("float32", NATIVE), ("bfloat16", BFLOAT16))
    }
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(repetitions + 2):
        for name, trainer in trainers.items():
            started = time.perf_counter()
            float(trainer.step(images, labels))
            seconds[name].append(time.perf_counter() - started)
    float32, bfloat16 = (median(seconds[name][2:]) for name in trainers)
    return {
        "case": f"{len(shape) - 1}D, {shape[0]} of {'x'.join(map(str, (*shape[1:], study.task.channels)))}",
        "filters": study.model.filters,
        "threads": threads,
        "float32_images": round(shape[0] / float32, 2),
        "bfloat16_images": round(shape[0] / bfloat16, 2),
        "ratio": round(float32 / bfloat16, 3),
        "automatic": "bfloat16" if fast_bfloat16() else "float32",
        "instructions": _instructions(),
    }


def _instructions() -> str:
    """What this CPU has for bfloat16, as Linux names it."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return "unknown"
    return " ".join(name for name in ("amx_bf16", "avx512_bf16") if name in flags) or "none"


def quality(data: Data, steps: int, seed: int, threads: int) -> list[Row]:
    """A row for each precision: trained alike, evaluated in float32."""
    from common.models import BFLOAT16, NATIVE, build_network

    study = data.study
    network = build_network(study)
    rows: list[Row] = []
    for name, operations in (("float32", NATIVE), ("bfloat16", BFLOAT16)):
        started = time.perf_counter()
        weights = train(data, network, study.augmentation, steps, seed, operations)
        seconds = time.perf_counter() - started
        predict = predictor(study, network, weights)
        row: Row = {"precision": name, "steps": steps, "seed": seed, "seconds": round(seconds, 1)}
        for side, cases in (("validation", data.validation), ("holdout", data.holdout)):
            values = each_case(
                cases,
                threads,
                lambda number, case, predict=predict: dice_of(
                    study, segment(study, predict, prepare(study, case.stored)), case.label
                ),
            )
            row[side] = round(float(np.mean([value for value in values if not math.isnan(value)])), 4)
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
