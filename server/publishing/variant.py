"""A published file, what was measured on it, and what is said of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.export.figures import json_ready
from common.study import Study
from server.evaluation import DetailedResult, HoldoutResult
from server.publishing.contents import Contents
from server.publishing.onnx_export import ONNX

NOT_ALONE = "needs a site's own normalization before use (training.personal: normalization): personalize it first"
"""Said of every file of a study whose sites kept their normalization layers: those in the file are as they began."""
WORTH_MENTIONING = 0.9
"""A quantized variant with a smaller share of narrow weights is said to be one."""


@dataclass(frozen=True)
class Variant:
    """One published file and what was measured on it. `failure` says why there is none; the figures are then None."""

    name: str
    failure: str | None = None
    file: str | None = None
    sha256: str | None = None
    size: int | None = None
    input_shape: tuple[int, ...] = ()
    output_shape: tuple[int, ...] = ()
    contents: Contents | None = None
    difference: float | None = None  # mean, of probabilities, from float32's on the golden tile
    result: HoldoutResult | None = None
    detailed: DetailedResult | None = None
    latency: float | None = None

    @property
    def cases_of_sites(self) -> dict[str, int]:
        """The number of holdout cases of every site, by site name; empty where nothing was measured."""
        return self.result.cases_of_sites if self.result else {}


def figures_of(study: Study, variant: Variant, reference: Variant) -> dict[str, Any]:
    """One variant's entry in the report; `reference` is float32."""
    dice = variant.result.mean_dice if variant.result else math.nan
    large = variant.result.mean_dice_of_large_sites if variant.result else math.nan
    # float32 is what the others are held against, so it loses nothing, measured or not.
    lost = 0.0 if variant is reference else math.nan
    if variant is not reference and variant.result and reference.result:
        lost = reference.result.mean_dice - dice
    ratio = variant.size / reference.size if variant.size and reference.size else None
    figures = {
        "name": variant.name,
        "file": variant.file,
        "bytes": variant.size,
        "ratio_to_float32": ratio,
        "dice": dice,
        "dice_of_large_sites": large,
        "dice_lost": lost,
        "latency_ms": variant.latency * 1e3 if variant.latency else None,
        "latency_ratio": variant.latency / reference.latency if variant.latency and reference.latency else None,
        # Wardround's own prediction runs LiteRT's files, and takes the fastest that is recommended.
        "recommended": variant.failure is None
        and variant.name != ONNX
        and works_alone(study)
        and lost <= study.publishing.allowed_dice_loss,
        "failed": variant.failure is not None,
        "note": _note(study, variant, ratio, lost),
    }
    return {key: json_ready(value) for key, value in figures.items()}


def works_alone(study: Study) -> bool:
    """Whether the study's model is of use as it is; else only with normalization layers of a site's own."""
    return study.training.personal == "none"


def _note(study: Study, variant: Variant, ratio: float | None, lost: float) -> str:
    if variant.failure is not None:
        return variant.failure
    notes = [] if works_alone(study) else [NOT_ALONE]
    allowed = study.publishing.allowed_dice_loss
    contents = variant.contents
    if contents and variant.name == "int8" and contents.float_operations:
        count = sum(contents.float_operations.values())
        notes.append(
            f"{count} of {contents.operations} operations stay in floating point: {_counted(contents.float_operations)}"
        )
    if contents and variant.name != "float32" and contents.narrow_share < WORTH_MENTIONING:
        notes.append(f"only {contents.narrow_share:.0%} of its weights are kept in 16 bits or fewer")
    if contents and contents.volumetric:
        notes.append(f"has 3D operations, which are neither quantized nor fast: {_counted(contents.volumetric)}")
    if contents and contents.unfolded:
        notes.append(f"normalization is not folded into the convolutions: {_counted(contents.unfolded)}")
    if variant.name == ONNX:
        notes.append("for other runtimes; measured by ONNX Runtime")
    elif variant.name != "float32" and ratio is not None and ratio > 0.95:
        notes.append("not smaller than float32")
    if math.isnan(lost):
        notes.append("not measured on a holdout")
    elif lost > allowed:
        notes.append(f"loses {lost:.4f} Dice, more than the {allowed:g} allowed")
    return "; ".join(notes)


def _counted(operations: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in sorted(operations.items()))
