"""Grad-CAM maps: LiteRT's are those that TensorFlow's own gradients give, for all kinds of network and head."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tensorflow as tf

from common.inference.lite import LiteModel, class_indices
from common.models import build_network, outputs_of, probabilities
from common.models.explaining import resized
from common.models.network import Weights
from common.network_traits import NETWORKS
from common.study import Study
from server.publishing.explanation import convert_explanation
from tests.common.networks import weights_as_of_a_trained_network

ALLOWED = 1e-3  # of a map's largest value

MakeStudy = Callable[..., Study]


@pytest.fixture
def study_of(tiny_study: Callable[..., Study]) -> MakeStudy:
    def make(name: str, dimensions: int, classes: int = 3, labels: str = "classes", **model: Any) -> Study:
        study = tiny_study(dimensions=dimensions)
        size = 32 if NETWORKS[name].fixed_stride else 16
        tile = (size, 2 * size) if dimensions == 2 else (8, 16, 12)
        names = ("background", "cell", "nucleus")[:classes]
        return dataclasses.replace(
            study,
            task=dataclasses.replace(study.task, classes=names, labels=labels),
            model=dataclasses.replace(study.model, name=name, **model),
            publishing=dataclasses.replace(study.publishing, tile=tile),
        )

    return make


def maps_by_tape(
    study: Study, weights: list[npt.NDArray[np.float32]], tile: npt.NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> npt.NDArray[np.float32]:
    """The definition, written out with a gradient tape."""
    seen = []
    with tf.GradientTape(persistent=True) as tape:

        def features(self: Weights, images: tf.Tensor) -> tf.Tensor:
            tape.watch(images)
            seen.append(images)
            return images

        monkeypatch.setattr(Weights, "features", features)
        logits = build_network(study)([tf.constant(weight) for weight in weights], tf.constant(tile))
        head = study.model.head
        classes = class_indices(probabilities(study, logits).numpy(), head)
        scores = [
            tf.reduce_sum(logits[..., index if head == "softmax" else index - 1] * (classes == index))
            for index in range(1, len(study.task.classes))
        ]
    monkeypatch.undo()
    deepest = seen[-1]  # the network was recorded before
    assert np.unique(classes).size == len(study.task.classes)
    maps = []
    for score in scores:
        gradient = tape.gradient(score, deepest)
        importance = tf.reduce_mean(gradient, axis=list(range(gradient.shape.rank - 1)))
        maps.append(tf.nn.relu(tf.reduce_sum(importance * deepest, axis=-1)))
    found: npt.NDArray[np.float32] = resized(tf.stack(maps, axis=-1), study.publishing.tile).numpy()
    return found


@pytest.mark.parametrize(
    ("name", "dimensions", "options"),
    [
        ("unet", 2, {"head": "softmax"}),
        ("unet", 3, {"head": "softmax"}),
        ("unet", 3, {"head": "sigmoid", "normalization": "group"}),
        ("unet", 2, {"head": "distance", "classes": 2, "labels": "instances", "normalization": "batch"}),
        ("attention_unet", 3, {"head": "softmax", "normalization": "batch"}),
        ("residual_unet", 2, {"head": "sigmoid", "normalization": "none"}),
        ("deeplabv3plus", 2, {"head": "softmax", "encoder": "xception", "classes": 2}),
        ("mobilenetv3_small", 2, {"head": "sigmoid"}),
    ],
)
def test_the_file_gives_probabilities_and_the_maps_of_tensorflows_own_gradients(
    tensorflow: None,
    study_of: MakeStudy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    dimensions: int,
    options: dict[str, Any],
) -> None:
    study = study_of(name, dimensions, **options)
    network = build_network(study)
    weights = weights_as_of_a_trained_network(network)
    tile = np.random.default_rng(0).normal(size=(1, *study.publishing.tile, 1)).astype(np.float32)
    expected = maps_by_tape(study, weights, tile, monkeypatch)

    (tmp_path / "model.tflite").write_bytes(convert_explanation(study, network, weights))
    found = LiteModel(tmp_path / "model.tflite")(tile)
    outputs = outputs_of(study)
    logits = network([tf.constant(weight) for weight in weights], tf.constant(tile))
    np.testing.assert_allclose(found[..., :outputs], probabilities(study, logits).numpy(), atol=1e-4)
    assert found.shape[-1] == outputs + len(study.task.foreground)
    for index in range(expected.shape[-1]):
        highest = expected[..., index].max()
        assert highest > 0
        np.testing.assert_allclose(
            found[..., outputs + index], expected[..., index], atol=ALLOWED * float(highest), rtol=0
        )


@pytest.mark.parametrize(
    ("name", "encoder", "dimensions"),
    [
        (name, encoder, dimensions)
        for name, traits in NETWORKS.items()
        for encoder in traits.encoders or (None,)
        for dimensions in traits.dimensions
    ],
)
def test_every_network_marks_features_that_all_logits_come_from(
    study_of: MakeStudy, name: str, encoder: str | None, dimensions: int
) -> None:
    network = build_network(study_of(name, dimensions, encoder=encoder))
    with tf.Graph().as_default():
        weights = [tf.compat.v1.placeholder(tf.float32, spec.shape) for spec in network.specs]
        images = tf.compat.v1.placeholder(tf.float32, [1, *[network.stride * 2] * dimensions, 1])
        logits, features = network.with_features(weights, images)
        assert max(features.shape[1:-1]) < max(images.shape[1:-1])
        assert all(gradient is not None for gradient in tf.gradients(logits, features))
        assert tf.gradients(logits, features)[0].shape == features.shape


def test_maps_of_a_volume_are_resized_along_every_axis() -> None:
    ramp = np.arange(4, dtype=np.float32)
    volume = (100 * ramp[:, None, None] + 10 * ramp[:, None] + ramp)[np.newaxis, ..., np.newaxis]
    found = resized(tf.constant(volume), [8, 8, 8]).numpy()[0, ..., 0]
    # Voxel i of the finer grid lies at (i + 0.5) / 2 - 0.5 of the coarser one, kept inside.
    place = np.clip((np.arange(8) + 0.5) / 2 - 0.5, 0, 3)
    np.testing.assert_allclose(found, 100 * place[:, None, None] + 10 * place[:, None] + place, rtol=1e-5)
