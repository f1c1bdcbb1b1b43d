"""Names for sites in what is published: the same in every version of a run, and nobody's outside it.

A pseudonym is the start of HMAC-SHA256 over study and site, by a random key that stays in the run folder. Without the
key a list of hospitals cannot be tried against it. A run whose key is lost gives other names from then on.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from common.disk import sync_folder
from common.errors import RunFolderError
from server.run_folder import RunFolder, storing

_KEY_BYTES: Final = 32
_DIGITS: Final = 12  # hexadecimal; of 50 sites two are named alike once in 2e11 studies


def pseudonyms(run: RunFolder, study: str, sites: Sequence[str]) -> dict[str, str]:
    """The pseudonym of each site; the run's key is made where it has none.

    Raises
    ------
    RunFolderError : the key cannot be read or written, or is damaged.
    """
    key = _key(run.pseudonyms)
    return {site: f"site-{_code(key, study, site)}" for site in sites}


def _code(key: bytes, study: str, site: str) -> str:
    return hmac.digest(key, f"{study}\0{site}".encode(), hashlib.sha256).hex()[:_DIGITS]


def _key(path: Path) -> bytes:
    with storing(path):
        if not path.exists():
            _make(path)
        try:
            key = bytes.fromhex(path.read_text("ascii").strip())
        except ValueError:
            key = b""
    if len(key) != _KEY_BYTES:
        raise RunFolderError(
            f"{path}: damaged; restore it from a backup, or delete it: the sites then get other names in what is "
            "published from here on"
        )
    return key


def _make(path: Path) -> None:
    """A new key, whole and for its owner alone; where another process makes one too, one of the two stays."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")  # mode 0600
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(_KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
    sync_folder(path.parent)
