"""The report of a data check, for a terminal, for programs and for a browser. Nothing of it is sent anywhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import groupby

from client.data_report_html import render_html
from client.data_summary import STAYS_HERE, DataReport, Spread, Summary, describe_requirements, describe_split
from common.errors import DataError
from common.imaging.case import Case
from common.imaging.checks import BY_CODE
from common.imaging.thumbnail import thumbnail
from common.wording import printable

__all__ = ["DataReport", "choose_cases", "draw_thumbnails", "render_html", "render_json", "render_text"]

_LISTED = 8
_MODALITIES = 4


def render_json(report: DataReport) -> str:
    """JSON in ASCII, indented, as described in `docs/checks.md`: equal reports give equal text."""
    return json.dumps(report.to_json(), indent=2, allow_nan=False)


def render_text(report: DataReport, *, most_listed: int | None = _LISTED) -> str:
    """The report in lines of plain text, without colours.

    Parameters
    ----------
    most_listed : findings shown of each code; None for all.
    """
    lines = [f"Data set {report.name}: {report.headline} {report.verdict}"]
    if report.requirements:
        lines.append(f"Checked for a study of {describe_requirements(report.requirements)}.{describe_split(report)}")
    for code, group in groupby(report.findings, key=lambda finding: finding.code):
        found = list(group)
        lines += ["", f"{code}  {found[0].level}: {BY_CODE[code].title} ({len(found)})"]
        listed = found if most_listed is None else found[:most_listed]
        for advice, same in groupby(listed, key=lambda finding: finding.advice):
            lines += [f"  - {_where(finding.case, finding.message)}{finding.message}" for finding in same]
            lines.append(f"    {advice}")
        if len(found) > len(listed):
            lines.append(f"  and {len(found) - len(listed)} more; the JSON and HTML reports have all of them")
    for summary in report.summaries():
        lines += ["", *_summary_lines(summary)]
    lines += ["", STAYS_HERE]
    return "\n".join(map(printable, lines)) + "\n"


def choose_cases(report: DataReport, most: int = 24) -> list[str]:
    """The cases worth a picture: half of them the worst, the others an even sample of the rest, in order of names."""
    weights = dict.fromkeys(report.cases, 0)
    for finding in report.findings:
        if finding.case in weights:
            weights[finding.case] += 1000 if finding.level == "error" else 1
    worst = sorted((name for name in report.cases if weights[name]), key=lambda name: (-weights[name], name))
    sound = [name for name in report.cases if not weights[name]]
    worst = worst[: max(most - len(sound), most // 2)]
    left = most - len(worst)
    step = max(len(sound) / left, 1.0) if left else 1.0
    return worst + [sound[int(index * step)] for index in range(min(left, len(sound)))]


def draw_thumbnails(
    report: DataReport,
    cases: Mapping[str, Case],
    *,
    most: int = 24,
    label_map: Mapping[int, int] | None = None,
    on_case: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, dict[str, bytes]]:
    """PNGs of `choose_cases`, by case and modality, at most four of a case; images that cannot be read have none.

    Parameters
    ----------
    cases : by name.
    on_case : called before each picture with the number of those done and of all.
    """
    found: dict[str, dict[str, bytes]] = {}
    dimensions = report.requirements.dimensions if report.requirements else None
    chosen = [name for name in choose_cases(report, most) if name in cases]
    for index, name in enumerate(chosen):
        on_case(index, len(chosen))
        pictures: dict[str, bytes] = {}
        for modality in sorted(cases[name].images)[:_MODALITIES]:
            with suppress(DataError):
                pictures[modality] = thumbnail(cases[name], dimensions, modality=modality, label_map=label_map)
        if pictures:
            found[name] = pictures
    return found


def _where(case: str, message: str) -> str:
    """The case, where the message does not begin with it; what is no case yet is called by its row of a table."""
    return "" if not case or message.startswith((f"case {case}:", f"{case}:")) else f"{case}: "


def _summary_lines(summary: Summary) -> list[str]:
    kinds = [f"{_frequent(summary.formats)}, {_frequent(summary.dtypes)}", f"channels {_frequent(summary.channels)}"]
    lines = [
        f"{summary.what} ({summary.count}): {', '.join(kinds)}",
        f"  shape (z, y, x)    {_spreads(summary.shape)}",
        f"  spacing (z, y, x)  {_spreads(summary.spacing)}",
    ]
    if summary.intensity:
        lines += [f"  {name:<17}  {_spread(spread)}" for name, spread in summary.intensity.items()]
    if summary.values:
        lines.append(f"  labels with value  {', '.join(f'{value} ({n})' for value, n in summary.values.items())}")
    if summary.different:
        lines.append(f"  values in a label  {_spread(summary.different)}")
    return lines


def _frequent(found: Mapping[str, int]) -> str:
    if len(found) == 1:
        return next(iter(found))
    return ", ".join(f"{value} ({count})" for value, count in found.items())


def _spreads(spreads: tuple[Spread, ...]) -> str:
    return " x ".join(_spread(spread) for spread in spreads)


def _spread(spread: Spread) -> str:
    shown = [f"{value:.4g}" for value in (spread.lowest, spread.median, spread.highest)]
    return shown[0] if len(set(shown)) == 1 else "..".join(shown)
