"""A published version's folder, opened: which file to run, for which study, and that nothing in it is damaged."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import PublishError, StudyError, UsageError
from common.study import Study, parse_study

MANIFEST = "manifest.json"
SIGNATURE = "manifest.sig"
"""The signature over the manifest (`common.inference.signature`); the one file that the manifest does not list."""
NEWEST_FORMAT = 1
"""The newest manifest that this version understands."""

COPY_AGAIN = "copy the version's folder again from where it was published"
"""What to do where a file of a version is damaged."""
_LONGEST_NAME = 200  # bytes; a file system takes 255, a partial file's name is longer than the file's

Verify = Callable[[bytes, Path], None]
"""Called with a manifest's bytes and the version's folder before anything in either is believed; raises where they are
not whose they should be. The manifest holds the digest of every other file, so a signature over it covers them all."""


@dataclass(frozen=True)
class ListedFile:
    """A file of a version, and the SHA-256 (hexadecimal digits) that the manifest has for it; not yet looked at."""

    file: Path
    sha256: str

    def check(self) -> None:
        """Raises PublishError where the file is not there, damaged or changed."""
        if not _is_there(self.file):
            raise PublishError(f"{self.file}: the manifest names this file, which is not there; {COPY_AGAIN}")
        _refuse_other(self.file, sha256_of(self.file), self.sha256)


@dataclass(frozen=True)
class PublishedModel:
    """One file of a published version, checked against the version's manifest.

    Attributes
    ----------
    file : the `.tflite` file.
    variant : its name, such as "float16".
    version : of the folder, such as "v3".
    study : what the model was trained for, and so how images are prepared for it.
    recommended : whether its publisher recommends this variant.
    note : what its publisher says of it; "" for nothing.
    sha256 : of the file, in hexadecimal digits.
    explanation : the file that explains what the model predicts (`common.inference.explanation`); None where the
        version was published without.
    """

    file: Path
    variant: str
    version: str
    study: Study
    recommended: bool
    note: str
    sha256: str
    explanation: ListedFile | None = None


def open_published(path: Path, variant: str | None = None, verify: Verify | None = None) -> PublishedModel:
    """Choose a file of a published version and check it.

    Parameters
    ----------
    path : a version's folder, or one `.tflite` file inside it.
    variant : a variant's name. None: of a folder the fastest recommended one, of a file its own.
    verify : see `Verify`.

    Raises
    ------
    UsageError : there is nothing at `path`, or a run's folder, or a file that is no variant; there is no such variant;
        or file and variant contradict each other.
    PublishError : it is no version that Wardround published, is damaged, or was written by a newer Wardround.
    """
    if not _is_there(path):
        raise UsageError(f"{path}: there is no such model; give the folder of a published version, or a file inside it")
    folder = path if path.is_dir() else path.parent
    refuse_folder_of_versions(path)
    manifest = read_manifest(path, verify)
    entry = _entry_of(manifest, folder, None if path.is_dir() else path.name, variant)
    try:
        study_digest = str(manifest["documents"]["study.yaml"]["sha256"])
        name, file, digest = str(entry["name"]), folder / str(entry["file"]), str(entry["sha256"])
        version, note = str(manifest["version"]), str(entry.get("note") or "")
        recommended = bool(entry["recommended"])
        explaining = manifest.get("explanation")
        explanation = explaining and ListedFile(folder / str(explaining["file"]), str(explaining["sha256"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise _no_manifest(folder / MANIFEST, f"it lacks {error}") from error
    for listed in (file, *([explanation.file] if explanation else [])):
        if listed.parent != folder or not is_plain_name(listed.name):
            raise PublishError(
                f"{folder / MANIFEST}: names a file outside the version's folder ({str(listed)!r}); do not use it"
            )
    study = _study_of(folder / "study.yaml", study_digest)
    ListedFile(file, digest).check()
    return PublishedModel(file, name, version, study, recommended, note, digest, explanation or None)


def read_manifest(path: Path, verify: Verify | None = None) -> Mapping[str, Any]:
    """What the manifest of a published version says.

    Parameters
    ----------
    path : the version's folder, or a file inside it.
    verify : see `Verify`.

    Raises
    ------
    PublishError : it is missing, damaged, or of a newer Wardround.
    """
    folder = path if path.is_dir() else path.parent
    file = folder / MANIFEST
    content = _bytes_of(file, path)
    if verify is not None:
        verify(content, folder)
    manifest = parse_manifest(content, file)
    if manifest["format"] > NEWEST_FORMAT:
        raise PublishError(
            f"{file}: written in format {manifest['format']} by Wardround {manifest.get('wardround', 'of a later day')}"
            f", and this version reads up to format {NEWEST_FORMAT}; update Wardround"
        )
    return manifest


def parse_manifest(content: bytes, file: Path) -> Mapping[str, Any]:
    """A manifest of any format, of which little more is known than its number, "format"; `file` is for errors.

    Raises
    ------
    PublishError : it is none.
    """
    try:
        manifest = json.loads(content)
    except ValueError as error:
        raise PublishError(f"{file}: damaged, it is not JSON ({error}); {COPY_AGAIN}") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format"), int):
        raise _no_manifest(file, "it states no format")
    return manifest


def sha256_of(file: Path) -> str:
    """The SHA-256 of a version's file, in hexadecimal digits.

    Raises
    ------
    PublishError : it cannot be read.
    """
    try:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(file, error) from error


def is_plain_name(name: str) -> bool:
    """Whether a file's name is one that stays in its folder, is shown there, and that any file system takes."""
    return (
        bool(name)
        and not name.startswith(".")
        and name.isprintable()
        and not {"/", "\\"} & set(name)
        and len(os.fsencode(name)) <= _LONGEST_NAME
    )


def _bytes_of(file: Path, given: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError as error:
        raise PublishError(
            f"{given}: no model that Wardround published ({MANIFEST} is not "
            f"{'in it' if given.is_dir() else 'beside it'}); give the folder of a published version, with all its files"
        ) from error
    except OSError as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: OSError) -> PublishError:
    advice = "check its rights" if isinstance(error, PermissionError) else COPY_AGAIN
    return PublishError(f"{file}: cannot be read ({error.strerror or error}); {advice}")


def _is_there(path: Path) -> bool:
    """Whether something is; raises PublishError where this user may not look."""
    try:
        return path.exists()
    except OSError as error:
        raise _unreadable(path, error) from error


def refuse_folder_of_versions(path: Path) -> None:
    """Raises UsageError for the folder of a run, or of its versions, and names the newest version in it."""
    if not path.is_dir() or _is_there(path / MANIFEST):
        return
    found = [
        (int(match[1]), manifest.parent)
        for folder in (path / "published", path)
        for manifest in folder.glob(f"v*/{MANIFEST}")
        if (match := re.fullmatch(r"v(\d+)", manifest.parent.name))
    ]
    if found:
        raise UsageError(f"{path}: holds published versions, and is none itself; give {max(found)[1]}, the newest")


def _entry_of(manifest: Mapping[str, Any], folder: Path, file: str | None, variant: str | None) -> Mapping[str, Any]:
    """The wanted variant's entry."""
    try:
        entries = [entry for entry in manifest["variants"] if entry["file"]]
        names = ", ".join(str(entry["name"]) for entry in entries)
        if file is not None:
            files = ", ".join(str(entry["file"]) for entry in entries)
            explaining = manifest.get("explanation") or {}
            entries = [entry for entry in entries if entry["file"] == file]
            if not entries and (not file.endswith(".tflite") or file == explaining.get("file")):
                raise UsageError(
                    f"{folder / file}: no .tflite that segments; give one of {files}, or the folder of this version"
                )
            if not entries:
                raise PublishError(f"{folder / file}: the manifest beside it does not name this file; {COPY_AGAIN}")
        if variant is not None:
            of_file = entries
            entries = [entry for entry in entries if entry["name"] == variant]
            if not entries and file is not None:
                raise UsageError(
                    f"--variant {variant}: {file} is {of_file[0]['name']}; leave one of the two out, or give the folder"
                )
            if not entries:
                raise UsageError(f"--variant {variant}: {folder.name} has {names}; give one of these")
        elif file is None:
            entries = [entry for entry in entries if entry["recommended"]]
            if not entries:
                raise UsageError(f"{folder}: recommends no variant; choose one by --variant ({names})")
        # A variant whose time was not measured comes after those whose was, in the publisher's order.
        return min(entries, key=lambda entry: entry.get("latency_ms") or math.inf)
    except (KeyError, TypeError, AttributeError) as error:
        raise _no_manifest(folder / MANIFEST, f"its variants lack {error}") from error


def _study_of(file: Path, digest: str) -> Study:
    if not _is_there(file):
        raise PublishError(f"{file}: is not there; {COPY_AGAIN}")
    content = _bytes_of(file, file.parent)
    _refuse_other(file, hashlib.sha256(content).hexdigest(), digest)
    try:
        return parse_study(content.decode("utf-8"), source=str(file))
    except (StudyError, UnicodeDecodeError) as error:
        raise PublishError(
            f"{file}: not understood by this version of Wardround ({str(error).splitlines()[0]}); update Wardround"
        ) from error


def _refuse_other(file: Path, found: str, expected: str) -> None:
    if found != expected:
        raise PublishError(
            f"{file}: damaged or changed: its SHA-256 is {found[:12]}…, the manifest says {expected[:12]}…; "
            f"{COPY_AGAIN}"
        )


def _no_manifest(file: Path, reason: str) -> PublishError:
    return PublishError(f"{file}: no manifest of a model that Wardround published ({reason}); give another folder")
