"""The files of a published version as its manifest lists them: for whoever copies a version, or reads its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import PublishError, UsageError, WireError
from common.inference.published import (
    MANIFEST,
    SIGNATURE,
    Verify,
    is_plain_name,
    open_published,
    parse_manifest,
    read_manifest,
    sha256_of,
)
from common.study import Study
from common.wire.tensors import Array, read_tensors

_UNLISTED = {MANIFEST, SIGNATURE}
_AGAIN = "fetch or copy the version again from where it was published"


@dataclass(frozen=True)
class PublishedWeights:
    """The weights of a published version, float32, in the order of the network's `specs`.

    Attributes
    ----------
    study : what they were trained for.
    version : of the folder, such as "v3".
    sha256 : of the file with the weights, in hexadecimal digits.
    """

    study: Study
    version: str
    weights: tuple[Array, ...]
    sha256: str


def open_weights(folder: Path, verify: Verify | None = None) -> PublishedWeights:
    """The weights of a version's folder, checked against its manifest; they are mapped, not read.

    Raises
    ------
    UsageError, PublishError : as `open_published`; UsageError too where `folder` is a file; PublishError too where the
        version was published without weights, or they are damaged.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: a file; give the folder of the published version, which holds its weights too")
    model = open_published(folder, "float32", verify)
    entry = read_manifest(folder, verify).get("weights")
    if not isinstance(entry, dict) or not {"file", "sha256"} <= set(entry):
        raise PublishError(f"{folder}: published without its weights; publish the round again by this version")
    digest = str(entry["sha256"])
    try:
        weights = read_tensors(folder / Path(str(entry["file"])).name, digest=bytes.fromhex(digest))
    except (WireError, ValueError) as error:
        raise PublishError(f"{folder}: its weights cannot be used ({error}); {_AGAIN}") from error
    return PublishedWeights(model.study, model.version, tuple(weights), digest)


def listed_files(manifest: bytes) -> dict[str, str]:
    """The SHA-256 (hexadecimal digits) of every file that a manifest lists, by the file's name.

    Raises
    ------
    PublishError : it is no manifest, or names a file that is not plainly in the version's folder.
    """
    content = parse_manifest(manifest, Path(MANIFEST))
    try:
        entries = [*content["variants"], content.get("weights"), content.get("golden"), content.get("explanation")]
        found = {str(entry["file"]): str(entry["sha256"]) for entry in entries if entry and entry.get("file")}
        found |= {str(name): str(entry["sha256"]) for name, entry in content["documents"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise PublishError(f"{MANIFEST}: not of a model that Wardround published ({error}); {_AGAIN}") from error
    if wrong := [name for name in found if not is_plain_name(name) or name in _UNLISTED]:
        raise PublishError(f"{MANIFEST}: names a file outside the version's folder ({wrong[0]!r}); do not use it")
    return found


def check_files(folder: Path, advice: str = _AGAIN) -> None:
    """Every file that the folder's manifest lists is there, as the manifest says, and nothing else is but a signature.

    Whose the manifest is, `common.inference.signature` tells.

    Parameters
    ----------
    advice : what to do where that is not so, the end of a sentence.

    Raises
    ------
    PublishError : otherwise, naming the file.
    """
    try:
        listed = listed_files((folder / MANIFEST).read_bytes())
        there = {path.name for path in folder.iterdir()} - _UNLISTED
        digests = {name: sha256_of(folder / name) for name in sorted(there & set(listed))}
    except OSError as error:
        raise PublishError(f"{folder}: cannot be read ({error.strerror or error}); {advice}") from error
    if missing := sorted(set(listed) - there):
        raise PublishError(f"{folder}: {missing[0]} is missing; {advice}")
    if unknown := sorted(there - set(listed)):
        raise PublishError(f"{folder}: {unknown[0]} is not in the manifest; remove it, or {advice}")
    for name, digest in digests.items():
        if digest != listed[name]:
            raise PublishError(f"{folder / name}: damaged or changed; its SHA-256 is not the manifest's; {advice}")


def origin_of(weights: PublishedWeights) -> Mapping[str, Any]:
    """What identifies weights that another model starts from: "study", "version", "sha256"."""
    return {"study": weights.study.name, "version": weights.version, "sha256": weights.sha256}
