"""Which augmentations should be the default?

Trains the same small U-Net (8 filters, depth 4, 128x128 patches, batches of 8, Adam at 1e-3 with cosine decay) once
for every set of augmentations, on the nuclei images of five hospitals pooled, patches drawn equally from the five.
Everything but the augmentations is the same in every run: initial weights, order of the cases, places of the patches.
The sites' own validation cases (the split that sites make of `deploy/studies/nuclei.yaml`) choose between the sets; the
holdout only reports.

Robustness: validation and holdout images are also spoilt before they are prepared, one way at a time (all relative to
the stored image's own range from minimum to maximum): Gaussian noise of sigma 0.05, gamma 1.5, Gaussian blur of sigma
1.5 pixels, and light that falls from 1.5 at one side to 0.5 at the other.

How to read it: Dice is the mean over cases, "sites" the mean over the five sites' means. "spoilt" is the mean over the
four ways of spoiling; "to clean" divides it by the Dice of the same weights on the images as they are, and "to none" by
what training without augmentation reaches on the same spoilt images.

Rows that `results/augmentation_ablation.csv` already has (of the same set, steps and seed) are not computed again, so
a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks._pooled import (
    ROOT,
    Data,
    Labelled,
    Predict,
    Row,
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
from benchmarks._report import RESULTS, report
from benchmarks._spoil import SPOILERS, spoilt
from common.errors import DataError
from common.learning.runtime import configure_tensorflow
from common.study import AUGMENTATIONS, Study

_DOCS = ROOT / "docs" / "augmentation.md"
_BEGIN, _END = "<!-- ablation: begin -->\n", "<!-- ablation: end -->\n"
_NAME = "augmentation_ablation"

_BASE = ("flip", "rotate", "scale")
SETS: dict[str, tuple[str, ...]] = {
    "none": (),
    "flip + rotate": ("flip", "rotate"),
    "base": _BASE,  # flip, rotate, scale
    "base + noise": (*_BASE, "noise"),
    "base + focus": (*_BASE, "blur", "low_resolution"),
    "base + contrast": (*_BASE, "brightness", "contrast", "contrast_stretch"),
    "base + gamma": (*_BASE, "gamma", "gamma_inverted"),
    "base + color": (*_BASE, "color_jitter"),
    "base + illumination": (*_BASE, "illumination"),
    "base + elastic": (*_BASE, "elastic"),
    "base + cutout": (*_BASE, "cutout"),
    "base + noise + contrast": (*_BASE, "noise", "contrast"),
    "classic": (*_BASE, "gamma", "contrast", "noise"),
    "proposed": (*_BASE, "gamma", "contrast", "noise", "blur", "low_resolution", "color_jitter", "illumination"),
    "full": AUGMENTATIONS,
}

_SHOWN = {
    "set": "augmentations",
    "steps": "steps",
    "seed": "seed",
    "validation": "validation",
    "validation_sites": "sites",
    "validation_spoilt": "spoilt",
    "holdout": "holdout",
    "holdout_sites": "sites",
    "holdout_spoilt": "spoilt",
    "to_clean": "to clean",
    "to_none": "to none",
    "seconds": "seconds",
}


def main() -> None:
    """Trains and evaluates the sets asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder of the five sites' folders and `holdout`")
    parser.add_argument("--steps", type=int, default=1200, help="training steps of each set (default: 1200)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="a run for each set and seed (default: 0)")
    parser.add_argument(
        "--sets", nargs="+", choices=tuple(SETS), default=list(SETS), metavar="SET", help=f"of {', '.join(SETS)}"
    )
    parser.add_argument("--threads", type=int, default=2, help="TensorFlow's threads (default: 2)")
    parser.add_argument("--write-docs", action="store_true", help="only write the table into docs/augmentation.md")
    options = parser.parse_args()
    if options.write_docs:
        write_docs(_DOCS, [row for row in _rows() if row["steps"] == options.steps])
        return
    if options.data is None:
        parser.error("--data: give the folder that holds the sites' folders and `holdout`")
    if min(options.steps, options.threads) < 1:
        parser.error("--steps, --threads: expected positive numbers")
    missing = [
        (name, seed)
        for seed in options.seeds
        for name in options.sets
        if (name, options.steps, seed) not in {(row["set"], row["steps"], row["seed"]) for row in _rows()}
    ]
    if missing:
        configure_tensorflow(options.threads)
        try:
            data = Data.load(nuclei_study(), options.data)
        except DataError as error:
            parser.error(str(error))
        for name, seed in missing:
            row = measure(data, name, options.steps, seed, options.threads)
            report(_NAME, with_ratios([*_rows(), row]), _SHOWN)


def nuclei_study() -> Study:
    """The nuclei study as it is shipped, with half of its filters."""
    study = shipped_study("nuclei")
    return dataclasses.replace(study, model=dataclasses.replace(study.model, filters=8))


# One run. ----------------------------------------------------------------------------------------------------------


def measure(data: Data, name: str, steps: int, seed: int, threads: int) -> Row:
    """Train with one set of augmentations and evaluate."""
    from common.models import build_network

    started = time.perf_counter()
    network = build_network(data.study)
    weights = train(data, network, SETS[name], steps, seed)
    trained = time.perf_counter()
    evaluate = functools.partial(_dice_of, data.study, predictor(data.study, network, weights), threads)
    row: Row = {"set": name, "steps": steps, "seed": seed}
    for side, cases in (("validation", data.validation), ("holdout", data.holdout)):
        clean = evaluate(cases, None)
        row[side] = round(float(np.mean(list(clean.values()))), 4)
        row[f"{side}_sites"] = round(mean_of_sites(cases, clean), 4)
        for how in SPOILERS:
            row[f"{side}_{how}"] = round(float(np.mean(list(evaluate(cases, how).values()))), 4)
        row[f"{side}_spoilt"] = round(float(np.mean([row[f"{side}_{how}"] for how in SPOILERS])), 4)
    return row | {"seconds": round(trained - started, 1), "evaluation_seconds": round(time.perf_counter() - trained, 1)}


def _dice_of(
    study: Study, predict: Predict, threads: int, cases: Sequence[Labelled], how: str | None
) -> dict[int, float]:
    """Dice by the case's number, of all that have anything to find or in which something was found."""

    def measured(number: int, case: Labelled) -> float:
        image = prepare(study, case.stored if how is None else spoilt(case.stored, how, number))
        return dice_of(study, segment(study, predict, image), case.label)

    values = each_case(cases, threads, measured)
    return {number: value for number, value in enumerate(values) if not math.isnan(value)}


# The rows. ---------------------------------------------------------------------------------------------------------


def _rows() -> list[Row]:
    """What was measured so far."""
    return read_rows(_NAME, frozenset(["set"]), frozenset(["steps", "seed"]))


def with_ratios(rows: Sequence[Row]) -> list[Row]:
    """The rows with what spoilt images cost, relative to clean ones and to training without augmentation."""
    none = {(row["steps"], row["seed"]): float(row["holdout_spoilt"]) for row in rows if row["set"] == "none"}
    return [
        row
        | {
            "to_clean": round(float(row["holdout_spoilt"]) / float(row["holdout"]), 3),
            "to_none": round(float(row["holdout_spoilt"]) / none.get((row["steps"], row["seed"]), math.nan), 3),
        }
        for row in rows
    ]


def write_docs(path: Path, rows: Sequence[Row]) -> None:
    """Put the table of these rows, means over their seeds, between the marks in the page."""
    if not rows:
        raise SystemExit(f"{RESULTS / _NAME}.csv: no rows of this number of steps; run the ablation first")
    write_between(path, _BEGIN, _END, table(rows))


def table(rows: Sequence[Row]) -> str:
    """Markdown; the sets in the order of `SETS`, the best by validation in bold."""
    names = [name for name in SETS if any(row["set"] == name for row in rows)]
    columns = [
        *("validation", "validation_sites", "validation_spoilt"),
        *("holdout", "holdout_sites", *(f"holdout_{how}" for how in SPOILERS), "holdout_spoilt"),
    ]
    mean = {
        name: {key: float(np.mean([float(row[key]) for row in rows if row["set"] == name])) for key in columns}
        for name in names
    }
    chosen = max(names, key=lambda name: mean[name]["validation"] + mean[name]["validation_spoilt"])
    lines = [
        "",
        f"{rows[0]['steps']} steps, {len({row['seed'] for row in rows})} run(s) a set. Dice of the validation cases as "
        "they are, as mean over sites, and spoilt; of the holdout likewise, by each way of spoiling. Bold: the set of "
        "the highest validation Dice, clean and spoilt together.",
        "",
        "| augmentations | validation | sites | spoilt | holdout | sites | "
        + " | ".join(SPOILERS)
        + " | spoilt | to clean | to none |",
        "|---|" + "---:|" * (len(columns) + 2),
    ]
    for name in names:
        values = mean[name]
        to_none = f"{values['holdout_spoilt'] / mean['none']['holdout_spoilt']:.3f}" if "none" in mean else ""
        cells = [f"{values[key]:.3f}" for key in columns]
        cells += [f"{values['holdout_spoilt'] / values['holdout']:.3f}", to_none]
        shown = f"**{name}**" if name == chosen else name
        lines.append(f"| {shown} | {' | '.join(cells)} |")
    lines += ["", *(f"- {name}: {', '.join(f'`{part}`' for part in SETS[name]) or 'nothing'}" for name in names), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
