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
    """

    def __init__(self, tensors: Sequence[tf.Tensor] | None = None) -> None:
        self._tensors = tensors
        self.specs: list[WeightSpec] = []

    def get(self, name: str, shape: Sequence[int], initializer: Initializer) -> tf.Tensor:
        """The weight `name`; names are unique within a network."""
        spec = WeightSpec(name, tuple(int(size) for size in shape), initializer)
        index = len(self.specs)
        self.specs.append(spec)
        if self._tensors is None:
            return tf.compat.v1.placeholder(tf.float32, spec.shape)
        return self._tensors[index]


class Network:
    """An architecture bound to its weights' specifications.

    Parameters
    ----------
    architecture : maps (weights, images) to logits, pure TensorFlow.
    channels : channels of the input images, the last axis.
    dimensions : 2 for images (batch, y, x, channel), 3 for (batch, z, y, x, channel).
    """

    def __init__(self, architecture: Architecture, *, channels: int, dimensions: int) -> None:
        self._architecture = architecture
        self.channels = channels
        self.dimensions = dimensions
        recorder = Weights()
        with tf.Graph().as_default():
            images = tf.compat.v1.placeholder(tf.float32, [None] * (dimensions + 1) + [channels])
            architecture(recorder, images)
        self.specs: tuple[WeightSpec, ...] = tuple(recorder.specs)
        names = [spec.name for spec in self.specs]
        if len(set(names)) != len(names):
            raise ValueError(f"weights: expected unique names, found {sorted(n for n in names if names.count(n) > 1)}")

    @tf.autograph.experimental.do_not_convert
    def __call__(self, weights: Sequence[tf.Tensor], images: tf.Tensor) -> tf.Tensor:
        """Logits, float32, of the images' spatial shape with one channel an output of the head."""
        return self._architecture(Weights(weights), tf.convert_to_tensor(images))

    def initial_weights(self, seed: int) -> tuple[tf.Tensor, ...]:
        """The weights that training starts from; each depends on the seed and its own name alone."""
        return tuple(spec.initializer(spec.shape, _seed_of(seed, spec.name)) for spec in self.specs)

    @property
    def parameters(self) -> int:
        """The number of trained numbers."""
        return sum(math.prod(spec.shape) for spec in self.specs)


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


def he_normal(shape: tuple[int, ...], seed: tf.Tensor) -> tf.Tensor:
    """Normal with variance 2 / fan-in (He et al. 2015, doi:10.1109/ICCV.2015.123); the last axis is the output."""
    fan_in = math.prod(shape[:-1])
    return tf.random.stateless_normal(shape, seed) * math.sqrt(2.0 / fan_in)


def transposed_he_normal(shape: tuple[int, ...], seed: tf.Tensor) -> tf.Tensor:
    """`he_normal` for a transposed convolution whose stride equals its kernel: each output sees `in` values.

    Kernels of transposed convolutions are (spatial..., out, in).
    """
    return tf.random.stateless_normal(shape, seed) * math.sqrt(2.0 / shape[-1])
