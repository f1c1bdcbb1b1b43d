"""A published file on a holdout: what a hospital gets, run as a hospital runs it, without TensorFlow."""

from __future__ import annotations

import os
from pathlib import Path

from common.errors import RunFolderError
from common.inference.lite import LiteModel
from common.inference.published import MANIFEST, PublishedModel
from server.evaluation.detailed import DetailedResult
from server.evaluation.holdout import Holdout
from server.run_folder import RunFolder


def evaluate_published(model: PublishedModel, holdout: Path) -> DetailedResult:
    """All metrics of one file of a published version, on all cores.

    Raises
    ------
    DataError : the holdout does not fit the study that the version was trained for (see `Holdout`).
    PublishError : LiteRT cannot run the file.
    """
    images = Holdout(model.study, holdout)
    return images.evaluate_in_detail(
        LiteModel(model.file),
        tile=model.study.publishing.tile,
        threads=len(os.sched_getaffinity(0)),
        fixed_batch=True,
        batch_size=1,
    )


def is_version(path: Path) -> bool:
    """Whether the path is that of a published version, or of a file in one."""
    return ((path if path.is_dir() else path.parent) / MANIFEST).is_file()


def newest_version(run: RunFolder) -> Path | None:
    """The folder of the newest version that a run published, if there is any.

    Raises
    ------
    RunFolderError : the folder cannot be read.
    """
    try:
        found = [path for path in run.published.glob("v*") if path.name[1:].isdecimal() and is_version(path)]
    except OSError as error:
        raise RunFolderError(f"{run.published}: cannot be read ({error.strerror})") from error
    return max(found, key=lambda path: int(path.name[1:]), default=None)


def run_of(version: Path) -> RunFolder | None:
    """The run in whose folder a published version (or a file in it) still lies, if it does."""
    folder = (version if version.is_dir() else version.parent).resolve()
    run = RunFolder(folder.parents[1])
    return run if folder.parent == run.published and run.study.is_file() else None
