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
import csv
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks._report import RESULTS, report
from benchmarks._spoil import SPOILERS, spoilt
from common.errors import DataError
from common.imaging.case import Case
from common.imaging.discovery import discover
from common.imaging.patches import sample_patch
from common.imaging.preprocessing import prepare_image, prepare_label
from common.imaging.readers import read_image, read_label
from common.imaging.sliding_window import predict_tiled
from common.imaging.splits import split_by_patient
from common.imaging.volume import Volume
from common.learning.runtime import configure_tensorflow
from common.metrics.overlap import count_overlap
from common.study import AUGMENTATIONS, HOLDOUT, Study, load_study

_ROOT = Path(__file__).resolve().parent.parent
_STUDY = _ROOT / "deploy" / "studies" / "nuclei.yaml"
_DOCS = _ROOT / "docs" / "augmentation.md"
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

Image = npt.NDArray[np.float32]
Label = npt.NDArray[np.uint8]
Row = dict[str, str | int | float]


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
        write_docs(_DOCS, [row for row in read_rows() if row["steps"] == options.steps])
        return
    if options.data is None:
        parser.error("--data: give the folder that holds the sites' folders and `holdout`")
    if min(options.steps, options.threads) < 1:
        parser.error("--steps, --threads: expected positive numbers")
    missing = [
        (name, seed)
        for seed in options.seeds
        for name in options.sets
        if (name, options.steps, seed) not in {(row["set"], row["steps"], row["seed"]) for row in read_rows()}
    ]
    if missing:
        configure_tensorflow(options.threads)
        try:
            data = Data.load(nuclei_study(), options.data)
        except DataError as error:
            parser.error(str(error))
        for name, seed in missing:
            row = measure(data, name, options.steps, seed, options.threads)
            report(_NAME, with_ratios([*read_rows(), row]), _SHOWN)


def nuclei_study() -> Study:
    """The nuclei study as it is shipped, with half of its filters."""
    study = load_study(_STUDY)
    return dataclasses.replace(study, model=dataclasses.replace(study.model, filters=8))


# The images. -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Labelled:
    """A case as it was read, for preparing it as it is or spoilt."""

    site: str
    name: str
    stored: Volume
    label: Label


@dataclass(frozen=True, eq=False)
class Data:
    """Prepared training cases by site, and the cases to evaluate on."""

    study: Study
    training: dict[str, list[tuple[Image, Label]]]
    validation: list[Labelled]
    holdout: list[Labelled]

    @classmethod
    def load(cls, study: Study, folder: Path) -> Data:
        """Read everything once. Raises DataError where a site's folder or file cannot be read."""
        training: dict[str, list[tuple[Image, Label]]] = {}
        validation: list[Labelled] = []
        for site in study.cohort.sites:
            own, other = split_by_patient(
                _labelled_cases(folder / site), study.evaluation.validation_fraction, study.seed
            )
            training[site] = [(prepare(study, case.stored), case.label) for case in _read(study, site, own)]
            validation += _read(study, site, other)
        sites = sorted(study.cohort.sites, key=len, reverse=True)
        holdout = [
            labelled
            for case in _labelled_cases(folder / HOLDOUT)
            for labelled in _read(
                study, next((site for site in sites if case.name.endswith(f"-{site}")), HOLDOUT), [case]
            )
        ]
        return cls(study, training, validation, holdout)


def _labelled_cases(folder: Path) -> list[Case]:
    cases = [case for case in discover(folder).cases if case.label is not None]
    if not cases:
        raise DataError(f"{folder}: no labelled cases found. Give the folder of the five sites' folders as --data.")
    return cases


def _read(study: Study, site: str, cases: Sequence[Case]) -> Iterator[Labelled]:
    for case in cases:
        if case.label is None:
            continue
        label = prepare_label(
            read_label(case.label, 2), dimensions=2, classes=len(study.task.classes), labels=study.task.labels
        )
        yield Labelled(site, case.name, read_image(case.images[""], 2), label)


def prepare(study: Study, volume: Volume) -> Image:
    """As a site prepares it: float32 (y, x, channel)."""
    intensity = study.preprocessing.intensity
    return prepare_image(volume, dimensions=2, channels=study.task.channels, intensity=intensity)


# One run. ----------------------------------------------------------------------------------------------------------


def measure(data: Data, name: str, steps: int, seed: int, threads: int) -> Row:
    """Train with one set of augmentations and evaluate."""
    from common.models import build_network

    started = time.perf_counter()
    network = build_network(data.study)
    weights = train(data, network, SETS[name], steps, seed)
    trained = time.perf_counter()
    evaluate = functools.partial(_dice_of, data.study, _predictor(data.study, network, weights), threads)
    row: Row = {"set": name, "steps": steps, "seed": seed}
    for side, cases in (("validation", data.validation), ("holdout", data.holdout)):
        clean = evaluate(cases, None)
        row[side] = round(float(np.mean(list(clean.values()))), 4)
        row[f"{side}_sites"] = round(_mean_of_sites(cases, clean), 4)
        for how in SPOILERS:
            row[f"{side}_{how}"] = round(float(np.mean(list(evaluate(cases, how).values()))), 4)
        row[f"{side}_spoilt"] = round(float(np.mean([row[f"{side}_{how}"] for how in SPOILERS])), 4)
    return row | {"seconds": round(trained - started, 1), "evaluation_seconds": round(time.perf_counter() - trained, 1)}


def train(data: Data, network: Any, names: tuple[str, ...], steps: int, seed: int) -> list[Any]:
    """The network's weights after `steps` of Adam on augmented patches."""
    import tensorflow as tf

    from common.metrics.losses import dice_cross_entropy

    study = data.study
    variables = [tf.Variable(weight) for weight in network.initial_weights(seed)]
    optimizer = tf.keras.optimizers.Adam(tf.keras.optimizers.schedules.CosineDecay(1e-3, steps))
    optimizer.build(variables)

    @tf.function(autograph=False)
    def step(images: Any, labels: Any) -> Any:
        with tf.GradientTape() as tape:
            logits = network([tf.convert_to_tensor(variable) for variable in variables], images)
            loss = dice_cross_entropy(logits, labels, head=study.model.head)
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return loss

    losses = []
    for number, (images, labels) in enumerate(_batches(data, names, steps, seed), start=1):
        losses.append(step(images, labels))
        if number % 100 == 0 or number == steps:
            print(f"step {number} of {steps}: loss {np.mean([float(loss) for loss in losses]):.3f}", flush=True)
            losses.clear()
    return [variable.numpy() for variable in variables]


def _batches(data: Data, names: tuple[str, ...], steps: int, seed: int) -> Any:
    """A `tf.data.Dataset` of augmented batches; sites take turns, so that each gives the same number of patches."""
    import tensorflow as tf

    from common.imaging.augmentation import augment

    study, size = data.study, data.study.training.batch_size
    sites = sorted(data.training)

    def draw() -> Iterator[tuple[Any, Any, Any]]:
        rng = np.random.default_rng(seed)
        for index in range(steps):
            pairs = []
            for place in range(index * size, (index + 1) * size):
                cases = data.training[sites[place % len(sites)]]
                image, label = cases[rng.integers(len(cases))]
                pairs.append(
                    sample_patch(image, label, study.preprocessing.patch, rng, study.training.foreground_fraction)
                )
            images, labels = (np.stack(part) for part in zip(*pairs, strict=True))
            yield images, labels, np.array([seed, index], np.int32)

    patch = study.preprocessing.patch
    signature = (
        tf.TensorSpec([size, *patch, study.task.channels], tf.float32),
        tf.TensorSpec([size, *patch], tf.uint8),
        tf.TensorSpec([2], tf.int32),
    )
    dataset = tf.data.Dataset.from_generator(draw, output_signature=signature)
    dataset = dataset.map(
        lambda images, labels, numbers: augment(images, labels, numbers, names) if names else (images, labels)
    )
    options = tf.data.Options()
    options.autotune.enabled = False  # it would confine training to one core, at random
    return dataset.prefetch(2).with_options(options)


def _predictor(study: Study, network: Any, weights: Sequence[Any]) -> Callable[[Image], Image]:
    import tensorflow as tf

    from common.models import probabilities

    values = [tf.constant(weight) for weight in weights]
    signature = [tf.TensorSpec([None, *study.publishing.tile, study.task.channels], tf.float32)]

    @tf.function(autograph=False, input_signature=signature)
    def forward(tiles: Any) -> Any:
        return probabilities(study, network(values, tiles))

    return lambda tiles: np.asarray(forward(tf.constant(tiles)), dtype=np.float32)


def _dice_of(
    study: Study, predict: Callable[[Image], Image], threads: int, cases: Sequence[Labelled], how: str | None
) -> dict[int, float]:
    """Dice by the case's number, of all that have anything to find or in which something was found."""
    from common.models.lite import class_indices

    def measured(number: int) -> float:
        case = cases[number]
        image = prepare(study, case.stored if how is None else spoilt(case.stored, how, number))
        found = predict_tiled(predict, image, study.publishing.tile, study.evaluation.overlap, 4)
        counts = count_overlap(class_indices(found, study.model.head), case.label, len(study.task.classes))
        return float(counts.dice()[0])

    with ThreadPoolExecutor(threads) as executor:
        values = list(executor.map(measured, range(len(cases))))
    return {number: value for number, value in enumerate(values) if not math.isnan(value)}


def _mean_of_sites(cases: Sequence[Labelled], dice: Mapping[int, float]) -> float:
    sites = sorted({cases[number].site for number in dice})
    return float(
        np.mean([np.mean([value for number, value in dice.items() if cases[number].site == site]) for site in sites])
    )


# The rows. ---------------------------------------------------------------------------------------------------------


def read_rows() -> list[Row]:
    """What was measured so far."""
    path = RESULTS / f"{_NAME}.csv"
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [
            {key: text if key == "set" else int(text) if key in ("steps", "seed") else float(text) for key, text in row}
            for row in ([item for item in line.items() if item[0] != "cores"] for line in csv.DictReader(file))
        ]


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
    text = path.read_text(encoding="utf-8")
    before, _, rest = text.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    path.write_text(before + _BEGIN + table(rows) + _END + after, encoding="utf-8")


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
