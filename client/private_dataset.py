"""A site's own patients as the steps of private training: who takes part in each is a matter of chance.

Everything here (who is drawn, patches, augmentation, noise) follows from a secret of the site's operating system and
from nothing that the coordinator knows: who could compute the noise could take it away again. What is drawn of one
patient does not depend on which others there are, as the guarantee asks for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from client.case_cache import CaseCache
from client.datasets import OnBatch, SiteDataset, as_tensor
from client.selection import SiteCases
from common.imaging.case import Case
from common.imaging.patches import sample_patch
from common.privacy.accounting import sampling_rate
from common.study import Study


@dataclass(frozen=True)
class SecretDraw:
    """The source of a private round's randomness.

    Attributes
    ----------
    key : 32 bytes that nobody but the site can know; not shown.
    """

    key: bytes

    def __repr__(self) -> str:
        return "SecretDraw()"

    def generator(self, purpose: str, number: int, who: str = "") -> np.random.Generator:
        """A generator of its own for each purpose, number and patient."""
        return np.random.default_rng(np.frombuffer(self._digest(purpose, number, who), np.uint32))

    def seed(self, purpose: str, number: int) -> npt.NDArray[np.int64]:
        """128 bits, int64 (2,)."""
        return np.frombuffer(self._digest(purpose, number, "")[:16], np.int64)

    def _digest(self, purpose: str, number: int, who: str) -> bytes:
        words = f"{purpose}/{number}/".encode() + who.encode("utf-8", "surrogateescape")
        return hashlib.blake2b(words, key=self.key, digest_size=32).digest()


class PrivateSiteDataset(SiteDataset):
    """The patients of one site, for a study with `privacy.unit: patient`.

    Attributes
    ----------
    patients : the training cases of each patient, in the order of the patients' names. Where nothing is known of
        patients, each image counts as one.
    images_alone : how many training cases count as a patient of their own because nothing else is known of them.
    """

    def __init__(self, study: Study, site: str, cases: SiteCases, cache: CaseCache | None = None) -> None:
        super().__init__(study, site, cases, cache)
        groups: dict[str, list[Case]] = {}
        for case in self.training_cases:
            groups.setdefault(case.patient, []).append(case)
        self.patients: dict[str, list[Case]] = {patient: groups[patient] for patient in sorted(groups)}
        self.images_alone = sum(case.patient == case.name for case in self.training_cases)

    @property
    def training_batches(self) -> int:
        """Steps of a round of training."""
        return int(self._study.privacy.steps_per_round)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of which images of which patients are trained on."""
        digest = hashlib.sha256()
        for patient, cases in self.patients.items():
            for word in (patient, *(part for case in cases for part in (case.name, self._key(case)))):
                digest.update(word.encode("utf-8", "surrogateescape") + b"\0")
            digest.update(b"\n")
        return digest.digest()

    def private_training(self, draw: SecretDraw, on_step: OnBatch = lambda index: None) -> Any:
        """A `tf.data.Dataset` of the steps of a round, as `common.learning.private_work` takes them.

        An element is images float32 (patients, crops, *patch, channel), labels uint8 (patients, crops, *patch) and the
        seed of the step's noise, int64 (2,). `on_step` is as `on_batch` of `SiteDataset.training`.
        """
        return self._drawn(draw, on_step)

    def training(self, round_number: int, on_batch: OnBatch = lambda index: None) -> Any:
        """Not for private training, whose draws never follow from the round's number."""
        raise NotImplementedError("a study with privacy.unit: patient trains on `private_training`")

    @property
    def _element(self) -> tuple[Any, ...]:
        import tensorflow as tf

        patch, channels = self._study.preprocessing.patch, self._study.task.channels
        return (
            tf.TensorSpec([None, None, *patch, channels], tf.float32),
            tf.TensorSpec([None, None, *patch], tf.uint8),
            tf.TensorSpec([2], tf.int64),
        )

    def _elements(self, draw: SecretDraw, on_batch: OnBatch) -> Iterator[tuple[Any, ...]]:
        import tensorflow as tf

        crops = self._study.privacy.crops_per_patient
        patch, channels = self._study.preprocessing.patch, self._study.task.channels
        for step in range(self.training_batches):
            on_batch(step)
            drawn = [self._of_patient(draw, step, patient) for patient in self.taking_part(draw, step)]
            if drawn:
                images, labels = (tf.stack(part) for part in zip(*drawn, strict=True))
            else:
                images, labels = tf.zeros([0, crops, *patch, channels]), tf.zeros([0, crops, *patch], tf.uint8)
            yield images, labels, draw.seed("noise", step)

    def taking_part(self, draw: SecretDraw, step: int) -> Sequence[str]:
        """The patients who were drawn for a step, each by chance and independently of all others."""
        names = list(self.patients)
        if not names:
            return []
        chance = draw.generator("sampling", step).random(len(names))
        rate = sampling_rate(self._study.privacy, len(names))
        return [name for name, value in zip(names, chance, strict=True) if value < rate]

    def _of_patient(self, draw: SecretDraw, step: int, patient: str) -> tuple[Any, Any]:
        """A patient's patches, of images drawn at random, varied: (crops, *patch, channel) and (crops, *patch)."""
        training, patch = self._study.training, self._study.preprocessing.patch
        rng = draw.generator("patches", step, patient)
        cases = self.patients[patient]
        images, labels = self._empty_batch(self._study.privacy.crops_per_patient)
        for place in range(len(images)):
            image, label = self._load(cases[rng.integers(len(cases))])
            images[place], labels[place] = sample_patch(
                image, label, patch, rng, training.foreground_fraction, copy=False
            )
        seed = rng.integers(2**31, size=2, dtype=np.int32)
        varied: tuple[Any, Any] = self._vary(as_tensor(images), as_tensor(labels), seed)
        return varied
