"""A published model as an ONNX file, for runtimes other than LiteRT; checked and measured by ONNX Runtime.

The converter (tf2onnx) and ONNX Runtime are optional: only a study that publishes this variant needs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from common.errors import PublishError
from common.export.conversion import quiet, reason_of
from common.study import Study

if TYPE_CHECKING:
    from common.models.network import Network

ONNX = "onnx"
"""The variant's name, and the ending of its file."""
_OPSET = 17  # what ONNX Runtime has read since 1.12


def convert_to_onnx(study: Study, network: Network, weights: Sequence[npt.ArrayLike]) -> bytes:
    """The network with its head as an ONNX file: `tile`, one prepared tile, in; its probabilities out; both float32.

    3D convolutions stay as they are, because ONNX Runtime computes them well.

    Raises
    ------
    PublishError : the converter is not installed or refuses.
    """
    import tensorflow as tf

    from common.models import probabilities

    convert = _imported("tf2onnx").convert
    signature = [tf.TensorSpec([1, *study.publishing.tile, network.channels], tf.float32, name="tile")]

    def answer(tile: Any) -> Any:
        # Made inside: tf2onnx takes constants from without for inputs.
        constants = [tf.constant(np.asarray(weight), tf.float32) for weight in weights]
        return probabilities(study, network(constants, tile))

    forward = tf.function(answer, autograph=False, input_signature=signature)
    with quiet("tf2onnx", "tensorflow", "absl"):
        try:
            model, _ = convert.from_function(forward, input_signature=signature, opset=_OPSET)
        except Exception as error:  # the converter raises what its many parts raise
            raise PublishError(
                f"{ONNX}: tf2onnx refused the network ({reason_of(error)}); remove the variant from publishing.variants"
            ) from error
    return bytes(model.SerializeToString())


class OnnxModel:
    """An ONNX file of one float32 input and output, run by ONNX Runtime on the CPU; may be called by several threads.

    Raises
    ------
    PublishError : ONNX Runtime is not installed or cannot load the file.
    """

    def __init__(self, path: Path, threads: int = 1) -> None:
        runtime = _imported("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        try:
            self._session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors have no common base
            raise PublishError(f"{path}: ONNX Runtime cannot load it ({error}); publish it again") from error
        (tile,), (answer,) = self._session.get_inputs(), self._session.get_outputs()
        self._input = tile.name
        self.input_shape = tuple(int(size) for size in tile.shape)
        self.output_shape = tuple(int(size) for size in answer.shape)

    def __call__(self, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Probabilities (b, *tile, outputs) of prepared tiles (b, *tile, channel)."""
        answers = [self._session.run(None, {self._input: tile[np.newaxis]})[0] for tile in batch]
        return np.asarray(np.concatenate(answers), np.float32)


def _imported(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise PublishError(
            f"{ONNX}: {name} is not installed ({error}); install tf2onnx, onnx and onnxruntime beside Wardround, or "
            "remove the variant from publishing.variants"
        ) from error
