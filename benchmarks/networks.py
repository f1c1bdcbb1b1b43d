"""Which network is best, and which normalization?

    networks       U-Net, residual, attention, dilated, DeepLabv3+ (both encoders), MobileNetV3-Small on the nuclei, as
                   shipped in `deploy/studies/nuclei.yaml` but for the network, on the images of all sites pooled: so
                   many steps of Adam at 1e-3 with cosine decay on patches drawn equally from the sites, from the same
                   order of cases and places of patches
    normalization  which one survives federation and export: weight, group, batch and none, of the studies' own U-Nets
                   (nuclei, or with --study hippocampus in 3D), federated by the study's own plan (`common.learning`):
                   sites side by side in this process, each taking --steps gradient steps in --rounds rounds. Statistics
                   of batch normalization are the count-weighted means of the sites', and frozen in the last third of
                   the rounds

Every arm of a comparison has the same budget. Validation cases (the split that sites make of the study) choose; the
holdout only reports.

How to read it: Dice is the mean over cases, "sites" the mean over the sites' means, "file" that of the published
dynamic range file over the holdout's cases; F1 at an IoU of 0.5 is given by the object's equivalent diameter in pixels
(connected components of the answer; counts over the whole holdout; nuclei only). "images/s" are patches in training
steps alone. Latency is that of one tile of the published models in LiteRT on one thread, the median of repeated calls,
float32 and dynamic range in the same process; "faster" and "smaller" are dynamic range against float32.

Rows that the CSV already has (of the same arm, study, budget and seed) are not computed again, and an arm of
`normalization` that was interrupted goes on from its last round in --weights, without a figure of its seconds.
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

from benchmarks._federated import Weights, checkpoint_path, fastest_operations, federate
from benchmarks._pooled import (
    ROOT,
    Data,
    Labelled,
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
from common.export.conversion import convert
from common.export.figures import median_seconds
from common.imaging.sliding_window import Predict
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

_STEPS = {"networks": 1200, "normalization": 320}  # of an arm; of each of its sites
_ROUNDS = 16
_TEXT = frozenset(["arm", "study"])
_BUDGET = ("steps", "rounds", "filters")  # of networks the latter two are 0: pooled, filters those of the arm
_IDENTITY = ("arm", "study", *_BUDGET, "seed")
_WHOLE = frozenset([*_BUDGET, "seed", "parameters", "bytes_float32", "bytes_dynamic_range"])
_SHOWN = {
    "arm": "arm",
    "study": "study",
    "steps": "steps",
    "validation": "validation",
    "validation_sites": "sites",
    "holdout": "holdout",
    "holdout_sites": "sites",
    "holdout_file": "file",
    "f1_<10": "F1 <10",
    "parameters": "weights",
    "images_per_second": "images/s",
    "latency_float32": "ms",
    "latency_dynamic_range": "ms dyn.",
    "seconds": "s",
}


def main() -> None:
    """Trains and evaluates the arms asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", nargs="?", choices=tuple(ARMS), default="networks", help="(default: networks)")
    parser.add_argument("--data", type=Path, help="the folder of the study's sites and `holdout`")
    parser.add_argument("--study", choices=("nuclei", "hippocampus"), default="nuclei", help="(default: nuclei)")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="some of the comparison's arms (default: all)")
    parser.add_argument(
        "--steps", type=int, help="of each arm (default: 1200); of normalization: of each site of an arm (default: 320)"
    )
    parser.add_argument("--rounds", type=int, default=_ROUNDS, help="of normalization (default: 16)")
    parser.add_argument("--filters", type=int, metavar="N", help="of normalization's network (default: the study's)")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="where normalization's arms keep their checkpoints")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="a run for each arm and seed (default: 0)")
    parser.add_argument("--threads", type=int, default=2, help="TensorFlow's threads in training (default: 2)")
    parser.add_argument(
        "--write-docs",
        action="store_true",
        help="only write the tables into docs/models.md: of the last row's budget, or the last one of --steps",
    )
    options = parser.parse_args()
    if options.write_docs:
        write_docs(options.steps)
        return
    name = options.comparison
    steps = options.steps or _STEPS[name]
    if options.data is None:
        parser.error("--data: give the folder that holds the sites' folders and `holdout`")
    if min(steps, options.rounds, options.threads, options.filters or 1) < 1:
        parser.error("--steps, --rounds, --filters, --threads: expected positive numbers")
    if name == "networks" and (options.study != "nuclei" or options.filters):
        parser.error("--study, --filters: compare networks on nuclei, as they are: some are for 2D alone")
    if name == "normalization" and options.weights is None:
        parser.error("--weights: give a folder to keep checkpoints in")
    if name == "normalization" and steps % options.rounds:
        parser.error(f"--steps: expected a multiple of {options.rounds} rounds; change one of them")
    arms = options.arms or list(ARMS[name])
    if unknown := set(arms) - set(ARMS[name]):
        parser.error(f"--arms: {', '.join(sorted(unknown))} not of this comparison; choose of {', '.join(ARMS[name])}")
    study = shipped_study(options.study)
    rounds, filters = (options.rounds, options.filters or study.model.filters) if name == "normalization" else (0, 0)
    done = [_identity(row) for row in _rows(name)]
    missing: list[Row] = [
        dict(zip(_IDENTITY, (arm, options.study, steps, rounds, filters, seed), strict=True))
        for seed in options.seeds
        for arm in arms
    ]
    missing = [row for row in missing if _identity(row) not in done]
    if not missing:
        return
    configure_tensorflow(options.threads)
    try:
        data = Data.load(study, options.data)
    except DataError as error:
        parser.error(str(error))
    for row in missing:
        print(f"{row['arm']}, seed {row['seed']}", flush=True)
        arm = dataclasses.replace(data, study=_study_of(data.study, name, row, options.threads))
        found = measure(arm, row, options.threads, options.weights)
        report(name, [*_rows(name), row | found], _SHOWN)


def _identity(row: Row) -> tuple[Any, ...]:
    return tuple(row[key] for key in _IDENTITY)


def _study_of(study: Study, comparison: str, row: Row, threads: int) -> Study:
    """The study as an arm trains it; pooled training takes from it what is not training."""
    changed = ARMS[comparison][str(row["arm"])]
    if row["filters"]:
        changed = changed | {"filters": row["filters"]}
    study = dataclasses.replace(study, model=dataclasses.replace(study.model, **changed))
    if not row["rounds"]:
        return study
    client = dataclasses.replace(study.training.client_optimizer, schedule="cosine", warmup_rounds=0)
    training = dataclasses.replace(study.training, rounds=int(row["rounds"]), threads=threads, client_optimizer=client)
    return dataclasses.replace(study, seed=int(row["seed"]), training=training)


def measure(data: Data, row: Row, threads: int, checkpoints: Path | None) -> Row:
    """Train one arm, evaluate it, and publish it in float32 and dynamic range.

    Parameters
    ----------
    row : which arm, and its budget.
    checkpoints : where the arm keeps its own, if it is federated.
    """
    from common.models import build_network

    study = data.study
    network = build_network(study)
    steps, rounds, seed = (int(row[key]) for key in ("steps", "rounds", "seed"))
    started = time.perf_counter()
    weights: Weights
    resumed = False
    if rounds:
        assert checkpoints is not None  # asked for
        folder = checkpoints / f"{row['study']}-{row['arm']}-{steps}-{rounds}-{study.model.filters}-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        resumed = checkpoint_path(folder).exists()
        weights = federate(data, steps // rounds, seed, folder, [rounds])[rounds]
        speed = images_per_second(data, network, fastest_operations(study))
    else:
        augmentations = tuple(name for name in _AUGMENTATIONS if name in study.augmentation)
        weights = train(data, network, augmentations, steps, seed)
        speed = images_per_second(data, network)
    seconds = math.nan if resumed else time.perf_counter() - started
    found = evaluated(data, predictor(study, network, weights), threads)
    found |= {"parameters": network.parameters, "images_per_second": round(speed, 2), "seconds": round(seconds, 1)}
    return found | published(data, network, weights, threads)


def evaluated(data: Data, predict: Predict, threads: int) -> Row:
    """Dice over the cases and over the sites of both sides, and F1 by the object's size over the holdout."""
    row: Row = {}
    for side, cases in (("validation", data.validation), ("holdout", data.holdout)):
        found = each_case(cases, threads, functools.partial(_evaluated, data.study, predict))
        dice = {number: value for number, (value, _) in enumerate(found) if not math.isnan(value)}
        row[side] = round(float(np.mean(list(dice.values()))), 4)
        row[f"{side}_sites"] = round(mean_of_sites(cases, dice), 4)
        if side == "holdout":
            objects = functools.reduce(operator.add, (counts for _, counts in found), InstanceCounts.zero())
            row |= {
                f"f1_{size}": round(float(value), 4)
                for size, value in zip(SIZE_NAMES, objects.f1_of_sizes(), strict=True)
            }
    return row


def _evaluated(study: Study, predict: Predict, number: int, case: Labelled) -> tuple[float, InstanceCounts]:
    del number
    found = segment(study, predict, prepare(study, case.stored))
    dice = dice_of(study, found, case.label)
    if study.task.labels != "instances":
        return dice, InstanceCounts.zero()
    from scipy import ndimage

    return dice, match_instances(ndimage.label(found)[0], case.objects)


def images_per_second(data: Data, network: Any, operations: Any = None, repetitions: int = 8) -> float:
    """Patches a second of training steps on one batch: without the pipeline, which is the same for all arms."""
    import tensorflow as tf

    study = data.study
    random = np.random.default_rng(0)
    shape = (study.training.batch_size, *study.preprocessing.patch)
    images = tf.constant(random.standard_normal((*shape, study.task.channels), np.float32))
    labels = tf.constant(random.integers(0, len(study.task.classes), shape, np.uint8))
    trainer = Trainer(study, network, repetitions + 2, seed=0, operations=operations)
    seconds = []
    for _ in range(repetitions + 2):
        started = time.perf_counter()
        float(trainer.step(images, labels))
        seconds.append(time.perf_counter() - started)
    return shape[0] / median(seconds[2:])


def published(data: Data, network: Any, weights: Sequence[Any], threads: int, repetitions: int = 20) -> Row:
    """Bytes and milliseconds a tile of both variants on one thread, calls taking turns; the holdout's Dice of one."""
    from common.imaging.patches import pad_to

    study = data.study
    tile = study.publishing.tile
    padded = pad_to(prepare(study, data.validation[0].stored), tile, mode="edge")
    tile_of_image = np.ascontiguousarray(padded[tuple(slice(size) for size in tile)], np.float32)
    row: Row = {}
    models: dict[str, LiteModel] = {}
    with tempfile.TemporaryDirectory() as folder:
        for variant in ("float32", "dynamic_range"):
            content = convert(study, network, weights, variant, [])
            path = Path(folder) / f"{variant}.tflite"
            path.write_bytes(content)
            models[variant] = LiteModel(path)
            row[f"bytes_{variant}"] = len(content)
        seconds = median_seconds(models, tile_of_image, repetitions)
        measured = functools.partial(_evaluated, study, models["dynamic_range"])
        dice = [value for value, _ in each_case(data.holdout, threads, measured)]
    row["holdout_file"] = round(float(np.nanmean(dice)), 4)
    return row | {f"latency_{variant}": round(1e3 * taken, 1) for variant, taken in seconds.items()}


# The tables. -------------------------------------------------------------------------------------------------------


def _rows(name: str) -> list[Row]:
    return read_rows(name, _TEXT, _WHOLE)


def write_docs(steps: int | None) -> None:
    """Put the tables, means over the seeds, between the marks in docs/models.md.

    Of each comparison and study those rows that have the last one's budget, or that of the last one of so many steps.
    """
    written = 0
    for comparison, arms in ARMS.items():
        for study in ("nuclei", "hippocampus"):
            rows = [row for row in _rows(comparison) if row["study"] == study and steps in (None, row["steps"])]
            if rows:
                rows = [row for row in rows if all(row[key] == rows[-1][key] for key in _BUDGET)]
                mark = f"{comparison} {study}"
                write_between(_DOCS, f"<!-- {mark}: begin -->\n", f"<!-- {mark}: end -->\n", table(list(arms), rows))
                written += 1
    if not written:
        raise SystemExit(f"{RESULTS}: no rows{f' of {steps} steps' if steps else ''}; run a comparison first")


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
    heading = ["", "validation", "sites", "holdout", "sites", "file", *sizes, "weights", "images/s"]
    heading += ["ms", "ms dynamic", "faster", "MB", "MB dynamic", "smaller"]
    steps, rounds, filters = (int(rows[0][key]) for key in _BUDGET)
    budget = f"{steps} steps of each site in {rounds} rounds" if rounds else f"{steps} steps, pooled"
    lines = [
        "",
        f"{budget}{f', {filters} filters' if filters else ''}; {len({row['seed'] for row in rows})} run(s) an arm. "
        "Bold: the highest Dice on the validation cases.",
        "",
        f"| {' | '.join(heading)} |",
        "|---|" + "---:|" * (len(heading) - 1),
    ]
    for name in names:
        values = mean[name]
        cells = [
            f"{values[key]:.3f}"
            for key in ("validation", "validation_sites", "holdout", "holdout_sites", "holdout_file")
        ]
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
