"""How long published files take for a tile, and how well they segment the holdout, run by LiteRT."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.inference.golden import Golden
from common.study import Study
from server.evaluation import Holdout
from server.publishing.calibration import Tile
from server.publishing.conversion import opened
from server.publishing.onnx_export import OnnxModel
from server.publishing.variant import Variant

if TYPE_CHECKING:
    from common.inference.lite import LiteModel

_RUNS = {2: 15, 3: 5}
_TOLERANCE = 2.0
"""How often its own difference from float32 a variant may have elsewhere: other machines round otherwise."""
_SMALLEST_TOLERANCE = 1e-3


def compared(variants: Sequence[Variant], folder: Path, tile: Tile) -> tuple[Golden, list[Variant]]:
    """The golden pair, float32's answer to `tile`, and the variants with their mean difference from it."""
    golden = Golden(tile, _opened(folder, variants[0])(tile[np.newaxis])[0])
    return golden, [
        replace(variant, difference=golden.difference(_opened(folder, variant))) if variant.file else variant
        for variant in variants
    ]


def tolerances(variants: Sequence[Variant]) -> dict[str, float]:
    """How far each file's answer to the golden tile may be from the golden answer, as a mean, by variant's name."""
    return {
        variant.name: max(_TOLERANCE * variant.difference, _SMALLEST_TOLERANCE)
        for variant in variants
        if variant.difference is not None
    }


def timed(
    study: Study, variants: Sequence[Variant], folder: Path, tile: Tile, progress: Callable[[str], None]
) -> list[Variant]:
    """With the median seconds of a tile on one thread; the variants take turns, so that other load hits all alike."""
    progress("measuring the time that a tile takes")
    models = {variant.name: _opened(folder, variant) for variant in variants if variant.file}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    batch = tile[np.newaxis]
    for run in range(_RUNS[study.task.dimensions] + 1):
        for name, model in models.items():
            began = time.perf_counter()
            model(batch)
            if run:  # the first call sets up
                seconds[name].append(time.perf_counter() - began)
    return [
        replace(variant, latency=statistics.median(seconds[variant.name])) if variant.file else variant
        for variant in variants
    ]


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
