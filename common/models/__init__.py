"""The networks a study can name: one file each, and the registry that maps the name to its builder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

from common.errors import StudyError
from common.models.attention_unet import attention_unet
from common.models.bfloat16 import BFLOAT16, fast_bfloat16
from common.models.deeplabv3plus import deeplabv3plus
from common.models.dilated_unet import dilated_unet
from common.models.mobilenetv3 import mobilenetv3_small
from common.models.network import Architecture, Network
from common.models.operations import NATIVE, Operations
from common.models.residual_unet import residual_unet
from common.models.unet import unet
from common.network_traits import NETWORKS
from common.study import ENCODERS, Study

Builder = Callable[[Study, dict[str, Any]], Architecture]


def _with_depth(build: Callable[..., Architecture]) -> Builder:
    return lambda study, sizes: build(depth=study.model.depth, **sizes)


# How the study's keys become a network's arguments; every network has the sizes `filters`, `outputs`, `normalization`.
_BUILDERS: Mapping[str, Builder] = {
    "unet": _with_depth(unet),
    "residual_unet": _with_depth(residual_unet),
    "attention_unet": _with_depth(attention_unet),
    "dilated_unet": _with_depth(dilated_unet),
    "deeplabv3plus": lambda study, sizes: deeplabv3plus(
        encoder=study.model.encoder or ENCODERS[0], patch=study.preprocessing.patch, **sizes
    ),
    "mobilenetv3_small": lambda study, sizes: mobilenetv3_small(**sizes),
}


def outputs_of(study: Study) -> int:
    """Channels of the logits: one a class (softmax), one a foreground class (sigmoid), or foreground and distance."""
    if study.model.head == "distance":
        return 2
    return len(study.task.classes) if study.model.head == "softmax" else len(study.task.foreground)


def build_network(study: Study) -> Network:
    """The network that the study names, with logits of `outputs_of(study)` channels.

    Raises
    ------
    StudyError : the network cannot be built for the study's dimensions or with its depth.
    """
    name, dimensions = study.model.name, study.task.dimensions
    traits = NETWORKS[name]
    if dimensions not in traits.dimensions:
        others = ", ".join(other for other, traits in NETWORKS.items() if dimensions in traits.dimensions)
        raise StudyError(
            f"model.name: {name} is not for task.dimensions {dimensions}; choose one of {others} (study {study.name})"
        )
    if traits.fixed_stride is None and study.model.depth > traits.deepest:
        raise StudyError(
            f"model.depth: expected 1 to {traits.deepest} with model.name {name}, found {study.model.depth} "
            f"(study {study.name})"
        )
    sizes = {
        "filters": study.model.filters,
        "outputs": outputs_of(study),
        "normalization": study.model.normalization,
    }
    return Network(
        _BUILDERS[name](study, sizes),
        channels=study.task.channels,
        dimensions=dimensions,
        stride=traits.stride(study.model.depth),
    )


def operations_for(study: Study) -> Operations:
    """How convolutions are computed in training on this machine; it does not change the study's plan."""
    return BFLOAT16 if study.training.precision == "auto" and fast_bfloat16() else NATIVE


def probabilities(study: Study, logits: tf.Tensor) -> tf.Tensor:
    """Probabilities of the head, same shape: one a class (softmax), one a foreground class (sigmoid), or that of the
    foreground and the normalized distance, which is from 0 to 1 too."""
    return tf.nn.softmax(logits) if study.model.head == "softmax" else tf.sigmoid(logits)
