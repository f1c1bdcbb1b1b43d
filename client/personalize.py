"""`wardround-site personalize`: fine-tunes a published model on a site's own images, and keeps it if that helped.

Training and validation cases are divided by the study's rule and seed. While the data set is the study's, the
validation cases are those of the study, which nobody trained on; cases that came or went since may change the division.
Nothing leaves the site.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from client.datasets import SiteDataset
from common.errors import DataError, UsageError
from common.export.figures import json_ready
from common.export.forward import ForwardPass
from common.imaging.patches import IGNORED
from common.imaging.sliding_window import Predict
from common.inference.lite import class_indices
from common.inference.published import Verify
from common.inference.version_files import PublishedWeights, open_weights
from common.metrics.overlap import OverlapCounts, count_overlap
from common.study import NO_PRIVACY, Study
from common.wire.tensors import Array

if TYPE_CHECKING:
    from common.models.network import Network

EPOCHS = 5
RATE = 0.1
_SILENCE_SECONDS = 20.0

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Personalized:
    """What personalization gave.

    Attributes
    ----------
    base : the published weights.
    weights : those after fine-tuning, in the same order.
    before, after : Dice of each foreground class over all voxels of the validation cases; NaN where it is in neither
        them nor the answer.
    training_cases, validation_cases : how many.
    """

    base: PublishedWeights
    weights: Sequence[Array]
    before: Mapping[str, float]
    after: Mapping[str, float]
    training_cases: int
    validation_cases: int

    @property
    def mean_before(self) -> float:
        """The mean over the classes."""
        return mean_dice(self.before)

    @property
    def mean_after(self) -> float:
        """The mean over the classes."""
        return mean_dice(self.after)

    @property
    def gained(self) -> bool:
        """Whether the personal model is the better one."""
        return self.mean_after > self.mean_before


def personalize(
    model: Path,
    open_cases: Callable[[Study], SiteDataset],
    *,
    epochs: int = EPOCHS,
    rate: float = RATE,
    progress: Progress = lambda _: None,
    verify: Verify | None = None,
) -> Personalized:
    """Fine-tune a published version on a site's training cases and measure both on its validation cases.

    Every epoch draws as many patches as an epoch of the study, augmented as there; the optimizer is the site's of the
    study, begun anew each epoch, at a learning rate that falls from the study's times `rate` to near zero.

    Parameters
    ----------
    model : the version's folder.
    verify : checks the signature, see `common.inference.published.Verify`.
    open_cases : gives the site's cases for a study: that of the version, with `epochs` rounds.

    Raises
    ------
    UsageError, PublishError : as `open_weights`.
    DataError : the site has no validation or no training cases, or a case can no longer be read.
    """
    from common.models import build_network

    base = open_weights(model, verify)
    study = tuning_study(base.study, epochs, rate)
    dataset = open_cases(study)
    if not dataset.training_cases or not dataset.validation_cases:
        raise DataError(
            f"{len(dataset.training_cases)} training and {len(dataset.validation_cases)} validation cases: without "
            "both nobody can tell whether a personal model is better; add labelled cases, or use the published model"
        )
    network = build_network(study)
    forward = ForwardPass(study, network)
    progress(f"measuring the published model on {len(dataset.validation_cases)} validation cases")
    before = validation_dice(study, dataset, forward.with_weights(base.weights))
    weights = fine_tune(study, network, base.weights, dataset, progress)
    progress("measuring the personal model")
    after = validation_dice(study, dataset, forward.with_weights(weights))
    return Personalized(base, weights, before, after, len(dataset.training_cases), len(dataset.validation_cases))


def tuning_study(study: Study, epochs: int, rate: float) -> Study:
    """The study as one site goes on with it by itself: a round an epoch, no averaging, a lower rate that falls."""
    training = study.training
    client = training.client_optimizer
    return dataclasses.replace(
        study,
        training=dataclasses.replace(
            training,
            algorithm="fedavg",
            proximal_mu=0.0,
            rounds=epochs,
            local_epochs=1,
            start_from=None,
            personal="none",
            client_optimizer=dataclasses.replace(
                client, learning_rate=client.learning_rate * rate, schedule="cosine", warmup_rounds=0
            ),
            server_optimizer=dataclasses.replace(training.server_optimizer, name="sgd", learning_rate=1.0),
        ),
        privacy=NO_PRIVACY,  # what is trained here stays here
    )


def fine_tune(
    study: Study, network: Network, weights: Sequence[Array], dataset: SiteDataset, progress: Progress
) -> list[Array]:
    """The weights after all rounds of the study's plan with one site, in this process."""
    from common.learning.graph import leaf_types, to_numpy, unflatten
    from common.learning.plan import RoundPlan
    from common.learning.process import build_training_process
    from common.models import operations_for

    progress("compiling the model, which takes up to half a minute")
    plan = RoundPlan(build_training_process(study, operations_for(study)))
    state_leaves = len(leaf_types(plan.state_type))
    state = [*weights, *plan.initialize()[len(network.specs) :]]  # a state begins with the model
    for number in range(1, study.training.rounds + 1):
        dataset.failure = None
        total = plan.zero()
        data = dataset.training(number, _telling(f"epoch {number} of {study.training.rounds}", dataset, progress))
        plan.accumulate(total, plan.work(data, to_numpy(plan.prepare(*state))))
        if dataset.failure is not None:
            raise dataset.failure
        leaves = plan.update(state, plan.report(*total))
        state = leaves[:state_leaves]
        _, metrics = unflatten(to_numpy(leaves), plan.result_type)
        loss = float(metrics["client_work"]["train"]["loss"])
        progress(f"epoch {number} of {study.training.rounds}: loss {loss:.3f}")
    return to_numpy(state[: len(network.specs)])


def _telling(epoch: str, dataset: SiteDataset, progress: Progress) -> Callable[[int], None]:
    """Says how far an epoch is, once in a while."""
    said = time.monotonic()

    def on_batch(index: int) -> None:
        nonlocal said
        if time.monotonic() - said >= _SILENCE_SECONDS:
            said = time.monotonic()
            progress(f"{epoch}: {index} of {dataset.training_batches} batches")

    return on_batch


def validation_dice(study: Study, dataset: SiteDataset, predict: Predict) -> dict[str, float]:
    """Dice of each foreground class over all voxels of the validation cases, as the study's rounds measure it.

    Raises
    ------
    DataError : a case can no longer be read.
    """
    classes = len(study.task.classes)
    counts = OverlapCounts.zero(classes)
    dataset.failure = None
    for images, labels in dataset.validation().as_numpy_iterator():
        found = class_indices(predict(images), study.model.head)
        counted = labels != IGNORED
        # The labels of a distance head say how far inside its object a voxel lies.
        truth = np.minimum(labels, 1) if study.model.head == "distance" else labels
        counts += count_overlap(found[counted], truth[counted], classes)
    if dataset.failure is not None:
        raise dataset.failure
    return dict(zip(study.task.foreground, counts.dice().tolist(), strict=True))


def mean_dice(of_classes: Mapping[str, float]) -> float:
    """The mean over the classes that occur; NaN if none does."""
    values = [value for value in of_classes.values() if not np.isnan(value)]
    return float(np.mean(values)) if values else float("nan")


def report_of(result: Personalized, folder: Path | None) -> dict[str, Any]:
    """What the command prints: plain values; `folder` is that of the personal model, None where it was not kept."""
    shown = {"before": json_ready(result.mean_before), "after": json_ready(result.mean_after)}
    return {
        "study": result.base.study.name,
        "version": result.base.version,
        "training_cases": result.training_cases,
        "validation_cases": result.validation_cases,
        "dice": shown,
        "class": {
            name: {"before": json_ready(result.before[name]), "after": json_ready(result.after[name])}
            for name in result.before
        },
        "gain": json_ready(result.mean_after - result.mean_before),
        "kept": folder is not None,
        "folder": str(folder) if folder is not None else None,
    }


def refuse_existing(out: Path) -> None:
    """Raises UsageError where the personal model's folder exists or cannot be made, before hours of training."""
    parent = out.absolute().parent
    try:
        if out.exists():
            raise UsageError(f"{out}: exists already; give another --out")
        if not parent.is_dir():
            raise UsageError(f"{out}: its parent folder does not exist; make it, or give another --out")
        tempfile.TemporaryFile(prefix=".wardround-", dir=parent).close()
    except OSError as error:
        raise UsageError(
            f"{out}: cannot be made in {parent} ({error.strerror or error}); check its rights, or give another --out"
        ) from error
