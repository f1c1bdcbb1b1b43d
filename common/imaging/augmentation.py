"""Random variations of a training batch as TensorFlow graph operations.

Every operation treats the whole batch at once and gives each example its own randomness. All randomness is stateless
and derives from the seed, so the same seed gives the same bits wherever the function runs, also inside
`tf.data.Dataset.map`; every operation has its own part of the seed, so adding one does not change what others draw.

Probabilities and ranges follow nnU-Net (Isensee et al. 2021, doi:10.1038/s41592-020-01008-z), somewhat milder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

import tensorflow as tf

NAMES = ("flip", "rotate", "scale", "gamma", "contrast", "noise", "blur")
_BLUR_RADIUS = 3


def augment(
    images: tf.Tensor, labels: tf.Tensor, seed: tf.Tensor, names: Collection[str], *, through_plane: bool = True
) -> tuple[tf.Tensor, tf.Tensor]:
    """Vary the examples of a batch, each on its own.

    Parameters
    ----------
    images : float32, shape (b, y, x, channel) or (b, z, y, x, channel)
    labels : uint8, shape (b, y, x) or (b, z, y, x)
        Class indices. Moved with the images (nearest neighbour), never mixed.
    seed : int32, shape (2,)
        Alone decides the outcome, together with `names` and the shapes.
    names : collection of str
        Which variations, out of `NAMES`; the order is fixed, whatever theirs is:

        - `flip`: mirrors along each spatial axis with probability 0.5 each; 2D patches that are square (and known to
          be when the graph is built) are also transposed with 0.5, so that all quarter turns occur.
        - `rotate` with probability 0.5: in 2D by any angle, in 3D by up to 15 degrees about one axis drawn at random.
        - `scale` with 0.3: by 0.8 to 1.25 (above 1 magnifies) in the plane (y, x).
        - `blur` with 0.2: in the plane (y, x), Gaussian with a sigma of 0.5 to 1 voxel.
        - `noise` with 0.3: Gaussian, sigma 0 to 0.1 of the example's standard deviation.
        - `contrast` with 0.3: multiplies by 0.75 to 1.25 about the example's mean and shifts by up to 0.2 of its
          standard deviation; each channel differs by a further 0.05 at most.
        - `gamma` with 0.3: a power of 0.7 to 1.5 over the example's range from minimum to maximum.

        What rotation and scaling bring in from outside the patch is its mirror image, in the label too.
    through_plane : bool
        Whether `rotate` in 3D also turns about the y and x axes. Turn it off where slices are much thicker than
        pixels are wide: rotation is in voxels and would shear such a volume.

    Returns
    -------
    images, labels
        Of the shapes and types of the arguments.
    """
    unknown = sorted(set(names) - set(NAMES))
    if unknown:
        raise ValueError(f"names: expected some of {NAMES}, found {unknown}")
    if images.shape.rank not in (4, 5) or labels.shape.rank != images.shape.rank - 1:
        raise ValueError(f"expected a batch of 2D or 3D images with labels, found {images.shape} and {labels.shape}")
    image_shape, label_shape = images.shape, labels.shape
    seeds = {name: tf.random.experimental.stateless_fold_in(seed, NAMES.index(name)) for name in names}
    images, labels = _move(images, labels, seeds, through_plane)
    for name, probability, change in _INTENSITY_CHANGES:
        if name in names:
            images = _change_some(images, seeds[name], probability, change)
    return tf.ensure_shape(images, image_shape), tf.ensure_shape(labels, label_shape)


def _draws(seed: tf.Tensor, images: tf.Tensor, count: int) -> list[tf.Tensor]:
    """`count` independent numbers in [0, 1) for each example: float32 tensors of shape (b,)."""
    draws: list[tf.Tensor] = tf.unstack(tf.random.stateless_uniform((count, tf.shape(images)[0]), seed), num=count)
    return draws


def _between(draw: tf.Tensor, low: float, high: float) -> tf.Tensor:
    return low + (high - low) * draw


def _per_example(values: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
    """From (b,) to (b, 1, ..., 1) of the rank of `like`."""
    return tf.reshape(values, (-1, *[1] * (like.shape.rank - 1)))


def _inner_axes(images: tf.Tensor) -> list[int]:
    return list(range(1, images.shape.rank))


def _mean_and_deviation(images: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Of each example over all its voxels and channels, shape (b, 1, ..., 1)."""
    mean, variance = tf.nn.moments(images, axes=_inner_axes(images), keepdims=True)
    return mean, tf.sqrt(variance)


# Where the voxels are. Flips, rotation and scaling in a plane are one 2x2 matrix, so a pixel is interpolated once.


def _move(
    images: tf.Tensor, labels: tf.Tensor, seeds: dict[str, tf.Tensor], through_plane: bool
) -> tuple[tf.Tensor, tf.Tensor]:
    if not seeds.keys() & {"flip", "rotate", "scale"}:
        return images, labels
    flat = images.shape.rank == 4
    angle, axis = tf.zeros(tf.shape(images)[:1]), tf.zeros(tf.shape(images)[:1])
    if "rotate" in seeds:
        chance, turn, about = _draws(seeds["rotate"], images, 3)
        limit = math.pi if flat else math.radians(15.0)
        angle = tf.where(chance < 0.5, _between(turn, -limit, limit), 0.0)
        if through_plane and not flat:
            axis = tf.floor(about * 3.0)  # 0, 1, 2: about z, y, x
    factor = tf.ones_like(angle)
    if "scale" in seeds:
        chance, size = _draws(seeds["scale"], images, 2)
        # Drawn in logarithms: a factor and its inverse are equally likely.
        factor = tf.where(chance < 0.3, tf.exp(_between(size, -math.log(1.25), math.log(1.25))), 1.0)
    in_plane = _rotation(tf.where(axis == 0.0, angle, 0.0), factor)
    if "flip" in seeds:
        mirror_z, mirror_y, mirror_x, transpose = (draw < 0.5 for draw in _draws(seeds["flip"], images, 4))
        is_square = flat and images.shape[1] is not None and images.shape[1] == images.shape[2]
        in_plane = tf.matmul(_reflection(mirror_x, mirror_y, transpose if is_square else None), in_plane)
        if not flat:
            images = tf.where(_per_example(mirror_z, images), tf.reverse(images, [1]), images)
            labels = tf.where(_per_example(mirror_z, labels), tf.reverse(labels, [1]), labels)
    labels = labels[..., tf.newaxis]
    if flat:
        images, labels = _warp(images, in_plane, "BILINEAR"), _warp(labels, in_plane, "NEAREST")
    else:
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
    return tf.where(_per_example(transpose, mirror), tf.reverse(mirror, [2]), mirror)


def _warp(images: tf.Tensor, matrix: tf.Tensor, interpolation: str) -> tf.Tensor:
    """Move the pixels of (b, y, x, channel).

    The output pixel at an offset (x, y) from the centre comes from `matrix @ (x, y)`; matrices of 0, 1 and -1 copy
    pixels to the bit, because every coordinate is then a whole number.
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
        return tf.transpose(tf.reshape(_warp(slices, matrix, interpolation), shape), back)

    return moved(images, "BILINEAR"), moved(labels, "NEAREST")


# What the voxels are. Only the examples that are drawn are computed, which is what makes this cheap.


def _change_some(
    images: tf.Tensor, seed: tf.Tensor, probability: float, change: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
) -> tf.Tensor:
    """Apply `change(images, seed)` to each example with a probability; the others keep their bits."""
    (chance,) = _draws(seed, images, 1)
    chosen = tf.where(chance < probability)
    changed = change(tf.gather_nd(images, chosen), tf.random.experimental.stateless_fold_in(seed, 1))
    return tf.tensor_scatter_nd_update(images, chosen, changed)


def _blur(images: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    (width,) = _draws(seed, images, 1)
    distance = tf.range(_BLUR_RADIUS + 1, dtype=tf.float32)[:, tf.newaxis]
    weights = tf.exp(-0.5 * tf.square(distance / _between(width, 0.5, 1.0)))
    weights = tf.unstack(weights / (weights[0] + 2.0 * tf.reduce_sum(weights[1:], axis=0)), num=_BLUR_RADIUS + 1)
    rank = images.shape.rank
    for axis in (rank - 3, rank - 2):
        images = _blur_along(images, axis, [_per_example(weight, images) for weight in weights])
    return images


def _blur_along(images: tf.Tensor, axis: int, weights: list[tf.Tensor]) -> tf.Tensor:
    """The symmetric filter with `weights` from the centre outwards; the border repeats its outermost value."""
    size = tf.shape(images)[axis]
    before = tf.repeat(tf.gather(images, [0], axis=axis), _BLUR_RADIUS, axis=axis)
    after = tf.repeat(tf.gather(images, [size - 1], axis=axis), _BLUR_RADIUS, axis=axis)
    padded = tf.concat([before, images, after], axis=axis)

    def shifted(by: int) -> tf.Tensor:
        begin = [_BLUR_RADIUS + by if i == axis else 0 for i in range(images.shape.rank)]
        return tf.slice(padded, begin, tf.shape(images))

    result = weights[0] * images
    for distance in range(1, _BLUR_RADIUS + 1):
        result += weights[distance] * (shifted(-distance) + shifted(distance))
    return result


def _noise(images: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    (amount,) = _draws(seed, images, 1)
    _, deviation = _mean_and_deviation(images)
    pixels = tf.random.stateless_normal(tf.shape(images), tf.random.experimental.stateless_fold_in(seed, 1))
    return images + (_per_example(_between(amount, 0.0, 0.1), images) * deviation) * pixels


def _contrast(images: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    gain, shift = _draws(seed, images, 2)
    gains = _per_example(_between(gain, 0.75, 1.25), images)
    shifts = _per_example(_between(shift, -0.2, 0.2), images)
    if images.shape[-1] != 1:
        shape = (2, tf.shape(images)[0], *[1] * (images.shape.rank - 2), tf.shape(images)[-1])
        own_seed = tf.random.experimental.stateless_fold_in(seed, 1)
        by_channel = tf.random.stateless_uniform(shape, own_seed, -0.05, 0.05)
        gains += by_channel[0]
        shifts += by_channel[1]
    mean, deviation = _mean_and_deviation(images)
    return images * gains + (mean * (1.0 - gains) + shifts * deviation)


def _gamma(images: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    (power,) = _draws(seed, images, 1)
    lowest = tf.reduce_min(images, axis=_inner_axes(images), keepdims=True)
    extent = tf.reduce_max(images, axis=_inner_axes(images), keepdims=True) - lowest
    # exp(g log t) is several times faster than pow here; log 0 is -inf, which exp takes back to 0.
    logarithm = tf.math.log((images - lowest) * tf.math.divide_no_nan(1.0, extent))
    return lowest + extent * tf.exp(_per_example(_between(power, 0.7, 1.5), images) * logarithm)


_INTENSITY_CHANGES: tuple[tuple[str, float, Callable[[tf.Tensor, tf.Tensor], tf.Tensor]], ...] = (
    ("blur", 0.2, _blur),
    ("noise", 0.3, _noise),
    ("contrast", 0.3, _contrast),
    ("gamma", 0.3, _gamma),
)
