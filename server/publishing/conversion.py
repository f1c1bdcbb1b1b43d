"""From weights to files in several precisions and formats, each checked against TensorFlow's answer."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from common.errors import PublishError
from common.export.conversion import Tile, convert
from common.export.figures import LARGEST_DIFFERENCE
from common.export.forward import predictor
from common.study import Study
from server.publishing.contents import Contents, contents_of
from server.publishing.onnx_export import ONNX, OnnxModel, convert_to_onnx
from server.publishing.variant import Variant

if TYPE_CHECKING:
    from common.inference.lite import LiteModel
    from common.models.network import Network

_log = logging.getLogger("wardround.publishing")  # what `wardround coordinator` shows is below "wardround"


def converted(
    study: Study,
    network: Network,
    weights: Sequence[npt.ArrayLike],
    tiles: Sequence[Tile],
    is_calibrated: bool,
    folder: Path,
    progress: Callable[[str], None],
) -> list[Variant]:
    """The variants' files, each run once; a failure is one of that variant, except of float32."""
    expected = predictor(study, network, weights)(tiles[0][np.newaxis])
    variants = []
    for name in study.publishing.variants:
        progress(f"converting to {name}")
        path = folder / (f"model.{ONNX}" if name == ONNX else f"model_{name}.tflite")
        try:
            if name == "int8" and not is_calibrated:
                raise PublishError("int8: it needs holdout images to calibrate on, and there is no holdout")
            contents = None
            if name == ONNX:
                content = convert_to_onnx(study, network, weights)
            else:
                content = convert(study, network, weights, name, tiles)
                contents = contents_of(content)
                _check_contents(name, contents)
            path.write_bytes(content)
            model = opened(path)
            _check_answer(name, model(tiles[0][np.newaxis]), expected)
        except PublishError as error:
            if name == "float32":
                raise
            path.unlink(missing_ok=True)
            failure = shareable(error, name, path)
            _log.warning("variant %s is not published: %s", name, failure)
            variants.append(Variant(name, failure=failure))
            continue
        variants.append(
            Variant(
                name,
                file=path.name,
                sha256=hashlib.sha256(content).hexdigest(),
                size=len(content),
                input_shape=model.input_shape,
                output_shape=model.output_shape,
                contents=contents,
            )
        )
    return variants


def shareable(error: PublishError, name: str, path: Path) -> str:
    """Why there is no file, for papers that others read: without `name`, which stands beside it wherever it is shown,
    and without the folder of `path`, which is this machine's alone.
    """
    return str(error).replace(str(path), path.name).removeprefix(f"{name}: ")


def opened(path: Path) -> LiteModel | OnnxModel:
    """A variant's file, run on one thread as its runtime does."""
    from common.inference.lite import LiteModel

    return OnnxModel(path) if path.suffix == f".{ONNX}" else LiteModel(path)


def _check_contents(name: str, contents: Contents) -> None:
    """What is called quantized must be, in part at least; how much of it is, the manifest and the card say."""
    if name != "float32" and not contents.narrow_share:
        raise PublishError(
            f"{name}: all weights of the converted model are still 32-bit numbers, so it is float32 under another "
            "name; remove the variant from publishing.variants"
        )


def _check_answer(name: str, found: Tile, expected: Tile) -> None:
    """float32 and ONNX must answer what TensorFlow does; the others must answer, and the holdout says how well."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        what = f"shape {found.shape}" if found.shape != expected.shape else "values that are not finite"
        raise PublishError(f"{name}: expected finite answers of shape {expected.shape}, found {what}; do not use it")
    difference = float(np.abs(found - expected).max())
    if name in ("float32", ONNX) and not difference <= LARGEST_DIFFERENCE:
        raise PublishError(
            f"{name}: the converted model differs from TensorFlow by {difference:.2g} on one tile, more than "
            f"{LARGEST_DIFFERENCE:g}; the weights may be of another study or not finite: publish another round"
        )
