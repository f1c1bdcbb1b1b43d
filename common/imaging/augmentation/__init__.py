"""Random variations of a training batch as TensorFlow graph operations.

Every operation treats the whole batch at once and gives each example its own randomness. All randomness is stateless
and derives from the seed, so the same seed gives the same bits wherever the function runs, also inside
`tf.data.Dataset.map`; every operation has its own part of the seed, so adding one does not change what others draw.

`spatial` and `elastic` move voxels of image and label together; `acquisition`, `intensity` and `occlusion` change the
image's values alone. Probabilities and ranges follow nnU-Net (Isensee et al. 2021, doi:10.1038/s41592-020-01008-z),
somewhat milder.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import tensorflow as tf

from common.imaging.augmentation import acquisition, elastic, intensity, occlusion, spatial
from common.imaging.augmentation.occlusion import modality_dropout
from common.imaging.augmentation.randomness import Change, change_some, seeds_and_chances
from common.study import AUGMENTATIONS

__all__ = ["VALUE_CHANGES", "ValueChange", "augment", "modality_dropout"]


@dataclass(frozen=True)
class ValueChange:
    """A variation that leaves every voxel where it is, and how likely an example gets it."""

    name: str
    probability: float
    change: Change


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
    images: tf.Tensor, labels: tf.Tensor, seed: tf.Tensor, names: Collection[str], *, through_plane: bool = True
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
    image_shape, label_shape = images.shape, labels.shape
    all_seeds, all_chances = seeds_and_chances(seed, images, len(AUGMENTATIONS))
    seeds = {name: own for name, own in zip(AUGMENTATIONS, all_seeds, strict=True) if name in names}
    chances = dict(zip(AUGMENTATIONS, all_chances, strict=True))
    if spatial.NAMES & seeds.keys():
        images, labels = spatial.move(images, labels, seeds, through_plane)
    if "elastic" in seeds:
        images, labels = elastic.deform(images, labels, seeds["elastic"], through_plane)
    for step in VALUE_CHANGES:
        if step.name in seeds:
            images = change_some(images, seeds[step.name], chances[step.name] < step.probability, step.change)
    return tf.ensure_shape(images, image_shape), tf.ensure_shape(labels, label_shape)
