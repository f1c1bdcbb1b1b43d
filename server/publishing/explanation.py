"""The file that explains a model: its probabilities, and where it saw what it predicts (`publishing.explain`).

It holds the gradients of `common.models.explaining` as LiteRT's operations, so that a hospital needs no TensorFlow to
look at them.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from common.errors import PublishError
from common.export.conversion import Tile, to_lite
from common.export.figures import LARGEST_DIFFERENCE
from common.study import Study
from server.publishing.conversion import shareable
from server.publishing.model_card import outputs_of

if TYPE_CHECKING:
    from common.models.explaining import Gradients
    from common.models.network import Network
    from common.models.operations import Operations

EXPLANATION = "model_explain.tflite"
_ADVICE = "set publishing.explain to false, or change the model"
_COMPARED_TILES = 3
_log = logging.getLogger("wardround.publishing")


@dataclass(frozen=True)
class Explanation:
    """The published file; `failure` says why there is none, the rest is then empty.

    Attributes
    ----------
    input_shape : (1, *tile, channel)
    output_shape : (1, *tile, outputs and then foreground classes): probabilities, and a map of each class.
    """

    failure: str | None = None
    sha256: str = ""
    size: int = 0
    input_shape: tuple[int, ...] = ()
    output_shape: tuple[int, ...] = ()


def explained(
    study: Study,
    network: Network,
    weights: Sequence[npt.ArrayLike],
    tiles: Sequence[Tile],
    folder: Path,
    progress: Callable[[str], None],
) -> Explanation | None:
    """Write the file that explains, checked on some of the `tiles`; None where the study wants none."""
    from common.inference.lite import LiteModel

    if not study.publishing.explain:
        return None
    progress("converting what explains the model")
    path = folder / EXPLANATION
    try:
        content = convert_explanation(study, network, weights)
        path.write_bytes(content)
        model = LiteModel(path)
        _check(study, network, weights, model, tiles[-_COMPARED_TILES:])
    except PublishError as error:
        path.unlink(missing_ok=True)
        failure = shareable(error, "explain", path)
        _log.warning("what explains the model is not published: %s", failure)
        return Explanation(failure=failure)
    digest = hashlib.sha256(content).hexdigest()
    return Explanation(None, digest, len(content), model.input_shape, model.output_shape)


def convert_explanation(study: Study, network: Network, weights: Sequence[npt.ArrayLike]) -> bytes:
    """A `.tflite` file, float32: one prepared tile in, its probabilities and Grad-CAM maps out, on the tile's grid.

    Raises
    ------
    PublishError : TensorFlow's converter refuses.
    """
    import tensorflow as tf

    from common.models.stacked import StackedOperations

    signature = tf.TensorSpec([1, *study.publishing.tile, network.channels], tf.float32)
    answer = _answering(study, network, weights, StackedOperations(), "exportable")
    return to_lite(answer, signature, "explain", _ADVICE)


def tensorflow_explanation(
    study: Study, network: Network, weights: Sequence[npt.ArrayLike], tile: Tile
) -> npt.NDArray[np.float32]:
    """What the file must answer to a tile (*tile, channel), by TensorFlow's own gradients."""
    import tensorflow as tf

    from common.models.operations import NATIVE

    answer = tf.function(_answering(study, network, weights, NATIVE, "tensorflow"), autograph=False)
    return np.asarray(answer(tf.constant(tile[np.newaxis], tf.float32)).numpy()[0], np.float32)


def _answering(
    study: Study,
    network: Network,
    weights: Sequence[npt.ArrayLike],
    operations: Operations,
    gradients: Gradients,
) -> Callable[[Any], Any]:
    import tensorflow as tf

    from common.models import probabilities
    from common.models.explaining import class_activation_maps, resized

    constants = [tf.constant(np.asarray(weight), tf.float32) for weight in weights]

    def answer(tile: Any) -> Any:
        logits, maps = class_activation_maps(network, constants, tile, study.model.head, operations, gradients)
        return tf.concat([probabilities(study, logits), resized(maps, study.publishing.tile)], axis=-1)

    return answer


def _check(
    study: Study,
    network: Network,
    weights: Sequence[npt.ArrayLike],
    model: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]],
    tiles: Sequence[Tile],
) -> None:
    """The file answers as TensorFlow does; maps relative to their own largest value."""
    outputs = len(outputs_of(study))
    for tile in tiles:
        found, expected = model(tile[np.newaxis])[0], tensorflow_explanation(study, network, weights, tile)
        if found.shape != expected.shape or not np.isfinite(found).all():
            raise PublishError(f"explain: expected finite answers of shape {expected.shape}; {_ADVICE}")
        scale = np.ones(expected.shape[-1], np.float32)
        highest = expected[..., outputs:].max(axis=tuple(range(expected.ndim - 1)))
        scale[outputs:] = np.where(highest > 0, highest, 1)
        difference = float((np.abs(found - expected) / scale).max())
        if not difference <= LARGEST_DIFFERENCE:
            raise PublishError(
                f"explain: the converted gradients differ from TensorFlow's by {difference:.2g} on one tile, more than "
                f"{LARGEST_DIFFERENCE:g}; {_ADVICE}"
            )


def figures_of_explanation(explanation: Explanation) -> dict[str, Any]:
    """The report's entry."""
    failed = explanation.failure is not None
    return {
        "file": None if failed else EXPLANATION,
        "bytes": None if failed else explanation.size,
        "failed": failed,
        "note": explanation.failure or "",
    }


def entry_of_explanation(study: Study, explanation: Explanation | None) -> dict[str, Any] | None:
    """The manifest's entry; None where there is no file."""
    if explanation is None or explanation.failure is not None:
        return None
    return {
        "file": EXPLANATION,
        "sha256": explanation.sha256,
        "bytes": explanation.size,
        "method": "Grad-CAM at the deepest features; the score is the sum of the class's logits over its region",
        "input": {"shape": explanation.input_shape, "dtype": "float32"},
        "output": {"shape": explanation.output_shape, "dtype": "float32"},
        "outputs": outputs_of(study),
        "maps": study.task.foreground,
    }
