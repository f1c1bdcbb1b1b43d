"""A network is a list of named weights and a pure function of them; no variables, no global state.

TFF wants models as functions of their weights, publishing wants the weights folded into constants, and a coordinator
must not hold several copies of a large model. One definition serves all three: an architecture asks a `Weights` scope
for each weight it needs. Traced once with a recording scope this gives the list of weights (shapes and initializers,
nothing allocated); called with a scope over tensors it computes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import tensorflow as tf

from common.models.operations import NATIVE, Operations

Initializer = Callable[[tuple[int, ...], tf.Tensor], tf.Tensor]
Architecture = Callable[["Weights", tf.Tensor], tf.Tensor]


@dataclass(frozen=True)
class WeightSpec:
    """One weight of a network: its name, its shape (convolution kernels are spatial..., in, out) and how it begins."""

    name: str
    shape: tuple[int, ...]
    initializer: Initializer


class Weights:
    """The scope an architecture draws its weights from, in the order in which it asks.

    Parameters
    ----------
    tensors : the values, in order; or None to record what is asked for.
    operations : how convolutions are computed.
    statistics : the values of what `get_statistics` asks for, in order.
    frozen : None outside training; in training a bool scalar, whether to normalize by the statistics all the same.

    Attributes
    ----------
    specs, statistics : what was asked for so far: what is trained, and what is measured.
    measured : in training, for each pair of statistics what layers `measure` of their batch.
    """

    def __init__(
        self,
        tensors: Sequence[tf.Tensor] | None = None,
        operations: Operations = NATIVE,
        *,
        statistics: Sequence[tf.Tensor] = (),
        frozen: tf.Tensor | None = None,
    ) -> None:
        self._tensors = tensors
        self._statistics = statistics
        self.frozen = frozen
        self.operations = operations
        self.specs: list[WeightSpec] = []
        self.statistics: list[WeightSpec] = []
        self.measured: list[tf.Tensor] = []

    def get(self, name: str, shape: Sequence[int], initializer: Initializer) -> tf.Tensor:
        """The weight `name`; names are unique within a network."""
        spec = WeightSpec(name, tuple(int(size) for size in shape), initializer)
        index = len(self.specs)
        self.specs.append(spec)
        if self._tensors is None:
            return tf.compat.v1.placeholder(tf.float32, spec.shape)
        return self._tensors[index]

    def get_statistics(self, name: str, channels: int) -> tuple[tf.Tensor, tf.Tensor]:
        """Mean and variance over all training images, (channels,) each: `name`/mean and `name`/variance.

        They are not trained but measured and aggregated (`common.learning.batch_statistics`). What else belongs to the
        layer has names that begin with `name`/ too.
        """
        index = len(self.statistics)
        self.statistics += [
            WeightSpec(f"{name}/mean", (channels,), zeros),
            WeightSpec(f"{name}/variance", (channels,), ones),
        ]
        if self._tensors is None:
            return tf.compat.v1.placeholder(tf.float32, [channels]), tf.compat.v1.placeholder(tf.float32, [channels])
        return self._statistics[index], self._statistics[index + 1]

    def measure(self, mean: tf.Tensor, variance: tf.Tensor) -> None:
        """Notes the batch's own mean and variance, once for each `get_statistics` in training."""
        self.measured += [tf.stop_gradient(mean), tf.stop_gradient(variance + tf.square(mean))]

    def features(self, images: tf.Tensor) -> tf.Tensor:
        """The network's deepest features, where its encoder ends: an architecture passes them through here, once.

        They stay as they are; what explains a network's answers (`common.models.explaining`) looks at them.
        """
        return images


class _Marking(Weights):
    """Keeps the deepest features, as a tensor that everything after them is computed from."""

    def features(self, images: tf.Tensor) -> tf.Tensor:
        # An operation of its own, so that no rewriting of the graph computes the rest from what lies before it.
        self.deepest = tf.stop_gradient(images)
        return self.deepest


class Network:
    """An architecture bound to its weights' specifications.

    Parameters
    ----------
    architecture : maps (weights, images) to logits, pure TensorFlow.
    channels : channels of the input images, the last axis.
    dimensions : 2 for images (batch, y, x, channel), 3 for (batch, z, y, x, channel).
    stride : what every spatial size of the images must be a multiple of.

    Attributes
    ----------
    trainable : what is trained.
    statistics : what is measured of training images, by layers that normalize over batches: pairs of mean and variance.
    specs : `trainable`, then `statistics`: the order of a model's weights everywhere.
    """

    def __init__(self, architecture: Architecture, *, channels: int, dimensions: int, stride: int) -> None:
        self._architecture = architecture
        self.stride = stride
        self.channels = channels
        self.dimensions = dimensions
        recorder = Weights()
        with tf.Graph().as_default():
            images = tf.compat.v1.placeholder(tf.float32, [None] * (dimensions + 1) + [channels])
            architecture(recorder, images)
        self.trainable: tuple[WeightSpec, ...] = tuple(recorder.specs)
        self.statistics: tuple[WeightSpec, ...] = tuple(recorder.statistics)
        self.specs: tuple[WeightSpec, ...] = self.trainable + self.statistics
        names = [spec.name for spec in self.specs]
        if len(set(names)) != len(names):
            raise ValueError(f"weights: expected unique names, found {sorted(n for n in names if names.count(n) > 1)}")

    @tf.autograph.experimental.do_not_convert
    def __call__(self, weights: Sequence[tf.Tensor], images: tf.Tensor, operations: Operations = NATIVE) -> tf.Tensor:
        """Logits, float32, of the images' spatial shape with one channel an output of the head."""
        trained = len(self.trainable)
        scope = Weights(weights[:trained], operations, statistics=weights[trained:])
        return self._architecture(scope, tf.convert_to_tensor(images))

    @tf.autograph.experimental.do_not_convert
    def train(
        self, weights: Sequence[tf.Tensor], images: tf.Tensor, frozen: tf.Tensor, operations: Operations = NATIVE
    ) -> tuple[tf.Tensor, tuple[tf.Tensor, ...]]:
        """Logits as layers compute them in training, and what they measured of this batch.

        Parameters
        ----------
        frozen : bool scalar, whether layers normalize by the statistics among `weights` instead of the batch's.

        Returns
        -------
        Logits, and for each pair of `statistics` E[x] and E[x^2] of the batch, in that order.
        """
        trained = len(self.trainable)
        scope = Weights(weights[:trained], operations, statistics=weights[trained:], frozen=frozen)
        logits = self._architecture(scope, tf.convert_to_tensor(images))
        return logits, tuple(scope.measured)

    @tf.autograph.experimental.do_not_convert
    def with_features(
        self, weights: Sequence[tf.Tensor], images: tf.Tensor, operations: Operations = NATIVE
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Logits, and the deepest features (batch, coarser spatial..., channel) that they are computed from.

        The logits' gradient with respect to the features exists; with respect to what lies before them it is None.
        """
        trained = len(self.trainable)
        scope = _Marking(weights[:trained], operations, statistics=weights[trained:])
        logits = self._architecture(scope, tf.convert_to_tensor(images))
        return logits, scope.deepest

    @property
    def normalization(self) -> tuple[int, ...]:
        """The places in `specs` of what belongs to layers that normalize over batches: gains, biases, statistics."""
        layers = {_layer_of(spec) for spec in self.statistics}
        return tuple(place for place, spec in enumerate(self.specs) if _layer_of(spec) in layers)

    def initial_weights(self, seed: int) -> tuple[tf.Tensor, ...]:
        """The weights that training starts from; each depends on the seed and its own name alone."""
        return tuple(spec.initializer(spec.shape, _seed_of(seed, spec.name)) for spec in self.specs)

    @property
    def parameters(self) -> int:
        """The number of trained numbers."""
        return sum(math.prod(spec.shape) for spec in self.trainable)


def _layer_of(spec: WeightSpec) -> str:
    return spec.name.rpartition("/")[0]


def _seed_of(seed: int, name: str) -> tf.Tensor:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    # Not a constant to TensorFlow's optimizer, which would compute the weights while it builds the graph and keep them.
    seed_pair = [int.from_bytes(digest[start : start + 4], "little", signed=True) for start in (0, 4)]
    return tf.raw_ops.PlaceholderWithDefault(input=tf.constant(seed_pair, tf.int32), shape=[2])


def zeros(shape: tuple[int, ...], seed: tf.Tensor) -> tf.Tensor:
    """All 0: biases."""
    del seed
    return tf.zeros(shape)


def ones(shape: tuple[int, ...], seed: tf.Tensor) -> tf.Tensor:
    """All 1: gains."""
    del seed
    return tf.ones(shape)


def constant(value: float) -> Initializer:
    """All of one value."""

    def initializer(shape: tuple[int, ...], seed: tf.Tensor) -> tf.Tensor:
        del seed
        return tf.fill(shape, tf.constant(value, tf.float32))

    return initializer


def he_normal(shape: tuple[int, ...], seed: tf.Tensor, *, scale: float = 1.0) -> tf.Tensor:
    """Normal with variance 2 / fan-in (He et al. 2015, doi:10.1109/ICCV.2015.123); the last axis is the output.

    `scale` is a factor of its standard deviation.
    """
    return _normal(shape, seed, math.prod(shape[:-1]), scale)


def depthwise_he_normal(shape: tuple[int, ...], seed: tf.Tensor) -> tf.Tensor:
    """`he_normal` for a depthwise convolution by a kernel (y, x, channel, 1): each output sees one channel."""
    return _normal(shape, seed, math.prod(shape[:-2]), 1.0)


def transposed_he_normal(shape: tuple[int, ...], seed: tf.Tensor, *, scale: float = 1.0) -> tf.Tensor:
    """`he_normal` for a transposed convolution whose stride equals its kernel: each output sees `in` values.

    Kernels of transposed convolutions are (spatial..., out, in).
    """
    return _normal(shape, seed, shape[-1], scale)


def _normal(shape: tuple[int, ...], seed: tf.Tensor, fan_in: int, scale: float) -> tf.Tensor:
    # One multiplication: TensorFlow's optimizer joins two by constants into one, which rounds to other values.
    return tf.random.stateless_normal(shape, seed) * (math.sqrt(2.0 / fan_in) * scale)
