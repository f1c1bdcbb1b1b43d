"""A published file on a holdout: what a hospital gets, run as a hospital runs it, without TensorFlow."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from common.inference.lite import LiteModel
from common.inference.published import PublishedModel
from server.evaluation.detailed import DetailedResult
from server.evaluation.holdout import Holdout


def evaluate_published(model: PublishedModel, holdout: Path, sites: Sequence[str] | None = None) -> DetailedResult:
    """All metrics of one file of a published version, on all cores.

    `sites` are those whose names the images' end in; None: those of the version, which knows them by pseudonyms.

    Raises
    ------
    DataError : the holdout does not fit the study that the version was trained for (see `Holdout`).
    PublishError : LiteRT cannot run the file.
    """
    study = model.study
    if sites is not None:
        study = dataclasses.replace(study, cohort=dataclasses.replace(study.cohort, sites=tuple(sites)))
    images = Holdout(study, holdout)
    return images.evaluate_in_detail(
        LiteModel(model.file),
        tile=model.study.publishing.tile,
        threads=len(os.sched_getaffinity(0)),
        fixed_batch=True,
        batch_size=1,
    )
