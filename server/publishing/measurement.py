"""How long published files take for a tile, and how well they segment the holdout, run by LiteRT."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.export.conversion import Tile
from common.export.figures import median_seconds
from common.inference.golden import Golden
from common.study import Study
from server.evaluation import Holdout
from server.publishing.conversion import opened
from server.publishing.onnx_export import OnnxModel
from server.publishing.variant import Variant

if TYPE_CHECKING:
    from common.inference.lite import LiteModel

_RUNS = {2: 15, 3: 5}


def compared(variants: Sequence[Variant], folder: Path, tile: Tile) -> tuple[Golden, list[Variant]]:
    """The golden pair, float32's answer to `tile`, and the variants with their mean difference from it."""
    golden = Golden(tile, _opened(folder, variants[0])(tile[np.newaxis])[0])
    return golden, [
        replace(variant, difference=golden.difference(_opened(folder, variant))) if variant.file else variant
        for variant in variants
    ]


def timed(
    study: Study, variants: Sequence[Variant], folder: Path, tile: Tile, progress: Callable[[str], None]
) -> list[Variant]:
    """With the median seconds of a tile on one thread."""
    progress("measuring the time that a tile takes")
    models = {variant.name: _opened(folder, variant) for variant in variants if variant.file}
    seconds = median_seconds(models, tile, _RUNS[study.task.dimensions])
    return [replace(variant, latency=seconds.get(variant.name)) for variant in variants]


def evaluated(
    study: Study,
    variants: Sequence[Variant],
    holdout: Holdout,
    folder: Path,
    threads: int | None,
    progress: Callable[[str], None],
) -> list[Variant]:
    """With their Dice and IoU on the holdout; float32 with every metric there is."""
    results = []
    for variant in variants:
        if variant.file:
            progress(f"evaluating {variant.name} on {len(holdout)} holdout images")
            model, tile, cores = _opened(folder, variant), study.publishing.tile, threads or _cores()
            if variant is variants[0]:
                detailed = holdout.evaluate_in_detail(model, tile=tile, threads=cores, fixed_batch=True, batch_size=1)
                variant = replace(variant, result=detailed.overlap, detailed=detailed)
            else:
                result = holdout.evaluate(model, tile=tile, threads=cores, fixed_batch=True, batch_size=1)
                variant = replace(variant, result=result)
        results.append(variant)
    return results


def _opened(folder: Path, variant: Variant) -> LiteModel | OnnxModel:
    assert variant.file is not None
    return opened(folder / variant.file)


def _cores() -> int:
    return len(os.sched_getaffinity(0))
