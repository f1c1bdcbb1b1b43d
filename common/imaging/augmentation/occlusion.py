"""What is not there: boxes cut out of the image, and modalities that a patient was not examined with."""

from __future__ import annotations

import tensorflow as tf

from common.imaging.augmentation.randomness import along_axis, between, length, mean_over, spatial_axes

_BOXES = 3


def cutout(image: tf.Tensor, numbers: tf.Tensor) -> tf.Tensor:
    """One to three boxes that hold the mean of their channel (DeVries and Taylor 2017, arXiv:1708.04552).

    The label stays: the network has to guess from what is around, as it must where an image is soiled or saturated.
    `image` is (spatial..., channel); of `numbers`, in [0, 1), the first few are used.
    """
    axes = spatial_axes(image)
    count = tf.floor(numbers[0] * _BOXES)
    drawn = tf.reshape(numbers[1 : 1 + 2 * len(axes) * _BOXES], (2, len(axes), _BOXES))
    covered = tf.zeros((), tf.bool)
    for box in range(_BOXES):
        here = count >= box
        for axis in axes:
            size = length(image, axis)
            half = between(drawn[1, axis, box], 0.1, 0.25) * size / 2.0
            along = tf.abs(tf.range(size) + 0.5 - drawn[0, axis, box] * size) < half
            here &= along_axis(along, axis, image.shape.rank)
        covered |= here
    return tf.where(covered, mean_over(image, axes), image)


def modality_dropout(images: tf.Tensor, seed: tf.Tensor, probability: float) -> tf.Tensor:
    """Take whole modalities away from the examples of a batch, as they are missing from patients.

    Parameters
    ----------
    images : float32, shape (b, y, x, channel) or (b, z, y, x, channel)
        A channel is a modality; one that a case lacks is 0 everywhere already.
    seed : int32, shape (2,)
        Alone decides the outcome, together with the shapes and which channels are 0.
    probability : float in [0, 1)
        Of each example and channel, independently of the others.

    Returns
    -------
    float32 tensor
        The images, in which a channel is as it was or 0 everywhere. Of the channels that are not 0 already, every
        example keeps at least one.

    Raises
    ------
    ValueError
        The probability is out of its range, or the images' rank or number of channels is unknown.
    """
    if not 0 <= probability < 1:
        raise ValueError(f"probability: expected a number from 0 to below 1, found {probability}")
    if images.shape.rank not in (4, 5) or images.shape[-1] is None:
        raise ValueError(f"expected a batch of 2D or 3D images of a known number of channels, found {images.shape}")
    if probability == 0 or images.shape[-1] == 1:
        return images
    present = tf.reduce_any(images != 0.0, axis=list(range(1, images.shape.rank - 1)))
    chance = tf.random.stateless_uniform(tf.shape(present), seed)
    # Where all that are present would go, the one of the highest number stays.
    standing = tf.where(present, chance, -1.0)
    stays = (chance >= probability) | (standing == tf.reduce_max(standing, axis=1, keepdims=True))
    stays = tf.reshape(stays, (-1, *[1] * (images.shape.rank - 2), images.shape[-1]))
    return tf.where(stays, images, 0.0)
