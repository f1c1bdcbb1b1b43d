"""What lies beside the `.tflite` files of a version: weights, golden pair, documents, and the manifest of them all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.export.figures import json_ready, tolerance_of
from common.export.sbom import SBOM, bill_of_materials, software
from common.inference.golden import GOLDEN, Golden
from common.inference.published import MANIFEST
from common.inference.signature import sign_manifest, signer_entry
from common.security.signing import Signer
from common.wire.tensors import write_tensors

WEIGHTS = "weights.tensors"


def write_beside(
    folder: Path,
    weights: Sequence[npt.ArrayLike],
    golden: Golden,
    differences: Mapping[str, float],
    documents: Mapping[str, bytes],
) -> dict[str, Any]:
    """Write all but the manifest, and a bill of materials; returns its entries "weights", "golden" and "documents".

    Parameters
    ----------
    weights : float32, in the order of the network's; for warm starts and personalization.
    differences : of each file's answer to the golden tile from the golden answer, as a mean, by variant.
    documents : what a file of this name shall hold.
    """
    stored = write_tensors(folder / WEIGHTS, [np.asarray(weight, np.float32) for weight in weights])
    pair = golden.to_bytes()
    documents = {**documents, SBOM: bill_of_materials()}
    for name, content in {GOLDEN: pair, **documents}.items():
        (folder / name).write_bytes(content)
    return {
        "weights": {"file": WEIGHTS, "sha256": stored.digest.hex(), "bytes": stored.size},
        "golden": {
            "file": GOLDEN,
            **_identified(pair),
            "measure": "mean absolute difference",
            "tolerance": {name: tolerance_of(difference) for name, difference in differences.items()},
        },
        "documents": {name: _identified(content) for name, content in documents.items()},
    }


def write_manifest(folder: Path, manifest: Mapping[str, Any], signer: Signer | None) -> None:
    """Write the manifest, last because it has the digest of every other file, and its signature where one signs."""
    content = {key: value for key, value in manifest.items() if key != "signer"} | {"software": software()}
    if signer is not None:
        content["signer"] = signer_entry(signer)
    text = json.dumps(json_ready(content), indent=1, ensure_ascii=False, allow_nan=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    if signer is not None:
        sign_manifest(folder, signer)


def _identified(content: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
