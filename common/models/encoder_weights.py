"""Starting an encoder from weights of a file, such as one that was trained on many natural images.

The file is a NumPy archive (.npz) of float arrays by weight name, `encoder/...` as `Network.specs` names them. Nothing
is downloaded.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.errors import StudyError
from common.models.network import Network

_KEY = "model.encoder_weights"
_PREFIX = "encoder/"

Values = Mapping[str, npt.NDArray[np.float32]]


def load_encoder_weights(network: Network, path: Path) -> dict[str, npt.NDArray[np.float32]]:
    """The file's weights of the network's encoder by name, in the network's order.

    Names that do not begin with `encoder/`, a classifier's for instance, are not read. The encoder's weights that the
    file does not hold are not in the result: they begin as without a file.

    Raises
    ------
    StudyError : the network has no encoder, the file cannot be read, holds none of the encoder's weights, names an
        encoder's weight that the network does not have, or has one of another shape, type or with values that are not
        finite.
    """
    specs = {spec.name: spec for spec in network.specs if spec.name.startswith(_PREFIX)}
    if not specs:
        raise StudyError(f"{_KEY}: the network has no encoder to load; give a model.name that has one, or null")
    arrays = _read(path)
    if not arrays:
        raise StudyError(f"{_KEY}: expected arrays named like {next(iter(specs))}, found none ({path})")
    if unknown := sorted(set(arrays) - set(specs)):
        raise StudyError(
            f"{_KEY}: {_listed(unknown)} not of this encoder; give the file of the encoder that model.name, "
            f"model.encoder and model.normalization say ({path})"
        )
    problems = [
        f"{name}: expected float values of shape {specs[name].shape}, all finite, found {array.dtype} {array.shape}"
        for name, array in arrays.items()
        if array.shape != specs[name].shape or array.dtype.kind != "f" or not np.isfinite(array).all()
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise StudyError(
            f"{_KEY}: {'; '.join(problems[:3])}{more}; model.filters 16 gives encoders their published widths ({path})"
        )
    return {name: np.asarray(arrays[name], np.float32) for name in specs if name in arrays}


def with_encoder_weights(
    network: Network, weights: Sequence[npt.ArrayLike], values: Values
) -> list[npt.NDArray[np.float32]]:
    """The network's weights, in order, those of `values` in their places."""
    return [
        values[spec.name] if spec.name in values else np.asarray(weight, np.float32)
        for spec, weight in zip(network.specs, weights, strict=True)
    ]


def _read(path: Path) -> dict[str, npt.NDArray[np.generic]]:
    try:
        # No pickles: a file from elsewhere must not run code.
        with np.load(path, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("a single array")
            return {name: archive[name] for name in archive.files if name.startswith(_PREFIX)}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0] or type(error).__name__
        raise StudyError(
            f"{_KEY}: cannot be read as a NumPy archive (.npz) without pickled objects: {reason} ({path})"
        ) from error


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{shown} {'is' if len(names) == 1 else 'are'}"
