"""The registry's rows: cases, layouts and findings as text, and the marks by which a change of files is noticed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from client.label_map import LabelMap
from common.imaging.case import Case, Source
from common.imaging.checks import Requirements
from common.imaging.facts import CaseFacts, digest_of
from common.imaging.findings import Finding
from common.imaging.layouts.options import Layout
from common.imaging.source_checks import Refused, origin_of
from common.version import VERSION

_EXAMINATION = 3  # counted up where an examination of the same files gives other facts than before


def to_text(value: Any) -> str:
    """JSON in ASCII, which holds whatever a header or a file name may."""
    return json.dumps(value)


def from_text(text: str) -> Any:
    """What was stored."""
    return json.loads(text)


def layout_text(layout: Layout) -> str:
    """A layout as text; `layout_of` is the inverse."""
    return to_text(
        {
            "channel_map": dict(layout.channel_map),
            "label": layout.label,
            "patient_pattern": layout.patient_pattern,
            "level": layout.level,
        }
    )


def layout_of(text: str) -> Layout:
    """The layout that was stored."""
    return Layout(**json.loads(text))


def findings_text(findings: Iterable[Finding]) -> str:
    """Findings as text; `findings_of` is the inverse."""
    return to_text([asdict(finding) for finding in findings])


def findings_of(text: str) -> tuple[Finding, ...]:
    """The findings that were stored."""
    return tuple(Finding(**finding) for finding in json.loads(text))


def facts_text(facts: CaseFacts | None) -> str | None:
    """Facts as text; `facts_of` is the inverse."""
    return None if facts is None else to_text(facts.to_json())


def facts_of(text: str | None) -> CaseFacts | None:
    """The facts that were stored."""
    return None if text is None else CaseFacts.from_json(json.loads(text))


def case_row(case: Case) -> tuple[str, str, str, str | None, str]:
    """Name, patient, images, label and the mark of the files."""
    images = {modality: _source(source) for modality, source in sorted(case.images.items())}
    label = to_text(_source(case.label)) if case.label else None
    return case.name, to_text(case.patient), to_text(images), label, files_mark(case)


def case_of(name: str, patient: str, images: str, label: str | None) -> Case:
    """The case that was stored."""
    sources = {modality: _source_of(found) for modality, found in json.loads(images).items()}
    return Case(name, json.loads(patient), sources, _source_of(json.loads(label)) if label else None)


def files_mark(case: Case) -> str:
    """Changes when a file of the case is written to, replaced, given other rights, comes or goes; nothing is opened.

    Of a source that is a folder all files count: a file that comes may be another slice.
    """
    marks: list[Any] = []
    for source in case.sources:
        try:
            if source.path.is_dir():
                marks += [_mark(Path(entry.path)) for entry in sorted(os.scandir(source.path), key=lambda e: e.name)]
            else:
                marks.append(_mark(source.path))
        except OSError:
            marks.append(str(source.path))
    return hashlib.sha256(to_text(marks).encode()).hexdigest()


def same_content(case: Case, facts: CaseFacts) -> bool:
    """Whether the files of a case hold what they did when the facts were taken."""
    known = [facts.images.get(modality) for modality in sorted(case.images)]
    if case.label is not None:
        known.append(facts.label)  # type: ignore[arg-type]
    try:
        return all(
            one is not None and digest_of(origin_of(source).files) == one.digest
            for one, source in zip(known, case.sources, strict=True)
        )
    except (OSError, Refused):
        return False


def still_holds(case: Case, facts: str | None) -> bool:
    """Whether an examination, for a study or for none, gave these facts of what the files of the case hold now."""
    try:
        known = facts_of(facts)
    except (KeyError, TypeError, ValueError, AttributeError):  # of another version
        return False
    if known is None:
        return False
    names = tuple(known.images)  # a study's, which are not always the site's
    asked = case.with_modalities(() if names == ("",) else names)
    return asked.images.keys() == known.images.keys() and same_content(asked, known)


def asked_mark(requirements: Requirements | None, label_map: LabelMap | None) -> str:
    """Tells examinations for different studies and label maps apart, and those of other versions of Wardround."""
    classes = sorted(label_map.classes.items()) if label_map else None
    return hashlib.sha256(f"{VERSION} {_EXAMINATION} {requirements} {classes}".encode()).hexdigest()


def _mark(path: Path) -> list[Any]:
    status = path.stat()
    # A copy may keep size and time of what it replaces; then it has another number or another time of change.
    return [
        str(path),
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
        status.st_ino,
        status.st_mode,
        status.st_uid,
        status.st_gid,
    ]


def _source(source: Source) -> list[str | int]:
    """The level only where it is not 0, as in registries that are older than levels."""
    return [str(source.path), source.series, *([source.level] if source.level else [])]


def _source_of(found: list[Any]) -> Source:
    path, series, *level = found
    return Source(Path(path), series, *level)
