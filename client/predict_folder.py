"""The folder that `predict` writes to: that it can be written to, and what of a case lies in it already."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from common.errors import UsageError

_SEGMENTATION = re.compile(r"(?P<name>.+)_seg(\.ome\.tif|\.tif|\.tiff|\.nii|\.nii\.gz|\.dcm)")
_OF_CASE = re.compile(
    r"_(seg|objects)(\.ome\.tif|\.tif|\.tiff|\.nii|\.nii\.gz|\.dcm)|_objects\.json|_overlay\.png|_explain_[^/]+\.png"
)


@contextlib.contextmanager
def results_folder(out: Path) -> Iterator[None]:
    """Makes the folder; if nothing was written at the end, what was made is gone again.

    Raises
    ------
    UsageError : it cannot be made, or not be written to.
    """
    made: list[Path] = []
    try:
        try:
            made = [path for path in (out, *out.parents) if not path.exists()]
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"--out {out}: cannot be made ({error.strerror or error}); give a folder that may be written to"
            ) from error
        try:
            tempfile.TemporaryFile(
                prefix=".wardround-", dir=out
            ).close()  # rights alone do not tell of all file systems
        except OSError as error:
            raise UsageError(
                f"--out {out}: cannot be written to ({error.strerror or error}); check its rights, or give another "
                "folder"
            ) from error
        yield
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # it holds results
                path.rmdir()


def results_of(out: Path, name: str) -> list[Path]:
    """The files of a case in the folder, of whatever model, format and options.

    Where one case is called `a` and another `a_explain_b`, a file is of the one with the longer name.
    """
    try:
        files = sorted(out.iterdir())
    except OSError:  # not there yet
        return []
    names = {match["name"] for path in files if (match := _SEGMENTATION.fullmatch(path.name))}
    longer = tuple(f"{other}_" for other in names if other.startswith(f"{name}_"))
    return [
        path
        for path in files
        if path.name.startswith(name)
        and _OF_CASE.fullmatch(path.name[len(name) :])
        and not (longer and path.name.startswith(longer))
    ]


def refuse_existing(paths: Sequence[Path]) -> None:
    """Raises UsageError where there is any, before any work is done."""
    if paths:
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        raise UsageError(f"{paths[0]}{more}: exists already; give another --out, or --force to replace it")
