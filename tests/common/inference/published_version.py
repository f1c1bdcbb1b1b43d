"""A published version's folder with a stand-in for a network, for tests of what runs it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from common.inference.signature import sign_manifest, signer_entry
from common.security.signing import Signer
from common.study import Study


def write_version(folder: Path, study: Study, files: dict[str, bytes], **changes: Any) -> Path:
    """A folder as publishing leaves it: `files` are the `.tflite` files by variant; `changes` go into the manifest.

    The first variant is the reference; the others are faster, each more than the one before, and the last one is not
    recommended where there are several.
    """
    folder.mkdir(parents=True)
    text = study.to_yaml().encode()
    (folder / "study.yaml").write_bytes(text)
    variants = []
    for index, (name, content) in enumerate(files.items()):
        (folder / f"model_{name}.tflite").write_bytes(content)
        variants.append(
            {
                "name": name,
                "file": f"model_{name}.tflite",
                "sha256": hashlib.sha256(content).hexdigest(),
                "bytes": len(content),
                "latency_ms": 10.0 - index,
                "recommended": index == 0 or index < len(files) - 1,
                "failed": False,
                "note": "",
            }
        )
    variants.append({"name": "broken", "file": None, "recommended": False, "failed": True, "note": "did not convert"})
    manifest = {
        "format": 1,
        "wardround": "0.1.0",
        "study": study.name,
        "version": folder.name,
        "variants": variants,
        "documents": {"study.yaml": {"sha256": hashlib.sha256(text).hexdigest(), "bytes": len(text)}},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))
    return folder


def sign(folder: Path, signer: Signer, **changes: Any) -> Path:
    """Signs a version as publishing does; `changes` go into the manifest before."""
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | changes | {"signer": signer_entry(signer)}))
    sign_manifest(folder, signer)
    return folder
