"""Signers of studies for tests that publish, and the file of the authorities that vouch for them."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

from common.security.certificates import ensure_simulation_identities
from common.security.signing import Signer, load_signer

FOLDER = Path(tempfile.mkdtemp(prefix="wardround-signers-"))
AUTHORITIES = FOLDER / "authorities.pem"
"""Those of all studies that were asked for."""
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)


@functools.cache
def identities(study: str) -> Path:
    """A folder of identities: `coordinator`, `sites/north`, `sites/alpha`."""
    folder = FOLDER / study
    ensure_simulation_identities(folder, study, ["north", "alpha"], ["localhost"])
    with AUTHORITIES.open("ab") as file:
        file.write((folder / "authority" / "ca.crt").read_bytes())
    return folder


def coordinator_of(study: str) -> Signer:
    """Who signs what the study publishes."""
    return load_signer(identities(study) / "coordinator")


def site_of(study: str, name: str = "north") -> Signer:
    """Who signs for one of its sites."""
    return load_signer(identities(study) / "sites" / name)
