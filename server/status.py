"""A run's status and results as text and tables, from what `RunFolder.read_status` and `report.json` hold.

What the status means is said in `server.description`; following a run is in `server.following`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from common.privacy.report import privacy_words
from common.security.expiry import expiry_words
from common.watching.alert import Alert
from server.description import ENDED, NOTHING, Description, Status, complete, describe, is_under_way, stage
from server.wording import clean, count, duration, figure, names

__all__ = ["ENDED", "Description", "Status", "clean", "complete", "count", "describe", "duration", "figure", "names"]

_SAID_OTHERWISE = (
    "finished", "ended-early", "coordinator-failed", "coordinator-gone", "below-quorum", "site-failed", "site-silent",
    "site-refused", "certificate-ending",
)  # fmt: skip


def last_round(status: Status) -> str:
    """The figures of the last round, or an empty text."""
    last = status.get("last")
    if not last:
        return ""
    parts = [
        f"{label} {figure(last[key])}"
        for key, label in (
            ("train_loss", "training loss"),
            ("validation_dice", "validation Dice"),
            ("holdout_dice", "holdout Dice"),
        )
        if last.get(key) is not None
    ]
    if last.get("epsilon") is not None:
        parts.append(f"epsilon {figure(last['epsilon'], 2)}")
    if last.get("seconds") is not None:
        parts.append(f"{figure(last['seconds'], 1)} s{_most_of_it(last)}")
    return f"round {last.get('round', '?')} of {status.get('rounds', '?')}: " + ", ".join(parts)


def _most_of_it(last: Status) -> str:
    """What took most of a round's time, and who was the last to answer; "" where nothing took more than the others."""
    timings = {part: float(seconds) for part, seconds in (last.get("timings") or {}).items() if part != "evaluation"}
    longest = max(timings, key=lambda part: timings[part], default="")
    if not longest or 2 * timings[longest] < sum(timings.values()):
        return ""
    slowest = last.get("slowest_site")
    whose = f", {slowest} answered last" if slowest and longest != "aggregation" else ""
    return f" (most of it {longest}{whose})"


def status_text(status: Status, *, now: float | None = None) -> str:
    """All that `wardround status` says, in lines of one subject each."""
    description = describe(status, now=now)
    sites = status.get("sites") or {}
    best = status.get("best") or {}
    lines = [
        ("sites", "; ".join(f"{site} {stage(part)}" for site, part in sites.items()) if is_under_way(status) else ""),
        ("cause", description.cause),
        ("next", description.next_step),
        ("notice", clean(str(status.get("notice") or ""))),
        ("alerts", "\n".join(alert_lines(status))),
        ("expires", expiring(status, time.time() if now is None else now)),
        ("privacy", _privacy(status)),
        ("last", last_round(status)),
        ("best", f"round {best['round']}, validation Dice {figure(best.get('validation_dice'))}" if best else ""),
        ("model", str(status.get("published") or "")),
    ]
    indented = [f"  {label:<8}" + text.replace("\n", "\n" + " " * 10) for label, text in lines if text]
    return "\n".join([description.headline, *indented])


def alert_lines(status: Status) -> list[str]:
    """The alerts in the status that nothing else in it says, a line each."""
    alerts = [Alert(**alert) for alert in status.get("alerts") or ()]
    return [clean(alert.text()).replace("\n", " ") for alert in alerts if alert.code not in _SAID_OTHERWISE]


def expiring(status: Status, now: float) -> str:
    """Whose certificate ends soon, and what to do; "" where none does."""
    if not is_under_way(status):
        return ""
    lines = []
    if words := expiry_words(status.get("certificate_expires"), now):
        lines.append(f"the coordinator's certificate {words}: `wardround init STUDY --renew`, then start it again")
    for site, part in (status.get("sites") or {}).items():
        if not part.get("revoked") and (words := expiry_words(part.get("certificate_expires"), now)):
            lines.append(f"the certificate of {site} {words}: there, `wardround-site rotate`")
    return "\n".join(lines)


def _privacy(status: Status) -> str:
    """What is spent of the budget, and by whom."""
    report = status.get("privacy")
    if not report:
        return ""
    sites = "; ".join(f"{site} {float(value):.2f}" for site, value in (report.get("sites") or {}).items())
    return privacy_words(report) + (f" ({sites})" if sites else "")


# Tables. -----------------------------------------------------------------------------------------------------------


def status_table(status: Status, *, now: float | None = None) -> RenderableType:
    """The round under way: a row a site, with what it does and how far it is."""
    now = time.time() if now is None else now
    description = describe(status, now=now)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("site", "stage", "", "batch"):
        table.add_column(heading, no_wrap=True)
    table.add_column("cases", justify="right")
    table.add_column("last seen", justify="right")
    for site, part in (status.get("sites") or {}).items():
        batch, batches = int(part.get("batch") or 0), int(part.get("batches") or 0)
        name = str(part.get("stage") or "waiting")
        total = 1 if name == "done" else batches
        cases = int(part.get("training_cases") or 0) + int(part.get("validation_cases") or 0)
        table.add_row(
            Text(site),
            Text(stage(part).split(",")[0], style={"done": "green", "failed": "red"}.get(name, "")),
            ProgressBar(total=max(total, 1), completed=total if name == "done" else batch, width=24),
            f"{batch} of {batches}" if batches else "",
            str(cases or ""),
            _last_seen(part, now),
        )
    rows: list[RenderableType] = [Text(description.headline, style="bold"), table, Text(description.cause)]
    if not is_under_way(status):
        del rows[1]
    if description.next_step != NOTHING:
        rows.append(Text(description.next_step))
    if status.get("notice"):
        rows.append(Text(clean(str(status["notice"])), style="yellow"))
    rows += [Text(line, style="yellow") for line in (*alert_lines(status), expiring(status, now)) if line]
    if last := last_round(status):
        rows.append(Text("last " + last))
    return Group(*rows)


def _last_seen(part: Status, now: float) -> str:
    """When a site was there last."""
    if part.get("connected"):
        return "now"
    seen = part.get("last_seen_at")
    return f"{duration(now - float(seen))} ago" if seen is not None else "never"


def rounds_table(rows: Sequence[Mapping[str, str]]) -> Table:
    """The figures by round, from the rows of `rounds.csv`."""
    table = _table("Rounds", "round", "training loss", "validation Dice", "holdout Dice", "sites", "seconds")
    for row in rows:
        figures = [figure(row.get(key)) for key in ("train/loss", "validation/dice", "holdout/dice")]
        table.add_row(figure(row.get("round"), 0), *figures, figure(row.get("sites"), 0), figure(row.get("seconds"), 1))
    return table


def holdout_table(holdout: Mapping[str, Any]) -> Table:
    """Dice and IoU on the holdout, by the site that the images come from ("other": none known) and over all of them."""
    table = _table("Holdout", "images of", "Dice", "IoU", "cases")
    sites: Mapping[str, Mapping[str, Any]] = holdout.get("site") or {}
    rows = sorted(sites.items())
    if holdout.get("other"):
        rows.append(("other", holdout["other"]))
    for name, part in (*rows, ("all", holdout)):
        style = "bold" if part is holdout else None
        table.add_row(
            name, figure(part.get("dice")), figure(part.get("iou")), figure(part.get("cases"), 0), style=style
        )
    return table


def variants_table(publication: Mapping[str, Any]) -> Table:
    """The published files beside each other: size, quality and speed, each also as a ratio to float32."""
    table = _table("Variants", "variant", "bytes", "of float32", "Dice", "lost", "ms", "of float32", "")
    for variant in publication.get("variants") or ():
        size = variant.get("bytes")
        remark = "recommended" if variant.get("recommended") else clean(str(variant.get("note") or ""))
        table.add_row(
            Text(str(variant.get("name"))),
            f"{int(size):,}" if size is not None else "–",
            figure(variant.get("ratio_to_float32"), 2),
            figure(variant.get("dice"), 4),
            figure(variant.get("dice_lost"), 4),
            figure(variant.get("latency_ms"), 1),
            figure(variant.get("latency_ratio"), 2),
            Text(remark),
        )
    return table


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(first)
    for heading in others:
        table.add_column(heading, justify="right" if heading else "left")
    return table


def output(*, stderr: bool = False) -> Console:
    """Where a command's text goes; wide enough for the tables where nothing says how wide it is."""
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 120
    return console
