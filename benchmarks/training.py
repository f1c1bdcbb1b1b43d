"""Does training through the plan cost more than plain Keras?

Compared in the same process, alternating: images per second of the plan's `work` (what a site does in a round) and of
`keras.Model.fit` of the same U-Net, built of Keras layers. Both get the same data (tensors made beforehand, through
`tf.data`), the same loss (cross-entropy and Dice), Adam at 1e-3, the same batches. Before anything is timed the two
networks are given the same weights, and must answer the same to the same images. Without normalization the Keras model
is made of Conv2D, ReLU, MaxPooling2D and Conv2DTranspose (in 3D of Conv3D, with stride 2 in place of the pooling, and
Conv3DTranspose); with standardized weights its convolutions are a small layer of their own that computes the same.

How to read it: medians over the repetitions; "ratio" is the plan's images per second divided by Keras's, so 1 means
that the plan costs nothing and more than 1 that it is faster. The first call of each is not timed: it compiles the
graph.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks._report import median, report
from benchmarks._study import benchmark_study
from common.learning.runtime import configure_tensorflow
from common.wire.tensors import Array


@dataclass(frozen=True)
class Case:
    """What is trained: the sizes of a U-Net and of its batches."""

    patch: tuple[int, ...]
    channels: int
    batch: int
    depth: int
    filters: int
    normalization: str

    def __str__(self) -> str:
        sizes = "x".join(map(str, (*self.patch, self.channels)))
        return f"{len(self.patch)}D {self.normalization}, {self.batch} of {sizes}"


_SHOWN = {
    "case": "case",
    "filters": "filters",
    "depth": "depth",
    "parameters": "weights",
    "work_images": "plan images/s",
    "fit_images": "Keras images/s",
    "ratio": "ratio",
}


def main() -> None:
    """Measures the cases asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=("2d", "3d"),
        default=["2d", "3d"],
        help="2d: 8 of 128x128x3, depth 4; 3d: 2 of 40x56x40x1, depth 3 (default: both)",
    )
    parser.add_argument(
        "--normalizations", nargs="+", choices=("none", "weight"), default=["none", "weight"], help="(default: both)"
    )
    parser.add_argument("--filters", type=int, default=16, help="channels at full resolution (default: 16)")
    parser.add_argument("--batches", type=int, default=20, help="batches of one repetition (default: 20)")
    parser.add_argument("--repetitions", type=int, default=5, help="repetitions of each (default: 5)")
    parser.add_argument("--threads", type=int, default=2, help="TensorFlow's threads, of both (default: 2)")
    options = parser.parse_args()
    if min(options.batches, options.repetitions, options.threads, options.filters) < 1:
        parser.error("expected positive numbers")
    configure_tensorflow(options.threads)
    cases = []
    for normalization in options.normalizations:
        if "2d" in options.cases:
            cases.append(Case((128, 128), 3, 8, 4, options.filters, normalization))
        if "3d" in options.cases:
            cases.append(Case((40, 56, 40), 1, 2, 3, options.filters, normalization))
    rows = [measure(case, options.batches, options.repetitions, options.threads) for case in cases]
    report("training", rows, _SHOWN)


def measure(case: Case, batches: int, repetitions: int, threads: int) -> dict[str, Any]:
    """One row: the plan and Keras in turns on the same batches."""
    import tensorflow as tf

    from common.learning.plan import build_plan
    from common.metrics.losses import dice_cross_entropy
    from common.models import build_network

    study = benchmark_study(
        filters=case.filters,
        depth=case.depth,
        normalization=case.normalization,
        patch=case.patch,
        channels=case.channels,
        batch_size=case.batch,
        threads=threads,
    )
    plan = build_plan(study).train
    broadcast = plan.prepare(*plan.initialize())
    network = build_network(study)
    model = keras_unet(case)  # after the plan: compiling one makes Keras models that were built before it unusable
    initial = list(network.initial_weights(study.seed))
    model.set_weights([np.asarray(weight) for weight in initial])
    model.compile(
        tf.keras.optimizers.Adam(1e-3), lambda labels, logits: dice_cross_entropy(logits, labels, head=study.model.head)
    )
    images, labels = _data(case, batches)
    _check_same(np.asarray(network(initial, tf.constant(images[0]))), np.asarray(model(images[0])))
    dataset = tf.data.Dataset.from_tensor_slices((images, labels)).prefetch(2)

    seconds: dict[str, list[float]] = {"work": [], "fit": []}
    for _ in range(repetitions + 1):
        started = time.perf_counter()
        plan.work(dataset, broadcast)
        seconds["work"].append(time.perf_counter() - started)
        started = time.perf_counter()
        model.fit(dataset, verbose=0)
        seconds["fit"].append(time.perf_counter() - started)
    work, fit = median(seconds["work"][1:]), median(seconds["fit"][1:])
    return {
        "case": str(case),
        "filters": case.filters,
        "depth": case.depth,
        "parameters": network.parameters,
        "threads": threads,
        "work_images": round(batches * case.batch / work, 3),
        "fit_images": round(batches * case.batch / fit, 3),
        "ratio": round(fit / work, 3),
    }


def _data(case: Case, batches: int) -> tuple[Array, Array]:
    """Images float32 (batches, batch, *patch, channels) of noise around what the labels, uint8, mark."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, (batches, case.batch, *case.patch), np.uint8)
    noise = random.standard_normal((*labels.shape, case.channels), np.float32)
    return noise + labels[..., np.newaxis], labels


def _check_same(plan: Array, keras: Array) -> None:
    difference = float(np.abs(plan - keras).max() / np.abs(plan).max())
    if difference > 1e-4:
        raise RuntimeError(f"the two networks differ by {difference:.1e}: the Keras model is not the plan's network")


def keras_unet(case: Case) -> Any:
    """The network of `common.models.unet` as a functional Keras model; its weights come in the same order."""
    import tensorflow as tf

    from common.models.layers import standardized

    layers = tf.keras.layers
    dimensions = len(case.patch)
    convolution = {2: layers.Conv2D, 3: layers.Conv3D}[dimensions]
    transposed = {2: layers.Conv2DTranspose, 3: layers.Conv3DTranspose}[dimensions]

    class StandardizedConvolution(layers.Layer):  # type: ignore[misc,name-defined]
        """Convolution with a standardized kernel, then ReLU."""

        def __init__(self, filters: int, stride: int) -> None:
            super().__init__()
            self._filters = filters
            self._stride = stride

        def build(self, shape: Sequence[int]) -> None:
            self.kernel = self.add_weight("kernel", [3] * dimensions + [shape[-1], self._filters])
            self.gain = self.add_weight("gain", [self._filters], initializer="ones")
            self.bias = self.add_weight("bias", [self._filters], initializer="zeros")

        def call(self, images: tf.Tensor) -> tf.Tensor:
            kernel = standardized(self.kernel, self.gain)
            result = tf.nn.convolution(images, kernel, strides=self._stride, padding="SAME")
            return tf.nn.relu(tf.nn.bias_add(result, self.bias))

    def convolve(images: Any, filters: int, stride: int = 1) -> Any:
        if case.normalization == "weight":
            return StandardizedConvolution(filters, stride)(images)
        return convolution(filters, 3, strides=stride, padding="same", activation="relu")(images)

    def block(images: Any, filters: int) -> Any:
        return convolve(convolve(images, filters), filters)

    images = inputs = layers.Input((*case.patch, case.channels))
    skips = []
    for level in range(case.depth):
        images = block(images, case.filters * 2**level)
        skips.append(images)
        images = layers.MaxPooling2D()(images) if dimensions == 2 else convolve(images, images.shape[-1], stride=2)
    images = block(images, case.filters * 2**case.depth)
    for level in reversed(range(case.depth)):
        filters = case.filters * 2**level
        images = layers.Concatenate()([skips[level], transposed(filters, 2, strides=2, padding="same")(images)])
        images = block(images, filters)
    return tf.keras.Model(inputs, convolution(2, 1)(images))


if __name__ == "__main__":
    main()
