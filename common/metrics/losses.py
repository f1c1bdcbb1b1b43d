"""What training minimizes: cross-entropy plus soft Dice, with the distance's own term for the distance head.

Labels are uint8 as cases are prepared: class indices, or with the head "distance" the encoding of
`common.imaging.distance`. `true_classes` reads both. Voxels of label `IGNORED` count nowhere.
"""

from __future__ import annotations

import tensorflow as tf

from common.imaging.distance import DEEPEST
from common.imaging.patches import IGNORED

_SMOOTH = 1.0
# A batch with fewer foreground voxels than this share of it does not get a louder distance term than others.
_LEAST_SHARE = 0.02


def dice_cross_entropy(logits: tf.Tensor, labels: tf.Tensor, *, head: str) -> tf.Tensor:
    """Mean cross-entropy plus 1 minus the soft Dice of the foreground classes, averaged over them.

    Dice is taken over the whole batch (Milletari et al. 2016, arXiv:1606.04797; batch Dice as in nnU-Net), so that a
    patch without foreground does not punish a rightly empty prediction. With the head "distance" this is the loss of
    the first output, the foreground, and `_distance_entropy` of the second is added.

    Parameters
    ----------
    logits : float32 (batch, spatial..., outputs).
    labels : uint8 (batch, spatial...), class indices or encoded distances; `IGNORED` counts nowhere.
    head : "softmax" (outputs are all classes), "sigmoid" (outputs are the foreground classes) or "distance" (outputs
        are foreground and distance).

    Returns
    -------
    A float32 scalar >= 0.
    """
    counted = tf.cast(tf.not_equal(labels, IGNORED), tf.float32)
    classes = true_classes(labels, head=head)
    scores = logits[..., :1] if head == "distance" else logits
    outputs = scores.shape[-1]
    if head == "softmax":
        entropy = tf.nn.sparse_softmax_cross_entropy_with_logits(
            labels=tf.where(counted > 0.0, classes, 0), logits=scores
        )
        foreground = tf.nn.softmax(scores)[..., 1:]
        truth = tf.one_hot(classes, outputs)[..., 1:]
    else:
        truth = tf.one_hot(classes - 1, outputs)
        entropy = tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(labels=truth, logits=scores), axis=-1)
        foreground = tf.sigmoid(scores)
    axes = list(range(logits.shape.rank - 1))
    foreground, truth = foreground * counted[..., tf.newaxis], truth * counted[..., tf.newaxis]
    intersection = tf.reduce_sum(foreground * truth, axes)
    volume = tf.reduce_sum(foreground, axes) + tf.reduce_sum(truth, axes)
    dice = (2.0 * intersection + _SMOOTH) / (volume + _SMOOTH)
    loss = _mean(entropy, counted) + 1.0 - tf.reduce_mean(dice)
    return loss + _distance_entropy(logits[..., 1], labels, counted) if head == "distance" else loss


def predicted_classes(logits: tf.Tensor, *, head: str) -> tf.Tensor:
    """Class indices, int32 (batch, spatial...): the likeliest; with sigmoid, background unless one exceeds 0.5.

    With the head "distance" the foreground is class 1; the distance decides nothing.
    """
    if head == "softmax":
        return tf.argmax(logits, axis=-1, output_type=tf.int32)
    if head == "distance":
        return tf.cast(logits[..., 0] > 0.0, tf.int32)
    best = tf.argmax(logits, axis=-1, output_type=tf.int32) + 1
    return tf.where(tf.reduce_max(logits, axis=-1) > 0.0, best, 0)


def true_classes(labels: tf.Tensor, *, head: str) -> tf.Tensor:
    """Class indices, int32, of uint8 labels: with the head "distance" 1 where they are 1 to 254. `IGNORED` stays."""
    classes = tf.cast(labels, tf.int32)
    return tf.where((classes > 0) & (classes <= DEEPEST), 1, classes) if head == "distance" else classes


def _distance_entropy(logits: tf.Tensor, labels: tf.Tensor, counted: tf.Tensor) -> tf.Tensor:
    """Cross-entropy of the distance with its soft target, above the target's own: 0 where it is exact.

    Its gradient is the difference of distances, which does not vanish where the sigmoid saturates, as that of the
    squared error does. Inside and outside of objects weigh the same, however small objects are.

    Parameters
    ----------
    logits : float32 (batch, spatial...), whose sigmoid is the normalized distance.
    labels : uint8 of the same shape; counted : float32, 1 where a voxel counts, else 0.
    """
    # Not `==`: in the graphs that TFF builds it asks whether two tensors are the same object.
    inside = tf.cast(tf.equal(true_classes(labels, head="distance"), 1), tf.float32)
    target = inside * (tf.cast(labels, tf.float32) - 1.0) / (DEEPEST - 1.0)
    own = -(tf.math.xlogy(target, target) + tf.math.xlogy(1.0 - target, 1.0 - target))
    entropy = tf.nn.sigmoid_cross_entropy_with_logits(labels=target, logits=logits) - own
    least = _LEAST_SHARE * tf.reduce_sum(counted)
    outside = counted * (1.0 - inside)
    return 0.5 * (_mean(entropy, inside, least) + _mean(entropy, outside, least))


def _mean(values: tf.Tensor, weights: tf.Tensor, least: tf.Tensor | float = 0.0) -> tf.Tensor:
    """The weighted mean; 0 where no weight is. `least` is a bound below the divisor."""
    return tf.math.divide_no_nan(tf.reduce_sum(values * weights), tf.maximum(tf.reduce_sum(weights), least))
