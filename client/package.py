"""Which package runs here: its version, and a digest over every file of it that a site runs."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

from common.errors import ApprovalError
from common.version import VERSION

_PARTS = ("client", "common")
"""The packages that a site runs; nothing of `server` is loaded at a site."""


@dataclass(frozen=True)
class Package:
    """The installed package; `digest` is hexadecimal."""

    version: str
    digest: str
    files: int


@functools.cache
def installed_package() -> Package:
    """The package that this process runs, read once; `require_unchanged` tells whether it is so still.

    The digest is SHA-256 over the path, the size and the bytes of every file, in the order of paths: not of the sources
    alone, because an extension module beside one would be loaded in its place. Byte code is left out: Python makes it.
    """
    return package_in(Path(__file__).resolve().parents[1])


def require_unchanged() -> None:
    """Raises ApprovalError where the files have changed since `installed_package` read them.

    Most modules are loaded after that, so an installation that is renewed meanwhile would run unseen.
    """
    if package_in(Path(__file__).resolve().parents[1]) != installed_package():
        raise ApprovalError(
            "the installed package has changed while the site was starting, so that it is not known what would run; "
            "start it again, and approve the study again where that is asked for"
        )


def package_in(root: Path) -> Package:
    """The package in a folder that holds `client` and `common`. Raises ApprovalError where a file cannot be read."""
    digest = hashlib.sha256()
    paths = sorted(
        path.relative_to(root).as_posix()
        for part in _PARTS
        for path in (root / part).rglob("*")
        if "__pycache__" not in path.parts and path.is_file()
    )
    for path in paths:
        try:
            content = (root / path).read_bytes()
        except OSError as error:
            raise ApprovalError(
                f"{root / path}: a file of the installed package cannot be read ({error.strerror}), so it is not known "
                "what would run; correct its rights, or install the package anew"
            ) from error
        digest.update(f"{len(path.encode())}:{path}:{len(content)}:".encode())
        digest.update(content)
    return Package(VERSION, digest.hexdigest(), len(paths))
