"""Flips, rotation and scaling. In a plane they are one 2x2 matrix, so that a pixel is interpolated once."""

from __future__ import annotations

import math

import tensorflow as tf

from common.imaging.augmentation.plane import move_pixels, warp
from common.imaging.augmentation.randomness import between, draws, per_example

NAMES = frozenset({"flip", "rotate", "scale"})


def move(
    images: tf.Tensor, labels: tf.Tensor, seeds: dict[str, tf.Tensor], through_plane: bool
) -> tuple[tf.Tensor, tf.Tensor]:
    """Flip, rotate and scale each example, those of the three that `seeds` has; shapes and types as in `augment`."""
    flat = images.shape.rank == 4
    angle, axis = tf.zeros(tf.shape(images)[:1]), tf.zeros(tf.shape(images)[:1])
    if "rotate" in seeds:
        chance, turn, about = draws(seeds["rotate"], images, 3)
        limit = math.pi if flat else math.radians(15.0)
        angle = tf.where(chance < 0.5, between(turn, -limit, limit), 0.0)
        if through_plane and not flat:
            axis = tf.floor(about * 3.0)  # 0, 1, 2: about z, y, x
    factor = tf.ones_like(angle)
    if "scale" in seeds:
        chance, size = draws(seeds["scale"], images, 2)
        # Drawn in logarithms: a factor and its inverse are equally likely.
        factor = tf.where(chance < 0.3, tf.exp(between(size, -math.log(1.25), math.log(1.25))), 1.0)
    in_plane = _rotation(tf.where(axis == 0.0, angle, 0.0), factor)
    if "flip" in seeds:
        mirror_z, mirror_y, mirror_x, transpose = (draw < 0.5 for draw in draws(seeds["flip"], images, 4))
        is_square = flat and images.shape[1] is not None and images.shape[1] == images.shape[2]
        in_plane = tf.matmul(_reflection(mirror_x, mirror_y, transpose if is_square else None), in_plane)
        if not flat:
            images = tf.where(per_example(mirror_z, images), tf.reverse(images, [1]), images)
            labels = tf.where(per_example(mirror_z, labels), tf.reverse(labels, [1]), labels)
    if flat:
        return move_pixels(images, labels, in_plane)
    labels = labels[..., tf.newaxis]
    images, labels = _warp_volumes(images, labels, in_plane, (2, 3))
    if "rotate" in seeds and through_plane:
        for about, plane in ((1.0, (1, 3)), (2.0, (1, 2))):
            chosen = tf.where((axis == about) & (angle != 0.0))
            matrix = _rotation(tf.gather_nd(angle, chosen), tf.gather_nd(tf.ones_like(angle), chosen))
            some = _warp_volumes(tf.gather_nd(images, chosen), tf.gather_nd(labels, chosen), matrix, plane)
            images, labels = (
                tf.tensor_scatter_nd_update(all_, chosen, part)
                for all_, part in zip((images, labels), some, strict=True)
            )
    return images, labels[..., 0]


def _rotation(angle: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Matrices (b, 2, 2) that turn by an angle in radians and magnify by a factor, both (b,)."""
    cos, sin = tf.cos(angle) / factor, tf.sin(angle) / factor
    return tf.reshape(tf.stack([cos, -sin, sin, cos], axis=1), (-1, 2, 2))


def _reflection(mirror_x: tf.Tensor, mirror_y: tf.Tensor, transpose: tf.Tensor | None) -> tf.Tensor:
    """Matrices (b, 2, 2) of 0, 1 and -1, from booleans (b,)."""
    x, y = tf.where(mirror_x, -1.0, 1.0), tf.where(mirror_y, -1.0, 1.0)
    zero = tf.zeros_like(x)
    mirror = tf.reshape(tf.stack([x, zero, zero, y], axis=1), (-1, 2, 2))
    if transpose is None:
        return mirror
    return tf.where(per_example(transpose, mirror), tf.reverse(mirror, [2]), mirror)


def _warp_volumes(
    images: tf.Tensor, labels: tf.Tensor, matrix: tf.Tensor, plane: tuple[int, int]
) -> tuple[tf.Tensor, tf.Tensor]:
    """Move voxels of (b, z, y, x, channel) within a plane of two axes; the third counts as channels."""
    (rest,) = {1, 2, 3} - set(plane)
    order = (0, *plane, rest, 4)
    back = [order.index(axis) for axis in range(5)]

    def moved(volumes: tf.Tensor, interpolation: str) -> tf.Tensor:
        turned = tf.transpose(volumes, order)
        shape = tf.shape(turned)
        slices = tf.reshape(turned, tf.concat([shape[:3], [shape[3] * shape[4]]], axis=0))
        return tf.transpose(tf.reshape(warp(slices, matrix, interpolation), shape), back)

    return moved(images, "BILINEAR"), moved(labels, "NEAREST")
