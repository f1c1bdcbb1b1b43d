"""From weights to files: LiteRT models in several precisions, each measured on the holdout, with their papers.

A folder of a published version appears whole or not at all. Every figure in its manifest was measured on exactly the
file that lies beside it, run as a hospital runs it: by LiteRT, a tile at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from common.errors import PublishError
from common.study import Study
from common.whole_folder import appearing_whole
from server.evaluation import Holdout
from server.publishing.calibration import calibration_tiles, made_up_tile
from server.publishing.conversion import converted
from server.publishing.explanation import explained, figures_of_explanation
from server.publishing.manifest import write_papers
from server.publishing.measurement import compared, evaluated, timed
from server.publishing.provenance import Provenance
from server.publishing.variant import figures_of

__all__ = ["publish"]


def publish(
    study: Study,
    weights: Sequence[npt.ArrayLike],
    holdout: Holdout | None,
    folder: Path,
    *,
    details: Mapping[str, object],
    provenance: Provenance | None = None,
    progress: Callable[[str], None] = lambda _: None,
    announce: Callable[[dict[str, Any], Path], None] = lambda report, partial: None,
    threads: int | None = None,
) -> dict[str, Any]:
    """Convert, check, measure and describe a model; write it all to `folder`, whose name is the version.

    Parameters
    ----------
    study : Study
        `study.publishing` says which variants, for which tile.
    weights : in the order of the network's specs.
    holdout : Holdout or None
        Without one nothing is measured, int8 (which needs images to calibrate on) fails, and only float32 is
        recommended. Where the sites kept their normalization layers, no variant is.
    folder : Path
        Must not exist; its parent does.
    details : mapping
        What else to state of these weights, such as the round and its validation Dice. Goes to the manifest, and to the
        card except for figures that do not exist (None, NaN).
    provenance : Provenance or None
        What the papers say of the origin, and who signs them; None where that is nothing and nobody.
    progress : callable
        Takes a sentence on what begins.
    announce : callable
        Takes what is returned and the folder that is about to become `folder`; nothing is published where it raises.
    threads : int or None
        Holdout cases in work at once; None: one a core.

    Returns
    -------
    dict
        "version"; "variants": a list, float32 first, of "name", "file", "bytes", "ratio_to_float32" (of bytes, below 1
        is smaller), "dice", "dice_of_large_sites", "dice_lost" (against float32, below 0 is better), "latency_ms"
        (median, a tile on one thread), "latency_ratio" (to float32, below 1 is faster), "recommended", "failed" and
        "note"; "explanation": None where the study wants none, or "file", "bytes", "failed" and "note"; "calibration":
        the names of the holdout images that int8 was calibrated on, which may be those of
        patients: the manifest only counts them. What was not measured is None.

    Raises
    ------
    PublishError
        The folder exists or cannot be written, or float32 does not convert or does not compute what TensorFlow does.
        Another variant that does not convert or run is reported as failed instead.
    DataError : see `Holdout.load`.
    """
    from common.models import build_network

    if folder.exists():
        raise PublishError(f"{folder}: this version exists already; publish under another version, or move it away")
    network = build_network(study)
    with appearing_whole(folder) as partial:
        calibration = calibration_tiles(study, holdout) if holdout is not None else []
        names = [name for name, _ in calibration]
        made_up = made_up_tile(study, [tile for _, tile in calibration])
        tiles = [tile for _, tile in calibration] or [made_up]
        variants = converted(study, network, weights, tiles, holdout is not None, partial, progress)
        golden, variants = compared(variants, partial, made_up)
        variants = timed(study, variants, partial, tiles[0], progress)
        if holdout is not None:
            variants = evaluated(study, variants, holdout, partial, threads, progress)
        explanation = explained(study, network, weights, [*tiles, made_up], partial, progress)
        progress("writing the manifest and the model card")
        report = {
            "version": folder.name,
            "variants": [figures_of(study, variant, variants[0]) for variant in variants],
            "explanation": figures_of_explanation(explanation) if explanation is not None else None,
            "calibration": names if any(v.name == "int8" and not v.failure for v in variants) else [],
        }
        origin = provenance or Provenance()
        write_papers(study, network, variants, report, holdout, details, weights, golden, explanation, origin, partial)
        announce(report, partial)
    return report
