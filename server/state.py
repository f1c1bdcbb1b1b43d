"""What a run keeps from round to round: the program's state to go on from, and the weights worth publishing."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_federated as tff
import tree

from common.errors import RunFolderError, WireError
from common.learning.graph import to_numpy
from common.wire.tensors import Array, TensorSpec, read_tensors, write_tensors

_SUFFIX = ".tensors"


class FileStateManager(tff.program.ProgramStateManager):  # type: ignore[misc]
    """Program state as one tensor file a version, written so that a crash leaves the old file or the new one.

    TFF's own manager writes SavedModels, neither durable nor atomic, and slow for large models.

    Parameters
    ----------
    folder : where the files lie; it must exist.
    keep : how many versions to keep; older ones are removed after each save.
    """

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self._folder = folder
        self._keep = keep

    async def get_versions(self) -> list[int] | None:
        """The versions that can be loaded, ascending; None where there are none."""
        return sorted(int(path.stem) for path in self._folder.glob(f"*{_SUFFIX}") if path.stem.isdigit()) or None

    async def load(self, version: int, structure: Any) -> Any:
        """The state saved as `version`, in the containers of `structure`.

        Raises
        ------
        tff.program.ProgramStateNotFoundError : there is no such version.
        RunFolderError : the file is damaged or of another study's state.
        """
        path = self._path(version)
        if not path.exists():
            raise tff.program.ProgramStateNotFoundError(version)
        try:
            leaves = await asyncio.to_thread(read_tensors, path)
            return tree.unflatten_as(
                structure, [_restored(leaf, like) for leaf, like in zip(leaves, tree.flatten(structure), strict=True)]
            )
        except (WireError, ValueError) as error:
            raise RunFolderError(
                f"{path}: the saved state cannot be used ({error}); remove this file to go on from the round before"
            ) from error

    async def save(self, program_state: Any, version: int) -> None:
        """Saves the state; a version that exists is refused with `tff.program.ProgramStateExistsError`."""
        path = self._path(version)
        if path.exists():
            raise tff.program.ProgramStateExistsError(version=version, path=str(self._folder))
        materialized = await tff.program.materialize_value(program_state)
        await asyncio.to_thread(write_tensors, path, [_storable(leaf) for leaf in tree.flatten(materialized)])
        for old in (await self.get_versions() or [])[: -self._keep]:
            self._path(old).unlink(missing_ok=True)

    def _path(self, version: int) -> Path:
        return self._folder / f"{version:06d}{_SUFFIX}"


def _storable(leaf: Any) -> Array:
    if hasattr(leaf, "to_bytes") and not isinstance(leaf, (int, np.generic, np.ndarray)):
        return np.frombuffer(leaf.to_bytes(), np.uint8)
    return to_numpy([leaf])[0]


def _restored(leaf: Array, like: Any) -> Any:
    if hasattr(type(like), "from_bytes") and not isinstance(like, (int, np.generic, np.ndarray)):
        return type(like).from_bytes(leaf.tobytes())
    expected = to_numpy([like])[0]
    if leaf.shape != expected.shape or leaf.dtype != expected.dtype:
        raise ValueError(f"expected {expected.dtype}{list(expected.shape)}, found {leaf.dtype}{list(leaf.shape)}")
    return leaf


class ModelReleaseManager(tff.program.ReleaseManager):  # type: ignore[misc]
    """Releases model weights as a tensor file a round; `keep_only` removes those that are no longer wanted."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def release(self, value: Any, key: int) -> None:
        """Writes the weights `value`, in the network's order (`Network.specs`), as round `key`."""
        weights = await tff.program.materialize_value(value)
        await asyncio.to_thread(write_tensors, self._folder / f"{key:06d}{_SUFFIX}", to_numpy(list(weights)))

    def keep_only(self, rounds: Sequence[int]) -> None:
        """Removes the weights of all other rounds."""
        for path in self._folder.glob(f"*{_SUFFIX}"):
            if path.stem.isdigit() and int(path.stem) not in rounds:
                path.unlink(missing_ok=True)


def load_weights(folder: Path, round_number: int, expected: Sequence[TensorSpec]) -> list[Array]:
    """The released weights of a round.

    Raises
    ------
    RunFolderError : they were not kept, or are damaged.
    """
    path = folder / f"{round_number:06d}{_SUFFIX}"
    if not path.exists():
        kept = ", ".join(str(int(p.stem)) for p in sorted(folder.glob(f"*{_SUFFIX}"))) or "none"
        raise RunFolderError(f"{path}: the weights of round {round_number} were not kept; kept are: {kept}")
    try:
        return read_tensors(path, expected)
    except WireError as error:
        raise RunFolderError(f"{path}: the weights cannot be used ({error}); publish another round") from error
