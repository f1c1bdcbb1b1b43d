"""The coordinator's holdout: images that no site trained on, segmented whole and compared with their labels.

The same measure serves a round's weights, run by TensorFlow, and a published file, run by LiteRT.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from common.errors import DataError
from common.imaging.case import Case
from common.imaging.checks import Requirements, examine_case
from common.imaging.discovery import discover
from common.imaging.geometry import to_ras
from common.imaging.grid import Grid
from common.imaging.loading import read_case
from common.imaging.preprocessing import prepare_case, prepare_label
from common.imaging.sliding_window import predict_tiled
from common.imaging.volume import Volume
from common.metrics.overlap import OverlapCounts, count_overlap
from common.study import Study

if TYPE_CHECKING:
    from common.models.network import Network

Predict = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]

LARGE_SITE_CASES = 10  # From this many cases on, a site's mean says something of the site.
_CACHE_BYTES = 2**30


class HoldoutCase(NamedTuple):
    """A case of a holdout.

    Attributes
    ----------
    image : float32, (spatial..., channel), prepared as for training.
    label : uint8 class indices, (z, y, x), on the grid as stored, turned to RAS in 3D.
    grid : the way back from the prepared grid.
    """

    image: npt.NDArray[np.float32]
    label: npt.NDArray[np.uint8]
    grid: Grid

    def predicted(self, classes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """A prediction on the prepared grid, brought to where `label` is."""
        return _placed(self.grid.restore(classes), self.grid.dimensions)


@dataclass(frozen=True, eq=False)
class HoldoutResult:
    """Overlap of every case of a holdout; means leave out what is not measurable.

    Attributes
    ----------
    classes : the foreground classes' names.
    cases : the cases' names, in order.
    sites : of each case, the site its image came from, or None where its name does not say.
    dice, iou : float64, shape (cases, foreground classes)
        NaN where a class is in neither prediction nor label.
    """

    classes: tuple[str, ...]
    cases: tuple[str, ...]
    sites: tuple[str | None, ...]
    dice: npt.NDArray[np.float64]
    iou: npt.NDArray[np.float64]

    @property
    def dice_of_cases(self) -> npt.NDArray[np.float64]:
        """Each case's mean Dice over the classes that are in it, shape (cases,); NaN where none is."""
        return _mean_of_rows(self.dice)

    @property
    def iou_of_cases(self) -> npt.NDArray[np.float64]:
        """As `dice_of_cases`, of IoU."""
        return _mean_of_rows(self.iou)

    @property
    def mean_dice(self) -> float:
        """Mean over cases of `dice_of_cases`; NaN if nothing was measurable, as in all means here."""
        return _mean(self.dice_of_cases)

    @property
    def mean_iou(self) -> float:
        """As `mean_dice`, of IoU."""
        return _mean(self.iou_of_cases)

    @property
    def cases_of_sites(self) -> dict[str, int]:
        """The number of cases of every site that has some, by site name; cases of no known site are in none."""
        return {site: self.sites.count(site) for site in sorted({site for site in self.sites if site is not None})}

    @property
    def dice_of_sites(self) -> dict[str, float]:
        """Mean Dice over the cases of every site that has some."""
        return self._by_site(self.dice_of_cases)

    @property
    def iou_of_sites(self) -> dict[str, float]:
        """As `dice_of_sites`, of IoU."""
        return self._by_site(_mean_of_rows(self.iou))

    @property
    def dice_of_classes(self) -> dict[str, float]:
        """Mean Dice over the cases that have the class, of every foreground class."""
        return {name: _mean(self.dice[:, index]) for index, name in enumerate(self.classes)}

    @property
    def iou_of_classes(self) -> dict[str, float]:
        """As `dice_of_classes`, of IoU."""
        return {name: _mean(self.iou[:, index]) for index, name in enumerate(self.classes)}

    @property
    def mean_dice_of_sites(self) -> float:
        """Mean over the sites' means: every site counts alike."""
        return _mean(list(self.dice_of_sites.values()))

    @property
    def mean_dice_of_large_sites(self) -> float:
        """Mean over the means of the sites with at least `LARGE_SITE_CASES` cases; NaN if there are none."""
        cases = self.cases_of_sites
        return _mean([dice for site, dice in self.dice_of_sites.items() if cases[site] >= LARGE_SITE_CASES])

    def rows(self) -> list[dict[str, str | float]]:
        """A row a case and class, for a CSV: case, site ("" if unknown), class, dice, iou."""
        return [
            {
                "case": case,
                "site": self.sites[row] or "",
                "class": name,
                "dice": float(self.dice[row, column]),
                "iou": float(self.iou[row, column]),
            }
            for row, case in enumerate(self.cases)
            for column, name in enumerate(self.classes)
        ]

    def scalars(self, *, each_case: bool = False) -> OrderedDict[str, Any]:
        """The means as nested plain floats, for release managers; which keys it has depends on the holdout alone.

        "cases" counts all cases; "other", beside "site", is of the cases whose name ends in no site of the study. With
        `each_case`, also the Dice and IoU of each case, the mean over its classes.
        """
        result: OrderedDict[str, Any] = OrderedDict(
            dice=self.mean_dice, iou=self.mean_iou, cases=float(len(self.cases))
        )
        cases, dice_of_sites, iou_of_sites = self.cases_of_sites, self.dice_of_sites, self.iou_of_sites
        if cases:
            result["dice_of_sites"] = self.mean_dice_of_sites
        if any(count >= LARGE_SITE_CASES for count in cases.values()):
            result["dice_of_large_sites"] = self.mean_dice_of_large_sites
        dice_of_classes, iou_of_classes = self.dice_of_classes, self.iou_of_classes
        result["class"] = OrderedDict(
            (name, OrderedDict(dice=dice_of_classes[name], iou=iou_of_classes[name])) for name in self.classes
        )
        if cases:
            result["site"] = OrderedDict(
                (site, OrderedDict(dice=dice_of_sites[site], iou=iou_of_sites[site], cases=float(count)))
                for site, count in cases.items()
            )
        if cases and None in self.sites:
            result["other"] = OrderedDict(
                dice=self._mean_of_site(self.dice_of_cases, None),
                iou=self._mean_of_site(self.iou_of_cases, None),
                cases=float(self.sites.count(None)),
            )
        if each_case:
            result["case"] = OrderedDict(
                (name, OrderedDict(dice=float(dice), iou=float(iou)))
                for name, dice, iou in zip(self.cases, self.dice_of_cases, self.iou_of_cases, strict=True)
            )
        return result

    def _by_site(self, values: npt.NDArray[np.float64]) -> dict[str, float]:
        return {site: self._mean_of_site(values, site) for site in self.cases_of_sites}

    def _mean_of_site(self, values: npt.NDArray[np.float64], site: str | None) -> float:
        return _mean([value for value, origin in zip(values, self.sites, strict=True) if origin == site])


class Holdout:
    """The cases of a holdout folder, prepared as for training. Safe to use from several threads.

    Parameters
    ----------
    study : Study
    folder : Path
        Arranged as a site's may be (`common.imaging.discovery`). A case whose name ends with "-" and the name of a
        site of the study came from that site.

    Attributes
    ----------
    cases : the cases' names, sorted.
    sites : of each case, the site it came from, or None.

    Raises
    ------
    DataError : the folder holds no cases, or some do not fit the study.
    """

    def __init__(self, study: Study, folder: Path) -> None:
        self._study = study
        self._files = _sound_cases(study, folder)
        self.cases: tuple[str, ...] = tuple(case.name for case in self._files)
        self.sites: tuple[str | None, ...] = tuple(site_of_origin(name, study.cohort.sites) for name in self.cases)
        self._cached: dict[int, HoldoutCase] = {}
        self._cached_bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._files)

    def load(self, index: int) -> HoldoutCase:
        """Case `index`, read the first time, and later too once 1 GB of cases is in memory. Not to be written to.

        Raises
        ------
        DataError : a file has vanished or was damaged since the holdout was checked.
        """
        with self._lock:
            if index in self._cached:
                return self._cached[index]
        case, task = self._files[index], self._study.task
        images, label = read_case(case, self._study)
        assert label is not None, "cases without a label were refused"
        prepared = prepare_case(images, None, self._study)  # as in use, where there is no label
        classes = prepare_label(label, dimensions=3, classes=len(task.classes), labels=task.labels)
        truth = _placed(Volume(classes[..., np.newaxis], label.spacing, label.affine), task.dimensions)
        loaded = HoldoutCase(prepared.image, truth, prepared.grid)
        size = loaded.image.nbytes + loaded.label.nbytes
        with self._lock:
            if index not in self._cached and self._cached_bytes + size <= _CACHE_BYTES:
                self._cached[index] = loaded
                self._cached_bytes += size
        return loaded

    def evaluate(
        self,
        predict: Predict,
        *,
        tile: Sequence[int],
        threads: int = 1,
        fixed_batch: bool = False,
        batch_size: int = 4,
    ) -> HoldoutResult:
        """Segment every image whole and measure it on the grid as stored, where a study resamples too.

        Parameters
        ----------
        predict : callable
            Takes float32 of shape (b, *tile, channel), answers probabilities (b, *tile, outputs): of the classes for a
            softmax head, of the foreground classes for a sigmoid head. Called from `threads` threads at once.
        tile : sequence of int
            What `predict` takes; larger images are tiled with the study's overlap, smaller ones are padded.
        threads : int
            Cases in work at once; the result does not depend on it.
        fixed_batch : bool
            Every call gets exactly `batch_size` tiles.
        batch_size : int

        Raises
        ------
        DataError : see `load`.
        """
        # Not at the top, because the package of models loads TensorFlow.
        from common.models.lite import class_indices

        study = self._study

        def measure(index: int) -> OverlapCounts:
            case = self.load(index)
            probabilities = predict_tiled(predict, case.image, tile, study.evaluation.overlap, batch_size, fixed_batch)
            predicted = case.predicted(class_indices(probabilities, study.model.head))
            return count_overlap(predicted, case.label, len(study.task.classes))

        executor = ThreadPoolExecutor(threads, thread_name_prefix="holdout")
        try:
            counts = list(executor.map(measure, range(len(self))))
        finally:
            executor.shutdown(cancel_futures=True)  # after a failure, what has not begun is not begun
        return HoldoutResult(
            classes=study.task.foreground,
            cases=self.cases,
            sites=self.sites,
            dice=np.stack([count.dice() for count in counts]),
            iou=np.stack([count.iou() for count in counts]),
        )


def _placed(volume: Volume, dimensions: int) -> npt.NDArray[np.uint8]:
    """The voxels (z, y, x) of class indices, turned to RAS in 3D, as image and label may be stored turned otherwise."""
    turned = to_ras(volume) if dimensions == 3 else volume
    return np.asarray(turned.array[..., 0], np.uint8)


def _sound_cases(study: Study, folder: Path) -> list[Case]:
    """The folder's cases under the study's modalities; one that is not sound refuses the whole holdout."""
    found = discover(folder)
    requirements = Requirements.of(study)
    cases = [case.with_modalities(study.task.modalities) for case in found.cases]
    findings = [*found.findings, *(finding for case in cases for finding in examine_case(case, requirements)[1])]
    errors = [finding for finding in findings if finding.level == "error"]
    if errors:
        lines = "\n".join(f"  {finding.code} {finding.message}. {finding.advice}" for finding in errors)
        raise DataError(f"{folder}: the holdout cannot be used:\n{lines}")
    return cases


def site_of_origin(case: str, sites: Sequence[str]) -> str | None:
    """The longest of the sites' names that the case's name ends with after a "-", or None."""
    return max((site for site in sites if case.endswith(f"-{site}")), key=len, default=None)


class ForwardPass:
    """The network's forward pass by TensorFlow, traced once for tiles of the study's size.

    Parameters
    ----------
    study : Study
    network : of `common.models.build_network(study)`.
    """

    def __init__(self, study: Study, network: Network) -> None:
        import tensorflow as tf

        from common.models import probabilities

        def forward(weights: Sequence[Any], tiles: Any) -> Any:
            return probabilities(study, network(weights, tiles))

        weights = [tf.TensorSpec(spec.shape, tf.float32) for spec in network.specs]
        tiles = tf.TensorSpec([None, *study.publishing.tile, network.channels], tf.float32)
        self._forward = tf.function(forward, autograph=False).get_concrete_function(weights, tiles)

    def with_weights(self, weights: Sequence[npt.ArrayLike]) -> Predict:
        """From tiles (b, *study.publishing.tile, channel) to probabilities (b, *tile, outputs), both float32.

        `weights` are in the order of `network.specs`. The callable may be used by several threads.
        """
        import tensorflow as tf

        values = [tf.constant(np.asarray(weight), tf.float32) for weight in weights]

        def predict(batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
            return np.asarray(self._forward(values, tf.constant(batch, tf.float32)).numpy(), dtype=np.float32)

        return predict


def predictor(study: Study, network: Network, weights: Sequence[npt.ArrayLike]) -> Predict:
    """`ForwardPass` for one set of weights."""
    return ForwardPass(study, network).with_weights(weights)


def _mean(values: npt.NDArray[np.float64] | Sequence[float]) -> float:
    """The mean of what is not NaN; NaN of nothing (where `numpy.nanmean` warns)."""
    measured = [float(value) for value in values if not math.isnan(value)]
    return math.fsum(measured) / len(measured) if measured else math.nan


def _mean_of_rows(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.array([_mean(row) for row in values], dtype=np.float64)
