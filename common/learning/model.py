"""The study's network as `tff.learning.models.FunctionalModel`s: one that trains on patches, one that is evaluated.

Batches are pairs (images, labels): images float32 (batch, spatial..., channel), labels uint8 (batch, spatial...) of
class indices (with the head "distance" encoded distances), where `IGNORED` marks voxels that are padding.
"""

from __future__ import annotations

import collections
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from common.imaging.patches import IGNORED
from common.learning.batch_statistics import adapting_rounds
from common.learning.client_work import Normalization, Tensors
from common.metrics.losses import dice_cross_entropy, predicted_classes, true_classes
from common.models.network import Network
from common.models.operations import NATIVE, Operations
from common.study import Study


def training_model(
    study: Study, network: Network, operations: Operations = NATIVE
) -> tff.learning.models.FunctionalModel:
    """The model on patches of the study's size; its metrics are the mean loss of a batch and the patches seen.

    Where the study is private, no noise covers them, and its metrics are the number of batches alone.

    Its non-trainable weights are the network's statistics. Where it has some, `training_normalization` says how it
    trains; its own `predict_on_batch` normalizes by them.
    """

    @tf.function(autograph=False)
    def initialize() -> collections.OrderedDict[str, tf.Tensor]:
        return collections.OrderedDict(
            loss_sum=tf.constant(0.0), batches=tf.constant(0.0), patches=tf.constant(0, tf.int64)
        )

    @tf.function(autograph=False)
    def update(state: Any, labels: tf.Tensor, batch_output: Any, sample_weight: Any = None) -> Any:
        del labels, sample_weight
        return collections.OrderedDict(
            loss_sum=state["loss_sum"] + batch_output.loss,
            batches=state["batches"] + 1.0,
            patches=state["patches"] + tf.cast(batch_output.num_examples, tf.int64),
        )

    @tf.function(autograph=False)
    def finalize(state: Any) -> collections.OrderedDict[str, tf.Tensor]:
        return collections.OrderedDict(
            loss=tf.math.divide_no_nan(state["loss_sum"], state["batches"]), patches=state["patches"]
        )

    metrics = (initialize, update, finalize) if study.privacy.unit == "none" else _counting_metrics()
    return _functional_model(study, network, operations, study.preprocessing.patch, metrics)


def _counting_metrics() -> tuple[Any, Any, Any]:
    @tf.function(autograph=False)
    def initialize() -> collections.OrderedDict[str, tf.Tensor]:
        return collections.OrderedDict(steps=tf.constant(0, tf.int64))

    @tf.function(autograph=False)
    def update(state: Any, labels: tf.Tensor, batch_output: Any, sample_weight: Any = None) -> Any:
        del labels, batch_output, sample_weight
        return collections.OrderedDict(steps=state["steps"] + 1)

    @tf.function(autograph=False)
    def finalize(state: Any) -> collections.OrderedDict[str, tf.Tensor]:
        return collections.OrderedDict(steps=state["steps"])

    return initialize, update, finalize


def training_normalization(study: Study, network: Network, operations: Operations = NATIVE) -> Normalization | None:
    """How the network's batch statistics are measured and frozen in training; None for one without any."""
    if not network.statistics:
        return None

    def train(weights: Tensors, statistics: Tensors, images: tf.Tensor, frozen: tf.Tensor) -> tuple[tf.Tensor, Tensors]:
        logits, moments = network.train([*weights, *statistics], images, frozen, operations)
        return logits, moments

    return Normalization(train, adapting_rounds(study.training.rounds))


def evaluation_model(study: Study, network: Network) -> tff.learning.models.FunctionalModel:
    """The model on images of any size; its metrics are true and false positives and false negatives of each class."""
    classes = len(study.task.foreground)

    @tf.function(autograph=False)
    def initialize() -> collections.OrderedDict[str, tf.Tensor]:
        return collections.OrderedDict(
            (name, tf.zeros([classes], tf.int64)) for name in ("true_positive", "false_positive", "false_negative")
        )

    @tf.function(autograph=False)
    def update(state: Any, labels: tf.Tensor, batch_output: Any, sample_weight: Any = None) -> Any:
        del sample_weight
        inside = tf.not_equal(labels, IGNORED)
        predicted = predicted_classes(batch_output.predictions, head=study.model.head)
        found = tf.one_hot(predicted - 1, classes, on_value=True, off_value=False) & inside[..., tf.newaxis]
        truth = tf.one_hot(true_classes(labels, head=study.model.head) - 1, classes, on_value=True, off_value=False)
        axes = list(range(labels.shape.rank))

        def count(mask: tf.Tensor) -> tf.Tensor:
            return tf.reduce_sum(tf.cast(mask, tf.int64), axes)

        return collections.OrderedDict(
            true_positive=state["true_positive"] + count(found & truth),
            false_positive=state["false_positive"] + count(found & ~truth),
            false_negative=state["false_negative"] + count(~found & truth & inside[..., tf.newaxis]),
        )

    @tf.function(autograph=False)
    def finalize(state: Any) -> Any:
        return site_dice(state)

    spatial = [None] * study.task.dimensions
    return _functional_model(study, network, NATIVE, spatial, (initialize, update, finalize))


def site_dice(counts: Any) -> collections.OrderedDict[str, tf.Tensor]:
    """Dice of each foreground class over one site's voxels, float32 (classes,), and whether it occurred (0 or 1)."""
    true_positive = tf.cast(counts["true_positive"], tf.float32)
    volume = 2.0 * true_positive + tf.cast(counts["false_positive"] + counts["false_negative"], tf.float32)
    return collections.OrderedDict(
        dice=tf.math.divide_no_nan(2.0 * true_positive, volume), occurred=tf.cast(volume > 0, tf.float32)
    )


def _functional_model(
    study: Study, network: Network, operations: Operations, spatial: Any, metrics: tuple[Any, Any, Any]
) -> tff.learning.models.FunctionalModel:
    @tf.function(autograph=False)
    def predict(weights: Any, images: tf.Tensor, training: bool) -> tf.Tensor:
        del training  # What differs in training is in `training_normalization`.
        return network([*weights[0], *weights[1]], images, operations)

    @tf.autograph.experimental.do_not_convert  # there is nothing to convert, and reading it takes a second
    def loss(output: tf.Tensor, label: tf.Tensor, sample_weight: Any = None) -> tf.Tensor:
        del sample_weight
        return dice_cross_entropy(output, label, head=study.model.head)

    # TFF reads shapes from these values and nothing else here: zeros without memory, whatever the model's size.
    # Training starts from `Network.initial_weights`, made inside the graph.
    shapes_only = tuple(
        tuple(np.broadcast_to(np.float32(0), spec.shape) for spec in specs)
        for specs in (network.trainable, network.statistics)
    )
    return tff.learning.models.FunctionalModel(
        initial_weights=shapes_only,
        predict_on_batch_fn=predict,
        loss_fn=loss,
        metrics_fns=metrics,
        input_spec=(
            tf.TensorSpec([None, *spatial, study.task.channels], tf.float32),
            tf.TensorSpec([None, *spatial], tf.uint8),
        ),
    )
