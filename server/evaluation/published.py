"""A published file on a holdout: what a hospital gets, run as a hospital runs it, without TensorFlow."""

from __future__ import annotations

import os
from pathlib import Path

from common.inference.lite import LiteModel
from common.inference.published import PublishedModel
from server.evaluation.detailed import DetailedResult
from server.evaluation.holdout import Holdout


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
