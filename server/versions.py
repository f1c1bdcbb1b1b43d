"""The versions that a run has published: a folder each, named v1, v2 and so on."""

from __future__ import annotations

from pathlib import Path

from common.errors import RunFolderError
from common.inference.published import MANIFEST
from common.security.pem_files import AUTHORITY_CERTIFICATE
from server.run_folder import RunFolder


def published_versions(folder: Path) -> dict[str, Path]:
    """The folders of all versions in a run's `published` by name, the newest last.

    Raises
    ------
    RunFolderError : the folder cannot be read.
    """
    try:
        return {path.name: path for _, path in _numbered(folder) if (path / MANIFEST).is_file()}
    except OSError as error:
        raise RunFolderError(f"{folder}: cannot be read ({error.strerror})") from error


def next_version(folder: Path) -> str:
    """The name of the version to come: above all numbers that are taken, be it by what is no version."""
    return f"v{max((number for number, _ in _numbered(folder)), default=0) + 1}"


def is_version(path: Path) -> bool:
    """Whether the path is that of a published version, or of a file in one."""
    return ((path if path.is_dir() else path.parent) / MANIFEST).is_file()


def newest_version(run: RunFolder) -> Path | None:
    """The folder of the newest version that a run published, if there is any.

    Raises
    ------
    RunFolderError : the folder cannot be read.
    """
    return next(reversed(published_versions(run.published).values()), None)


def run_of(version: Path) -> RunFolder | None:
    """The run in whose folder a published version (or a file in it) still lies, if it does."""
    folder = (version if version.is_dir() else version.parent).resolve()
    run = RunFolder(folder.parents[1])
    return run if folder.parent == run.published and run.study.is_file() else None


def authority_of(version: Path) -> Path | None:
    """The authority's certificate of the run that a version lies in, where the coordinator's identity is there too."""
    run = run_of(version)
    return run.identity / "coordinator" / AUTHORITY_CERTIFICATE if run is not None else None


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """What has a version's name, by number."""
    return sorted((int(path.name[1:]), path) for path in folder.glob("v*") if path.name[1:].isdecimal())
