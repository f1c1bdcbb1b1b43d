"""Moving the pixels of 2D patches: one pass over the batch, each pixel interpolated once."""

from __future__ import annotations

from functools import cache
from typing import Any

import tensorflow as tf

from common.imaging.augmentation.randomness import per_example


def move_pixels(images: tf.Tensor, labels: tf.Tensor, matrix: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Move image and label of every example by a matrix of its own.

    Parameters
    ----------
    images : float32, shape (b, y, x, channel)
        Interpolated linearly.
    labels : uint8, shape (b, y, x)
        Take the nearest pixel.
    matrix : float32, shape (b, 2, 2)
        The output pixel at an offset (x, y) from the centre comes from `matrix @ (x, y)`; what lies outside is the
        mirror image at the border pixel's outer edge. Matrices of 0, 1 and -1 copy pixels to the bit, because every
        coordinate is then a whole number.

    Returns
    -------
    images, labels
        Of the shapes and types of the arguments.
    """
    if _compiler_is_there():
        images, labels = _compiled_values(images, labels, _compiled_places(labels, matrix))
        return images, labels
    return warp(images, matrix, "BILINEAR"), warp(labels[..., tf.newaxis], matrix, "NEAREST")[..., 0]


def warp(images: tf.Tensor, matrix: tf.Tensor, interpolation: str) -> tf.Tensor:
    """Move the pixels of (b, y, x, channel), as `move_pixels` does, by TensorFlow's kernel.

    `interpolation` is BILINEAR or NEAREST. The kernel takes any number of channels but works out the coordinates anew
    for each.
    """
    size = tf.shape(images)[1:3]
    centre = tf.cast(tf.reverse(size, [0]) - 1, tf.float32)[:, tf.newaxis] / 2.0
    rows = tf.concat([matrix, centre - tf.matmul(matrix, centre)], axis=2)  # (b, 2, 3)
    flat = tf.reshape(rows, (-1, 6))
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=images,
        transforms=tf.concat([flat, tf.zeros_like(flat[:, :2])], axis=1),
        output_shape=size,
        fill_value=0.0,
        interpolation=interpolation,
        fill_mode="REFLECT",
    )


@cache
def _compiler_is_there() -> bool:
    """Whether this TensorFlow can compile for the CPU; not all platforms' packages can."""
    try:
        with tf.init_scope():
            tf.function(lambda values: values + 1.0, jit_compile=True, autograph=False)(tf.zeros(1))
    except tf.errors.OpError:
        return False
    return True


def _places(labels: tf.Tensor, matrix: tf.Tensor) -> Any:
    """Row numbers into the batch's pixels, int32 (b, y, x): the upper left neighbour and the nearest; the steps to the
    next column and row; and how far the place is on the way to them, (b, y, x) each."""
    batch, height, width = tf.unstack(tf.shape(labels))
    down, across = _offsets(height)[:, tf.newaxis], _offsets(width)[tf.newaxis, :]

    def source(row: int, size: tf.Tensor) -> tf.Tensor:
        along_x, along_y = (per_example(matrix[:, row, column], labels) for column in (0, 1))
        return _reflected(along_x * across + along_y * down, size)

    x, y = source(0, width), source(1, height)
    left, top = tf.floor(x), tf.floor(y)
    first = per_example(tf.range(batch) * (height * width), labels)

    def at(row: tf.Tensor, column: tf.Tensor) -> tf.Tensor:
        return first + tf.cast(row, tf.int32) * width + tf.cast(column, tf.int32)

    # At the last column and row the fraction is 0, so that the pixel itself may stand for the next.
    step_x = tf.cast(left < tf.cast(width - 1, tf.float32), tf.int32)
    step_y = tf.cast(top < tf.cast(height - 1, tf.float32), tf.int32) * width
    return at(top, left), at(tf.floor(y + 0.5), tf.floor(x + 0.5)), step_x, step_y, x - left, y - top


def _values(images: tf.Tensor, labels: tf.Tensor, places: Any) -> Any:
    """Images interpolated linearly and labels of the nearest pixel at what `_places` gives."""
    here, nearest, step_x, step_y, right, below = places
    right, below = right[..., tf.newaxis], below[..., tf.newaxis]
    pixels = tf.reshape(images, (-1, tf.shape(images)[-1]))

    def in_row(index: tf.Tensor) -> tf.Tensor:
        return (1.0 - right) * tf.gather(pixels, index) + right * tf.gather(pixels, index + step_x)

    values = (1.0 - below) * in_row(here) + below * in_row(here + step_y)
    return values, tf.gather(tf.reshape(labels, (-1,)), nearest)


def _offsets(size: tf.Tensor) -> tf.Tensor:
    """The pixels' distances from the centre along an axis, (size,)."""
    return tf.cast(tf.range(size), tf.float32) - tf.cast(size - 1, tf.float32) / 2.0


def _reflected(offset: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
    """From distances from the centre to coordinates inside, mirrored at the border as often as it takes."""
    extent = tf.cast(size, tf.float32)
    place = offset + extent / 2.0  # from 0 to the extent, between the outer edges
    place -= tf.floor(place / (2.0 * extent)) * (2.0 * extent)
    place = tf.minimum(place, 2.0 * extent - place)
    return tf.clip_by_value(place - 0.5, 0.0, extent - 1.0)


# Compiled, each of the two parts becomes one loop over the pixels; together they take a third of the kernel's time. In
# one part the compiler would work out the coordinates anew for every value that is read. They are compiled once for
# each shape, which takes a fraction of a second; so the batch is not reduced to the examples that are drawn.
_compiled_places = tf.function(_places, jit_compile=True, autograph=False, reduce_retracing=True)
_compiled_values = tf.function(_values, jit_compile=True, autograph=False, reduce_retracing=True)
