"""From weights to one LiteRT file, by TensorFlow's converter."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from common.errors import PublishError
from common.inference.lite import captured_stderr
from common.study import Study

if TYPE_CHECKING:
    from common.models.network import Network
    from common.models.operations import Operations

Tile = npt.NDArray[np.float32]
_log = logging.getLogger("wardround.publishing")  # what `wardround coordinator` shows is below "wardround"


def convert(
    study: Study,
    network: Network,
    weights: Sequence[npt.ArrayLike],
    variant: str,
    tiles: Sequence[Tile],
    operations: Operations | None = None,
) -> bytes:
    """A `.tflite` file of the network with its head: one tile in, its probabilities out, both float32.

    3D convolutions are written as 2D ones, because LiteRT quantizes and accelerates these alone.

    Parameters
    ----------
    variant : of `common.study.VARIANTS`
    tiles : what int8 calibrates its ranges on, (*tile, channel) each; not used for the others.
    operations : how convolutions are computed; None: as published.

    Raises
    ------
    PublishError : TensorFlow's converter refuses.
    """
    import tensorflow as tf

    from common.models import probabilities
    from common.models.stacked import StackedOperations

    chosen = operations or StackedOperations()
    constants = [tf.constant(np.asarray(weight), tf.float32) for weight in weights]
    signature = tf.TensorSpec([1, *study.publishing.tile, network.channels], tf.float32)

    def answer(tile: tf.Tensor) -> tf.Tensor:
        logits = network(constants, tile, chosen)
        return probabilities(study, chosen.settled(logits) if isinstance(chosen, StackedOperations) else logits)

    def prepare(converter: Any) -> None:
        if variant != "float32":
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        if variant == "float16":
            converter.target_spec.supported_types = [tf.float16]
        if variant == "int8":
            converter.representative_dataset = lambda: ([tile[np.newaxis]] for tile in tiles)
            # float32 is allowed besides, because operations without an int8 kernel would be left in float32 or fail,
            # depending on the operation. Which ones were is looked up afterwards.
            converter.target_spec.supported_ops = [
                tf.lite.OpsSet.TFLITE_BUILTINS_INT8,
                tf.lite.OpsSet.TFLITE_BUILTINS,
            ]

    advice = "remove the variant from publishing.variants, or change the model"
    return to_lite(answer, signature, variant, advice, prepare)


def to_lite(
    answer: Callable[[Any], Any],
    signature: Any,
    name: str,
    advice: str,
    prepare: Callable[[Any], None] = lambda _: None,
) -> bytes:
    """A function of one tensor as a `.tflite` file.

    Parameters
    ----------
    answer : from a tensor of `signature`, a `tf.TensorSpec` without unknown sizes, to one tensor: convolutions of an
        unknown batch are neither folded nor accelerated as well.
    name, advice : of what is made, and what to do where it cannot be, for errors.
    prepare : sets the converter's options.

    Raises
    ------
    PublishError : the function cannot be traced, or TensorFlow's converter refuses.
    """
    import tensorflow as tf

    with quiet("absl", "tensorflow") as chatter:
        try:
            forward = tf.function(answer, autograph=False).get_concrete_function(signature)
            converter = tf.lite.TFLiteConverter.from_concrete_functions([forward], tf.Module())
            prepare(converter)
            model = converter.convert()
        except Exception as error:  # the converter raises what its many parts raise
            raise PublishError(
                f"{name}: TensorFlow's converter refused the network ({reason_of(error)}); {advice}"
            ) from error
        finally:
            chatter.seek(0)
            said = chatter.read().decode(errors="replace")
    _log.debug("converter, %s:\n%s", name, said)
    return bytes(model)


@contextlib.contextmanager
def quiet(*loggers: str) -> Iterator[IO[bytes]]:
    """Keep what converters say from the terminal: stderr goes to the file that is yielded, warnings nowhere.

    Parameters
    ----------
    loggers : names of loggers that are to report nothing below errors.
    """
    chosen = [logging.getLogger(name) for name in loggers]
    levels = [logger.level for logger in chosen]
    with captured_stderr() as chatter, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in chosen:
                logger.setLevel(logging.ERROR)
            yield chatter
        finally:
            for logger, level in zip(chosen, levels, strict=True):
                logger.setLevel(level)


def reason_of(error: Exception) -> str:
    """A converter's error in one line of at most 300 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
