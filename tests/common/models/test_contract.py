"""One contract for every network that a study can name: builds, trains, starts the same, exports."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from common.errors import StudyError
from common.export.forward import predictor
from common.inference.lite import LiteModel
from common.metrics.losses import dice_cross_entropy
from common.models import build_network, outputs_of
from common.models.layers import LOGIT_SCALE
from common.network_traits import NETWORKS
from common.study import Study
from server.publishing.contents import contents_of
from server.publishing.conversion import LARGEST_DIFFERENCE, convert
from tests.common.networks import weights_as_of_a_trained_network

NETWORKS_AND_ENCODERS = [(name, encoder) for name, traits in NETWORKS.items() for encoder in traits.encoders or (None,)]
EVERY_NETWORK = [
    (name, encoder, dimensions) for name, encoder in NETWORKS_AND_ENCODERS for dimensions in NETWORKS[name].dimensions
]

MakeStudy = Callable[..., Study]


@pytest.fixture
def study_of(tiny_study: Callable[..., Study]) -> MakeStudy:
    """Makes the smallest useful study of a network: 4 filters, depth 2, patches and tiles of 16 or 32 voxels."""

    def make(name: str, encoder: str | None = None, dimensions: int = 2, **model: Any) -> Study:
        study = tiny_study(dimensions=dimensions, head="sigmoid")
        size = 32 if NETWORKS[name].fixed_stride else 16 if dimensions == 2 else 8
        sizes = (size,) * dimensions
        return dataclasses.replace(
            study,
            model=dataclasses.replace(study.model, name=name, encoder=encoder, **model),
            preprocessing=dataclasses.replace(study.preprocessing, patch=sizes),
            publishing=dataclasses.replace(study.publishing, tile=sizes),
        )

    return make


@pytest.mark.parametrize(("name", "encoder", "dimensions"), EVERY_NETWORK)
def test_starts_the_same_every_time_and_exports_to_what_tensorflow_computes(
    tensorflow: None, study_of: MakeStudy, tmp_path: Path, name: str, encoder: str | None, dimensions: int
) -> None:
    study = study_of(name, encoder, dimensions)
    network = build_network(study)
    weights = [weight.numpy() for weight in network.initial_weights(3)]
    for weight, again in zip(weights, build_network(study).initial_weights(3), strict=True):
        np.testing.assert_array_equal(weight, again)
    assert any(
        np.any(weight != other.numpy()) for weight, other in zip(weights, network.initial_weights(4), strict=True)
    )

    (tmp_path / "model.tflite").write_bytes(convert(study, network, weights, "float32", []))
    tile = np.random.default_rng(0).normal(size=(1, *study.publishing.tile, 1)).astype(np.float32)
    expected = predictor(study, network, weights)(tile)
    assert expected.shape == (*tile.shape[:-1], outputs_of(study))
    np.testing.assert_allclose(LiteModel(tmp_path / "model.tflite")(tile), expected, atol=LARGEST_DIFFERENCE, rtol=0)


@pytest.mark.parametrize(("name", "encoder", "dimensions"), EVERY_NETWORK)
@pytest.mark.parametrize(("variant", "share"), [("dynamic_range", 0.05), ("int8", 0.15)])
def test_quantized_files_hold_narrow_weights_and_answer_nearly_as_tensorflow(
    tensorflow: None,
    study_of: MakeStudy,
    tmp_path: Path,
    name: str,
    encoder: str | None,
    dimensions: int,
    variant: str,
    share: float,
) -> None:
    study = study_of(name, encoder, dimensions)
    network = build_network(study)
    weights = weights_as_of_a_trained_network(network)
    random = np.random.default_rng(0)
    tiles = [random.normal(size=(*study.publishing.tile, 1)).astype(np.float32) for _ in range(4)]
    content = convert(study, network, weights, variant, tiles)
    (tmp_path / "model.tflite").write_bytes(content)

    expected = predictor(study, network, weights)(tiles[0][np.newaxis])
    assert expected.std() > 0.05
    found = LiteModel(tmp_path / "model.tflite")(tiles[0][np.newaxis])
    assert np.abs(found - expected).mean() < share * expected.std()
    contents = contents_of(content)
    assert not contents.volumetric
    if variant == "int8":
        assert contents.narrow_share == 1.0
        assert not contents.float_operations
    else:
        assert contents.narrow_share > 0.5  # the converter leaves the smallest kernels as they are


@pytest.mark.parametrize(("name", "encoder", "dimensions"), EVERY_NETWORK)
@pytest.mark.parametrize("normalization", ["group", "batch"])  # the others are plain convolutions by then
def test_every_normalization_exports_to_what_tensorflow_computes(
    tensorflow: None,
    study_of: MakeStudy,
    tmp_path: Path,
    name: str,
    encoder: str | None,
    dimensions: int,
    normalization: str,
) -> None:
    study = study_of(name, encoder, dimensions, normalization=normalization)
    network = build_network(study)
    weights = weights_as_of_a_trained_network(network)
    content = convert(study, network, weights, "float32", [])
    assert contents_of(content).weight_bytes["FLOAT32"] < 4 * 1.05 * network.parameters  # nothing for every voxel
    (tmp_path / "model.tflite").write_bytes(content)
    tile = np.random.default_rng(0).normal(size=(1, *study.publishing.tile, 1)).astype(np.float32)
    expected = predictor(study, network, weights)(tile)
    np.testing.assert_allclose(LiteModel(tmp_path / "model.tflite")(tile), expected, atol=LARGEST_DIFFERENCE, rtol=0)


@pytest.mark.parametrize(("name", "encoder", "dimensions"), EVERY_NETWORK)
@pytest.mark.parametrize("normalization", ["weight", "group", "batch", "none"])
def test_a_step_along_the_gradient_lowers_the_loss_and_reaches_every_weight(
    tensorflow: None, study_of: MakeStudy, name: str, encoder: str | None, dimensions: int, normalization: str
) -> None:
    if dimensions == 3 and normalization in ("group", "none") and name != "unet":
        pytest.skip("the layers are those of the U-Net, which is trained so in 3D")
    study = study_of(name, encoder, dimensions, normalization=normalization)
    network = build_network(study)
    rng = np.random.default_rng(0)
    # One and a half patches along an axis: any multiple of the stride is allowed.
    size = [study.preprocessing.patch[0] + network.stride, *study.preprocessing.patch[1:]]
    labels = rng.integers(2, size=(2, *size)).astype(np.uint8)
    images = (labels[..., np.newaxis] + 0.1 * rng.normal(size=(*labels.shape, 1))).astype(np.float32)
    weights = list(network.initial_weights(1))
    losses = []
    for _ in range(2):
        trained = weights[: len(network.trainable)]
        with tf.GradientTape() as tape:
            tape.watch(trained)
            logits, measured = network.train(weights, images, tf.constant(False))
            loss = dice_cross_entropy(logits, labels, head="sigmoid")
        gradients = tape.gradient(loss, trained)
        missing = [spec.name for spec, found in zip(network.trainable, gradients, strict=True) if found is None]
        assert not missing
        assert len(measured) == len(network.statistics)
        # So long a step that the loss would fall by a thousandth if it were linear.
        rate = 0.001 * loss / tf.square(tf.linalg.global_norm(gradients))
        weights[: len(trained)] = [weight - rate * slope for weight, slope in zip(trained, gradients, strict=True)]
        losses.append(float(loss))
    assert losses[1] < losses[0]


@pytest.mark.parametrize(("name", "encoder", "dimensions"), EVERY_NETWORK)
def test_answers_are_undecided_at_the_start(
    tensorflow: None, study_of: MakeStudy, name: str, encoder: str | None, dimensions: int
) -> None:
    study = study_of(name, encoder, dimensions)
    network = build_network(study)
    images = tf.random.stateless_normal((2, *study.preprocessing.patch, 1), (1, 2))
    assert float(tf.math.reduce_std(network(network.initial_weights(1), images))) < 3 * LOGIT_SCALE


@pytest.mark.parametrize("name", [name for name, traits in NETWORKS.items() if 3 not in traits.dimensions])
def test_a_network_for_images_refuses_volumes(study_of: MakeStudy, name: str) -> None:
    study = study_of(name, (NETWORKS[name].encoders or (None,))[0])
    study = dataclasses.replace(study, task=dataclasses.replace(study.task, dimensions=3))
    with pytest.raises(StudyError, match=rf"^model\.name: {name} is not for task\.dimensions 3; choose one of unet"):
        build_network(study)


def test_a_network_for_small_objects_refuses_many_halvings(study_of: MakeStudy) -> None:
    with pytest.raises(StudyError, match=r"^model\.depth: expected 1 to 2 with model\.name dilated_unet, found 3"):
        build_network(study_of("dilated_unet", depth=3))


@pytest.mark.parametrize(("name", "encoder"), NETWORKS_AND_ENCODERS)
def test_the_stride_is_what_sizes_must_be_multiples_of(
    tensorflow: None, study_of: MakeStudy, name: str, encoder: str | None
) -> None:
    """An image of half the stride does not come out in its own size."""
    network = build_network(study_of(name, encoder))
    assert network.stride == NETWORKS[name].stride(2)
    weights = network.initial_weights(1)
    image = tf.zeros([1, network.stride, network.stride // 2, 1])
    try:
        shape = network(weights, image).shape
    except tf.errors.OpError:
        return
    assert shape[1:3] != image.shape[1:3]
