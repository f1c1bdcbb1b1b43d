"""Which network is best, and which normalization?

Every arm trains with the same budget on the same pooled images: so many steps of Adam at 1e-3 with cosine decay on
patches drawn equally from the sites, from the same order of cases and places of patches. Validation cases (the split
that sites make of the study) choose; the holdout only reports.

    networks       U-Net, residual, attention, dilated, DeepLabv3+ (both encoders), MobileNetV3-Small on the nuclei, as
                   shipped in `deploy/studies/nuclei.yaml` but for the network
    normalization  weight, group, batch and none, of the studies' own U-Nets: nuclei, or with --study hippocampus in 3D

How to read it: Dice is the mean over cases, "sites" the mean over the sites' means; F1 at an IoU of 0.5 is given by the
object's equivalent diameter in pixels (connected components of the answer; counts over the whole holdout; nuclei
only). "images/s" are patches in training steps alone. Latency is that of one tile of the published models in LiteRT on
one thread, the median of repeated calls, float32 and dynamic range in the same process; "faster" and "smaller" are
dynamic range against float32.

Rows that the CSV already has (of the same arm, study, steps and seed) are not computed again, so a run that was
interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import operator
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._pooled import (
    ROOT,
    Data,
    Labelled,
    Predict,
    Row,
    Trainer,
    dice_of,
    each_case,
    mean_of_sites,
    predictor,
    prepare,
    read_rows,
    segment,
    shipped_study,
    train,
    write_between,
)
from benchmarks._report import RESULTS, median, report
from common.errors import DataError
from common.inference.lite import LiteModel
from common.learning.runtime import configure_tensorflow
from common.metrics.instances import SIZE_NAMES, InstanceCounts, match_instances
from common.study import Study

_DOCS = ROOT / "docs" / "models.md"
_AUGMENTATIONS = ("flip", "rotate", "scale", "gamma", "contrast", "noise")  # no flips where sides are told apart

ARMS: dict[str, dict[str, dict[str, Any]]] = {
    "networks": {
        "U-Net": {"name": "unet"},
        "residual U-Net": {"name": "residual_unet"},
        "Attention U-Net": {"name": "attention_unet"},
        "dilated U-Net": {"name": "dilated_unet", "depth": 2, "filters": 32},
        "DeepLabv3+, MobileNetV3": {"name": "deeplabv3plus", "encoder": "mobilenetv3"},
        "DeepLabv3+, Xception": {"name": "deeplabv3plus", "encoder": "xception"},
        "MobileNetV3-Small": {"name": "mobilenetv3_small"},
    },
    "normalization": {name: {"normalization": name} for name in ("weight", "group", "batch", "none")},
}
"""The arms of each comparison: what each changes in the study's `model`."""

_TEXT = frozenset(["arm", "study"])
_WHOLE = frozenset(["steps", "seed", "parameters", "bytes_float32", "bytes_dynamic_range"])
_SHOWN = {
    "arm": "arm",
    "study": "study",
    "steps": "steps",
    "validation": "validation",
    "validation_sites": "sites",
    "holdout": "holdout",
    "holdout_sites": "sites",
    "f1_<10": "F1 <10",
    "parameters": "weights",
    "images_per_second": "images/s",
    "latency_float32": "ms",
    "latency_dynamic_range": "ms dyn.",
}


def main() -> None:
    """Trains and evaluates the arms asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", nargs="?", choices=tuple(ARMS), default="networks", help="(default: networks)")
    parser.add_argument("--data", type=Path, help="the folder of the study's sites and `holdout`")
    parser.add_argument("--study", choices=("nuclei", "hippocampus"), default="nuclei", help="(default: nuclei)")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="some of the comparison's arms (default: all)")
    parser.add_argument("--steps", type=int, default=1200, help="training steps of each arm (default: 1200)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="a run for each arm and seed (default: 0)")
    parser.add_argument("--threads", type=int, default=2, help="TensorFlow's threads in training (default: 2)")
    parser.add_argument("--write-docs", action="store_true", help="only write the tables into docs/models.md")
    options = parser.parse_args()
    if options.write_docs:
        write_docs(options.steps)
        return
    if options.data is None:
        parser.error("--data: give the folder that holds the sites' folders and `holdout`")
    if min(options.steps, options.threads) < 1:
        parser.error("--steps, --threads: expected positive numbers")
    if options.comparison == "networks" and options.study != "nuclei":
        parser.error("--study: some networks are for 2D alone; compare networks on nuclei")
    arms = options.arms or list(ARMS[options.comparison])
    if unknown := set(arms) - set(ARMS[options.comparison]):
        known = ", ".join(ARMS[options.comparison])
        parser.error(f"--arms: {', '.join(sorted(unknown))} not of this comparison; choose of {known}")
    name = options.comparison
    done = {(row["arm"], row["study"], row["steps"], row["seed"]) for row in _rows(name)}
    missing = [
        (arm, seed) for seed in options.seeds for arm in arms if (arm, options.study, options.steps, seed) not in done
    ]
    if not missing:
        return
    configure_tensorflow(options.threads)
    try:
        data = Data.load(shipped_study(options.study), options.data)
    except DataError as error:
        parser.error(str(error))
    for arm, seed in missing:
        print(f"{arm}, seed {seed}", flush=True)
        study = dataclasses.replace(
            data.study, model=dataclasses.replace(data.study.model, **ARMS[options.comparison][arm])
        )
        row: Row = {"arm": arm, "study": options.study, "steps": options.steps, "seed": seed}
        row |= measure(dataclasses.replace(data, study=study), options.steps, seed, options.threads)
        report(name, [*_rows(name), row], _SHOWN)


def measure(data: Data, steps: int, seed: int, threads: int) -> Row:
    """Train one arm, evaluate it, and publish it in float32 and dynamic range."""
    from common.models import build_network

    study = data.study
    network = build_network(study)
    speed = images_per_second(data, network)
    started = time.perf_counter()
    augmentations = tuple(name for name in _AUGMENTATIONS if name in study.augmentation)
    weights = train(data, network, augmentations, steps, seed)
    seconds = time.perf_counter() - started
    predict = predictor(study, network, weights)
    row: Row = {}
    for side, cases in (("validation", data.validation), ("holdout", data.holdout)):
        found = each_case(cases, threads, functools.partial(_evaluated, study, predict))
        dice = {number: value for number, (value, _) in enumerate(found) if not math.isnan(value)}
        row[side] = round(float(np.mean(list(dice.values()))), 4)
        row[f"{side}_sites"] = round(mean_of_sites(cases, dice), 4)
        if side == "holdout":
            objects = functools.reduce(operator.add, (counts for _, counts in found), InstanceCounts.zero())
            row |= {
                f"f1_{size}": round(float(value), 4)
                for size, value in zip(SIZE_NAMES, objects.f1_of_sizes(), strict=True)
            }
    row |= {"parameters": network.parameters, "images_per_second": round(speed, 2), "seconds": round(seconds, 1)}
    return row | published(study, network, weights, prepare(study, data.validation[0].stored))


def _evaluated(study: Study, predict: Predict, number: int, case: Labelled) -> tuple[float, InstanceCounts]:
    del number
    found = segment(study, predict, prepare(study, case.stored))
    dice = dice_of(study, found, case.label)
    if study.task.labels != "instances":
        return dice, InstanceCounts.zero()
    from scipy import ndimage

    return dice, match_instances(ndimage.label(found)[0], case.objects)


def images_per_second(data: Data, network: Any, repetitions: int = 8) -> float:
    """Patches a second of training steps on one batch: without the pipeline, which is the same for all arms."""
    import tensorflow as tf

    study = data.study
    random = np.random.default_rng(0)
    shape = (study.training.batch_size, *study.preprocessing.patch)
    images = tf.constant(random.standard_normal((*shape, study.task.channels), np.float32))
    labels = tf.constant(random.integers(0, len(study.task.classes), shape, np.uint8))
    trainer = Trainer(study, network, repetitions + 2, seed=0)
    seconds = []
    for _ in range(repetitions + 2):
        started = time.perf_counter()
        float(trainer.step(images, labels))
        seconds.append(time.perf_counter() - started)
    return shape[0] / median(seconds[2:])


def published(study: Study, network: Any, weights: Sequence[Any], image: Any, repetitions: int = 20) -> Row:
    """Bytes and milliseconds a tile of both variants on one thread, calls of the two taking turns."""
    from common.imaging.patches import pad_to
    from server.publishing.conversion import convert

    tile = study.publishing.tile
    padded = pad_to(image, tile, mode="edge")
    batch = np.ascontiguousarray(padded[tuple(slice(size) for size in tile)][np.newaxis], np.float32)
    row: Row = {}
    models: dict[str, LiteModel] = {}
    with tempfile.TemporaryDirectory() as folder:
        for variant in ("float32", "dynamic_range"):
            content = convert(study, network, weights, variant, [])
            path = Path(folder) / f"{variant}.tflite"
            path.write_bytes(content)
            models[variant] = LiteModel(path)
            row[f"bytes_{variant}"] = len(content)
        seconds: dict[str, list[float]] = {variant: [] for variant in models}
        for _ in range(repetitions + 1):
            for variant, model in models.items():
                started = time.perf_counter()
                model(batch)
                seconds[variant].append(time.perf_counter() - started)
    return row | {f"latency_{variant}": round(1e3 * median(times[1:]), 1) for variant, times in seconds.items()}


# The tables. -------------------------------------------------------------------------------------------------------


def _rows(name: str) -> list[Row]:
    return read_rows(name, _TEXT, _WHOLE)


def write_docs(steps: int) -> None:
    """Put the tables of the runs of so many steps, means over their seeds, between the marks in docs/models.md."""
    written = 0
    for comparison, arms in ARMS.items():
        for study in ("nuclei", "hippocampus"):
            rows = [row for row in _rows(comparison) if row["steps"] == steps and row["study"] == study]
            if rows:
                mark = f"{comparison} {study}"
                write_between(_DOCS, f"<!-- {mark}: begin -->\n", f"<!-- {mark}: end -->\n", table(list(arms), rows))
                written += 1
    if not written:
        raise SystemExit(f"{RESULTS}: no rows of {steps} steps; run a comparison first, or give --steps")


def table(arms: Sequence[str], rows: Sequence[Row]) -> str:
    """Markdown; arms in their order, the best by validation in bold."""
    names = [arm for arm in arms if any(row["arm"] == arm for row in rows)]
    keys = [key for key in rows[0] if key not in _TEXT]
    mean = {
        name: {key: float(np.mean([float(row[key]) for row in rows if row["arm"] == name])) for key in keys}
        for name in names
    }
    chosen = max(names, key=lambda name: mean[name]["validation"])
    sizes = [f"F1 {size}" for size in SIZE_NAMES if not math.isnan(mean[names[0]][f"f1_{size}"])]
    heading = ["", "validation", "sites", "holdout", "sites", *sizes, "weights", "images/s"]
    heading += ["ms", "ms dynamic", "faster", "MB", "MB dynamic", "smaller"]
    lines = [
        "",
        f"{rows[0]['steps']:.0f} steps, {len({row['seed'] for row in rows})} run(s) an arm. Bold: the highest Dice on "
        "the validation cases.",
        "",
        f"| {' | '.join(heading)} |",
        "|---|" + "---:|" * (len(heading) - 1),
    ]
    for name in names:
        values = mean[name]
        cells = [f"{values[key]:.3f}" for key in ("validation", "validation_sites", "holdout", "holdout_sites")]
        cells += [f"{values[size.replace('F1 ', 'f1_')]:.2f}" for size in sizes]
        cells += [f"{values['parameters'] / 1e6:.2f}M", f"{values['images_per_second']:.1f}"]
        cells += [f"{values['latency_float32']:.1f}", f"{values['latency_dynamic_range']:.1f}"]
        cells += [f"{values['latency_float32'] / values['latency_dynamic_range']:.2f}x"]
        cells += [f"{values['bytes_float32'] / 1e6:.2f}", f"{values['bytes_dynamic_range'] / 1e6:.2f}"]
        cells += [f"{values['bytes_float32'] / values['bytes_dynamic_range']:.2f}x"]
        lines.append(f"| {f'**{name}**' if name == chosen else name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", ""])


if __name__ == "__main__":
    main()
