"""What lies in a folder, listed once: circular links, closed folders and impossible names do not stop it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import DataError
from common.imaging.findings import Code, Finding
from common.wording import file_name


@dataclass(frozen=True)
class Listing:
    """A folder's files and folders, sorted, without hidden ones.

    Attributes
    ----------
    files : what is not a folder, and folders that are called like an image file, which readers refuse.
    folders : the rest.
    findings : what could not be listed or named.
    """

    files: list[Path] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


def list_folder(folder: Path) -> Listing:
    """The entries of one folder; a folder that cannot be listed is a finding and has none.

    What cannot be named or listed counts as a case of its own, which is kept out.
    """
    listing = Listing()
    try:
        entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        # Whatever is in there is kept out: it counts as a case.
        name = file_name(folder)
        message = f"folder {name}: cannot be listed ({error.strerror})"
        listing.findings.append(Code.UNREADABLE_FOLDER.finding(message, case=name, file=name))
        return listing
    for path in entries:
        if file_name(path) != path.name:
            listing.findings.append(
                Code.NOT_TAKEN.finding(
                    f"file {file_name(path)}: the name is not valid text",
                    case=file_name(path),
                    file=file_name(path),
                    advice="Rename it, with letters, digits and signs of UTF-8.",
                )
            )
            continue
        try:
            (listing.folders if path.is_dir() else listing.files).append(path)
        except OSError as error:
            # The folder may be listed, but not searched.
            message = f"{path.name}: cannot be looked at ({error.strerror})"
            advice = "Give the user that runs the site the right to search its folder."
            listing.findings.append(
                Code.UNREADABLE_FOLDER.finding(message, case=path.name, file=path.name, advice=advice)
            )
    return listing


def is_there(path: Path) -> bool:
    """Whether there is such a file or folder; False where its folder may not be searched, which `list_folder` tells."""
    try:
        return path.exists()
    except OSError:
        return False


def is_folder(path: Path) -> bool:
    """Whether this is a folder; False as for `is_there`."""
    try:
        return path.is_dir()
    except OSError:
        return False


def walk(folder: Path) -> Iterator[tuple[Path, Listing]]:
    """Every folder below and including `folder`, each once, whatever links there are; parents first, sorted.

    Raises
    ------
    DataError
        `folder` itself cannot be listed.
    """
    seen: set[tuple[int, int]] = set()
    waiting = [folder]
    first = True
    while waiting:
        current = waiting.pop()
        try:
            status = current.stat()
        except OSError:
            continue  # removed since it was listed; there is nothing to say about it
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        listing = list_folder(current)
        if first:
            require_listable(folder)
            first = False
        yield current, listing
        waiting.extend(reversed(listing.folders))


def require_listable(folder: Path) -> None:
    """See that there is something to look at.

    Raises
    ------
    DataError
        The folder does not exist, is none, or may not be read.
    """
    try:
        os.scandir(folder).close()
    except FileNotFoundError:
        raise DataError(f"{folder}: the folder does not exist. Check the path.") from None
    except OSError as error:
        raise DataError(
            f"{folder}: the folder cannot be listed ({error.strerror}). Check that it is a folder this user may read."
        ) from error
