"""What software a version was made with: its main parts, and a bill of materials of everything that is installed.

Source: CycloneDX 1.5, https://cyclonedx.org/docs/1.5/json/; names of packages as purl; licences as PEP 639.
"""

from __future__ import annotations

import datetime
import json
import platform
import re
import uuid
from importlib.metadata import Distribution, distributions
from typing import Any, Final

from common.version import VERSION

SBOM: Final = "sbom.json"

_MAIN: Final = ("ai-edge-litert", "cryptography", "grpcio", "numpy", "tensorflow", "tensorflow-federated")
_LONGEST_LICENCE: Final = 80  # some packages state the whole text


def software() -> dict[str, str]:
    """The versions of what decides how a model is computed, by name."""
    found = {name: distribution.version for name, distribution in _installed().items() if name in _MAIN}
    return {"python": platform.python_version(), "wardround": VERSION, **found}


def bill_of_materials() -> bytes:
    """A CycloneDX document of the distributions that are installed where this runs, in the order of their names."""
    installed = _installed()
    content = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": f"urn:uuid:{uuid.uuid4()}",
        "version": 1,
        "metadata": {
            "timestamp": datetime.datetime.now(datetime.UTC).replace(microsecond=0).isoformat(),
            "component": {"type": "application", "bom-ref": "wardround", "name": "wardround", "version": VERSION},
            "properties": [
                {"name": "python", "value": platform.python_version()},
                {"name": "platform", "value": platform.platform()},
            ],
        },
        "components": [_component(name, one) for name, one in installed.items() if name != "wardround"],
    }
    return json.dumps(content, indent=1).encode() + b"\n"


def _installed() -> dict[str, Distribution]:
    """By normalized name; of two of one name the first on the path counts, as it does for imports."""
    found: dict[str, Distribution] = {}
    for one in distributions():
        if name := one.metadata["Name"]:
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), one)
    return dict(sorted(found.items()))


def _component(name: str, distribution: Distribution) -> dict[str, Any]:
    purl = f"pkg:pypi/{name}@{distribution.version}"
    component: dict[str, Any] = {
        "type": "library",
        "bom-ref": purl,
        "name": name,
        "version": distribution.version,
        "purl": purl,
    }
    if licence := _licence(distribution):
        component["licenses"] = [licence]
    return component


def _licence(distribution: Distribution) -> dict[str, Any] | None:
    metadata = distribution.metadata
    if "License-Expression" in metadata:
        return {"expression": metadata["License-Expression"]}
    (stated, *_) = metadata.get_all("License") or [""]
    if stated and stated != "UNKNOWN" and "\n" not in stated and len(stated) <= _LONGEST_LICENCE:
        return {"license": {"name": stated}}
    for classifier in metadata.get_all("Classifier") or ():
        if classifier.startswith("License :: "):
            return {"license": {"name": classifier.rpartition(" :: ")[2]}}
    return None
