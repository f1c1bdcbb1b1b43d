"""What is not there: boxes cut out of the image, and modalities that a patient was not examined with."""

from __future__ import annotations

import tensorflow as tf

from common.imaging.augmentation.randomness import (
    along_axis,
    between,
    draws,
    length,
    own_seed,
    per_channel,
    spatial_axes,
)

_BOXES = 3


def cutout(images: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """One to three boxes that hold the mean of their channel (DeVries and Taylor 2017, arXiv:1708.04552).

    The label stays: the network has to guess from what is around, as it must where an image is soiled or saturated.
    """
    axes = spatial_axes(images)
    (count,) = draws(seed, images, 1)
    shape = (2, len(axes), tf.shape(images)[0], _BOXES)
    centres, lengths = tf.unstack(tf.random.stateless_uniform(shape, own_seed(seed, 1)))
    inside = tf.floor(count * _BOXES)[:, tf.newaxis] >= tf.range(_BOXES, dtype=tf.float32)  # (b, boxes)
    covered = tf.zeros((), tf.bool)
    for box in range(_BOXES):
        here = tf.ones((), tf.bool)
        for number, axis in enumerate(axes):
            size = length(images, axis)
            centre = centres[number, :, box, tf.newaxis] * size
            half = between(lengths[number, :, box, tf.newaxis], 0.1, 0.25) * size / 2.0
            place = tf.range(size) + 0.5
            along = (tf.abs(place - centre) < half) & inside[:, box, tf.newaxis]
            here &= along_axis(along, axis, images)
        covered |= here
    return tf.where(covered, tf.reduce_mean(images, axis=axes, keepdims=True), images)


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
    present = tf.reduce_any(images != 0.0, axis=spatial_axes(images))
    chance = tf.random.stateless_uniform(tf.shape(present), seed)
    # Where all that are present would go, the one of the highest number stays.
    standing = tf.where(present, chance, -1.0)
    stays = (chance >= probability) | (standing == tf.reduce_max(standing, axis=1, keepdims=True))
    return tf.where(per_channel(stays, images), images, 0.0)
