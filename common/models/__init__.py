"""The networks a study can name: one file each, and the registry that maps the name to its builder."""

from __future__ import annotations

import tensorflow as tf

from common.models.network import Network
from common.models.unet import unet
from common.study import Study

_BUILDERS = {"unet": unet}


def outputs_of(study: Study) -> int:
    """Channels of the logits: one a class with softmax, one a foreground class with sigmoid."""
    return len(study.task.classes) if study.model.head == "softmax" else len(study.task.foreground)


def build_network(study: Study) -> Network:
    """The network that the study names, with logits of `outputs_of(study)` channels."""
    architecture = _BUILDERS[study.model.name](
        filters=study.model.filters,
        depth=study.model.depth,
        outputs=outputs_of(study),
        normalization=study.model.normalization,
    )
    return Network(architecture, channels=study.task.channels, dimensions=study.task.dimensions)


def probabilities(study: Study, logits: tf.Tensor) -> tf.Tensor:
    """Probabilities of the head, same shape: one a class (softmax) or one a foreground class (sigmoid)."""
    return tf.nn.softmax(logits) if study.model.head == "softmax" else tf.sigmoid(logits)
