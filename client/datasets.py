"""A site's own cases as the batches that a round trains on and is evaluated on.

Everything drawn (order, patches, augmentation) follows from (study, seed, round, site), so that a round trained again
after a crash sends the same bits. Files are read in place; prepared images are kept in memory up to a limit.
"""

from __future__ import annotations

import collections
import hashlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import DataError
from common.imaging.folder import Case, check_cases, find_cases, split_cases
from common.imaging.patches import pad_to, sample_patch, tiles
from common.imaging.preprocessing import prepare_image, prepare_label
from common.imaging.readers import read_image, read_label
from common.study import Study

Image = npt.NDArray[np.float32]
Label = npt.NDArray[np.uint8]
Batch = tuple[Image, Label]
OnBatch = Callable[[int], None]

CACHE_BYTES = 512 * 2**20
_IGNORED = 255  # `common.learning.model.IGNORED`, which would load TensorFlow here


class Cancelled(Exception):
    """Raised by a batch callback to end a round's work early."""


@dataclass(frozen=True)
class Draw:
    """The source of a round's randomness."""

    study: str
    seed: int
    round: int
    site: str

    def generator(self, purpose: str, *numbers: int) -> np.random.Generator:
        """A generator of its own for each purpose and numbers."""
        text = f"{self.study}/{self.seed}/{self.round}/{self.site}/{purpose}/{'/'.join(map(str, numbers))}"
        return np.random.default_rng(np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint32))


class SiteDataset:
    """The cases of one site, split into training and validation.

    Parameters
    ----------
    study : says what the images must be and how they are prepared.
    site : the site's name.
    folder : with `images/` and `labels/`.

    Raises
    ------
    DataError : no cases, an image without label, an unreadable file, or cases that do not fit the study; all are named.

    Attributes
    ----------
    failure : why the data ended early (TensorFlow would hide it from whoever reads a `tf.data.Dataset`), or None.
    """

    def __init__(self, study: Study, site: str, folder: Path) -> None:
        self._study = study
        self._site = site
        self._folder = folder
        self.failure: DataError | None = None
        cases = find_cases(folder)
        task = study.task
        try:
            check_cases(
                cases, dimensions=task.dimensions, channels=task.channels, classes=len(task.classes), labels=task.labels
            )
        except DataError as error:
            raise DataError(f"{folder}: {error}") from error
        self.training_cases, self.validation_cases = split_cases(
            cases, study.evaluation.validation_fraction, study.seed
        )
        self._cache = _CaseCache(self._prepare, CACHE_BYTES)

    @property
    def patches(self) -> int:
        """Patches a round of training draws."""
        training = self._study.training
        return training.local_epochs * (training.patches_per_epoch or len(self.training_cases))

    @property
    def training_batches(self) -> int:
        """Batches of a round of training."""
        return -(-self.patches // self._study.training.batch_size)

    def training(self, round_number: int, on_batch: OnBatch = lambda index: None) -> Any:
        """A `tf.data.Dataset` of batches: images float32 (batch, *patch, channel), labels uint8 (batch, *patch).

        `on_batch` is called with the index of each batch as it is drawn; it may raise `Cancelled`, which ends the data.
        """
        import tensorflow as tf

        from common.imaging.augmentation import augment

        study = self._study
        draw = Draw(study.name, study.seed, round_number, self._site)

        def batches() -> Iterator[tuple[Image, Label, npt.NDArray[np.int32]]]:
            try:
                for index, (images, labels) in enumerate(self._training_batches(draw)):
                    on_batch(index)
                    seed = draw.generator("augment", index).integers(2**31, size=2, dtype=np.int32)
                    yield images, labels, seed
            except Cancelled:
                return
            except DataError as error:
                self.failure = DataError(f"{self._folder}: {error}")
                return

        patch = study.preprocessing.patch
        signature = (
            tf.TensorSpec([None, *patch, study.task.channels], tf.float32),
            tf.TensorSpec([None, *patch], tf.uint8),
            tf.TensorSpec([2], tf.int32),
        )
        dataset = tf.data.Dataset.from_generator(batches, output_signature=signature)
        names = study.augmentation
        dataset = dataset.map(
            lambda images, labels, seed: augment(images, labels, seed, names) if names else (images, labels)
        )
        return dataset.prefetch(2)

    def _training_batches(self, draw: Draw) -> Iterator[Batch]:
        training = self._study.training
        patch = self._study.preprocessing.patch
        images, labels = [], []
        for index, case in enumerate(self._order(draw)):
            image, label = self._cache.get(case)
            rng = draw.generator("patch", index)
            image_patch, label_patch = sample_patch(image, label, patch, rng, training.foreground_fraction)
            images.append(image_patch)
            labels.append(label_patch)
            if len(images) == training.batch_size or index + 1 == self.patches:
                yield np.stack(images), np.stack(labels)
                images, labels = [], []

    def _order(self, draw: Draw) -> Iterator[Case]:
        """The case of each patch: shuffled passes over all cases, one after the other."""
        drawn = 0
        for turn in range(self.patches):
            for index in draw.generator("order", turn).permutation(len(self.training_cases)):
                if drawn == self.patches:
                    return
                drawn += 1
                yield self.training_cases[index]

    def validation(self, on_batch: OnBatch = lambda index: None) -> Any:
        """A `tf.data.Dataset` of single tiles that cover the validation cases; voxels outside carry label 255."""
        import tensorflow as tf

        def generate() -> Iterator[Batch]:
            try:
                for index, case in enumerate(self.validation_cases):
                    on_batch(index)
                    yield from self._tiles_of(case)
            except Cancelled:
                return
            except DataError as error:
                self.failure = DataError(f"{self._folder}: {error}")
                return

        spatial = [None] * self._study.task.dimensions
        signature = (
            tf.TensorSpec([None, *spatial, self._study.task.channels], tf.float32),
            tf.TensorSpec([None, *spatial], tf.uint8),
        )
        return tf.data.Dataset.from_generator(generate, output_signature=signature).prefetch(2)

    def _tiles_of(self, case: Case) -> Iterator[Batch]:
        """Whole-image evaluation in tiles of the study's tile size; each voxel counts once."""
        tile = self._study.publishing.tile
        image, label = self._cache.get(case)
        counted = np.zeros(label.shape, bool)
        for where in tiles(label.shape, tile, 0.0):
            part = label[where].copy()
            part[counted[where]] = _IGNORED
            counted[where] = True
            padded_image = pad_to(image[where], tile, "edge")
            outside = pad_to(np.ones(part.shape, np.uint8), tile, "constant") == 0
            padded_label = pad_to(part, tile, "constant")
            padded_label[outside] = _IGNORED
            yield padded_image[np.newaxis], padded_label[np.newaxis]

    def _prepare(self, case: Case) -> Batch:
        task = self._study.task
        image = prepare_image(
            read_image(case.image, task.dimensions),
            dimensions=task.dimensions,
            channels=task.channels,
            intensity=self._study.preprocessing.intensity,
        )
        label = prepare_label(
            read_label(case.label, task.dimensions),
            dimensions=task.dimensions,
            classes=len(task.classes),
            labels=task.labels,
        )
        return image, label


class _CaseCache:
    """Prepared cases, the most recently used up to a number of bytes."""

    def __init__(self, prepare: Callable[[Case], Batch], limit: int) -> None:
        self._prepare = prepare
        self._limit = limit
        self._held: collections.OrderedDict[str, Batch] = collections.OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, case: Case) -> Batch:
        """The prepared image and label of a case. Raises DataError where its files can no longer be read."""
        with self._lock:
            if case.name in self._held:
                self._held.move_to_end(case.name)
                return self._held[case.name]
        prepared = self._prepare(case)
        size = prepared[0].nbytes + prepared[1].nbytes
        with self._lock:
            if case.name not in self._held and size <= self._limit:
                self._held[case.name] = prepared
                self._bytes += size
                while self._bytes > self._limit:
                    _, (image, label) = self._held.popitem(last=False)
                    self._bytes -= image.nbytes + label.nbytes
        return prepared
