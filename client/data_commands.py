"""What the actions of `wardround-site data` do; `data_cli` parses them without loading what reads images."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from client.data_cli import open_registry, registry_path
from client.data_report import DataReport, draw_thumbnails, printable, render_html, render_json, render_text
from client.label_map import parse_label_map
from client.registry import Check, DataSet, Examined, Registry
from common.errors import DataError, UsageError
from common.imaging.checks import Finding, Requirements
from common.imaging.facts import CaseFacts, SourceFacts
from common.imaging.layouts.options import Layout
from common.study import Study, load_study

_ARRANGEMENTS = {
    "table": "by its cases.csv",
    "pairs": "in pairs of images/ and labels/",
    "side by side": "images and labels side by side",
    "dicom": "DICOM by patient and session",
    "none": "in no known arrangement",
}


def add(options: argparse.Namespace) -> int:
    """Registers a folder, examines its cases and says what was found."""
    layout = Layout(_channel_map(options.channel_map), options.label, options.patient_pattern)
    label_map = parse_label_map(options.label_map)
    registry = open_registry(options.registry, make=True)
    data_set = registry.add(options.name, options.path, layout, label_map)
    cases = registry.cases(data_set.name)
    check = registry.check([data_set.name], on_case=_progress("examining"))
    if options.json:
        names = [
            {"description": name, "modality": modality or None, "count": count}
            for (name, modality), count in data_set.taken_for.items()
        ]
        print(json.dumps(_described(data_set) | {"taken_for": names, "check": _report(data_set, check).to_json()}))
        return 0
    patients = {case.patient for case in cases}
    modalities = Counter(modality or "image" for case in cases for modality in case.images)
    labelled = sum(case.label is not None for case in cases)
    _say(
        f"{data_set.name}: {_count(len(cases), 'case')} of {_count(len(patients), 'patient')}, "
        f"{_ARRANGEMENTS[data_set.arrangement]}"
    )
    if cases:
        _say(f"  images  {', '.join(f'{name} {count}' for name, count in sorted(modalities.items()))}")
        _say(f"  labels  {labelled}" + (f", read as {label_map}" if label_map else ""))
    if data_set.taken_for:
        _say("  taken for, by name; where one is wrong, give --channel-map 'NAME=PATTERN'")
        named = [
            (f"    {printable(name)}", modality or "left out", str(count))
            for (name, modality), count in data_set.taken_for.items()
        ]
        _print_table(("    description", "modality", "images"), named)
    if layout.patient_pattern and data_set.arrangement != "dicom":
        unknown = [case.name for case in cases if layout.patient_in(case.name) is None]
        if unknown:
            _say(
                f"  patients  the pattern finds none in {_count(len(unknown), 'name')}, such as {unknown[0]}; "
                "each of these cases counts as a patient of its own"
            )
    report = _report(data_set, check)
    _say(f"  checked {report.headline}")
    if report.by_code:
        found = [f"{code} {_count(count, 'time')}" for code, count in report.by_code.items()]
        _say(f"  found   {', '.join(found)}")
        _say(f"What these are, and what to do: wardround-site data check {data_set.name}")
    return 0


def list_all(options: argparse.Namespace) -> int:
    """Prints what is registered."""
    path = registry_path(options.registry)
    registry = Registry(path) if path.exists() else None
    data_sets = registry.data_sets() if registry else []
    rows = [(one, len(registry.cases(one.name))) for one in data_sets] if registry else []
    if options.json:
        print(json.dumps([_described(one) | {"cases": cases} for one, cases in rows]))
        return 0
    if not rows:
        _say(f"{path}: nothing is registered; register a folder with `wardround-site data add NAME PATH`")
        return 0
    _print_table(
        ("name", "cases", "added", "folder"),
        [
            (one.name, str(cases), time.strftime("%Y-%m-%d", time.localtime(one.added_at)), str(one.path))
            for one, cases in rows
        ],
    )
    return 0


def check(options: argparse.Namespace) -> int:
    """Examines what has changed, for a study or for any, and prints the report; 3 if the data cannot be used."""
    study = load_study(options.study) if options.study else None
    registry = open_registry(options.registry)
    data_set = registry.get(options.name)
    check = registry.check([data_set.name], study, on_case=_progress("examining"))
    report = _report(data_set, check, study)
    if options.html:
        _write_html(options.html, report, data_set, check)
    print(render_json(report) if options.json else render_text(report).rstrip("\n"))
    if options.html and not options.json:
        _say(f"With pictures: {options.html}")
    return 0 if report.is_fit else DataError.exit_code


def show(options: argparse.Namespace) -> int:
    """Prints what is known of one case."""
    registry = open_registry(options.registry)
    names = [options.data] if options.data else [one.name for one in registry.data_sets()]
    found = [name for name in names if any(case.name == options.case for case in registry.cases(name))]
    if not found:
        where = f"in data set {options.data}" if options.data else "in any data set"
        raise UsageError(
            f"case {options.case!r}: not {where}; see the names with `wardround-site data check NAME --json`"
        )
    if len(found) > 1:
        raise UsageError(f"case {options.case!r}: in {', '.join(found)}; say which with --data")
    check = registry.check(found)
    one = next(one for one in check.examined if one.case.name == options.case)
    findings = [finding for finding in check.findings if finding.case == options.case]
    if options.json:
        print(json.dumps(_case_json(one, findings) | {"data_set": found[0]}))
    else:
        _print_case(found[0], one, findings)
    return 0


def remove(options: argparse.Namespace) -> int:
    """Forgets a data set."""
    registry = open_registry(options.registry)
    folder = registry.get(options.name).path
    registry.remove(options.name)
    _say(f"{options.name}: forgotten; the files in {folder} are as they were")
    return 0


def _channel_map(given: Sequence[str]) -> dict[str, str]:
    rules: dict[str, str] = {}
    for text in given:
        name, equals, pattern = text.partition("=")
        name, pattern = name.strip(), pattern.strip()
        if not equals:
            raise UsageError(f"channel map {text!r}: expected 'NAME=PATTERN', such as 'FLAIR=dark.?fluid'; correct it")
        if name in rules:
            raise UsageError(f"channel map {text!r}: {name} is given twice; join the patterns with |")
        rules[name] = pattern
    return rules


def _report(data_set: DataSet, check: Check, study: Study | None = None) -> DataReport:
    facts = [one.facts for one in check.examined if one.facts is not None]
    return DataReport.of(data_set.name, check.names, facts, check.findings, Requirements.of(study) if study else None)


def _write_html(path: Path, report: DataReport, data_set: DataSet, check: Check) -> None:
    cases = {one.case.name: one.case for one in check.examined}
    classes = data_set.label_map.classes if data_set.label_map else None
    pictures = draw_thumbnails(report, cases, label_map=classes, on_case=_progress("drawing"))
    try:
        if path.exists() and not path.is_file():
            raise DataError(f"{path}: is no file; choose another --html")
        # Names of cases and pictures of patients are for whoever runs the site, as the registry is: a new file takes
        # the place of an old one, whose rights and readers may be others.
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".report-")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(render_html(report, pictures))
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink()
            raise
    except OSError as error:
        raise DataError(
            f"{path}: the report cannot be written ({error.strerror}); choose another --html in a folder that exists"
        ) from error


def _described(data_set: DataSet) -> dict[str, Any]:
    return {
        "name": data_set.name,
        "path": str(data_set.path),
        "arrangement": data_set.arrangement,
        "label_map": str(data_set.label_map) if data_set.label_map else None,
        "channel_map": dict(data_set.layout.channel_map),
        "added_at": data_set.added_at,
    }


def _case_json(one: Examined, findings: Iterable[Finding]) -> dict[str, Any]:
    return {
        "name": one.case.name,
        "patient": one.case.patient,
        "images": {modality: _place(source.path, source.series) for modality, source in one.case.images.items()},
        "label": _place(one.case.label.path, one.case.label.series) if one.case.label else None,
        "facts": one.facts.to_json() if one.facts else None,
        "findings": [finding.to_json() for finding in findings],
    }


def _place(path: Path, series: str) -> dict[str, str]:
    return {"path": str(path), "series": series}


def _print_case(data_set: str, one: Examined, findings: Sequence[Finding]) -> None:
    _say(f"{one.case.name}: patient {one.case.patient}, data set {data_set}")
    facts: CaseFacts | None = one.facts
    for modality, source in sorted(one.case.images.items()):
        _say(f"image {modality}".rstrip())
        _say(f"  file     {source.path}" + (f", series {source.series}" if source.series else ""))
        if facts and (image := facts.images.get(modality)):
            _print_geometry(image)
            _say(
                f"  values   {image.minimum:g} to {image.maximum:g}, mean {image.mean:.4g}, deviation {image.std:.4g}, "
                f"1st and 99th percentile {image.p01:g} and {image.p99:g}"
            )
    if one.case.label:
        print("label")
        source = one.case.label
        _say(f"  file     {source.path}" + (f", series {source.series}" if source.series else ""))
        if facts and facts.label:
            _print_geometry(facts.label)
            shown = list(facts.label.counts.items())[:8]
            more = f" and {facts.label.values - len(shown)} more values" if facts.label.values > len(shown) else ""
            _say(f"  voxels   {', '.join(f'{value}: {count}' for value, count in shown)}{more}")
    if not facts:
        print("its files could not all be read")
    for finding in findings:
        _say(f"{finding.code} {finding.level}: {finding.message}. {finding.advice}")


def _print_geometry(facts: SourceFacts) -> None:
    shape = " x ".join(str(size) for size in facts.shape)
    spacing = " x ".join(f"{distance:.4g}" for distance in facts.spacing)
    _say(f"  format   {facts.format}, {facts.dtype}, {_count(facts.channels, 'channel')}")
    _say(f"  grid     {shape} voxels, {spacing} apart (z, y, x)")
    _say(f"  sha256   {facts.digest}")


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, *rows]:
        _say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _say(text: str) -> None:
    """Prints a line; a file's name may hold anything, and must do nothing to the terminal."""
    print(printable(text))


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _progress(what: str) -> Any:
    """Writes where it is on a terminal, and nothing elsewhere."""

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            end = "\n" if done + 1 == total else ""
            print(f"\r{what} {done + 1} of {total}", end=end, file=sys.stderr, flush=True)

    return show
