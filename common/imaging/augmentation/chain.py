"""The chain of augmentations over a batch: one example after the other, compiled into one function.

One example at a time, because its values then stay in the processor's cache from one change to the next, and because
a condition skips what is not drawn. Compiled, because TensorFlow's operations one by one cost as much in handling as
in arithmetic, and wake threads that training needs. It is compiled once for each shape of a batch, which takes a second
or two.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import tensorflow as tf

Change = Callable[[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]
"""From the image, the label, the numbers and the control points of an example to its new image and label."""


def for_each(change: Change, compiled: bool) -> Any:
    """`change` for every example of a batch.

    A function of images (b, spatial..., channel), labels (b, spatial...), numbers and points (b, ...).
    """

    def vary(images: tf.Tensor, labels: tf.Tensor, numbers: tf.Tensor, points: tf.Tensor) -> Any:
        count = tf.shape(images)[0]
        results = [
            tf.TensorArray(values.dtype, size=count, element_shape=values.shape[1:]) for values in (images, labels)
        ]

        def one(index: tf.Tensor, *results: tf.TensorArray) -> Any:
            example = [tf.gather(values, index) for values in (images, labels, numbers, points)]
            return index + 1, *(
                result.write(index, values) for result, values in zip(results, change(*example), strict=True)
            )

        _, *results = tf.while_loop(lambda index, *_: index < count, one, (0, *results), parallel_iterations=1)
        return tuple(
            tf.reshape(result.stack(), tf.shape(values))
            for result, values in zip(results, (images, labels), strict=True)
        )

    return tf.function(vary, jit_compile=compiled or None, autograph=False)


@cache
def compiler_is_there() -> bool:
    """Whether this TensorFlow can compile for the CPU; not all platforms' packages can."""
    try:
        with tf.init_scope():
            tf.function(lambda values: values + 1.0, jit_compile=True, autograph=False)(tf.zeros(1))
    except tf.errors.OpError:
        return False
    return True
