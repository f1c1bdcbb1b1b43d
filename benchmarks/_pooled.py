"""Training and evaluation on the images of all sites pooled: what comparisons of networks and augmentations share.

Patches are drawn equally from the sites, the order of the cases and the places of the patches follow from the seed
alone, and the split into training and validation cases is the one that sites make of the study. Validation cases
choose, the holdout only reports.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks._report import RESULTS
from common.errors import DataError
from common.export.forward import predictor as predictor  # for the scripts: a network's answers to tiles
from common.imaging.case import Case
from common.imaging.discovery import discover
from common.imaging.patches import sample_patch
from common.imaging.preprocessing import prepare_case
from common.imaging.readers import read_image, read_label
from common.imaging.sliding_window import Predict, predict_tiled
from common.imaging.splits import split_cases
from common.imaging.volume import Volume
from common.inference.lite import class_indices
from common.metrics.overlap import count_overlap
from common.study import HOLDOUT, Study, load_study

ROOT = Path(__file__).resolve().parent.parent
STUDIES = ROOT / "deploy" / "studies"

Image = npt.NDArray[np.float32]
Label = npt.NDArray[np.uint8]
Row = dict[str, str | int | float]


# The images. -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Labelled:
    """A case as it was read, for preparing it as it is or spoilt; `label` is prepared, `objects` as stored."""

    site: str
    name: str
    stored: Volume
    label: Label
    objects: npt.NDArray[np.integer[Any]]


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
            own, other = split_cases(_labelled_cases(folder / site), study.evaluation, study.seed)
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


def shipped_study(name: str) -> Study:
    """The study of this name as it is shipped."""
    return load_study(STUDIES / f"{name}.yaml")


def prepare(study: Study, volume: Volume) -> Image:
    """As a site prepares it: float32 (spatial..., channel)."""
    return prepare_case([volume], None, study).image


def _labelled_cases(folder: Path) -> list[Case]:
    cases = [case for case in discover(folder).cases if case.label is not None]
    if not cases:
        raise DataError(f"{folder}: no labelled cases found. Give the folder of the sites' folders as --data.")
    return cases


def _read(study: Study, site: str, cases: Sequence[Case]) -> Iterator[Labelled]:
    dimensions = study.task.dimensions
    for case in cases:
        if case.label is None:
            continue
        image, objects = read_image(case.images[""], dimensions), read_label(case.label, dimensions)
        label = prepare_case([image], objects, study).label
        assert label is not None  # a label was given
        yield Labelled(site, case.name, image, label, objects.array[..., 0].reshape(label.shape))


# Training. ---------------------------------------------------------------------------------------------------------


def batches(data: Data, augmentations: tuple[str, ...], steps: int, seed: int, first: int = 0) -> Any:
    """A `tf.data.Dataset` of augmented batches; sites take turns, so that each gives the same number of patches.

    Of the `steps` batches, it begins with the one of index `first`.
    """
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
            if index < first:  # drawn all the same: what follows depends on it
                continue
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
        lambda images, labels, numbers: (
            augment(images, labels, numbers, augmentations) if augmentations else (images, labels)
        )
    )
    options = tf.data.Options()
    options.autotune.enabled = False  # it would confine training to one core, at random
    return dataset.prefetch(2).with_options(options)


class Trainer:
    """Adam at 1e-3, or another rate, with cosine decay over `steps`, on a network's weights.

    Batch statistics, where the network has them, follow those of the batches by a tenth a step for two thirds of the
    steps and are then frozen, as a site's do in the last third of the rounds.
    """

    def __init__(
        self, study: Study, network: Any, steps: int, seed: int, operations: Any = None, rate: float = 1e-3
    ) -> None:
        import tensorflow as tf

        from common.metrics.losses import dice_cross_entropy
        from common.models.operations import NATIVE

        self.variables = [tf.Variable(weight) for weight in network.initial_weights(seed)]
        trained = self.variables[: len(network.trainable)]
        statistics = self.variables[len(network.trainable) :]
        optimizer = tf.keras.optimizers.Adam(tf.keras.optimizers.schedules.CosineDecay(rate, steps))
        optimizer.build(trained)
        self._optimizer = optimizer
        self._adapting = steps - steps // 3
        self._done = 0

        @tf.function(autograph=False)
        def step(images: Any, labels: Any, frozen: Any) -> Any:
            with tf.GradientTape() as tape:
                values = [tf.convert_to_tensor(variable) for variable in self.variables]
                logits, measured = network.train(values, images, frozen, operations or NATIVE)
                loss = dice_cross_entropy(logits, labels, head=study.model.head)
            optimizer.apply_gradients(zip(tape.gradient(loss, trained), trained, strict=True))
            pace = tf.where(frozen, 0.0, 0.1)
            for place in range(0, len(statistics), 2):
                mean, variance = statistics[place : place + 2]
                square = variance + mean**2
                square += pace * (measured[place + 1] - square)
                mean.assign_add(pace * (measured[place] - mean))
                variance.assign(tf.maximum(square - mean**2, 0.0))
            return loss

        self._step = step

    def step(self, images: Any, labels: Any) -> Any:
        """The loss of a batch, after whose gradient the weights have moved."""
        import tensorflow as tf

        self._done += 1
        return self._step(images, labels, tf.constant(self._done > self._adapting))

    def weights(self) -> list[Any]:
        """The weights as they are now, arrays in the network's order."""
        return [variable.numpy() for variable in self.variables]

    @property
    def done(self) -> int:
        """How many steps were taken."""
        return self._done

    def state(self) -> list[Any]:
        """Arrays by which `restore` goes on from here: the weights, what the optimizer remembers, the steps taken."""
        return [variable.numpy() for variable in (*self.variables, *self._optimizer.variables)] + [np.int64(self._done)]

    def restore(self, state: Sequence[Any]) -> None:
        """Go on from where `state` was taken, of a trainer made with the same arguments."""
        for variable, value in zip((*self.variables, *self._optimizer.variables), state[:-1], strict=True):
            variable.assign(value)
        self._done = int(state[-1])


def train(
    data: Data, network: Any, augmentations: tuple[str, ...], steps: int, seed: int, operations: Any = None
) -> list[Any]:
    """The network's weights after `steps` on augmented patches; prints the loss every 100."""
    trainer = Trainer(data.study, network, steps, seed, operations)
    losses = []
    for number, (images, labels) in enumerate(batches(data, augmentations, steps, seed), start=1):
        losses.append(trainer.step(images, labels))
        if number % 100 == 0 or number == steps:
            print(f"step {number} of {steps}: loss {np.mean([float(loss) for loss in losses]):.3f}", flush=True)
            losses.clear()
    return trainer.weights()


# Evaluation. -------------------------------------------------------------------------------------------------------


def segment(study: Study, predict: Predict, image: Image) -> Label:
    """The class of every voxel of a prepared image."""
    found = predict_tiled(predict, image, study.publishing.tile, study.evaluation.overlap, 4)
    return class_indices(found, study.model.head)


def each_case(cases: Sequence[Labelled], threads: int, measure: Callable[[int, Labelled], Any]) -> list[Any]:
    """`measure` of every case's number and case, on so many threads."""
    with ThreadPoolExecutor(threads) as executor:
        return list(executor.map(measure, range(len(cases)), cases))


def dice_of(study: Study, found: Label, label: Label) -> float:
    """Mean Dice of the foreground classes that occur in either; NaN where none does. `label` is as it was prepared."""
    # The labels of a distance head say how far inside its object a voxel lies.
    truth = np.minimum(label, 1) if study.model.head == "distance" else label
    values = count_overlap(found, truth, len(study.task.classes)).dice()
    return float(np.nanmean(values)) if not np.isnan(values).all() else math.nan


def dice_by_case(
    study: Study, network: Any, weights: Sequence[Any], cases: Sequence[Labelled], threads: int
) -> dict[int, float]:
    """Dice by the case's number, of all that have anything to find or in which something was found."""
    predict = predictor(study, network, weights)

    def measured(number: int, case: Labelled) -> float:
        del number
        return dice_of(study, segment(study, predict, prepare(study, case.stored)), case.label)

    values = each_case(cases, threads, measured)
    return {number: value for number, value in enumerate(values) if not math.isnan(value)}


def mean_of_sites(cases: Sequence[Labelled], dice: Mapping[int, float]) -> float:
    """The mean over sites of the mean Dice of each, by the case's number."""
    sites = sorted({cases[number].site for number in dice})
    return float(
        np.mean([np.mean([value for number, value in dice.items() if cases[number].site == site]) for site in sites])
    )


# Rows. -------------------------------------------------------------------------------------------------------------


def read_rows(name: str, text: frozenset[str], whole: frozenset[str]) -> list[Row]:
    """What `results/<name>.csv` has so far; columns of `text` and of `whole` numbers, all others are floats."""
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [
            {
                key: value if key in text else int(value) if key in whole else float(value)
                for key, value in line.items()
                if key != "cores"
            }
            for line in csv.DictReader(file)
        ]


def write_between(page: Path, begin: str, end: str, text: str) -> None:
    """Put the text between the marks in the page."""
    old = page.read_text(encoding="utf-8")
    before, found, rest = old.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{page}: the marks {begin.strip()} and {end.strip()} are missing; put them back")
    page.write_text(before + begin + text + end + after, encoding="utf-8")
