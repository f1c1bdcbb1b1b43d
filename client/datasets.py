"""A site's own cases as the batches that a round trains on and is evaluated on.

Everything drawn (order, patches, augmentation) follows from (study, seed, round, site), so that a round trained again
after a crash sends the same bits. Files are read in place; prepared images are kept in a cache of the site's own.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from client.case_cache import CaseCache
from client.registry_rows import files_mark, same_content
from client.selection import SiteCases
from common.errors import DataError
from common.imaging.case import Case
from common.imaging.loading import load_case
from common.imaging.patches import IGNORED, pad_to, sample_patch, tiles
from common.imaging.preprocessing import Prepared
from common.imaging.splits import split_cases
from common.study import Study

Image = npt.NDArray[np.float32]
Label = npt.NDArray[np.uint8]
Batch = tuple[Image, Label]
OnBatch = Callable[[int], None]

_DROPOUT = 1000  # its part of a batch's seed, beyond those of the augmentations
_THICK = 3.0
_ALIGNMENT = 64


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
    """The cases of one site, split into training and validation; see `client.private_dataset` for private training.

    Parameters
    ----------
    study : says how images are prepared and what is drawn of them.
    site : the site's name.
    cases : what the site trains on, as `client.selection` chose it.
    cache : keeps prepared cases from round to round; None prepares them whenever they are drawn.

    Attributes
    ----------
    failure : why the data ended early (TensorFlow would hide it from whoever reads a `tf.data.Dataset`), or None.
    """

    def __init__(self, study: Study, site: str, cases: SiteCases, cache: CaseCache | None = None) -> None:
        self._study = study
        self._site = site
        self._cases = cases
        self._cache = cache
        self._keys: dict[str, str] = {}
        self._numbers = itertools.count()
        self._rounds: dict[int, tuple[Draw, OnBatch]] = {}  # whose data is in use
        self.failure: DataError | None = None
        self.training_cases, self.validation_cases = split_cases(
            cases.cases, study.evaluation, study.seed, independent=study.privacy.unit == "patient"
        )

    def make_room(self) -> int:
        """Empties the cache of prepared cases; see `CaseCache.make_room`."""
        return 0 if self._cache is None else self._cache.make_room()

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
        return self._drawn(Draw(self._study.name, self._study.seed, round_number, self._site), on_batch)

    def _drawn(self, draw: Any, on_batch: OnBatch) -> Any:
        """The `tf.data.Dataset` of what a draw gives."""
        import tensorflow as tf

        number = next(self._numbers)
        self._rounds[number] = draw, on_batch
        data = tf.data.experimental.from_variant(self._pipeline(number), self._element)
        weakref.finalize(data, self._rounds.pop, number)
        return data

    @property
    def _element(self) -> tuple[Any, ...]:
        """The type of an element of the training data, as tensor specs."""
        return tuple(self._vary.input_signature[:2])

    @cached_property
    def _pipeline(self) -> Any:
        """From a number of `_rounds` to its data as a variant, a TensorFlow function.

        Traced once: made anew in every round, the pipeline takes as long as several batches, and TensorFlow holds on to
        the generator of each.
        """
        import tensorflow as tf

        element = self._element
        options = tf.data.Options()
        options.autotune.enabled = False  # nothing is left to it, and it would look on from a thread of its own

        def pipeline(number: Any) -> Any:
            data = tf.data.Dataset.from_generator(self._batches, args=(number,), output_signature=element)
            return tf.data.experimental.to_variant(data.prefetch(2).with_options(options))

        return tf.function(pipeline, input_signature=[tf.TensorSpec([], tf.int64)], autograph=False)

    def _batches(self, number: int) -> Iterator[tuple[Any, ...]]:
        """The batches of one of `_rounds`; after them nothing, or `failure`."""
        draw, on_batch = self._rounds[int(number)]
        try:
            yield from self._elements(draw, on_batch)
        except Cancelled:
            return
        except DataError as error:
            self.failure = DataError(f"site {self._site}: {error}")
            return

    def _elements(self, draw: Any, on_batch: OnBatch) -> Iterator[tuple[Any, ...]]:
        """What `_batches` gives. Raises Cancelled, and DataError where a case cannot be read."""
        seeds = draw.generator("augment").integers(2**31, size=(self.training_batches, 2), dtype=np.int32)
        size = self._study.training.batch_size
        for index, (images, labels) in enumerate(self._training_batches(draw)):
            on_batch(index)
            drawn = min(size, self.patches - index * size)
            # Not by `Dataset.map`, which would set the function up anew in every round: up to a second.
            varied = self._vary(as_tensor(images), as_tensor(labels), seeds[index])
            yield tuple(values[:drawn] for values in varied) if drawn < size else varied

    @cached_property
    def _vary(self) -> Any:
        """Augmentation and dropout of a batch, a TensorFlow function: traced once, which takes it seconds."""
        import tensorflow as tf

        from common.imaging.augmentation import augment, modality_dropout

        study = self._study
        names, dropout = study.augmentation, study.training.modality_dropout
        through_plane = not _has_thick_slices(study)
        patch = study.preprocessing.patch

        def vary(images: Any, labels: Any, seed: Any) -> tuple[Any, Any]:
            values = images
            if names:
                values, labels = augment(images, labels, seed, names, through_plane=through_plane)
            if study.task.modalities:  # one that a case lacks stays 0 everywhere, as it is when the model is used
                there = tf.reduce_any(images != 0.0, axis=range(1, images.shape.rank - 1), keepdims=True)
                values = tf.where(there, values, 0.0)
            images = values
            if dropout:
                own_seed = tf.random.experimental.stateless_fold_in(seed, _DROPOUT)
                images = modality_dropout(images, own_seed, dropout)
            return images, labels

        signature = (
            tf.TensorSpec([None, *patch, study.task.channels], tf.float32),
            tf.TensorSpec([None, *patch], tf.uint8),
            tf.TensorSpec([2], tf.int32),
        )
        return tf.function(vary, input_signature=signature, autograph=False)

    def _training_batches(self, draw: Draw) -> Iterator[Batch]:
        """All of one size, for which the augmentation is compiled: the last is filled up with what is there."""
        training, patch = self._study.training, self._study.preprocessing.patch
        size = training.batch_size
        rng = draw.generator("patches")
        images, labels = self._empty_batch()
        for index, case in enumerate(self._order(draw)):
            image, label = self._load(case)
            place = index % size
            images[place], labels[place] = sample_patch(
                image, label, patch, rng, training.foreground_fraction, copy=False
            )
            if place + 1 == size or index + 1 == self.patches:
                yield images, labels
                images, labels = self._empty_batch()

    def _empty_batch(self, size: int | None = None) -> Batch:
        """Zeros where TensorFlow can use them without a copy; `size` is the study's batch size unless given."""
        study = self._study
        shape = (study.training.batch_size if size is None else size, *study.preprocessing.patch)
        return _aligned((*shape, study.task.channels), np.float32), _aligned(shape, np.uint8)

    def _order(self, draw: Draw) -> Iterator[Case]:
        """The case of each patch: shuffled passes over all cases, one after the other."""
        drawn = 0
        for turn in range(self.patches):
            for index in draw.generator("order", turn).permutation(len(self.training_cases)):
                if drawn == self.patches:
                    return
                drawn += 1
                yield self.training_cases[index]

    def _key(self, case: Case) -> str:
        """By which the cache knows a case; worked out once, because it takes longer than reading a patch."""
        if case.name not in self._keys:
            self._keys[case.name] = self._cases.key(case, self._study)
        return self._keys[case.name]

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
                self.failure = DataError(f"site {self._site}: {error}")
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
        image, label = self._load(case)
        counted = np.zeros(label.shape, bool)
        for where in tiles(label.shape, tile, 0.0):
            part = label[where].copy()
            part[counted[where]] = IGNORED
            counted[where] = True
            padded_image = pad_to(image[where], tile, "edge")
            outside = pad_to(np.ones(part.shape, np.uint8), tile, "constant") == 0
            padded_label = pad_to(part, tile, "constant")
            padded_label[outside] = IGNORED
            yield padded_image[np.newaxis], padded_label[np.newaxis]

    def _load(self, case: Case) -> Batch:
        """The prepared image and label of a case. Raises DataError where its files can no longer be read."""

        def prepare() -> Prepared:
            before = files_mark(case)
            prepared = load_case(case, self._study, self._cases.label_map)
            untouched = self._cases.marks[case.name] == before == files_mark(case)
            if not untouched and not same_content(case, self._cases.facts[case.name]):
                raise DataError(
                    f"case {case.name}: its files have changed since they were checked. Start the site again, which "
                    "checks them anew."
                )
            return prepared

        prepared = prepare() if self._cache is None else self._cache.get(self._key(case), prepare)
        assert prepared.label is not None, "a case without a label is not among a site's cases"
        return prepared.image, prepared.label


def _aligned(shape: tuple[int, ...], dtype: type) -> npt.NDArray[Any]:
    """Zeros in memory that TensorFlow's vector units can read, so that it needs no copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def as_tensor(array: npt.NDArray[Any]) -> Any:
    """The same memory as a tensor, which keeps it; nobody may write to it from here on."""
    import tensorflow as tf

    return tf.experimental.dlpack.from_dlpack(array.__dlpack__())


def _has_thick_slices(study: Study) -> bool:
    """Whether slices are so much thicker than pixels are wide that turning them into each other would shear."""
    spacing = study.preprocessing.spacing
    return spacing is not None and len(spacing) == 3 and spacing[0] > _THICK * max(spacing[1:])


def site_dataset(study: Study, site: str, cases: SiteCases, cache: CaseCache | None = None) -> SiteDataset:
    """The data set for the study: of steps of patients where its training is private."""
    if study.privacy.unit == "patient":
        from client.private_dataset import PrivateSiteDataset

        return PrivateSiteDataset(study, site, cases, cache)
    return SiteDataset(study, site, cases, cache)
