"""Cases from DICOM as an archive exports it: patients, sessions and series, told apart by headers, at any depth.

A session (one StudyInstanceUID of one PatientID) is a case. Each of its series is an image, whose modality its
description says (`options`), or a label: a DICOM-SEG object, which belongs to the session of the series it refers to,
or a series that is called a mask or segmentation. Only headers are read. Source: DICOM PS3.3, A.1.2 (the information
model of composite objects) and C.8.20 (Segmentation).
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pydicom

from common.imaging.case import Case, Source
from common.imaging.findings import Code, Finding
from common.imaging.layouts.named_files import is_silent
from common.imaging.layouts.options import LABEL, Found, Layout
from common.imaging.layouts.tree import Listing
from common.imaging.readers.dicom_folder import Series, scan_folder
from common.imaging.readers.dicom_headers import text_of
from common.wording import listed


@dataclass(frozen=True)
class _Image:
    """A series of images, in one folder."""

    series: Series
    folder: Path

    @property
    def key(self) -> tuple[Path, str]:
        """Tells it from every other; a series may lie in two folders."""
        return self.folder, self.series.uid

    @property
    def description(self) -> str:
        """Of the series; what exports without descriptions have is the name of its folder."""
        return self.series.description or self.folder.name


@dataclass(frozen=True)
class _Label:
    """A label: a series of masks, or one DICOM-SEG file and the series it was drawn on (empty if it does not say)."""

    source: Source
    description: str
    refers_to: frozenset[str] = frozenset()


@dataclass
class _Session:
    patient: str
    study: str
    images: list[_Image] = field(default_factory=list)
    labels: list[_Label] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.images[0].folder if self.images else self.labels[0].source.path.parent


def cases_of_sessions(root: Path, tree: Sequence[tuple[Path, Listing]], layout: Layout) -> Found:
    """The cases of all DICOM files in the listed folders."""
    found = Found()
    sessions: dict[tuple[str, str], _Session] = {}
    ignored: list[str] = []
    without_images: defaultdict[str, list[str]] = defaultdict(list)
    for folder, _ in tree:
        try:
            scan = scan_folder(folder)
        except OSError:
            continue  # a finding of the tree
        ignored += [path.relative_to(root).as_posix() for path in scan.ignored if not is_silent(path)]
        # Beside a series, they may be slices of it: its reader refuses them, and with them the case.
        if not any(series.frames for series in scan.series):
            for path, reason in scan.damaged.items():
                found.findings.append(
                    Code.UNREADABLE.finding(
                        f"file {path.name}: cannot be read as DICOM ({reason})",
                        case=path.relative_to(root).as_posix(),
                        file=path.name,
                    )
                )
        for path, kind in scan.left_aside.items():
            without_images[kind].append(path.name)
        for series in scan.series:
            key = (series.patient, series.study or str(folder.parent))
            session = sessions.setdefault(key, _Session(*key))
            if series.is_segmentation:
                session.labels += [_segmentation(path, series, layout) for path in series.files]
            elif not series.frames:
                without_images[series.kind] += [path.name for path in series.files]
            elif layout.is_label(series.description) or layout.is_label(folder.name):
                session.labels.append(_Label(layout.source(folder, series.uid), series.description or folder.name))
            else:
                session.images.append(_Image(series, folder))
    _move_to_their_images(sessions)
    for session in sessions.values():
        if not session.images:
            found.findings.extend(_lonely(label) for label in session.labels)
    whole = [session for session in sessions.values() if session.images]
    for session, name in zip(whole, _names(whole), strict=True):
        found.cases.append(_case(session, name, root, layout, found))
    found.findings.extend(_left_out(ignored, without_images))
    return found


def _case(session: _Session, name: str, root: Path, layout: Layout, found: Found) -> Case:
    findings = found.findings
    label = _choose_label(session, name, layout, found)
    preferred = label.refers_to if label else frozenset()
    images = {}
    for modality, candidates in _by_modality(session, name, layout, found).items():
        referred = [image for image in candidates if image.series.uid in preferred]
        chosen = referred if len(referred) == 1 else candidates
        images[modality] = layout.source(chosen[0].folder, chosen[0].series.uid)
        told = _told_apart(candidates)
        left = [told[image.key] for image in candidates if image is not chosen[0]]
        if len(chosen) > 1:
            findings.append(
                Code.NAME_TWICE.finding(
                    f"{len(chosen)} series are the case's {modality}: {listed(told[i.key] for i in chosen)}",
                    case=name,
                    file=chosen[1].folder.name,
                    advice=f"Say which it is with --channel-map '{modality}=PATTERN', or move the others away.",
                )
            )
        elif left:
            findings.append(
                Code.LEFT_OUT.finding(
                    f"the label was drawn on {told[chosen[0].key]}; left out: {listed(left)}",
                    case=name,
                    file=chosen[0].folder.name,
                )
            )
    path = session.folder.relative_to(root).as_posix()
    by_pattern = layout.patient_in(path)
    if layout.patient_pattern and by_pattern is None:
        found.without_patient.append(path)
    return Case(name, by_pattern or session.patient or name, images, label.source if label else None)


def _told_apart(images: Sequence[_Image]) -> dict[tuple[Path, str], str]:
    """By its key the description of each series, with its first file where others are described alike."""
    alike = Counter(image.description for image in images)
    return {
        image.key: image.description
        if alike[image.description] == 1
        else f"{image.description} ({image.folder.name}/{image.series.files[0].name})"
        for image in images
    }


def _by_modality(session: _Session, name: str, layout: Layout, found: Found) -> dict[str, list[_Image]]:
    named: defaultdict[str, list[_Image]] = defaultdict(list)
    others: list[_Image] = []
    for image in session.images:
        modality = layout.modality_of(image.description)
        # A description of MR that no rule knows may be any contrast, or a localizer. CT is CT.
        if modality is None and image.series.modality != "MR":
            modality = image.series.modality or "image"
            if layout.names(modality):
                modality = None  # whoever says which series are the CT says that this one, such as a scout, is not
        if modality is None:
            others.append(image)
        else:
            named[modality].append(image)
    if not named:
        named["MR"], others = others, []
    found.taken_for.extend((image.description, modality) for modality, images in named.items() for image in images)
    found.taken_for.extend((image.description, "") for image in others)
    if others:
        descriptions = listed([image.description for image in others])
        found.findings.append(
            Code.IGNORED_FILE.finding(
                f"series of no known modality: {descriptions}",
                case=name,
                file=others[0].folder.name,
                advice="Nothing, if they are not wanted; otherwise name them with --channel-map 'NAME=PATTERN'.",
            )
        )
    return dict(sorted(named.items()))


def _choose_label(session: _Session, name: str, layout: Layout, found: Found) -> _Label | None:
    findings = found.findings
    present = {image.series.uid for image in session.images}
    labels = []
    for label in session.labels:
        called = label.description or label.source.name
        if layout.label and not (layout.is_label(label.description) or layout.is_label(label.source.name)):
            found.taken_for.append((called, ""))
            continue
        if label.refers_to and not label.refers_to & present:
            findings.append(_lonely(label))
        else:
            labels.append(label)
            found.taken_for.append((called, LABEL))
    if len(labels) > 1:
        files = [f"{label.source.name} ({label.description or 'without description'})" for label in labels]
        findings.append(
            Code.LABEL_TWICE.finding(
                f"{len(labels)} labels for one case: {listed(files)}",
                case=name,
                file=labels[1].source.name,
                advice="Say which it is with --label PATTERN, or move the others away.",
            )
        )
    return labels[0] if labels else None


def _segmentation(path: Path, series: Series, layout: Layout) -> _Label:
    """A DICOM-SEG file with the series that its header refers to."""
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["ReferencedSeriesSequence"])
        references = header.get("ReferencedSeriesSequence") or []
        uids = frozenset(text_of(item, "SeriesInstanceUID") for item in references) - {""}
    except Exception:  # damaged behind what `scan_folder` read; whoever reads the label says so
        uids = frozenset()
    return _Label(layout.source(path), series.description, uids)


def _move_to_their_images(sessions: dict[tuple[str, str], _Session]) -> None:
    """Some tools store segmentations as an examination of their own: they go to that of the images."""
    home: defaultdict[str, list[_Session]] = defaultdict(list)
    for session in sessions.values():
        for image in session.images:
            home[image.series.uid].append(session)
    for session in sessions.values():
        for label in list(session.labels):
            there = [other for uid in sorted(label.refers_to) for other in home[uid]]
            if there and session not in there:
                session.labels.remove(label)
                there[0].labels.append(label)


def _names(sessions: list[_Session]) -> list[str]:
    """A name for each session: patient and date; where two are alike, with a part of the study's digest."""
    plain = []
    for session in sessions:
        patient = session.patient or "patient"
        plain.append("_".join(part for part in (patient, _date(session.images[0].series.files[0])) if part))
    clean = ["".join(sign if sign.isprintable() and sign not in "/\\" else "_" for sign in name) for name in plain]
    return [
        f"{name}_{hashlib.sha256(session.study.encode()).hexdigest()[:8]}" if clean.count(name) > 1 else name
        for name, session in zip(clean, sessions, strict=True)
    ]


def _date(path: Path) -> str:
    try:
        return text_of(pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["StudyDate"]), "StudyDate")
    except Exception:  # as above
        return ""


def _lonely(label: _Label) -> Finding:
    return Code.LABEL_WITHOUT_IMAGE.finding(
        f"label {label.source.name} was drawn on a series that is not here",
        file=label.source.name,
        advice="Add the images it was drawn on, or remove the label.",
    )


def _left_out(ignored: list[str], without_images: dict[str, list[str]]) -> list[Finding]:
    findings = []
    if ignored:
        count = f"{len(ignored)} files are" if len(ignored) > 1 else "a file is"
        findings.append(Code.IGNORED_FILE.finding(f"{count} no DICOM: {listed(ignored)}"))
    for kind, names in sorted(without_images.items()):
        count = f"{len(names)} files hold" if len(names) > 1 else "a file holds"
        findings.append(
            Code.IGNORED_FILE.finding(
                f"{count} no images ({kind}): {listed(names)}",
                advice="Nothing, unless they are the labels: export those as DICOM-SEG.",
            )
        )
    return findings
