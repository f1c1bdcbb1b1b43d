"""What `wardround-site predict` does; `predict_cli` parses it without loading what reads images."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from client.predict_inputs import find_inputs
from client.predict_outputs import (
    MEASUREMENTS,
    Targets,
    refuse_existing,
    targets_of,
    unit_of,
    write_explanations,
    write_measurements,
    write_results,
)
from common.errors import DataError, UsageError, WardroundError
from common.imaging.case import Case
from common.imaging.layouts.options import Layout
from common.imaging.writers.codes import SegmentCodes, parse_codes
from common.inference.explanation import open_explanation
from common.inference.golden import check_golden
from common.inference.lite import LiteModel
from common.inference.measurements import Measurement, measurements_of
from common.inference.prediction import predict_case
from common.inference.published import PublishedModel, open_published
from common.wording import printable


@dataclass
class _Report:
    """What came of the inputs."""

    written: list[dict[str, Any]] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    measured: list[Measurement] = field(default_factory=list)


def run(options: argparse.Namespace) -> int:
    """Segments every input; those that fail are named at the end.

    Raises
    ------
    UsageError : options do not fit the model or each other, or results exist already.
    PublishError : the model is damaged or does not run, or a delegate does not compute what was published.
    DataError : an input failed, after all others were segmented.
    """
    layout = Layout(_channel_map(options.channel_map), level=options.level)
    published = open_published(options.model, options.variant)
    _refuse_misfits(options, published)
    codes = parse_codes(options.code, published.study.task.foreground)
    if not published.recommended:
        print(f"note: {published.variant} is not recommended by its publisher: {published.note}", file=sys.stderr)
    explaining = open_explanation(published, _threads(options)) if options.explain else None
    inputs = find_inputs(options.inputs, published.study, layout)
    report = _Report(failed=list(inputs.refused))
    modalities = published.study.task.modalities
    work = [
        (
            case,
            targets_of(
                case,
                modalities,
                options.out,
                instances=options.instances,
                picture=options.overlay,
                explained=published.study.task.foreground if options.explain else (),
            ),
        )
        for case in inputs.cases
    ]
    table = options.out / MEASUREMENTS
    if work and not options.force:
        refuse_existing([*(path for _, targets in work for path in targets.files.values()), table])
    if work:
        model = _open(published, options)
        _make(options.out)
        for number, (case, targets) in enumerate(work, start=1):
            with _progress(f"{number}/{len(work)} {printable(case.name)}", quiet=options.json) as progress:
                _segment(model, explaining, published, case, targets, codes, options, report, progress)
    failure: WardroundError | None = None
    if report.measured:
        try:
            write_measurements(table, report.measured, options.force)
        except (DataError, UsageError) as error:  # once what was written is told
            failure = error
    _print(report, published, table if report.measured and failure is None else None, options.json)
    if failure is not None:
        raise failure
    if report.failed:
        total = len(inputs.cases) + len(inputs.refused)
        reasons = "\n".join(f"  {printable(name)}: {printable(reason)}" for name, reason in report.failed)
        raise DataError(f"{len(report.failed)} of {total} inputs could not be segmented:\n{reasons}")
    return 0


def _segment(
    model: LiteModel,
    explaining: LiteModel | None,
    published: PublishedModel,
    case: Case,
    targets: Targets,
    codes: dict[str, SegmentCodes],
    options: argparse.Namespace,
    report: _Report,
    progress: Callable[[float], None],
) -> None:
    """One case; what is wrong with it goes to the report."""
    study = published.study
    try:
        predicted = predict_case(model, study, case, mirror=options.mirror, temporary=options.out, progress=progress)
        try:
            write_results(predicted, targets, published, codes, options.force)
            if explaining is not None:
                write_explanations(predicted, targets, explaining, study, options.force, progress)
            classes = predicted.classes
            unit = unit_of(targets.source, classes.spacing, classes.affine)
            measured = measurements_of(
                case.name, classes.array[..., 0], study.task.foreground, classes.spacing, unit, predicted.objects
            )
        finally:
            predicted.case.close()
    except (DataError, UsageError) as error:  # the latter where a result has appeared meanwhile
        report.failed.append((case.name, str(error).removeprefix(f"case {case.name}: ")))
        return
    except MemoryError:
        reason = "needs more memory than this machine has; give a smaller image or, of a pyramid, a higher --level"
        report.failed.append((case.name, reason))
        return
    files = {what: str(path) for what, path in targets.files.items()}
    report.written.append({"input": case.name, "files": files, "measurements": [one.row() for one in measured]})
    report.measured.extend(measured)


def _refuse_misfits(options: argparse.Namespace, published: PublishedModel) -> None:
    study = published.study
    if options.instances and study.task.labels != "instances":
        raise UsageError("--instances: the model tells classes apart, not objects; leave the option out")
    if options.mirror and "flip" not in study.augmentation:
        raise UsageError(
            "--mirror: the model was not trained on mirror images (the study's augmentation has no flip), so its "
            "answers to them are not to be trusted; leave the option out"
        )
    if options.threads is not None and options.threads < 1:
        raise UsageError(f"--threads {options.threads}: expected at least 1; correct it")


def _open(published: PublishedModel, options: argparse.Namespace) -> LiteModel:
    if options.delegate is None:
        return LiteModel(published.file, threads=_threads(options))
    model = LiteModel(published.file, threads=_threads(options), delegate=options.delegate)
    check_golden(model, published.variant)  # a delegate that computes something else is told before any image is seen
    return model


def _threads(options: argparse.Namespace) -> int:
    return options.threads or len(os.sched_getaffinity(0))


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"--out {out}: cannot be made ({error.strerror or error}); give a folder that may be written to"
        ) from error


def _channel_map(given: Sequence[str]) -> dict[str, str]:
    """Modality -> pattern, as given."""
    result = {}
    for text in given:
        name, sign, pattern = text.partition("=")
        if not sign:
            raise UsageError(
                f"--channel-map {text!r}: expected 'NAME=PATTERN', such as 'FLAIR=dark.?fluid'; correct it"
            )
        if name.strip() in result:
            raise UsageError(f"--channel-map {text!r}: {name.strip()} is given twice; join the patterns with |")
        result[name.strip()] = pattern.strip()
    return result


def _print(report: _Report, published: PublishedModel, table: Path | None, as_json: bool) -> None:
    if as_json:
        result = {
            "model": {
                "study": published.study.name,
                "version": published.version,
                "variant": published.variant,
                "sha256": published.sha256,
            },
            "written": report.written,
            "measurements": str(table) if table else None,
            "failed": [{"input": name, "error": reason} for name, reason in report.failed],
        }
        print(json.dumps(result))
        return
    for entry in report.written:
        print(f"{printable(entry['input'])}: {', '.join(_amount(row) for row in entry['measurements'])}")
        for path in entry["files"].values():
            print(f"  {printable(path)}")
    if table:
        print(f"{table}: {published.study.name} {published.version}, {published.variant}")


def _amount(row: dict[str, Any]) -> str:
    """A class and how much there is of it, in the unit that says most."""
    for key, unit in (("volume_ml", "ml"), ("volume_um3", "um^3"), ("area_mm2", "mm^2"), ("area_um2", "um^2")):
        if row[key] is not None:
            amount = f"{row[key]:.4g} {unit}"
            break
    else:
        amount = f"{row['voxels']} pixels"
    objects = f" in {row['objects']} objects" if row["objects"] is not None else ""
    return f"{printable(row['class'])} {amount}{objects}"


@contextmanager
def _progress(name: str, quiet: bool) -> Iterator[Callable[[float], None]]:
    """How much of an image is done, on one line of a terminal that is cleared at the end."""
    if quiet or not sys.stderr.isatty():
        yield lambda share: None
        return
    try:
        yield lambda share: print(f"\r{name} {share:4.0%} ", end="", file=sys.stderr, flush=True)
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
