"""What the actions of `wardround-site data` print on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from client.registry import Examined
from common.imaging.case import Source
from common.imaging.facts import CaseFacts, SourceFacts
from common.imaging.findings import Finding
from common.wording import counted, printable


def say(text: str) -> None:
    """Prints a line; a file's name may hold anything, and must do nothing to the terminal."""
    print(printable(text))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints columns of equal width; the cells hold nothing that `printable` would shorten."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, *rows]:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_findings(findings: Iterable[Finding], indent: str = "") -> None:
    """A line for each."""
    for finding in findings:
        say(f"{indent}{finding.code} {finding.level}: {finding.message}. {finding.advice}")


def print_case(data_set: str, one: Examined, findings: Sequence[Finding]) -> None:
    """What is known of a case."""
    say(f"{one.case.name}: patient {one.case.patient}, data set {data_set}")
    facts: CaseFacts | None = one.facts
    for modality, source in sorted(one.case.images.items()):
        say(f"image {modality}".rstrip())
        _print_place(source)
        if facts and (image := facts.images.get(modality)):
            _print_geometry(image)
            say(
                f"  values   {image.minimum:g} to {image.maximum:g}, mean {image.mean:.4g}, deviation {image.std:.4g}, "
                f"1st and 99th percentile {image.p01:g} and {image.p99:g}"
            )
    if one.case.label:
        say("label")
        _print_place(one.case.label)
        if facts and facts.label:
            _print_geometry(facts.label)
            shown = list(facts.label.counts.items())[:8]
            more = f" and {facts.label.values - len(shown)} more values" if facts.label.values > len(shown) else ""
            say(f"  voxels   {', '.join(f'{value}: {count}' for value, count in shown)}{more}")
    if not facts:
        say("its files could not all be read")
    print_findings(findings)


def _print_place(source: Source) -> None:
    level = f", level {source.level}" if source.level else ""
    say(f"  file     {source.path}" + (f", series {source.series}" if source.series else "") + level)


def _print_geometry(facts: SourceFacts) -> None:
    shape = " x ".join(str(size) for size in facts.shape)
    spacing = " x ".join(f"{distance:.4g}" for distance in facts.spacing)
    stated = " (the file states none)" if facts.stated == "nothing" else ""
    say(f"  format   {facts.format}, {facts.dtype}, {counted(facts.channels, 'channel')}")
    say(f"  grid     {shape} voxels, {spacing} apart (z, y, x){stated}")
    say(f"  sha256   {facts.digest}")


def progress(what: str) -> Any:
    """Writes where it is on a terminal, and nothing elsewhere."""

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            end = "\n" if done + 1 == total else ""
            print(f"\r{what} {done + 1} of {total}", end=end, file=sys.stderr, flush=True)

    return show
