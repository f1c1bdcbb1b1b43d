"""The manifest: what identifies and describes every file of a published version."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from common.export.papers import write_beside, write_manifest
from common.inference.golden import Golden
from common.inference.published import NEWEST_FORMAT
from common.study import Study
from common.version import VERSION
from server.evaluation import Holdout
from server.publishing.explanation import Explanation, entry_of_explanation
from server.publishing.model_card import model_card, outputs_of
from server.publishing.provenance import Provenance
from server.publishing.variant import Variant, works_alone

if TYPE_CHECKING:
    from common.models.network import Network


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
    provenance: Provenance,
    folder: Path,
) -> None:
    """Write weights, golden pair, model card, study and, last, the manifest with all their digests and its signature.

    `study.yaml` is what prediction prepares images by. The manifest repeats what another runtime needs to feed a file.
    """
    named, study = study, provenance.of_study(study)
    variants = [provenance.of_variant(variant) for variant in variants]
    documents = {
        "model_card.md": model_card(study, network, variants, report, details).encode(),
        "study.yaml": _without_paths(study).to_yaml().encode(),
    }
    differences = {variant.name: variant.difference for variant in variants if variant.difference is not None}
    papers = write_beside(folder, weights, golden, differences, documents)
    manifest = {
        "format": NEWEST_FORMAT,
        "wardround": VERSION,
        "study": study.name,
        "version": report["version"],
        "plan": provenance.plan or None,
        "sites": provenance.sites(named),
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
        "privacy": details.get("privacy"),
        "holdout": {"cases": len(holdout), "sites": variants[0].cases_of_sites} if holdout is not None else None,
        "weights": papers["weights"],
        "golden": papers["golden"],
        "explanation": entry_of_explanation(study, explanation),
        "calibration_images": len(report["calibration"]),  # no names: they may be those of patients
        "documents": papers["documents"],
    }
    write_manifest(folder, manifest, provenance.signer)


def _without_paths(study: Study) -> Study:
    """The study without the paths of this machine, which are nobody else's business; the details say what they gave."""
    return replace(
        study,
        training=replace(study.training, start_from=None),
        model=replace(study.model, encoder_weights=None),
    )


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
