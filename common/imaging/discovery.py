"""What cases a folder holds, by looking at it: tables, pairs of names, or DICOM as an archive exports it.

No pixel is read. Whatever is wrong becomes a finding; only a folder that cannot be listed is an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
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
from common.imaging.layouts.tree import Listing, is_there, require_listable, short_list, walk
from common.imaging.readers import suffix_of

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
    taken_for : (what a series or file calls itself, the modality that was made of it, "" for none) -> how many there
        are; empty where a table or numbers say it.
    """

    cases: list[Case] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    arrangement: Arrangement = "none"
    taken_for: TakenFor = field(default_factory=dict)


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
        return _discovery(folder, cases_of_table(folder, layout), "table")
    pairs = image_and_label_folders(folder)
    if pairs:
        return _discovery(folder, _with_patients(folder, cases_of_pairs(*pairs, layout)), "pairs")
    tree = list(walk(folder))
    unlisted = [finding for _, listing in tree for finding in listing.findings]
    # Findings of the tree come once, from here.
    tree = [(path, Listing(listing.files, listing.folders)) for path, listing in tree]
    nested = [path for path, _ in tree if path != folder and image_and_label_folders(path)]
    if nested:
        names = short_list([path.relative_to(folder).as_posix() for path in nested])
        advice = f"Add each of these folders by itself: {names}."
        finding = Code.NO_CASES.finding("the folder holds folders of images, and none itself", advice=advice)
        return Discovery(findings=[finding, *unlisted])
    arrangement: Arrangement = "side by side"
    if any(has_labelled_files(listing, layout) for _, listing in tree):
        found = _with_patients(folder, cases_beside_labels(_with_images(tree), layout))
    else:
        found = cases_of_sessions(folder, tree, layout)
        arrangement = "dicom"
        if not found.cases and (images := _with_images(tree)):
            found = _with_patients(folder, cases_beside_labels(images, layout))
            arrangement = "side by side"
    found.findings.extend(unlisted)
    return _discovery(folder, found, arrangement)


def _with_images(tree: list[tuple[Path, Listing]]) -> list[tuple[Path, Listing]]:
    """The folders with files that are read by their suffix; the first of all stays, as names are relative to it."""
    return [tree[0], *(pair for pair in tree[1:] if any(suffix_of(path) for path in pair[1].files))]


def _with_patients(folder: Path, found: Found) -> Found:
    """The cases with the patients that `patients.csv` gives them."""
    patients = patients_of_table(folder, found.findings)
    cases = [replace(case, patient=patients.get(case.name, case.patient)) for case in found.cases]
    if patients:
        # Of a case that is kept out already, its own finding says why.
        known = {case.name for case in found.cases} | {finding.case for finding in found.findings}
        found.findings.extend(rows_without_cases(sorted(patients.keys() - known)))
        found.findings.extend(cases_without_rows(sorted({case.name for case in cases} - patients.keys())))
    return Found(cases, found.findings, found.taken_for)


def _discovery(folder: Path, found: Found, arrangement: Arrangement) -> Discovery:
    if found.cases:
        cases = sorted(found.cases, key=lambda case: case.name)
        return Discovery(cases, found.findings, arrangement, dict(sorted(Counter(found.taken_for).items())))
    nothing = Code.NO_CASES.finding(f"{folder.name or folder} holds no image that could be a case")
    return Discovery([], [*found.findings, nothing], "none")
