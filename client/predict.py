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

from client.predict_folder import refuse_existing, results_folder, results_of
from client.predict_inputs import Inputs, find_inputs
from client.predict_notes import fitting_advice, notes_on_channels, notes_on_headers
from client.predict_outputs import (
    Targets,
    check_target,
    targets_of,
    unit_of,
    write_explanations,
    write_results,
)
from client.predict_table import MEASUREMENTS, merge_measurements, read_table
from common.errors import DataError, UsageError, WardroundError
from common.imaging.case import Case
from common.imaging.layouts.options import Layout
from common.imaging.writers.codes import SegmentCodes, parse_codes
from common.inference.explanation import open_explanation
from common.inference.golden import check_golden
from common.inference.images import OpenCase
from common.inference.lite import LiteModel
from common.inference.measurements import Measurement, measurements_of
from common.inference.prediction import predict_case
from common.inference.published import PublishedModel, open_published
from common.inference.trust import Trust
from common.wording import printable


@dataclass(frozen=True)
class _Written:
    """What was made of one input: its files by what they are, and what was measured, in volumes or planes."""

    name: str
    files: dict[str, str]
    measured: list[Measurement]
    is_volume: bool


@dataclass
class _Report:
    """What came of the inputs.

    Attributes
    ----------
    begun : the inputs of which files were written, or older ones removed.
    notes : an input or a folder, and what there is to know of it.
    """

    quiet: bool
    written: list[_Written] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    begun: list[str] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)

    def note(self, name: str, text: str) -> None:
        """Says it at once, unless JSON will say it at the end."""
        self.notes.append((name, text))
        if not self.quiet:
            print(f"note: {printable(name)}: {printable(text)}", file=sys.stderr)

    def fail(self, name: str, reason: str) -> None:
        """Keeps it for the end."""
        self.failed.append((name, fitting_advice(reason)))


def run(options: argparse.Namespace) -> int:
    """Segments every input; those that fail are named at the end.

    Raises
    ------
    UsageError : options do not fit the model, the inputs or each other, results exist already, or the folder for them
        cannot be made or written to.
    IdentityError : the model is not signed, or not by whom it should be.
    PublishError : the model is damaged or does not run, or a delegate does not compute what was published.
    DataError : an input failed, after all others were segmented.
    """
    layout = Layout(_channel_map(options.channel_map), level=options.level)
    trust = Trust.of(options)
    published = open_published(options.model, options.variant, trust)
    trust.warn()
    _refuse_misfits(options, published)
    codes = parse_codes(options.code, published.study.task.foreground)
    if not published.recommended:
        print(f"note: {published.variant} is not recommended by its publisher: {published.note}", file=sys.stderr)
    explaining = open_explanation(published, _threads(options)) if options.explain else None
    with results_folder(options.out):
        return _predict(
            options, published, explaining, codes, trust, find_inputs(options.inputs, published.study, layout)
        )


def _predict(
    options: argparse.Namespace,
    published: PublishedModel,
    explaining: LiteModel | None,
    codes: dict[str, SegmentCodes],
    trust: Trust,
    inputs: Inputs,
) -> int:
    study, table = published.study, options.out / MEASUREMENTS
    work = [
        (
            case,
            targets_of(
                case,
                study.task.modalities,
                options.out,
                instances=options.instances,
                picture=options.overlay,
                explained=study.task.foreground if options.explain else (),
            ),
        )
        for case in inputs.cases
    ]
    if not options.force:
        refuse_existing([path for case in inputs.cases for path in results_of(options.out, case.name)])
    report = _Report(options.json)
    for name, text in inputs.notes:
        report.note(name, text)
    for name, reason in inputs.refused:
        report.fail(name, reason)
    if work:
        read_table(table)  # refused now rather than after the work
        model = _open(published, options)
        for number, (case, targets) in enumerate(work, start=1):
            with _progress(f"{number}/{len(work)} {printable(case.name)}", quiet=options.json) as progress:
                _segment(model, explaining, published, case, targets, codes, options, report, progress)
    failure: WardroundError | None = None
    measured = [one for entry in report.written for one in entry.measured]
    if report.written or report.begun:
        try:
            merge_measurements(table, measured, _name_of(published), report.begun)
        except (DataError, UsageError) as error:  # once what was written is told
            failure = error
    _print(report, published, trust, table if report.written and failure is None else None)
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

    def look(opened: OpenCase) -> None:
        for text in (*notes_on_headers(case), *notes_on_channels(opened, study)):
            report.note(case.name, text)

    try:
        check_target(targets, published, codes)
        predicted = predict_case(
            model, study, case, mirror=options.mirror, temporary=options.out, progress=progress, when_open=look
        )
        try:
            if options.force:
                report.begun.append(case.name)
                _remove_others(options.out, case.name, targets.segmentation)
            write_results(predicted, targets, published, codes, options.force)
            if explaining is not None:
                write_explanations(predicted, targets, explaining, study, options.force, progress)
            classes = predicted.classes
            unit = unit_of(targets.source, classes.stated)
            measured = measurements_of(
                case.name, classes.array[..., 0], study.task.foreground, classes.spacing, unit, predicted.objects
            )
        finally:
            predicted.case.close()
    except (DataError, UsageError) as error:  # the latter where a result has appeared meanwhile
        report.fail(case.name, str(error).removeprefix(f"case {case.name}: "))
        return
    except MemoryError:
        reason = "needs more memory than this machine has; give a smaller image or, of a pyramid, a higher --level"
        report.fail(case.name, reason)
        return
    files = {what: str(path) for what, path in targets.files.items()}
    report.written.append(_Written(case.name, files, measured, classes.array.shape[0] > 1))


def _remove_others(out: Path, name: str, segmentation: Path) -> None:
    """Removes what an earlier run made of a case, so that nothing of it lies beside the new segmentation, which is
    replaced whole."""
    for path in results_of(out, name):
        if path != segmentation:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise DataError(f"{path}: cannot be removed ({error.strerror or error}); check its rights") from error


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
    if options.delegate is not None and not options.delegate.is_file():
        raise UsageError(f"--delegate {options.delegate}: there is no such file; give the delegate's shared library")


def _open(published: PublishedModel, options: argparse.Namespace) -> LiteModel:
    if options.delegate is None:
        return LiteModel(published.file, threads=_threads(options))
    model = LiteModel(published.file, threads=_threads(options), delegate=options.delegate)
    check_golden(model, published.variant)  # a delegate that computes something else is told before any image is seen
    return model


def _threads(options: argparse.Namespace) -> int:
    return options.threads or len(os.sched_getaffinity(0))


def _name_of(published: PublishedModel) -> str:
    return f"{published.study.name} {published.version} {published.variant}"


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


def _print(report: _Report, published: PublishedModel, trust: Trust, table: Path | None) -> None:
    if report.quiet:
        result = {
            "model": {
                "study": published.study.name,
                "version": published.version,
                "variant": published.variant,
                "sha256": published.sha256,
                **trust.report(),
            },
            "written": [
                {"input": one.name, "files": one.files, "measurements": [each.row() for each in one.measured]}
                for one in report.written
            ],
            "measurements": str(table) if table else None,
            "failed": [{"input": name, "error": reason} for name, reason in report.failed],
            "notes": [{"input": name, "note": text} for name, text in report.notes],
        }
        print(json.dumps(result))
        return
    for one in report.written:
        print(f"{printable(one.name)}: {', '.join(_amount(each, one.is_volume) for each in one.measured)}")
        for path in one.files.values():
            print(f"  {printable(path)}")
    if table:
        print(f"{table}: {published.study.name} {published.version}, {published.variant}")


def _amount(measured: Measurement, is_volume: bool) -> str:
    """A class and how much there is of it, in the unit that says most."""
    units = (
        (measured.volume_ml, "ml"),
        (measured.volume_um3, "um^3"),
        (measured.area_mm2, "mm^2"),
        (measured.area_um2, "um^2"),
    )
    known = next((f"{value:.4g} {unit}" for value, unit in units if value is not None), None)
    amount = known or f"{measured.voxels} {'voxels' if is_volume else 'pixels'}"
    objects = f" in {measured.objects} objects" if measured.objects is not None else ""
    return f"{printable(measured.name)} {amount}{objects}"


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
