"""`wardround-site data add`: registers a folder, examines its cases and says what was found."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from client.data_cli import open_registry
from client.data_printing import print_findings, print_table, progress, say
from client.data_summary import DataReport
from client.label_map import parse_label_map
from client.registry import DataSet
from common.errors import DataError, UsageError
from common.imaging.case import Case
from common.imaging.findings import Finding
from common.imaging.layouts.options import LABEL, Layout
from common.wording import counted, printable

_ARRANGEMENTS = {
    "table": "by its cases.csv",
    "pairs": "in pairs of images/ and labels/",
    "side by side": "images and labels side by side",
    "dicom": "DICOM by patient and session",
    "none": "in no known arrangement",
}
_SHOWN = 8


def add(options: argparse.Namespace) -> int:
    """Registers a folder and examines its cases; 3, and nothing is registered, where there are none."""
    layout = Layout(_channel_map(options.channel_map), options.label, options.patient_pattern, options.level)
    label_map = parse_label_map(options.label_map)
    with open_registry(options.registry, make=True) as registry:
        data_set = registry.add(options.name, options.path, layout, label_map)
        cases = registry.cases(data_set.name)
        check = registry.check([data_set.name], on_case=progress("examining"))
        if not cases:
            registry.remove(data_set.name)
    facts = [one.facts for one in check.examined if one.facts is not None]
    report = DataReport.of(data_set.name, check.names, facts, check.findings)
    if options.json:
        _print_json(data_set, report, is_registered=bool(cases))
    elif cases:
        _print_data_set(data_set, cases)
        _print_report(data_set, report)
    else:
        say(f"{data_set.name}: not registered, because there is no case in {data_set.path}")
        _print_findings(report.findings)
    return 0 if cases else DataError.exit_code


def described(data_set: DataSet) -> dict[str, Any]:
    """What the user said of a data set, and how it was understood, as a JSON object."""
    return {
        "name": data_set.name,
        "path": str(data_set.path),
        "arrangement": data_set.arrangement,
        "label_map": str(data_set.label_map) if data_set.label_map else None,
        "channel_map": dict(data_set.layout.channel_map),
        "label": data_set.layout.label or None,
        "patient_pattern": data_set.layout.patient_pattern or None,
        "level": data_set.layout.level,
        "added_at": data_set.added_at,
    }


def _channel_map(given: Sequence[str]) -> dict[str, str]:
    rules: dict[str, str] = {}
    for text in given:
        name, equals, pattern = text.partition("=")
        name, pattern = name.strip(), pattern.strip()
        if not equals:
            raise UsageError(f"channel map {text!r}: expected 'NAME=PATTERN', such as 'FLAIR=dark.?fluid'; correct it")
        if name.casefold() == LABEL:
            raise UsageError(f"channel map {text!r}: no modality is called {name}; say what labels are with --label")
        twin = next((known for known in rules if known.casefold() == name.casefold()), None)
        if twin is not None:
            same = "given twice" if twin == name else f"the same as {twin}, as capitals do not count"
            raise UsageError(f"channel map {text!r}: {name} is {same}; join the patterns with |")
        rules[name] = pattern
    return rules


def _print_json(data_set: DataSet, report: DataReport, *, is_registered: bool) -> None:
    taken_for = [
        {
            "description": name,
            "modality": modality if modality not in ("", LABEL) else None,
            "label": modality == LABEL,
            "count": count,
        }
        for (name, modality), count in data_set.taken_for.items()
    ]
    found = {
        "registered": is_registered,
        "taken_for": taken_for,
        "without_patient": list(data_set.without_patient),
        "check": report.to_json(),
    }
    print(json.dumps(described(data_set) | found))


def _print_data_set(data_set: DataSet, cases: Sequence[Case]) -> None:
    patients = {case.patient for case in cases}
    modalities = Counter(modality or "image" for case in cases for modality in case.images)
    labelled = sum(case.label is not None for case in cases)
    say(
        f"{data_set.name}: {counted(len(cases), 'case')} of {counted(len(patients), 'patient')}, "
        f"{_ARRANGEMENTS[data_set.arrangement]}"
    )
    say(f"  images  {', '.join(f'{name} {count}' for name, count in sorted(modalities.items()))}")
    say(f"  labels  {labelled}" + (f", read as {data_set.label_map}" if data_set.label_map else ""))
    if data_set.taken_for:
        say("  taken for, by name; where one is wrong, give --channel-map 'NAME=PATTERN' or --label PATTERN")
        named = [
            (f"    {printable(name)}", modality or "left out", str(count))
            for (name, modality), count in data_set.taken_for.items()
        ]
        print_table(("    description", "taken for", "files or series"), named)
    without = data_set.without_patient
    if without:
        is_dicom = data_set.arrangement == "dicom"
        where = counted(len(without), "folder" if is_dicom else "name")
        instead = (
            "DICOM's PatientID says it there" if is_dicom else "each of these cases counts as a patient of its own"
        )
        say(f"  patients  the pattern finds none in {where}, such as {without[0]}; {instead}")


def _print_report(data_set: DataSet, report: DataReport) -> None:
    say(f"  checked {report.headline}")
    if report.by_code:
        found = [f"{code} {counted(count, 'time')}" for code, count in report.by_code.items()]
        say(f"  found   {', '.join(found)}")
        _print_findings([finding for finding in report.findings if not finding.case])
        say(f"What these are, and what to do: wardround-site data check {data_set.name}")


def _print_findings(findings: Sequence[Finding]) -> None:
    print_findings(findings[:_SHOWN], "  ")
    if len(findings) > _SHOWN:
        say(f"  and {len(findings) - _SHOWN} more; --json has all of them")
