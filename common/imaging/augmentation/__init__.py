"""Random variations of a training batch as TensorFlow graph operations.

Each example has its own randomness. All of it is stateless and derives from the seed, so the same seed gives the same
bits wherever the function runs, also inside `tf.data.Dataset.map`; every variation has its own part of the seed, so
adding one does not change what others draw.

`spatial` and `elastic` move voxels of image and label together; `acquisition`, `intensity` and `occlusion` change the
image's values alone. Probabilities and ranges follow nnU-Net (Isensee et al. 2021, doi:10.1038/s41592-020-01008-z),
somewhat milder.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from typing import Any

import tensorflow as tf

from common.imaging.augmentation import acquisition, chain, elastic, intensity, occlusion, spatial
from common.imaging.augmentation.occlusion import modality_dropout
from common.imaging.augmentation.randomness import own_seed
from common.study import AUGMENTATIONS

__all__ = ["VALUE_CHANGES", "ValueChange", "augment", "modality_dropout"]


@dataclass(frozen=True)
class ValueChange:
    """A variation that leaves every voxel where it is, and how likely an example gets it.

    `change` takes an image (spatial..., channel) and numbers in [0, 1), of which it uses the first few.
    """

    name: str
    probability: float
    change: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]


# The order in which an image comes about: the object, the light on it, the optics, the detector, the file, the damage.
VALUE_CHANGES = (
    ValueChange("color_jitter", 0.3, intensity.color_jitter),
    ValueChange("illumination", 0.2, acquisition.illumination),
    ValueChange("blur", 0.2, acquisition.blur),
    ValueChange("low_resolution", 0.2, acquisition.low_resolution),
    ValueChange("noise", 0.3, intensity.noise),
    ValueChange("brightness", 0.2, intensity.brightness),
    ValueChange("contrast", 0.3, intensity.contrast),
    ValueChange("contrast_stretch", 0.2, intensity.contrast_stretch),
    ValueChange("gamma_inverted", 0.15, intensity.gamma_inverted),
    ValueChange("gamma", 0.3, intensity.gamma),
    ValueChange("cutout", 0.2, occlusion.cutout),
)


def augment(
    images: tf.Tensor,
    labels: tf.Tensor,
    seed: tf.Tensor,
    names: Collection[str],
    *,
    through_plane: bool = True,
    always: bool = False,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Vary the examples of a batch, each on its own.

    Parameters
    ----------
    images : float32, shape (b, y, x, channel) or (b, z, y, x, channel)
        The number of channels is known when the graph is built.
    labels : uint8, shape (b, y, x) or (b, z, y, x)
        Class indices. Moved with the images (nearest neighbour), never mixed.
    seed : int32, shape (2,)
        Alone decides the outcome, together with `names` and the shapes.
    names : collection of str
        Which variations, out of `common.study.AUGMENTATIONS`; they are applied in this order, whatever theirs is:

        - `flip`: mirrors along each spatial axis with probability 0.5 each; 2D patches that are square (and known to
          be when the graph is built) are also transposed with 0.5, so that all quarter turns occur.
        - `rotate` with probability 0.5: in 2D by any angle, in 3D by up to 15 degrees about one axis drawn at random.
        - `scale` with 0.3: by 0.8 to 1.25 (above 1 magnifies) in the plane (y, x).
        - `elastic` with 0.2: a smooth displacement field, of control points a quarter of the patch apart; a voxel
          moves by at most 1/16 of the patch's size along each axis in 2D, by 1/24 in 3D.
        - `color_jitter` with 0.3, on images of at least 3 channels: multiplies each channel by 0.8 to 1.2 about its
          mean and shifts it by up to 0.2 of its standard deviation.
        - `illumination` with 0.2: a smooth field multiplies what lies above the example's minimum; from one side to
          the other by up to a factor of e, from the centre to the corners by up to 1.35 either way. Channels keep
          their means.
        - `blur` with 0.2: in the plane (y, x), Gaussian with a sigma of 0.5 to 1 voxel.
        - `low_resolution` with 0.2: in the plane (y, x), to 0.5 to 1 of the pixels along each axis and back.
        - `noise` with 0.3: Gaussian, sigma 0 to 0.3 of the example's standard deviation; 0.3 is about 0.05 of the range
          from minimum to maximum of a microscopy image or an MRI.
        - `brightness` with 0.2: shifts by up to 0.3 of the example's standard deviation.
        - `contrast` with 0.3: multiplies by 0.75 to 1.25 about the example's mean and shifts by up to 0.2 of its
          standard deviation; each channel differs by a further 0.05 at most.
        - `contrast_stretch` with 0.2: what lies between the lowest 0 to 0.1 and the highest 0 to 0.3 of the example's
          range becomes all of it; the rest is clipped.
        - `gamma_inverted` with 0.15: as `gamma`, of the negative.
        - `gamma` with 0.3: a power of 0.7 to 1.5 over the example's range from minimum to maximum.
        - `cutout` with 0.2: one to three boxes, each side 0.1 to 0.25 of the patch's, hold their channel's mean; the
          label stays.

        What moves in from outside the patch is its mirror image, in the label too.
    through_plane : bool
        Whether `rotate` in 3D also turns about the y and x axes, and `elastic` also moves along z. Turn it off where
        slices are much thicker than pixels are wide: rotation is in voxels and would shear such a volume.
    always : bool
        Whether every example gets every variation, instead of each with its probability; `flip` still draws the axes.

    Returns
    -------
    images, labels
        Of the shapes and types of the arguments.

    Raises
    ------
    ValueError
        A name is unknown, the shapes are not those of a batch, or the number of channels is not known.
    """
    unknown = sorted(set(names) - set(AUGMENTATIONS))
    if unknown:
        raise ValueError(f"names: expected some of {AUGMENTATIONS}, found {unknown}")
    if images.shape.rank not in (4, 5) or labels.shape.rank != images.shape.rank - 1:
        raise ValueError(f"expected a batch of 2D or 3D images with labels, found {images.shape} and {labels.shape}")
    if images.shape[-1] is None:
        raise ValueError(f"expected images of a known number of channels, found {images.shape}")
    wanted = tuple(name for name in AUGMENTATIONS if name in names)
    if not wanted:
        return images, labels
    examples, dimensions, channels = tf.shape(images)[0], labels.shape.rank - 1, images.shape[-1]
    # Drawn for all variations, also for those that are not used, of which none needs more numbers than these.
    count = max(_NUMBERS, 2 * channels + 3)
    numbers = tf.random.stateless_uniform((len(AUGMENTATIONS), examples, count), seed)
    points = tf.zeros((examples, 0))
    if "elastic" in wanted:
        points = elastic.control_points(own_seed(seed, 1), examples, dimensions)
    vary = _chain(wanted, dimensions, through_plane, always, chain.compiler_is_there())
    numbers = tf.transpose(numbers, (1, 0, 2))
    # The compiler makes nothing of an empty batch.
    new_images, new_labels = tf.cond(
        examples > 0, lambda: vary(images, labels, numbers, points), lambda: (images, labels)
    )
    return tf.ensure_shape(new_images, images.shape), tf.ensure_shape(new_labels, labels.shape)


_NUMBERS = 20  # a chance and those of `cutout` in 3D


@cache
def _chain(names: tuple[str, ...], dimensions: int, through_plane: bool, always: bool, compiled: bool) -> Any:
    """The variations of a batch as one function, traced once for each shape."""
    moves = spatial.NAMES & set(names)
    changes = [step for step in VALUE_CHANGES if step.name in names]

    def one(image: tf.Tensor, label: tf.Tensor, numbers: tf.Tensor, points: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        own = {name: numbers[place] for place, name in enumerate(AUGMENTATIONS) if name in names}
        if moves:
            image, label = spatial.move(
                image,
                label,
                {name: own[name] for name in moves},
                points,
                through_plane=through_plane,
                always=always,
            )
        for step in changes:
            chance, drawn = own[step.name][0], own[step.name][1:]
            image = _changed(image, always | (chance < step.probability), drawn, step)
        return image, label

    return chain.for_each(one, compiled)


def _changed(image: tf.Tensor, chosen: tf.Tensor, numbers: tf.Tensor, step: ValueChange) -> tf.Tensor:
    return tf.cond(chosen, lambda: step.change(image, numbers), lambda: image)
