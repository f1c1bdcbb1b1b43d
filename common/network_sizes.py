"""How many numbers the networks have, without TensorFlow: what a site's review says before anything is loaded.

The U-Nets are counted layer by layer, as `common.models` builds them; the networks with an encoder are not, because
their widths are rounded in many places, and building them is the one place that knows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from common.study import Study

_DILATED_CONVOLUTIONS = 5  # `common.models.dilated_unet.RATES`
_U_SHAPED = ("unet", "residual_unet", "attention_unet", "dilated_unet")


@dataclass(frozen=True)
class NetworkSize:
    """Numbers that are trained, and numbers that layers measure of their batches (`normalization: batch`)."""

    weights: int
    statistics: int

    @property
    def update_bytes(self) -> int:
        """Bytes of the numbers in one update; its header and a few single numbers come on top."""
        return 4 * (self.weights + self.statistics)


def size_without_tensorflow(study: Study) -> NetworkSize | None:
    """The size of the study's network; None where it takes TensorFlow to know it."""
    if study.model.name not in _U_SHAPED:
        return None
    counter = _Counter(study.task.dimensions, study.model.normalization)
    name, filters, depth = study.model.name, study.model.filters, study.model.depth
    channels = study.task.channels
    for level in range(depth):
        width = filters * 2**level
        counter.block(name, channels, width)
        channels = width
        if study.task.dimensions == 3:
            counter.normalized(3, channels, channels)
    deepest = filters * 2**depth
    if name == "dilated_unet":
        counter.normalized(3, channels, deepest)
        for _ in range(_DILATED_CONVOLUTIONS - 1):
            counter.normalized(3, deepest, deepest)
    else:
        counter.block(name, channels, deepest)
    for level in reversed(range(depth)):
        width, below = filters * 2**level, filters * 2 ** (level + 1)
        if name == "attention_unet":
            inner = max(1, width // 2)
            counter.normalized(2, width, inner)
            counter.normalized(1, below, inner)
            counter.plain(2, inner, 1)
        counter.plain(2, below, width)
        counter.block(name, 2 * width, width)
    counter.plain(1, filters, _outputs(study))
    return NetworkSize(counter.weights, counter.statistics)


def size_of(study: Study) -> NetworkSize:
    """The size of the study's network; loads TensorFlow, which takes seconds, where it has to build it."""
    size = size_without_tensorflow(study)
    if size is not None:
        return size
    from common.models import build_network

    network = build_network(study)
    return NetworkSize(network.parameters, sum(math.prod(spec.shape) for spec in network.statistics))


def _outputs(study: Study) -> int:
    """As `common.models.outputs_of`, which cannot be imported without TensorFlow."""
    if study.model.head == "distance":
        return 2
    return len(study.task.classes) if study.model.head == "softmax" else len(study.task.foreground)


class _Counter:
    """Adds up the numbers of layers, as `common.models.layers` asks for them."""

    def __init__(self, dimensions: int, normalization: str) -> None:
        self.weights = 0
        self.statistics = 0
        self._dimensions = dimensions
        self._normalization = normalization

    def plain(self, size: int, inputs: int, outputs: int) -> None:
        """A convolution, transposed or not, with a bias."""
        self.weights += size**self._dimensions * inputs * outputs + outputs

    def normalized(self, size: int, inputs: int, outputs: int) -> None:
        """A convolution with its normalization: a bias, and but for "none" a gain."""
        self.plain(size, inputs, outputs)
        if self._normalization != "none":
            self.weights += outputs
        if self._normalization == "batch":
            self.statistics += 2 * outputs

    def block(self, name: str, inputs: int, outputs: int) -> None:
        """Two convolutions of size 3, and in residual networks a shortcut."""
        self.normalized(3, inputs, outputs)
        self.normalized(3, outputs, outputs)
        if name == "residual_unet":
            self.normalized(1, inputs, outputs)
