"""What cases a folder holds, by looking at it: tables, pairs of names, or DICOM as an archive exports it.

No pixel is read. Whatever is wrong becomes a finding; only a folder that cannot be listed is an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from common.imaging.case import Case
from common.imaging.findings import Code, Finding
from common.imaging.layouts.dicom_sessions import cases_of_sessions
from common.imaging.layouts.manifest import (
    CASES_TABLE,
    cases_of_table,
    cases_without_rows,
    patients_of_table,
    rows_without_cases,
)
from common.imaging.layouts.named_files import (
    cases_beside_labels,
    cases_of_pairs,
    has_labelled_files,
    image_and_label_folders,
)
from common.imaging.layouts.options import Found, Layout
from common.imaging.layouts.tree import Listing, is_there, list_folder, require_listable, walk
from common.imaging.readers import suffix_of
from common.imaging.readers.dicom_folder import is_dicom
from common.wording import counted, listed

Arrangement = Literal["table", "pairs", "side by side", "dicom", "none"]
TakenFor = Mapping[tuple[str, str], int]


@dataclass(frozen=True)
class Discovery:
    """What a folder holds.

    Attributes
    ----------
    cases : sorted by name, names unique. An image without a label is a case without one.
    findings : what could not be made a case of, or could in two ways. An error about a case keeps it out.
    arrangement : how the folder was understood: "table" (`cases.csv`), "pairs" (`images/` and `labels/`), "side by
        side" (images and labels in one folder), "dicom" (patients, sessions and series), or "none".
    taken_for : (what a series or file calls itself, the modality that was made of it, "label" or "" for neither) -> how
        many there are; empty where a table, folders or numbers say it.
    without_patient : the names, in DICOM the folders, in which the pattern of patients finds none.
    """

    cases: list[Case] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    arrangement: Arrangement = "none"
    taken_for: TakenFor = field(default_factory=dict)
    without_patient: list[str] = field(default_factory=list)


def discover(folder: Path, layout: Layout | None = None) -> Discovery:
    """Find the cases of a folder.

    A `cases.csv` says all itself; without one, `images/` with `labels/` is taken, then images beside labels of their
    names at any depth, then DICOM at any depth, and at last images that have no label.

    Parameters
    ----------
    folder : absolute, or relative to the working directory; sources are below it, or where its table says.
    layout : what the user says about it.

    Raises
    ------
    DataError
        The folder does not exist or cannot be listed.
    """
    layout = layout or Layout()
    require_listable(folder)
    if is_there(folder / CASES_TABLE):
        return _discovery(folder, layout, cases_of_table(folder, layout), "table")
    pairs = image_and_label_folders(folder)
    if pairs:
        found = _with_patients(folder, cases_of_pairs(*pairs, layout))
        beside = (path for path in list_folder(folder).folders if path not in pairs)
        found.findings.extend(_left_out(folder, (pair for path in beside for pair in walk(path))))
        return _discovery(folder, layout, found, "pairs")
    tree = list(walk(folder))
    unlisted = [finding for _, listing in tree for finding in listing.findings]
    # Findings of the tree come once, from here.
    tree = [(path, Listing(listing.files, listing.folders)) for path, listing in tree]
    nested = [path for path, _ in tree if path != folder and image_and_label_folders(path)]
    if nested:
        names = listed([path.relative_to(folder).as_posix() for path in nested])
        advice = f"Add each of these folders by itself: {names}."
        finding = Code.NO_CASES.finding("the folder holds folders of images, and none itself", advice=advice)
        return Discovery(findings=[finding, *unlisted])
    arrangement: Arrangement = "side by side"
    if any(has_labelled_files(listing, layout) for _, listing in tree):
        images = _with_images(tree)
        found = _with_patients(folder, cases_beside_labels(images, layout))
        found.findings.extend(_left_out(folder, (pair for pair in tree if pair not in images)))
    else:
        found = cases_of_sessions(folder, tree, layout)
        arrangement = "dicom"
        if not found.cases and (images := _with_images(tree)):
            found = _with_patients(folder, cases_beside_labels(images, layout))
            arrangement = "side by side"
    found.findings.extend(unlisted)
    return _discovery(folder, layout, found, arrangement)


def _with_images(tree: list[tuple[Path, Listing]]) -> list[tuple[Path, Listing]]:
    """The folders with files that are read by their suffix; the first of all stays, as names are relative to it."""
    return [tree[0], *(pair for pair in tree[1:] if any(suffix_of(path) for path in pair[1].files))]


def _left_out(folder: Path, tree: Iterable[tuple[Path, Listing]]) -> Iterator[Finding]:
    """A warning for each folder that holds images, of those that the arrangement has no place for."""
    for path, listing in tree:
        count = sum(_is_image(file) for file in listing.files)
        if count:
            name = path.relative_to(folder).as_posix()
            yield Code.FOLDER_LEFT_OUT.finding(f"folder {name}: {counted(count, 'image')} left out", file=name)


def _is_image(path: Path) -> bool:
    try:
        return bool(suffix_of(path)) or (not path.suffix and is_dicom(path))
    except OSError:
        return False


def _with_patients(folder: Path, found: Found) -> Found:
    """The cases with the patients that `patients.csv` gives them."""
    patients = patients_of_table(folder, found.findings)
    cases = [replace(case, patient=patients.get(case.name, case.patient)) for case in found.cases]
    if patients:
        # Of a case that is kept out already, its own finding says why.
        known = {case.name for case in found.cases} | {finding.case for finding in found.findings}
        found.findings.extend(rows_without_cases(sorted(patients.keys() - known)))
        found.findings.extend(cases_without_rows(sorted({case.name for case in cases} - patients.keys())))
    return replace(found, cases=cases)


def _discovery(folder: Path, layout: Layout, found: Found, arrangement: Arrangement) -> Discovery:
    if not found.cases:
        nothing = Code.NO_CASES.finding(f"{folder.name or folder} holds no image that could be a case")
        return Discovery([], [*found.findings, nothing], "none")
    cases = sorted(found.cases, key=lambda case: case.name)
    taken_for = dict(sorted(Counter(found.taken_for).items()))
    without = found.without_patient
    if layout.patient_pattern and arrangement != "dicom":
        without = [case.name for case in cases if layout.patient_in(case.name) is None]
    findings = [
        *found.findings,
        *_twice_but_for_capitals(cases),
        *_unused_pattern(layout, cases, taken_for, arrangement),
    ]
    return Discovery(cases, findings, arrangement, taken_for, without)


def _twice_but_for_capitals(cases: Iterable[Case]) -> Iterator[Finding]:
    """Studies find modalities whatever their capitals: of two that differ in these alone, none is guessed."""
    for case in cases:
        names = sorted(case.images)
        twins = [name for name in names if sum(name.casefold() == other.casefold() for other in names) > 1]
        if twins:
            yield Code.NAME_TWICE.finding(
                f"case {case.name}: {listed(twins)} are one modality, as capitals do not count",
                case=case.name,
                file=case.images[twins[1]].name,
                advice="Give one of them another name, or move it away.",
            )


def _unused_pattern(
    layout: Layout, cases: Sequence[Case], taken_for: TakenFor, arrangement: Arrangement
) -> Iterator[Finding]:
    """A warning about a pattern for labels that chooses none."""
    if not layout.label or (arrangement in ("dicom", "side by side") and any(case.label for case in cases)):
        return
    if arrangement in ("dicom", "side by side"):
        names = {name for name, _ in taken_for} or {source.name for case in cases for source in case.sources}
        reason = f"matches none of the names: {listed(sorted(names), most=12)}"
    else:
        reason = (
            "is not looked at: the " + ("table" if arrangement == "table" else "folder") + " says which the labels are"
        )
    yield Code.NO_SUCH_LABEL.finding(f"--label {layout.label!r} {reason}")
