"""Cases by the names of files: `images/` beside `labels/`, and images with their labels in one folder.

In `images/` and `labels/` (or nnU-Net's `imagesTr/` and `labelsTr/`), an image belongs to the label of the same name;
the suffixes may differ, and a folder of one DICOM series may stand for a file. In any other folder the label is called
like the image and `_segm`, `_seg`, `_mask` or `_label`. A case has several images where their names are the case's
name and a modality (`case_T1post`, `case_flair`) or nnU-Net's number of a channel (`case_0000`).
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.imaging.case import Case, Source
from common.imaging.findings import Code, Finding
from common.imaging.layouts.options import LABEL, Found, Layout
from common.imaging.layouts.tree import Listing, is_folder, list_folder
from common.imaging.readers import SUFFIXES, suffix_of
from common.wording import listed

_FOLDERS = (("images", "labels"), ("imagesTr", "labelsTr"))
_CHANNEL = re.compile(r"(.+)_([0-9]{4})")
# What lies beside images without being one: no reason to say anything.
_SILENT = re.compile(
    r"(licen[sc]e|readme|copying)([._-].*)?|.*\.(txt|md|csv|tsv|json|xml|yaml|yml|html|pdf)", re.IGNORECASE
)


def image_and_label_folders(folder: Path) -> tuple[Path, Path] | None:
    """The two folders of the layout by pairs, where `folder` has them; the second may be missing."""
    return next(((folder / image, folder / label) for image, label in _FOLDERS if is_folder(folder / image)), None)


def cases_of_pairs(images: Path, labels: Path, layout: Layout) -> Found:
    """The cases of two folders: every image is one or belongs to one, with the label of its name if there is any."""
    found = Found()
    image_files = _by_name(list_folder(images), images.name, found.findings)
    label_files: dict[str, Path] = {}
    if is_folder(labels):
        label_files = _by_name(list_folder(labels), labels.name, found.findings, Code.LABEL_TWICE)
    else:
        message = f"{images.name}/ has no {labels.name}/ beside it"
        found.findings.append(Code.UNREADABLE_FOLDER.finding(message, advice=f"Put the labels into {labels.name}/."))
    _join(image_files, label_files, layout, _channel_names(images.parent), found)
    return found


def is_silent(path: Path) -> bool:
    """Whether a file is of a kind that lies beside images without being one, such as a licence or a table."""
    return _SILENT.fullmatch(path.name) is not None


def has_labelled_files(listing: Listing, layout: Layout) -> bool:
    """Whether a folder holds an image and, called like it, a label."""
    stems = [_stem(path) for path in listing.files if suffix_of(path)]
    return any(
        (name := _labelled(stem, layout)) and any(s.startswith(name) and s != stem for s in stems) for stem in stems
    )


def cases_beside_labels(listings: Sequence[tuple[Path, Listing]], layout: Layout) -> Found:
    """The cases of folders that hold images and labels alike; names are unique in all of them together."""
    found = Found()
    by_folder: list[tuple[Path, Found]] = []
    for folder, listing in listings:
        part = Found()
        files = Listing(listing.files)  # folders are looked at by themselves
        everything = _by_name(files, folder.name, part.findings)
        labels: dict[str, Path] = {}
        for stem in list(everything):
            if (name := _labelled(stem, layout)) is not None:
                path = everything.pop(stem)
                if name in labels:
                    part.findings.append(_twice(name, [labels[name], path], Code.LABEL_TWICE))
                labels[name] = path
                part.taken_for.append((stem.removeprefix(name).strip("_-. "), LABEL))
        _join(everything, labels, layout, {}, part)
        found.taken_for.extend(part.taken_for)
        by_folder.append((folder, part))
    count: defaultdict[str, int] = defaultdict(int)
    for _, part in by_folder:
        for case in part.cases:
            count[case.name] += 1
    root = listings[0][0]
    for folder, part in by_folder:
        names = {
            case.name: f"{folder.relative_to(root).as_posix()}/{case.name}" if count[case.name] > 1 else case.name
            for case in part.cases
        }
        for case in part.cases:
            name = names[case.name].removeprefix("./")
            found.cases.append(Case(name, layout.patient_in(name) or name, case.images, case.label))
        for finding in part.findings:
            name = names.get(finding.case, finding.case).removeprefix("./")
            found.findings.append(Finding(finding.code, finding.level, name, *_rest(finding)))
    found.cases.sort(key=lambda case: case.name)
    return found


def _rest(finding: Finding) -> tuple[str, str, str]:
    return finding.file, finding.message, finding.advice


def _by_name(listing: Listing, where: str, findings: list[Finding], code: Code = Code.NAME_TWICE) -> dict[str, Path]:
    """The files of a folder by the names of cases; of two of one name the first, and a finding of the code."""
    files: defaultdict[str, list[Path]] = defaultdict(list)
    ignored: list[str] = []
    findings.extend(listing.findings)
    for path in [*listing.files, *listing.folders]:
        if suffix_of(path) is not None or path in listing.folders:
            files[_stem(path)].append(path)
        elif not is_silent(path):
            ignored.append(path.name)
    for name, paths in files.items():
        if len(paths) > 1:
            findings.append(_twice(name, paths, code))
    if ignored:
        findings.append(
            Code.IGNORED_FILE.finding(
                f"{len(ignored)} {'file' if len(ignored) == 1 else 'files'} in {where}/ that no reader takes: "
                f"{listed(ignored)}",
                file=ignored[0] if len(ignored) == 1 else "",
                advice=f"Convert them to one of {', '.join(SUFFIXES)}, or move them out of the folder.",
            )
        )
    return {name: paths[0] for name, paths in files.items()}


def _twice(name: str, paths: list[Path], code: Code) -> Finding:
    names = ", ".join(path.name for path in paths)
    return code.finding(f"{names} are of one name", case=name, file=paths[0].name)


def _join(
    images: Mapping[str, Path], labels: Mapping[str, Path], layout: Layout, channels: Mapping[str, str], found: Found
) -> None:
    """Cases of images and labels by name."""
    parts: defaultdict[str, dict[str, Source]] = defaultdict(dict)
    numbered = {stem: match for stem in images if (match := _CHANNEL.fullmatch(stem)) and stem not in labels}
    # A file called scan_2019 is not channel 2019 of a case; channels count from 0000 and belong to a label.
    numbered = {
        stem: match
        for stem, match in numbered.items()
        if f"{match[1]}_0000" in numbered and (match[1] in labels or not labels)
    }
    several = {match[2] for match in numbered.values()} != {"0000"}
    for stem in sorted(images):
        name, modality = stem, ""
        if stem in numbered:
            name, number = numbered[stem].groups()
            channel = channels.get(str(int(number)), number)
            modality = (layout.modality_of(channel) or channel) if several else ""
        elif stem not in labels:
            name, modality = _case_and_modality(stem, labels, layout)
        if modality in parts[name]:
            found.findings.append(
                Code.NAME_TWICE.finding(
                    f"{parts[name][modality].name} and {images[stem].name} are both the case's {modality or 'image'}",
                    case=name,
                    file=images[stem].name,
                    advice=f"Say which it is with --channel-map '{modality or 'NAME'}=PATTERN', or move one away.",
                )
            )
        else:
            parts[name][modality] = layout.source(images[stem])
            if modality:
                found.taken_for.append((stem.removeprefix(name).lstrip("_-. "), modality))
    for name in sorted(parts):
        label = labels.get(name)
        patient = layout.patient_in(name) or name
        found.cases.append(Case(name, patient, dict(parts[name]), layout.source(label) if label else None))
    for name in sorted(labels.keys() - parts.keys()):
        found.findings.append(
            Code.LABEL_WITHOUT_IMAGE.finding(
                f"label {labels[name].name} has no image of its name", case=name, file=labels[name].name
            )
        )


def _case_and_modality(stem: str, labels: Mapping[str, Path], layout: Layout) -> tuple[str, str]:
    """`case_flair` is the FLAIR of the labelled case `case`; what names no modality is a case of its own."""
    for at in range(len(stem) - 1, 0, -1):
        if stem[at] in "_-. " and stem[:at] in labels:
            modality = layout.modality_of(stem[at + 1 :])
            if modality is not None:
                return stem[:at], modality
    return stem, ""


def _channel_names(folder: Path) -> Mapping[str, str]:
    """What nnU-Net's `dataset.json` calls the channels, by number; empty where it says nothing."""
    try:
        table = json.loads((folder / "dataset.json").read_text("utf-8"))
        names = table.get("channel_names") or table.get("modality") or {}
        return {str(int(number)): str(name) for number, name in names.items()}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}  # it is not ours to check; the numbers serve


def _labelled(stem: str, layout: Layout) -> str | None:
    """The name of the case whose label is called so, or None for an image."""
    if not layout.is_label(stem):
        return None
    if layout.label:
        name = re.sub(layout.label, "", stem, flags=re.IGNORECASE)
    else:
        name = re.sub(r"[_. -](mask|masks|segm|seg|label|labels|segmentation|gt)$", "", stem, flags=re.IGNORECASE)
    name = name.strip("_. -")
    return name if name and name != stem else None


def _stem(path: Path) -> str:
    """The file's name without suffix, composed: macOS writes an é as two characters."""
    suffix = suffix_of(path)
    name = path.name[: -len(suffix)] if suffix else path.name
    return unicodedata.normalize("NFC", name)
