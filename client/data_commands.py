"""What the actions of `wardround-site data` do; `data_cli` parses them without loading what reads images."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from client.data_add import add, described
from client.data_cli import open_registry, registry_path
from client.data_printing import print_case, print_table, progress, say
from client.data_report import DataReport, draw_thumbnails, render_html, render_json, render_text
from client.registry import Check, DataSet, Examined, Registry
from common.errors import DataError, UsageError
from common.imaging.case import Source
from common.imaging.checks import Finding, Requirements
from common.imaging.splits import split_cases
from common.study import Study, load_study
from common.wording import listed

__all__ = ["add", "check", "list_all", "remove", "show"]


def list_all(options: argparse.Namespace) -> int:
    """Prints what is registered."""
    path = registry_path(options.registry)
    rows: list[tuple[DataSet, int]] = []
    if path.exists():
        with Registry(path) as registry:
            rows = [(one, len(registry.cases(one.name))) for one in registry.data_sets()]
    if options.json:
        print(json.dumps([described(one) | {"cases": cases} for one, cases in rows]))
        return 0
    if not rows:
        say(f"{path}: nothing is registered; register a folder with `wardround-site data add NAME PATH`")
        return 0
    print_table(
        ("name", "cases", "added", "labels read as", "folder"),
        [
            (one.name, str(cases), _day(one.added_at), str(one.label_map or "stored"), str(one.path))
            for one, cases in rows
        ],
    )
    return 0


def check(options: argparse.Namespace) -> int:
    """Examines what has changed, for a study or for any, and prints the report; 3 if the data cannot be used."""
    study = load_study(options.study) if options.study else None
    if options.html:
        _refuse_html(options.html)
    with _data_sets(options.name, options.registry) as (registry, data_sets):
        names = [one.name for one in data_sets]
        if study is not None:
            registry.label_map_of(names)  # as `start` will ask for one
        check = registry.check(names, study, on_case=progress("examining"))
    report = _report(options.name, data_sets, check, study)
    if options.html:
        _write_html(options.html, report, data_sets[0], check)
    print(render_json(report) if options.json else render_text(report).rstrip("\n"))
    if options.html and not options.json:
        say(f"With pictures: {options.html}")
    return 0 if report.is_fit else DataError.exit_code


def show(options: argparse.Namespace) -> int:
    """Prints what is known of one case."""
    study = load_study(options.study) if options.study else None
    with open_registry(options.registry) as registry:
        names = [options.data] if options.data else [one.name for one in registry.data_sets()]
        cases = {name: [case.name for case in registry.cases(name)] for name in names}
        found = [name for name, known in cases.items() if options.case in known]
        if not found:
            raise UsageError(_unknown_case(options.case, cases, options.data))
        if len(found) > 1:
            raise UsageError(
                f"case {options.case!r}: in {', '.join(found)}; say which with --data, such as --data {found[0]}"
            )
        check = registry.check(found, study)
    one = next(one for one in check.examined if one.case.name == options.case)
    findings = sorted(finding for finding in check.findings if finding.case == options.case)
    if options.json:
        print(json.dumps(_case_json(one, findings) | {"data_set": found[0]}))
    else:
        print_case(found[0], one, findings)
    return 0


def remove(options: argparse.Namespace) -> int:
    """Forgets a data set."""
    with open_registry(options.registry) as registry:
        folder = registry.get(options.name).path
        registry.remove(options.name)
    say(f"{options.name}: forgotten; the files in {folder} are as they were")
    return 0


def _unknown_case(name: str, cases: dict[str, list[str]], data_set: str | None) -> str:
    """What to say of a case that no data set has, with the names that come nearest."""
    known = sorted({case for names in cases.values() for case in names})
    near = [case for case in known if name.casefold() in case.casefold()]
    near += difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    instead = f"; the nearest names are {listed(dict.fromkeys(near), most=3)}" if near else ""
    where = f"in data set {data_set}" if data_set else "in any data set"
    return f"case {name!r}: not {where}{instead}; see all names with `wardround-site data check NAME --json`"


@contextmanager
def _data_sets(given: str, registry: Path | None) -> Iterator[tuple[Registry, list[DataSet]]]:
    """Registered data sets, or else a folder, registered for as long as the command runs; chosen as `start` does."""
    folder, path, names = Path(given), registry_path(registry), list(dict.fromkeys(given.split(",")))
    if registry is not None or path.exists():
        with open_registry(registry) as opened:
            if {one.name for one in opened.data_sets()}.issuperset(names) or not folder.is_dir():
                yield opened, [opened.get(name) for name in names]
                return
    if not folder.is_dir():
        raise UsageError(
            f"{given}: no folder, and no registered data set, as there is no registry at {path}; correct the name, "
            "register the data with `wardround-site data add`, or give the right --registry"
        )
    with (
        tempfile.TemporaryDirectory(prefix="wardround-") as temporary,
        Registry(Path(temporary) / "registry.sqlite") as opened,
    ):
        yield opened, [opened.add("folder", folder)]


def _report(name: str, data_sets: Sequence[DataSet], check: Check, study: Study | None) -> DataReport:
    facts = [one.facts for one in check.examined if one.facts is not None]
    about = _about(data_sets, study)
    if study is None:
        return DataReport.of(name, check.names, facts, check.findings, about=about)
    training, validation = split_cases(
        check.usable, study.evaluation, study.seed, independent=study.privacy.unit == "patient"
    )
    present = {modality for one in check.examined for modality in one.case.images}
    return DataReport.of(
        name,
        check.names,
        facts,
        check.findings,
        Requirements.of(study),
        (len(training), len(validation)),
        [modality for modality in study.task.modalities if check.examined and modality not in present],
        about,
    )


def _about(data_sets: Sequence[DataSet], study: Study | None) -> Iterator[tuple[str, str]]:
    yield "Checked", time.strftime("%Y-%m-%d %H:%M", time.localtime())
    yield "Study", study.name if study else "none: what every study would ask"
    for one in data_sets:
        prefix = f"{one.name}: " if len(data_sets) > 1 else ""
        channel_map = ", ".join(f"{name}={pattern}" for name, pattern in one.layout.channel_map.items())
        yield f"{prefix}Folder", str(one.path)
        yield f"{prefix}Label map", str(one.label_map or "none: values are read as stored")
        yield f"{prefix}Channel map", channel_map or "none: the built-in names"
        yield f"{prefix}Level", str(one.layout.level) if one.layout.level else "0, the full resolution"


def _refuse_html(path: Path) -> None:
    """Before anything is examined for it."""
    if path.exists() and not path.is_file():
        raise UsageError(f"{path}: is no file; choose another --html")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.parent}; choose another --html in a folder that exists")


def _write_html(path: Path, report: DataReport, data_set: DataSet, check: Check) -> None:
    cases = {one.case.name: one.case for one in check.examined}
    classes = data_set.label_map.classes if data_set.label_map else None
    pictures = draw_thumbnails(report, cases, label_map=classes, on_case=progress("drawing"))
    try:
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
        raise UsageError(
            f"{path}: the report cannot be written ({error.strerror}); choose another --html in a folder that exists"
        ) from error


def _case_json(one: Examined, findings: Iterable[Finding]) -> dict[str, Any]:
    return {
        "name": one.case.name,
        "patient": one.case.patient,
        "images": {modality: _place(source) for modality, source in one.case.images.items()},
        "label": _place(one.case.label) if one.case.label else None,
        "facts": one.facts.to_json() if one.facts else None,
        "findings": [finding.to_json() for finding in findings],
    }


def _place(source: Source) -> dict[str, str | int]:
    return {"path": str(source.path), "series": source.series, "level": source.level}


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(seconds))
