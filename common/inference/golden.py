"""The golden pair of a published version: a tile and its answer, by which a file, a machine or a delegate is checked.

The tile is made up, of nobody's image, so it may travel with the model. The answer is that of the float32 file where it
was published. Each variant's manifest entry has the largest difference that is its own; more of it means that the file
is damaged, or that what runs it (a delegate, another version of LiteRT) does not compute what was published and
measured.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.errors import PublishError
from common.inference.lite import LiteModel
from common.inference.published import COPY_AGAIN, MANIFEST, read_manifest

GOLDEN = "golden.npz"
_STEPS = 4096  # answers are kept to 1/4096, which is well below any tolerance and compresses to a tenth


@dataclass(frozen=True)
class Golden:
    """A prepared tile, float32 (*tile, channel), and its probabilities, float32 (*tile, outputs)."""

    tile: npt.NDArray[np.float32]
    answer: npt.NDArray[np.float32]

    def to_bytes(self) -> bytes:
        """The pair as an `.npz` file with the arrays `tile` and `answer`."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, tile=self.tile, answer=np.round(self.answer * _STEPS) / np.float32(_STEPS))
        return buffer.getvalue()

    def difference(self, model: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]) -> float:
        """The mean over all voxels and outputs of how far the model's probabilities are from the golden ones.

        The mean, because a few voxels on the edge between two classes may turn over with the smallest rounding.
        """
        return float(np.abs(model(self.tile[np.newaxis])[0] - self.answer).mean())


def load_golden(version: Path) -> Golden:
    """The golden pair of a published version's folder, checked against the manifest's digest.

    Raises
    ------
    PublishError : the folder has none, or it is damaged.
    """
    entry = read_manifest(version).get("golden")
    if not isinstance(entry, dict):
        raise PublishError(f"{version}: published without a golden pair; publish the model again to have one")
    path = version / GOLDEN
    try:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != entry["sha256"]:
            raise ValueError("it is not the file that the manifest names")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return Golden(np.asarray(arrays["tile"], np.float32), np.asarray(arrays["answer"], np.float32))
    except OSError as error:
        raise PublishError(f"{path}: cannot be read ({error.strerror or error}); {COPY_AGAIN}") from error
    except (KeyError, ValueError) as error:
        raise PublishError(f"{path}: damaged ({error}); {COPY_AGAIN}") from error


def check_golden(model: LiteModel, variant: str | None = None) -> float:
    """Run a published file on its version's golden tile; returns its difference from the golden answer.

    Parameters
    ----------
    model : opened from a published version's folder, on whatever is to be checked: a machine, a delegate.
    variant : of the file. None: the one that the manifest names for it.

    Raises
    ------
    PublishError : the difference is above the manifest's tolerance, or the version has no golden pair for this file.

    The manifest is believed as it is; whoever checks its signature does so before.
    """
    version = model.path.parent
    golden = load_golden(version)
    manifest = read_manifest(version)
    try:
        names = {str(entry["file"]): str(entry["name"]) for entry in manifest["variants"]}
        tolerance = float(manifest["golden"]["tolerance"][variant or names[model.path.name]])
    except (KeyError, TypeError, ValueError) as error:
        raise PublishError(f"{version / MANIFEST}: no tolerance for {model.path.name}; {COPY_AGAIN}") from error
    shape = (1, *golden.tile.shape), (1, *golden.answer.shape)
    if (model.input_shape, model.output_shape) != shape:
        raise PublishError(f"{model.path}: takes and gives other shapes than its golden pair; {COPY_AGAIN}")
    difference = golden.difference(model)
    if not difference <= tolerance:  # so that NaN fails
        raise PublishError(
            f"{model.path}: differs from its golden answer by {difference:.2g} on average, more than the "
            f"{tolerance:.2g} allowed, so it does not compute here what was published; run it without a delegate, "
            "with another version of LiteRT, or use the float32 variant"
        )
    return difference
