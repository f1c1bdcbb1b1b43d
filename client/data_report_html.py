"""A data check's report as one HTML file: no script, no reference to anything outside the file.

Reads without a mouse and aloud: headings, tables with headers, folds that are `details`, pictures with a text.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from html import escape
from itertools import groupby

from client.data_summary import STAYS_HERE, DataReport, Spread, Summary, describe_requirements, describe_split
from common.imaging.checks import BY_CODE, Finding
from common.wording import printable

_MOST_PICTURE_BYTES = 6_000_000
_OPEN = 20
_MOST_ROWS = 2000

_STYLE = """
:root { color-scheme: light dark; --line: #8885; --soft: #8881; --error: #b3261e; --warning: #8a5a00; --good: #1b6e3a; }
@media (prefers-color-scheme: dark) { :root { --error: #ff9d94; --warning: #ffc46b; --good: #7fdc9f; } }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; margin: .5rem 0; } h2 { font-size: 1.25rem; margin: 2rem 0 .5rem; }
.lead { font-size: 1.1rem; } .error { color: var(--error); } .warning { color: var(--warning); }
.good { color: var(--good); }
.scroll { overflow-x: auto; } .scroll:focus-visible, summary:focus-visible { outline: 3px solid #4a90d9; }
table { border-collapse: collapse; margin: .5rem 0; } caption { text-align: left; font-weight: 600; padding: .25rem 0; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .75rem .25rem 0; text-align: left; vertical-align: top; }
td { overflow-wrap: anywhere; } td.n { font-variant-numeric: tabular-nums; white-space: nowrap; }
details { border: 1px solid var(--line); border-radius: .4rem; margin: .5rem 0; padding: .4rem .8rem; }
summary { cursor: pointer; font-weight: 600; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(12rem, 1fr)); gap: 1rem; padding: 0; }
.pictures li { list-style: none; } figure { margin: 0; } figcaption { font-size: .875rem; overflow-wrap: anywhere; }
figure img { max-width: 100%; background: #000; border-radius: .25rem; }
.pictures .several { grid-column: 1 / -1; } .side { display: flex; flex-wrap: wrap; gap: .5rem; }
.side div { max-width: 12rem; } .side span { display: block; font-size: .875rem; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; } dt { font-weight: 600; }
dd { margin: 0; overflow-wrap: anywhere; }
footer { margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: .75rem; font-size: .9rem; }
@media print { details { break-inside: avoid; } }
"""


def render_html(report: DataReport, thumbnails: Mapping[str, Mapping[str, bytes]] | None = None) -> str:
    """The report as an HTML document, to be written as UTF-8.

    Parameters
    ----------
    thumbnails : PNGs by case and modality, as `draw_thumbnails` makes them; beyond 6 MB they are left out.
    """
    title = f"Data check: {report.name}"
    state = "good" if report.is_fit else "error"
    asked = (
        f"<p>Checked for a study of {_text(describe_requirements(report.requirements))}.{describe_split(report)}</p>"
        if report.requirements
        else ""
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{_text(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>{_text(title)}</h1>
<p class="lead">{_text(report.headline)} <strong class="{state}">{_text(report.verdict)}</strong></p>
{asked}
{_about(report)}
{_findings(report)}
{_summaries(report.summaries())}
{_pictures(report, thumbnails or {})}
</main>
<footer><p>{STAYS_HERE} It names cases and files and shows images;
give it to nobody who may not see them.</p></footer>
</body>
</html>
"""


def _about(report: DataReport) -> str:
    items = "".join(f"<dt>{_text(name)}</dt><dd>{_text(text)}</dd>" for name, text in report.about)
    return f"<dl>{items}</dl>" if items else ""


def _findings(report: DataReport) -> str:
    if not report.findings:
        return '<section aria-labelledby="findings"><h2 id="findings">Findings</h2><p class="good">None.</p></section>'
    groups = [(code, list(found)) for code, found in groupby(report.findings, key=lambda finding: finding.code)]
    rows = "".join(
        f'<tr><td><a href="#{code}">{code}</a></td><td class="{found[0].level}">{found[0].level}</td>'
        f"<td>{_text(BY_CODE[code].title)}</td><td class=n>{len(found)}</td></tr>"
        for code, found in groups
    )
    parts = "".join(_code(code, found) for code, found in groups)
    return f"""<section aria-labelledby="findings">
<h2 id="findings">Findings</h2>
<p>Errors keep a case out; warnings do not.</p>
{_table("Codes that were found", ("code", "level", "what it is", "how often"), rows)}
{parts}
</section>"""


def _code(code: str, findings: list[Finding]) -> str:
    rows = "".join(
        f"<tr><td>{_text(finding.case) or 'all'}</td><td>{_text(finding.message)}</td>"
        f"<td>{_text(finding.advice)}</td></tr>"
        for finding in findings[:_MOST_ROWS]
    )
    more = f"<p>And {len(findings) - _MOST_ROWS} more.</p>" if len(findings) > _MOST_ROWS else ""
    is_open = " open" if len(findings) <= _OPEN else ""
    title = f'<span class="{findings[0].level}">{code}</span> {_text(BY_CODE[code].title)} ({len(findings)})'
    table = _table(f"Findings of {code}", ("case", "what is wrong", "what to do"), rows)
    return f'<details id="{code}"{is_open}><summary>{title}</summary>{table}{more}</details>'


def _summaries(summaries: list[Summary]) -> str:
    if not summaries:
        return ""
    kinds = "".join(
        f'<tr><th scope="row">{_text(s.what)}</th><td class=n>{s.count}</td><td>{_frequent(s.formats)}</td>'
        f"<td>{_frequent(s.dtypes)}</td><td>{_frequent(s.channels)}</td>"
        + "".join(f"<td class=n>{_spread(spread)}</td>" for spread in (*s.shape, *s.spacing))
        + "</tr>"
        for s in summaries
    )
    axes = [f"{what} {axis}" for what in ("shape", "spacing") for axis in "zyx"]
    tables = _table(
        "Geometry, as stored: lowest, median and highest where they differ",
        ("", "number", "format", "type", "channels", *axes),
        kinds,
    )
    with_intensity = [s for s in summaries if s.intensity]
    if with_intensity:
        rows = "".join(
            f'<tr><th scope="row">{_text(s.what)}</th>'
            + "".join(f"<td class=n>{_spread(spread)}</td>" for spread in s.intensity.values())
            + "</tr>"
            for s in with_intensity
        )
        tables += _table("Intensity: lowest, median and highest image", ("", *with_intensity[0].intensity), rows)
    for s in summaries:
        if s.values:
            rows = "".join(
                f"<tr><td class=n>{_text(value)}</td><td class=n>{n}</td></tr>" for value, n in s.values.items()
            )
            tables += _table("Label values, as stored, of the lowest 16", ("value", "labels that have it"), rows)
    return f'<section aria-labelledby="images"><h2 id="images">Images and labels</h2>{tables}</section>'


def _pictures(report: DataReport, thumbnails: Mapping[str, Mapping[str, bytes]]) -> str:
    items: list[str] = []
    size = 0
    out = set(report.kept_out)
    codes: dict[str, list[str]] = {}
    for finding in report.findings:
        codes.setdefault(finding.case, []).append(finding.code)
    for name, pictures in thumbnails.items():
        size += sum(map(len, pictures.values()))
        if size > _MOST_PICTURE_BYTES:
            break
        state = "error" if name in out else "warning" if name in codes else "good"
        found = ", ".join(dict.fromkeys(codes.get(name, []))) or "no finding"
        side = "".join(_picture(name, modality, content) for modality, content in pictures.items())
        items.append(
            f'<li{" class=several" if len(pictures) > 1 else ""}><figure><div class="side">{side}</div>'
            f'<figcaption>{_text(name)} <span class="{state}">{found}</span></figcaption></figure></li>'
        )
    if not items:
        return ""
    return f"""<section aria-labelledby="pictures">
<h2 id="pictures">Pictures</h2>
<p>{len(items)} of {len(report.cases)} cases: those with most findings first, then a sample. The slice where the label
is largest, its outline in colour; of several modalities four at most.</p>
<ul class="pictures">{"".join(items)}</ul>
</section>"""


def _picture(case: str, modality: str, content: bytes) -> str:
    data = base64.b64encode(content).decode("ascii")
    what = _text(modality or "image")
    alt = f"{what} of case {_text(case)}: a slice with the outline of the label"
    return f'<div><img src="data:image/png;base64,{data}" alt="{alt}"><span>{what}</span></div>'


def _table(caption: str, header: Iterable[str], rows: str) -> str:
    """A table that scrolls by itself, with the keyboard too."""
    cells = "".join(f'<th scope="col">{_text(name)}</th>' if name else "<td></td>" for name in header)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_text(caption)}"><table>'
        f"<caption>{_text(caption)}</caption><thead><tr>{cells}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _text(text: str) -> str:
    """For text and for attributes; what cannot be shown or encoded is replaced."""
    return escape(printable(text), quote=True)


def _frequent(found: Mapping[str, int]) -> str:
    if len(found) == 1:
        return _text(next(iter(found)))
    return ", ".join(f"{_text(value)} ({count})" for value, count in found.items())


def _spread(spread: Spread) -> str:
    shown = [f"{value:.4g}" for value in (spread.lowest, spread.median, spread.highest)]
    return shown[0] if len(set(shown)) == 1 else " · ".join(shown)
