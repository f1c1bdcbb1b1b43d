"""Steps of private training on images in memory: what comparisons of levels of noise share.

Each image counts as a patient, as it does at a site of these data. Who takes part, patches and noise follow from the
benchmark's seed, so that a run can be repeated; at a site they never do (`client.private_dataset`).
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks._pooled import Image, Label
from common.imaging.patches import sample_patch
from common.privacy.accounting import NoisySteps, epsilon_of, sampling_rate
from common.study import NO_PRIVACY, Privacy, Study

Step = tuple[Any, Any, Any]


def noise_levels(parser: argparse.ArgumentParser, arms: Sequence[str]) -> dict[str, float | None]:
    """The noise multiplier of each arm, None of "none"; ends the program where one is no number."""
    try:
        return {arm: None if arm == "none" else float(arm) for arm in arms}
    except ValueError:
        parser.error(f"--noise: expected numbers or none, found {' '.join(arms)}")


def private_study(
    study: Study, noise: float | None, *, patients: float, crops: int, steps: int, norm: float, delta: float
) -> Study:
    """The study with so many private steps a round, each site counting the same; noise None: without privacy.

    Without privacy its batches have as many patches as a private step has on average.
    """
    training = dataclasses.replace(study.training, weighting="equal", batch_size=max(1, round(patients * crops)))
    privacy = NO_PRIVACY
    if noise is not None:
        privacy = Privacy(
            unit="patient",
            epsilon=1000.0,  # nothing stops: how Dice and epsilon go together is the question
            delta=delta,
            noise_multiplier=noise,
            clip_norm=norm,
            patients_per_step=patients,
            steps_per_round=steps,
            crops_per_patient=crops,
        )
    return dataclasses.replace(study, training=training, privacy=privacy)


def element(study: Study) -> tuple[Any, ...]:
    """The type of a private step, as tensor specs."""
    import tensorflow as tf

    patch = study.preprocessing.patch
    return (
        tf.TensorSpec([None, None, *patch, study.task.channels], tf.float32),
        tf.TensorSpec([None, None, *patch], tf.uint8),
        tf.TensorSpec([2], tf.int64),
    )


def private_steps(
    study: Study, cases: Sequence[tuple[Image, Label]], steps: int, seed: int, first: int = 0
) -> Iterator[Step]:
    """The steps from index `first` on: images (patients, crops, ...), labels and the seed of the noise."""
    import tensorflow as tf

    from common.imaging.augmentation import augment

    privacy, patch = study.privacy, study.preprocessing.patch
    rate = sampling_rate(privacy, len(cases))
    for step in range(first, steps):
        rng = np.random.default_rng([seed, step])
        images, labels = [], []
        for place in np.flatnonzero(rng.random(len(cases)) < rate):
            image, label = cases[place]
            pairs = [
                sample_patch(image, label, patch, rng, study.training.foreground_fraction)
                for _ in range(privacy.crops_per_patient)
            ]
            batch = tuple(tf.constant(np.stack(part)) for part in zip(*pairs, strict=True))
            if study.augmentation:
                own_seed = tf.constant(rng.integers(2**31, size=2, dtype=np.int32))
                batch = augment(*batch, own_seed, study.augmentation)
            images.append(batch[0])
            labels.append(batch[1])
        noise = rng.integers(2**62, size=2)
        if images:
            yield tf.stack(images), tf.stack(labels), noise
        else:
            shape = (0, privacy.crops_per_patient, *patch)
            yield np.zeros((*shape, study.task.channels), np.float32), np.zeros(shape, np.uint8), noise


def epsilon_after(study: Study, patients: int, steps: int) -> float:
    """What so many steps spend at a site of so many patients."""
    privacy = study.privacy
    return epsilon_of([NoisySteps(sampling_rate(privacy, patients), privacy.noise_multiplier, steps)], privacy.delta)
