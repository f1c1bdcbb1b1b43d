"""Grad-CAM of a segmentation: where in its deepest features a network saw what made it predict a class.

Selvaraju et al. 2017 (doi:10.1007/s11263-019-01228-7) weigh each channel of the features by the mean gradient of a
class's score with respect to it and keep what is positive of their sum. The score is that of Vinogradova et al. 2020
(Seg-Grad-CAM, arXiv:2002.11434): the sum of the class's logits over the region that is predicted to be of it.

The gradients are part of the graph, so that a file holds them, and LiteRT has no operations for those of activations,
slices and others. They are written here with what it has: a convolution's gradient is again a convolution.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import tensorflow as tf

from common.inference.lite import Head
from common.models.network import Network
from common.models.operations import NATIVE, Operations, dimensions_of
from common.models.stacked import StackedOperations

Gradients = Literal["exportable", "tensorflow"]


@tf.autograph.experimental.do_not_convert
def class_activation_maps(
    network: Network,
    weights: Sequence[tf.Tensor],
    images: tf.Tensor,
    head: Head,
    operations: Operations = NATIVE,
    gradients: Gradients = "exportable",
) -> tuple[tf.Tensor, tf.Tensor]:
    """Logits of one image, and the Grad-CAM map of each foreground class; called while a graph is traced.

    Parameters
    ----------
    images : (1, spatial..., channel), of known size.
    head : of the study, which says what is predicted: see `common.inference.lite.class_indices`.
    gradients : "exportable" ones are made of operations that LiteRT has; "tensorflow" are what those must be equal to.

    Returns
    -------
    logits : (1, spatial..., outputs)
    maps : (1, coarser spatial..., foreground classes), at the resolution of the deepest features, from 0 up. The unit
        is that of logits, summed over the region; 0 everywhere for a class that is not predicted.
    """
    graph = tf.compat.v1.get_default_graph()
    with graph.gradient_override_map(_EXPORTABLE if gradients == "exportable" else {}):
        logits, features = network.with_features(weights, images, operations)
        if isinstance(operations, StackedOperations):
            logits = operations.settled(logits)
        maps = [_map(logits, region, features) for region in _regions(logits, head)]
    return logits, tf.concat(maps, axis=-1)


def resized(maps: tf.Tensor, size: Sequence[int]) -> tf.Tensor:
    """Maps (1, spatial..., channel) of known size brought to another one, linearly."""
    if dimensions_of(maps) == 2:
        return tf.image.resize(maps, size)
    channels = maps.shape[-1]
    planes = tf.image.resize(maps[0], size[1:])
    columns = tf.reshape(planes, [1, maps.shape[1], size[1] * size[2], channels])
    return tf.reshape(tf.image.resize(columns, [size[0], size[1] * size[2]]), [1, *size, channels])


def _regions(logits: tf.Tensor, head: Head) -> list[tf.Tensor]:
    """For each foreground class 1 where it is predicted, in its own output, and 0 elsewhere; shaped as the logits."""
    outputs = logits.shape[-1]
    if head == "distance":
        predicted = [logits[..., 0] > 0]
    else:
        # Of equals the first, as argmax has it, which is not asked for: it would be integers.
        best = tf.reduce_max(logits, axis=-1)
        wins: list[tf.Tensor] = []
        for output in range(outputs):
            others = [logits[..., other] < best for other in range(output)]
            wins.append(functools.reduce(tf.logical_and, others, logits[..., output] >= best))
        predicted = wins[1:] if head == "softmax" else [tf.logical_and(win, best > 0) for win in wins]
    first = 1 if head == "softmax" else 0
    return [
        tf.cast(where, tf.float32)[..., tf.newaxis] * tf.one_hot(first + index, outputs)
        for index, where in enumerate(predicted)
    ]


def _map(logits: tf.Tensor, region: tf.Tensor, features: tf.Tensor) -> tf.Tensor:
    (gradient,) = tf.gradients(logits, features, grad_ys=tf.stop_gradient(region))
    importance = tf.reduce_mean(gradient, axis=list(range(1, gradient.shape.rank - 1)), keepdims=True)
    return tf.nn.relu(tf.reduce_sum(importance * features, axis=-1, keepdims=True))


# Gradients with respect to an operation's images, in operations that LiteRT has; those of the others it has already. -


@tf.RegisterGradient("WardroundRelu")
def _of_relu(operation: tf.Operation, gradient: tf.Tensor) -> tf.Tensor:
    return gradient * tf.cast(operation.outputs[0] > 0, tf.float32)


@tf.RegisterGradient("WardroundRelu6")
def _of_relu6(operation: tf.Operation, gradient: tf.Tensor) -> tf.Tensor:
    passes = tf.logical_and(operation.outputs[0] > 0, operation.outputs[0] < 6)
    return gradient * tf.cast(passes, tf.float32)


@tf.RegisterGradient("WardroundSigmoid")
def _of_sigmoid(operation: tf.Operation, gradient: tf.Tensor) -> tf.Tensor:
    share = operation.outputs[0]
    return gradient * share * (1.0 - share)


@tf.RegisterGradient("WardroundRsqrt")
def _of_rsqrt(operation: tf.Operation, gradient: tf.Tensor) -> tf.Tensor:
    inverse = operation.outputs[0]
    return gradient * (-0.5 * inverse * inverse * inverse)


@tf.RegisterGradient("WardroundConv")
def _of_convolution(operation: tf.Operation, gradient: tf.Tensor) -> tuple[tf.Tensor, None]:
    """Stride 1 and zero padding alike on both sides: the kernel mirrored, its inputs and outputs exchanged."""
    kernel = operation.inputs[1]
    spatial = list(range(kernel.shape.rank - 2))
    _require(operation, set(operation.get_attr("strides")) == {1} and operation.get_attr("padding") == b"SAME")
    _require(operation, all(kernel.shape[axis] % 2 for axis in spatial))
    mirrored = tf.reverse(kernel, spatial) if any(kernel.shape[axis] > 1 for axis in spatial) else kernel
    exchanged = tf.transpose(mirrored, [*spatial, len(spatial) + 1, len(spatial)])
    dilations = operation.get_attr("dilations")[1:-1]
    result = tf.nn.convolution(gradient, exchanged, padding="SAME", dilations=dilations)
    return tf.ensure_shape(result, operation.inputs[0].shape), None


@tf.RegisterGradient("WardroundDepthwise")
def _of_depthwise(operation: tf.Operation, gradient: tf.Tensor) -> tuple[tf.Tensor, None]:
    kernel = operation.inputs[1]
    _require(operation, kernel.shape[-1] == 1 and set(operation.get_attr("strides")) == {1})
    _require(operation, all(size % 2 for size in kernel.shape[:2]))
    padding = operation.get_attr("padding").decode()
    mirrored = tf.reverse(kernel, [0, 1])
    if padding == "VALID":  # between space-to-batch and back, as dilated ones are written
        gradient = tf.pad(gradient, [[0, 0], *[[size - 1] * 2 for size in kernel.shape[:2]], [0, 0]])
    return tf.nn.depthwise_conv2d(gradient, mirrored, [1, 1, 1, 1], padding), None


@tf.RegisterGradient("WardroundTransposed")
def _of_transposed(operation: tf.Operation, gradient: tf.Tensor) -> tuple[None, None, tf.Tensor]:
    """Of a transposed convolution whose stride is its kernel's size: a convolution of that stride."""
    strides = operation.get_attr("strides")[1:-1]
    _require(operation, strides == operation.inputs[1].shape[:-2].as_list())
    return None, None, tf.nn.convolution(gradient, operation.inputs[1], strides=strides, padding="SAME")


@tf.RegisterGradient("WardroundSlice")
def _of_slice(operation: tf.Operation, gradient: tf.Tensor) -> tuple[Any, ...]:
    """Of a slice in steps of 1 without axes added: zeros around it."""
    shape = operation.inputs[0].shape
    begin, end, steps = (tf.get_static_value(tensor) for tensor in operation.inputs[1:])
    masks = {name: operation.get_attr(f"{name}_mask") for name in ("begin", "end", "ellipsis", "new_axis")}
    removed = operation.get_attr("shrink_axis_mask")
    _require(operation, begin is not None and end is not None and (steps == 1).all())
    _require(operation, not masks["ellipsis"] and not masks["new_axis"] and shape.is_fully_defined())
    paddings, kept = [], []
    for axis, size in enumerate(shape):
        first, last = 0, size
        if axis < len(begin):
            single = removed >> axis & 1
            if single or not masks["begin"] >> axis & 1:
                first = min(begin[axis] + (size if begin[axis] < 0 else 0), size)
            if single:
                last = first + 1
            elif not masks["end"] >> axis & 1:
                last = min(end[axis] + (size if end[axis] < 0 else 0), size)
        paddings.append([int(first), int(size - last)])
        kept.append(int(last - first))
    return tf.pad(tf.reshape(gradient, kept), paddings), None, None, None


def _require(operation: tf.Operation, holds: bool) -> None:
    if not holds:
        raise ValueError(f"{operation.name} ({operation.type}): its gradient cannot be exported")


_EXPORTABLE = {
    "Relu": "WardroundRelu",
    "Relu6": "WardroundRelu6",
    "Sigmoid": "WardroundSigmoid",
    "Rsqrt": "WardroundRsqrt",
    "Conv2D": "WardroundConv",
    "Conv3D": "WardroundConv",
    "DepthwiseConv2dNative": "WardroundDepthwise",
    "Conv2DBackpropInput": "WardroundTransposed",
    "Conv3DBackpropInputV2": "WardroundTransposed",
    "StridedSlice": "WardroundSlice",
}
