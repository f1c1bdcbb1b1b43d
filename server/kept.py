"""The tensor files of states and models: which are there, and whether they are as they were written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from common.errors import RunFolderError, WireError
from common.wire.tensors import read_tensors

_SUFFIX = ".tensors"


def kept(folder: Path) -> dict[int, Path]:
    """The files by round, ascending."""
    return dict(sorted((int(path.stem), path) for path in folder.glob(f"*{_SUFFIX}") if path.stem.isdigit()))


def fault(path: Path, sha256: str | None) -> str:
    """What is wrong with a tensor file of this hex SHA-256 (None: not known); "" if nothing is."""
    try:
        read_tensors(path, digest=bytes.fromhex(sha256) if sha256 is not None else None)
    except WireError as error:
        return str(error).removeprefix(f"{path}: ").split(";")[0]
    return ""


def check_kept(folder: Path, recorded: Mapping[int, str]) -> None:
    """Raises RunFolderError if a file of a recorded round is not as it was written."""
    for number, path in kept(folder).items():
        found = fault(path, recorded[number]) if number in recorded else ""
        if found:
            raise RunFolderError(
                f"{path}: damaged ({found}); `wardround repair --run {folder.parent} --dry-run` says what can be "
                "saved, `wardround repair` saves it"
            )
