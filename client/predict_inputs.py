"""What `predict` is given, as cases: single files, folders as a site's data sets are found, or an image by modality."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from client.predict_notes import left_aside
from common.errors import DataError, UsageError
from common.imaging.case import Case, Source
from common.imaging.discovery import discover
from common.imaging.facts import format_of
from common.imaging.findings import Code, Finding
from common.imaging.layouts.manifest import CASES_TABLE, PATIENTS_TABLE
from common.imaging.layouts.options import Layout
from common.imaging.layouts.tree import walk
from common.imaging.readers import suffix_of
from common.imaging.readers.dicom_folder import is_dicom, scan_folder
from common.study import Study

_NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]{0,31})=(.+)")
# Of an image and its label: what keeps a case from being trained on, and says nothing of its images.
_OF_LABELS = "E2"
_LEFT_OUT = (Code.LEFT_OUT.code, Code.FOLDER_LEFT_OUT.code)
_TABLES = (CASES_TABLE, PATIENTS_TABLE)


@dataclass(frozen=True)
class Inputs:
    """What was found.

    Attributes
    ----------
    cases : images keyed by the study's modalities; names are unique and can be parts of file names.
    refused : what could not be made a case of: what was given or found, and why.
    notes : what of a folder plays no part: the folder, and what there is to know.
    """

    cases: list[Case] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)


def find_inputs(given: Sequence[str], study: Study, layout: Layout) -> Inputs:
    """The cases of what a user gives.

    Parameters
    ----------
    given : paths of files and folders, or `MODALITY=PATH`, all of which together are one case.
    study : whose modalities the images must be.
    layout : for folders.

    Raises
    ------
    UsageError : a modality is no one of the study's, or given twice; results of two inputs would have one name; a level
        is asked for of an image that has none.
    """
    found = Inputs()
    named: dict[str, Path] = {}
    for text in given:
        match = _NAMED.fullmatch(text)
        if match is not None and not Path(text).exists():
            modality = _modality(match[1], study)
            if modality in named:
                raise UsageError(f"{text}: {modality} is given twice; predict one case after the other")
            named[modality] = Path(match[2])
        else:
            _take(Path(text), study, layout, found)
    if named:
        _take_named(named, study, layout, found)
    _refuse_same_names(found.cases)
    _refuse_levels(found.cases, layout.level)
    return found


def _modality(name: str, study: Study) -> str:
    for modality in study.task.modalities:
        if modality.casefold() == name.casefold():
            return modality
    known = ", ".join(study.task.modalities)
    raise UsageError(
        f"{name}=...: the model takes {f'the modalities {known}' if known else 'one image, of no modality'}; "
        f"{'give one of these' if known else 'give the path alone'}"
    )


def _take(path: Path, study: Study, layout: Layout, found: Inputs) -> None:
    try:
        if not path.exists():
            raise DataError(f"{path}: does not exist; correct the path")
        if path.is_dir():
            _take_folder(path, study, layout, found)
        else:
            _take_case(Case(_stem(path), "", {"": layout.source(path)}, None), study, found)
    except (DataError, OSError) as error:
        found.refused.append((str(path), str(error).removeprefix(f"{path}: ")))


def _take_folder(folder: Path, study: Study, layout: Layout, found: Inputs) -> None:
    if others := _no_images(folder):
        found.notes.append((str(folder), left_aside(others)))
    if len(study.task.modalities) < 2:
        series = [one for one in scan_folder(folder).series if one.frames and not one.is_segmentation]
        if len(series) == 1:
            name = _clean(folder.resolve().name)
            _take_case(Case(name, "", {"": layout.source(folder, series[0].uid)}, None), study, found)
            return
    discovery = discover(folder, layout)
    out = _kept_out(discovery.findings)
    found.notes.extend((str(folder), one.message) for one in discovery.findings if one.code in _LEFT_OUT)
    if not discovery.cases:
        reasons = [finding.message for finding in discovery.findings if finding.level == "error"]
        raise DataError(f"{folder}: {reasons[0] if reasons else 'holds no image'}; give a folder of images")
    for case in discovery.cases:
        if case.name in out:
            found.refused.append((case.name, f"{out[case.name].message}. {out[case.name].advice}"))
        else:
            _take_case(case, study, found)


def _kept_out(findings: Sequence[Finding]) -> dict[str, Finding]:
    """The first error of every case that is about its images."""
    out: dict[str, Finding] = {}
    for finding in findings:
        if finding.level == "error" and finding.case and not finding.code.startswith(_OF_LABELS):
            out.setdefault(finding.case, finding)
    return out


def _take_named(named: dict[str, Path], study: Study, layout: Layout, found: Inputs) -> None:
    missing = [str(path) for path in named.values() if not path.exists()]
    first = next(path for path in named.values())
    if missing:
        found.refused.append((_stem(first), f"{missing[0]} does not exist; correct the path"))
        return
    images = {modality: layout.source(path) for modality, path in named.items()}
    _take_case(Case(_stem(first), "", images, None), study, found)


def _take_case(case: Case, study: Study, found: Inputs) -> None:
    """A case, without its label, if it has the images that the study asks for."""
    modalities = study.task.modalities
    ready = case.with_modalities(modalities)
    missing = [modality for modality in modalities or ("",) if modality not in ready.images]
    if missing and (study.task.missing_modality == "error" or not ready.images):
        found.refused.append((case.name, _missing(case, missing)))
        return
    found.cases.append(Case(_clean(case.name), case.patient, ready.images, None))


def _missing(case: Case, missing: list[str]) -> str:
    has = ", ".join(sorted(filter(None, case.images))) or "one image of no modality"
    if missing == [""]:
        return f"it has {len(case.images)} images ({has}) and the model takes one; give that image by itself"
    return (
        f"{', '.join(missing)}: not among its images, which are {has}; say which series or file it is with "
        "--channel-map 'NAME=PATTERN', or give each as MODALITY=PATH"
    )


def _no_images(folder: Path) -> list[str]:
    """For each file in the folder, at any depth, that no reader takes and that is no table of cases: of what type."""
    kinds = []
    for _, listing in walk(folder):
        for path in listing.files:
            if suffix_of(path) or path.name in _TABLES:
                continue
            with contextlib.suppress(OSError):  # whoever reads it says so
                if path.is_file() and not is_dicom(path):
                    kinds.append(path.suffix[1:].upper() or "without suffix")
    return kinds


def _refuse_same_names(cases: Sequence[Case]) -> None:
    """Results of one name would replace each other, also where a file system takes A and a for one."""
    seen: dict[str, Source] = {}
    for case in cases:
        source = next(iter(case.images.values()))
        other = seen.setdefault(case.name.casefold(), source)
        if other == source and other is not source:
            raise UsageError(f"{source.path}: given twice; leave one out")
        if other is not source:
            raise UsageError(
                f"{other.path} and {source.path}: their results would have one name, {case.name}_...; predict each "
                "into an --out of its own"
            )


def _refuse_levels(cases: Sequence[Case], level: int) -> None:
    """Of formats that have none. How many a TIFF file has is seen when it is read."""
    for source in (source for case in cases for source in case.images.values() if level):
        kind = format_of(source)
        if kind != "TIFF" and (suffix_of(source.path) or source.path.is_dir()):
            raise UsageError(f"--level {level}: {source.path} is {kind}, which has no levels; leave --level out")


def _stem(path: Path) -> str:
    suffix = suffix_of(path)
    name = path.name[: -len(suffix)] if suffix else path.stem if path.is_file() else path.name
    return _clean(name.removesuffix(".ome"))


def _clean(name: str) -> str:
    """A name that can begin a file's: folders that a case lies in become parts of it."""
    clean = "".join(sign if sign.isprintable() and sign not in '/\\:*?"<>|' else "_" for sign in name)
    return clean.lstrip(".") or "image"
