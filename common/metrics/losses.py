"""The loss that segmentation trains on: cross-entropy plus soft Dice."""

from __future__ import annotations

import tensorflow as tf

_SMOOTH = 1.0


def dice_cross_entropy(logits: tf.Tensor, labels: tf.Tensor, *, head: str) -> tf.Tensor:
    """Mean cross-entropy plus 1 minus the soft Dice of the foreground classes, averaged over them.

    Dice is taken over the whole batch (Milletari et al. 2016, arXiv:1606.04797; batch Dice as in nnU-Net), so that a
    patch without foreground does not punish a rightly empty prediction.

    Parameters
    ----------
    logits : float32 (batch, spatial..., outputs).
    labels : uint8 (batch, spatial...), class indices.
    head : "softmax" (outputs are all classes) or "sigmoid" (outputs are the foreground classes).

    Returns
    -------
    A float32 scalar >= 0.
    """
    outputs = logits.shape[-1]
    labels = tf.cast(labels, tf.int32)
    if head == "softmax":
        entropy = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
        foreground = tf.nn.softmax(logits)[..., 1:]
        truth = tf.one_hot(labels, outputs)[..., 1:]
    else:
        truth = tf.one_hot(labels - 1, outputs)
        entropy = tf.nn.sigmoid_cross_entropy_with_logits(labels=truth, logits=logits)
        foreground = tf.sigmoid(logits)
    axes = list(range(logits.shape.rank - 1))
    intersection = tf.reduce_sum(foreground * truth, axes)
    volume = tf.reduce_sum(foreground, axes) + tf.reduce_sum(truth, axes)
    dice = (2.0 * intersection + _SMOOTH) / (volume + _SMOOTH)
    return tf.reduce_mean(entropy) + 1.0 - tf.reduce_mean(dice)


def predicted_classes(logits: tf.Tensor, *, head: str) -> tf.Tensor:
    """Class indices, int32 (batch, spatial...): the likeliest; with sigmoid, background unless one exceeds 0.5."""
    if head == "softmax":
        return tf.argmax(logits, axis=-1, output_type=tf.int32)
    best = tf.argmax(logits, axis=-1, output_type=tf.int32) + 1
    return tf.where(tf.reduce_max(logits, axis=-1) > 0.0, best, 0)
