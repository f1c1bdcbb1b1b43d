"""What a run keeps from round to round: the program's state to go on from, and the weights worth publishing."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_federated as tff
import tree

from common.errors import RunFolderError, WireError
from common.learning.graph import to_numpy
from common.wire.partial import disk_hit
from common.wire.tensors import Array, Stored, TensorSpec, read_tensors, write_tensors
from server.run_folder import storing

_SUFFIX = ".tensors"


def _unrecorded(number: int, stored: Stored) -> None:
    """Where nobody keeps a journal."""


class FileStateManager(tff.program.ProgramStateManager):  # type: ignore[misc]
    """Program state as one tensor file a version, written so that a crash leaves the old file or the new one.

    TFF's own manager writes SavedModels, neither durable nor atomic, and slow for large models.

    A file that was not recorded before the coordinator was killed does not count: its round is done again, to the same
    bits.

    Parameters
    ----------
    folder : where the files lie; it must exist.
    keep : how many versions to keep; older ones are removed after each save.
    recorded : the hex SHA-256 by version of what was saved before; None or empty: whatever is there counts.
    record : called with each version once it is on disk, before older ones go; what it raises passes.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = 2,
        recorded: Mapping[int, str] | None = None,
        record: Callable[[int, Stored], None] = _unrecorded,
    ) -> None:
        self._folder = folder
        self._keep = keep
        self._recorded = dict(recorded or {})
        self._record = record

    async def get_versions(self) -> list[int] | None:
        """The versions that can be loaded, ascending, and the last one recorded; None where there are none."""
        files = [int(path.stem) for path in self._folder.glob(f"*{_SUFFIX}") if path.stem.isdigit()]
        if self._recorded:
            files = [version for version in files if version in self._recorded] + [max(self._recorded)]
        return sorted(set(files)) or None

    async def load(self, version: int, structure: Any) -> Any:
        """The state saved as `version`, in the containers of `structure`.

        Raises
        ------
        tff.program.ProgramStateNotFoundError : there is no such version.
        RunFolderError : the file is gone, damaged or of another study's state.
        """
        path = self._path(version)
        if not path.exists() and version != max(self._recorded, default=0):
            raise tff.program.ProgramStateNotFoundError(version)
        digest = bytes.fromhex(self._recorded[version]) if version in self._recorded else None
        try:
            leaves = await asyncio.to_thread(read_tensors, path, None, digest)
            state = tree.unflatten_as(
                structure, [_restored(leaf, like) for leaf, like in zip(leaves, tree.flatten(structure), strict=True)]
            )
        except (WireError, ValueError) as error:
            raise RunFolderError(
                f"{path}: the saved state cannot be used ({error}); `wardround repair --run {self._folder.parent}` "
                "goes back to the last good round and says beforehand, with --dry-run, which that is"
            ) from error
        if digest is None:
            await asyncio.to_thread(self._adopt, version)
        return state

    async def save(self, program_state: Any, version: int) -> None:
        """Saves the state; a version that counts is refused with `tff.program.ProgramStateExistsError`."""
        path = self._path(version)
        if path.exists() and (version in self._recorded or not self._recorded):
            raise tff.program.ProgramStateExistsError(version=version, path=str(self._folder))
        materialized = await tff.program.materialize_value(program_state)
        leaves = [_storable(leaf) for leaf in tree.flatten(materialized)]
        await asyncio.to_thread(self._save, version, leaves)

    def _save(self, version: int, leaves: list[Array]) -> None:
        path = self._path(version)
        disk_hit("state.before", path)
        stored = write_tensors(path, leaves)
        self._record(version, stored)
        self._recorded[version] = stored.digest.hex()
        disk_hit("state.saved", path)
        versions = sorted(int(old.stem) for old in self._folder.glob(f"*{_SUFFIX}") if old.stem.isdigit())
        for old in [old for old in versions if old <= version][: -self._keep]:
            with storing(self._path(old)):
                self._path(old).unlink(missing_ok=True)

    def _adopt(self, version: int) -> None:
        """Records a state that a version of the program without digests wrote."""
        with self._path(version).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
        self._record(version, Stored(self._path(version), digest, self._path(version).stat().st_size))
        self._recorded[version] = digest.hex()

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
    """Releases model weights as a tensor file a round; `keep_only` removes those that are no longer wanted.

    Parameters
    ----------
    folder : where the files lie; it must exist.
    record : called with each round once its weights are on disk; what it raises passes.
    """

    def __init__(self, folder: Path, *, record: Callable[[int, Stored], None] = _unrecorded) -> None:
        self._folder = folder
        self._record = record

    async def release(self, value: Any, key: int) -> None:
        """Writes the weights `value`, in the network's order (`Network.specs`), as round `key`."""
        weights = await tff.program.materialize_value(value)
        await asyncio.to_thread(self._write, key, list(weights))

    def _write(self, key: int, weights: list[Any]) -> None:
        path = self._folder / f"{key:06d}{_SUFFIX}"
        disk_hit("model.before", path)
        stored = write_tensors(path, to_numpy(weights))
        self._record(key, stored)
        disk_hit("model.released", path)

    def keep_only(self, rounds: Sequence[int], *, up_to: int) -> None:
        """Removes the weights of other rounds up to `up_to`, and keeps the newest of them.

        Later ones stay: they are of a round whose state is not saved yet, and may be the best so far.
        """
        numbered = {int(path.stem): path for path in self._folder.glob(f"*{_SUFFIX}") if path.stem.isdigit()}
        saved = {number: path for number, path in numbered.items() if number <= up_to}
        for number, path in saved.items():
            if number not in rounds and number != max(saved):
                with storing(path):
                    path.unlink(missing_ok=True)
        disk_hit("models.removed", self._folder)


def load_weights(
    folder: Path, round_number: int, expected: Sequence[TensorSpec], digest: str | None = None
) -> list[Array]:
    """The released weights of a round, whose hex SHA-256 is `digest` where it is known.

    Raises
    ------
    RunFolderError : they were not kept, or are damaged.
    """
    path = folder / f"{round_number:06d}{_SUFFIX}"
    if not path.exists():
        kept = ", ".join(str(int(p.stem)) for p in sorted(folder.glob(f"*{_SUFFIX}"))) or "none"
        raise RunFolderError(f"{path}: the weights of round {round_number} were not kept; kept are: {kept}")
    try:
        return read_tensors(path, expected, bytes.fromhex(digest) if digest is not None else None)
    except WireError as error:
        raise RunFolderError(
            f"{path}: the weights cannot be used ({error}); publish another round with `wardround publish --round N`, "
            "or set the file aside with `wardround repair`"
        ) from error
