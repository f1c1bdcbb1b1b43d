"""The manifest: what identifies and describes every file of a published version."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from common.inference.golden import GOLDEN, Golden
from common.inference.published import NEWEST_FORMAT
from common.study import Study
from common.version import VERSION
from common.wire.tensors import write_tensors
from server.evaluation import Holdout
from server.publishing.explanation import Explanation, entry_of_explanation
from server.publishing.measurement import tolerances
from server.publishing.model_card import model_card, outputs_of
from server.publishing.variant import Variant, json_ready, works_alone

if TYPE_CHECKING:
    from common.models.network import Network

WEIGHTS = "weights.tensors"


def write_papers(
    study: Study,
    network: Network,
    variants: Sequence[Variant],
    report: Mapping[str, Any],
    holdout: Holdout | None,
    details: Mapping[str, object],
    weights: Sequence[npt.ArrayLike],
    golden: Golden,
    explanation: Explanation | None,
    folder: Path,
) -> None:
    """Write the weights, the golden pair, the model card, the study and, last, the manifest with all their digests.

    `study.yaml` is what prediction prepares images by. The manifest repeats what another runtime needs to feed a file.
    """
    stored = write_tensors(folder / WEIGHTS, [np.asarray(weight, np.float32) for weight in weights])
    pair = golden.to_bytes()
    (folder / GOLDEN).write_bytes(pair)
    documents = {
        "model_card.md": model_card(study, network, variants, report, details).encode(),
        "study.yaml": _without_paths(study).to_yaml().encode(),
    }
    for name, content in documents.items():
        (folder / name).write_bytes(content)
    manifest = {
        "format": NEWEST_FORMAT,
        "wardround": VERSION,
        "study": study.name,
        "version": report["version"],
        "details": details,
        "model": {
            "name": study.model.name,
            "filters": study.model.filters,
            "depth": study.model.depth,
            "normalization": study.model.normalization,
            "parameters": network.parameters,
            # False: of use only with normalization layers of a site's own (training.personal: normalization).
            "works_alone": works_alone(study),
        },
        "preprocessing": {
            "dimensions": study.task.dimensions,
            "channels": study.task.channels,
            "modalities": study.task.modalities,
            "missing_modality": study.task.missing_modality,
            "spacing": study.preprocessing.spacing,
            "intensity": study.preprocessing.intensity,
            "window": study.preprocessing.window,
            "crop": study.preprocessing.crop,
            "tile": study.publishing.tile,
            "axes": ["batch", *("z", "y", "x")[-study.task.dimensions :], "channel"],
            "overlap": study.evaluation.overlap,
            "classes": study.task.classes,
            "labels": study.task.labels,
            "head": study.model.head,
            "outputs": outputs_of(study),
        },
        "variants": [
            _manifest_entry(variant, figures) for variant, figures in zip(variants, report["variants"], strict=True)
        ],
        "holdout": {"cases": len(holdout), "sites": variants[0].cases_of_sites} if holdout is not None else None,
        # For warm starts and personalization: float32, in the order of the network's weights.
        "weights": {"file": WEIGHTS, "sha256": stored.digest.hex(), "bytes": stored.size},
        "golden": {
            "file": GOLDEN,
            **_identified(pair),
            "measure": "mean absolute difference",
            "tolerance": tolerances(variants),
        },
        "explanation": entry_of_explanation(study, explanation),
        "calibration_images": len(report["calibration"]),  # no names: they may be those of patients
        "documents": {name: _identified(content) for name, content in documents.items()},
    }
    text = json.dumps(json_ready(manifest), indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "manifest.json").write_text(text + "\n", encoding="utf-8")


def _without_paths(study: Study) -> Study:
    """The study without the paths of this machine, which are nobody else's business; the details say what they gave."""
    return replace(
        study,
        training=replace(study.training, start_from=None),
        model=replace(study.model, encoder_weights=None),
    )


def _identified(content: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def _manifest_entry(variant: Variant, figures: Mapping[str, Any]) -> dict[str, Any]:
    """The report's figures, and what identifies and describes the file."""
    entry = dict(figures)
    if variant.file:
        entry |= {
            "sha256": variant.sha256,
            "input": {"shape": variant.input_shape, "dtype": "float32"},
            "output": {"shape": variant.output_shape, "dtype": "float32"},
            "holdout": measured.scalars() if (measured := variant.detailed or variant.result) else None,
        }
    if variant.contents:
        entry |= {
            "weight_bytes": variant.contents.weight_bytes,
            "narrow_weight_share": variant.contents.narrow_share,
            "float_operations": variant.contents.float_operations,
            "float_share": sum(variant.contents.float_operations.values()) / variant.contents.operations,
        }
    return entry
