"""A run's status and results in words and tables: what goes on, who holds it up, what to do next.

Pure functions from what `RunFolder.read_status` and `report.json` hold to text and rich tables. Following a run with
them is in `server.following`.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from common.privacy.report import privacy_words
from common.security.expiry import expiry_words
from common.study import Study
from server.run_folder import plainly

Status = Mapping[str, Any]

ENDED = ("finished", "failed", "stopped", "repaired")
_NOTHING = "Nothing to do."


@dataclass(frozen=True)
class Description:
    """A run in three sentences: how it stands, why, and what somebody should do."""

    headline: str
    cause: str
    next_step: str


def complete(status: Status, study: Study) -> dict[str, Any]:
    """The status with what the study says beside it: the quorum, and names that are not known before the start."""
    known = {
        "study": study.name,
        "rounds": study.training.rounds,
        "round": 0,
        "quorum": study.cohort.quorum,
    }
    sites: dict[str, Any] = {site: {} for site in study.cohort.sites} | dict(status.get("sites") or {})
    return known | dict(status) | {"sites": sites}


def describe(status: Status, *, now: float | None = None) -> Description:
    """What goes on, why, and what to do next.

    Parameters
    ----------
    status : as `RunFolder.read_status` returns it; the quorum is spoken of where `complete` added it, and with
        "simulated" nobody is sent to a hospital.
    now : Unix time; the clock's unless given.
    """
    state = str(status.get("state", "starting"))
    name = f"{status.get('study', 'study')}: "
    running = bool(status.get("running", True))
    if state == "finished":
        return _finished(name, status)
    if running:
        return _active(name, state if state not in ENDED else "starting", status, time.time() if now is None else now)
    if state == "failed":
        return _failed(name, status)
    if state == "repaired":
        return Description(
            f"{name}repaired",
            clean(str(status.get("repair") or "`wardround repair` set aside what was damaged.")),
            "Start the coordinator again with the same command.",
        )
    if state == "stopped":
        return Description(
            f"{name}stopped{_in_round(status)}",
            "The coordinator was asked to stop.",
            "Start the coordinator again with the same command: it goes on where it was.",
        )
    if "pid" not in status:
        return Description(f"{name}not started", "No coordinator has run here yet.", "Start the coordinator.")
    return Description(
        f"{name}not running, last seen {state}{_in_round(status)}",
        "The coordinator ended without a word, as when it is killed or the machine goes down.",
        "Start the coordinator again with the same command: it goes on where it was. Its log may say why it ended.",
    )


def _failed(name: str, status: Status) -> Description:
    headline = f"{name}failed{_in_round(status)}"
    error = clean(str(status.get("error") or "The coordinator did not say why; its log may."))
    if "`wardround repair" not in error:
        todo = "Remove the cause, then start the coordinator again with the same command: it goes on where it was."
        return Description(headline, error, todo)
    return Description(
        headline,
        plainly(error.split("; `wardround repair")[0]),
        f"Run `wardround repair --run {status.get('run', 'DIR')} --dry-run`: it says what is damaged and what can be "
        "done. Without --dry-run it does it; then start the coordinator again with the same command.",
    )


def _finished(name: str, status: Status) -> Description:
    rounds = count(int(status.get("rounds") or 0), "round")
    published = status.get("published")
    ended = status.get("ended") or {}
    why = ""
    if ended:
        rounds = f"{ended.get('round')} of {rounds}"
        why = f"It ended early: {clean(str(ended.get('reason')))}. "
    if published:
        return Description(
            f"{name}finished after {rounds}", f"{why}The model is published in {published}.", "Read its model_card.md."
        )
    return Description(
        f"{name}finished after {rounds}",
        "The published model is not here any more.",
        "Start the coordinator again with the same command, which publishes the best round again, or publish one with "
        "`wardround publish`.",
    )


def _active(name: str, state: str, status: Status, now: float) -> Description:
    rounds = f"round {status.get('round', 0)} of {status.get('rounds', '?')}"
    if int(status.get("attempt") or 1) > 1:
        rounds += f", attempt {status['attempt']}"
    if state == "starting":
        return Description(f"{name}starting", "The coordinator prepares the study's plan.", _NOTHING)
    if state == "waiting for sites":
        if status.get("kind"):
            return _in_progress(f"{name}waiting for sites, {rounds}", status, now)
        if status.get("round"):
            return Description(
                f"{name}after {rounds}", "The coordinator evaluates the round and prepares the next one.", _NOTHING
            )
        return _waiting(f"{name}waiting for sites", status)
    if state == "publishing":
        return Description(f"{name}publishing", "The coordinator converts and measures the best model.", _NOTHING)
    if state == "evaluating" and status.get("kind") != "evaluate":
        return Description(
            f"{name}evaluating, {rounds}", "The coordinator evaluates the model on its holdout.", _NOTHING
        )
    doing = "validation at the sites" if status.get("kind") == "evaluate" else "training"
    return _in_progress(f"{name}{doing}, {rounds}", status, now)


def _waiting(headline: str, status: Status) -> Description:
    sites = status.get("sites") or {}
    absent = [site for site, part in sites.items() if not part.get("connected")]
    there = len(sites) - len(absent)
    refused = any(sites[site].get("refused_reason") for site in absent)
    if not absent:
        return Description(headline, "All sites are connected; the first round begins.", _NOTHING)
    quorum = f" (the quorum is {status['quorum']})" if "quorum" in status else ""
    address = f"; they reach the coordinator at {status['address']}" if status.get("address") else ""
    todo = _NOTHING if status.get("simulated") else _sentence(" and ".join(_fetching(sites, absent))) + f"{address}."
    return Description(
        headline,
        f"{'; '.join(_absence(sites, absent))}; {there} of {count(len(sites), 'site')} "
        f"{'is' if there == 1 else 'are'}{' connected' if refused else ''}{quorum}.",
        todo,
    )


def _absence(sites: Mapping[str, Mapping[str, Any]], absent: Sequence[str]) -> list[str]:
    """Why these sites are not there."""
    revoked, refused, away = _kinds_of_absence(sites, absent)
    causes = [f"{names(away)} {_are(away)} not connected"] if away else []
    causes += [f"{names(revoked)} {'was' if len(revoked) == 1 else 'were'} revoked"] if revoked else []
    return causes + ([f"{names(refused)} came with another study or version (refused)"] if refused else [])


def _kinds_of_absence(
    sites: Mapping[str, Mapping[str, Any]], absent: Sequence[str]
) -> tuple[list[str], list[str], list[str]]:
    """Those that were revoked, those that were sent away, and the others."""
    revoked = [site for site in absent if sites[site].get("revoked")]
    refused = [site for site in absent if sites[site].get("refused_reason") and site not in revoked]
    return revoked, refused, [site for site in absent if site not in (*revoked, *refused)]


def _fetching(sites: Mapping[str, Mapping[str, Any]], absent: Sequence[str]) -> list[str]:
    """What to do to have these sites there."""
    revoked, refused, away = _kinds_of_absence(sites, absent)
    todo = [f"to have {names(revoked)} in again, invite and enrol anew (`wardround invite`)"] if revoked else []
    todo += [f"start {names(refused)} with the coordinator's study file and version of Wardround"] if refused else []
    return todo + ([f"run `wardround-site start` at {names(away)}"] if away else [])


def _in_progress(headline: str, status: Status, now: float) -> Description:
    everyone: Mapping[str, Mapping[str, Any]] = status.get("sites") or {}
    sites = {site: part for site, part in everyone.items() if part.get("asked", True)}
    done = [site for site, part in sites.items() if part.get("stage") == "done"]
    failed = [site for site, part in sites.items() if part.get("stage") == "failed" and not part.get("revoked")]
    absent = [site for site, part in sites.items() if not part.get("connected") and site not in (*done, *failed)]
    working = sorted((s for s in sites if s not in (*done, *failed, *absent)), key=lambda site: _progress(sites[site]))
    if not failed and not absent and not working:
        return Description(headline, "All sites have answered; the coordinator sums their updates.", _NOTHING)

    causes = [f"{site} cannot do its part: {clean(_reason(sites[site]))}" for site in failed]
    if absent:
        causes += _absence(sites, absent)
    if len(working) == 1:
        causes.append(f"{working[0]} is still at work: {stage(sites[working[0]])}")
    elif working:
        causes.append(
            f"{len(working)} sites are still at work, the slowest is {working[0]}: {stage(sites[working[0]])}"
        )
    cause = "; ".join(causes) + "."

    quorum = int(status.get("needed") or status.get("quorum") or 0)
    deadline = _deadline(status.get("deadline_at"), now)
    closed = status.get("closed_with")
    if not failed and not absent:
        if closed:
            them = f"{names(closed)} before, and goes on when all of them have answered"
            return Description(headline, cause, f"Nothing to do: the round was closed with {them}.")
        return Description(
            headline, cause, f"Nothing to do: the round closes when all have answered, at the latest {deadline}."
        )
    simulated = bool(status.get("simulated"))
    if simulated and not failed and not done and int(status.get("round") or 0) <= 1:
        return Description(headline, cause, "Nothing to do: the sites are being started.")
    todo = []
    if absent and simulated:
        todo.append(f"see the log of {names(absent)} in the run's folder `sites`")
    elif absent:
        todo += _fetching(sites, absent)
    if failed:
        todo.append(f"remove the cause at {names(failed)}, whose site log says more")
    what = " and ".join(todo)
    able = len(done) + len(working)
    if able < quorum and closed:
        return Description(
            headline,
            cause,
            f"{_sentence(what)}: the round was closed with {names(closed)} before, and goes on with all of them alone, "
            "however long that takes.",
        )
    if able < quorum:
        return Description(
            headline,
            cause,
            f"{_sentence(what)}: the round needs {count(quorum, 'site')}, {able} can answer. What was "
            f"received is kept; another attempt begins {deadline}.",
        )
    them = "it" if len(failed) + len(absent) == 1 else "them"
    return Description(
        headline,
        cause,
        f"The quorum allows the round to go on without {them} {deadline}. To have {them} in, {what}.",
    )


_STAGES = ("waiting", "assigned", "download", "training", "evaluation", "upload", "done", "failed")


def _progress(part: Mapping[str, Any]) -> tuple[bool, int, float]:
    """Orders the sites at work: who shows no progress at all is last, and so comes first here."""
    name = str(part.get("stage", "waiting"))
    batches = int(part.get("batches") or 0)
    done = int(part.get("batch") or 0) / batches if batches else 0.0
    return (not part.get("no_progress_seconds"), _STAGES.index(name) if name in _STAGES else 0, done)


def stage(part: Mapping[str, Any]) -> str:
    """A site's stage with its batches, as in "training, batch 3 of 12, no progress for 75 s"."""
    name = str(part.get("stage") or "waiting")
    if part.get("revoked") and name != "done":
        return "revoked"
    if name == "waiting":
        return "connected" if part.get("connected") else "refused" if part.get("refused_reason") else "not connected"
    if name in ("training", "evaluation") and part.get("batches"):
        name = f"{name}, batch {part.get('batch', 0)} of {part['batches']}"
    idle = int(part.get("no_progress_seconds") or 0)
    return f"{name}, no progress for {f'{idle} s' if idle < 120 else duration(idle)}" if idle else name


def _reason(part: Mapping[str, Any]) -> str:
    return str(part.get("reason") or "it gave no reason").rstrip(".")


def _deadline(deadline_at: float | None, now: float) -> str:
    if deadline_at is None:
        return "at the deadline"
    return f"at the deadline, in {duration(deadline_at - now)}" if deadline_at > now else "now, at the deadline"


def _is_under_way(status: Status) -> bool:
    """Whether what the status says of the sites still holds: after the end it is what they did last."""
    return bool(status.get("running", True)) and status.get("state") not in ENDED


def _in_round(status: Status) -> str:
    return f" in round {status['round']} of {status.get('rounds', '?')}" if status.get("round") else ""


# Words. ------------------------------------------------------------------------------------------------------------


def clean(text: str) -> str:
    """Text from elsewhere, without what would steer a terminal; line breaks stay."""
    return "\n".join("".join(c if c.isprintable() else " " for c in line) for line in text.splitlines())


def names(sites: Sequence[str]) -> str:
    """An enumeration: "a, b and c"."""
    return " and ".join([", ".join(sites[:-1]), sites[-1]] if len(sites) > 1 else sites)


def count(number: int, what: str) -> str:
    """The number with its noun: "1 site", "5 sites"."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def duration(seconds: float) -> str:
    """Seconds for people: "45 s", "7 min", "1 h 20 min"."""
    if seconds < 60:
        return f"{max(0, math.ceil(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def figure(value: Any, digits: int = 3) -> str:
    """A number to so many decimals; a dash where there is none."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return clean(str(value)) if value else "–"
    return "–" if math.isnan(number) else f"{number:.{digits}f}"


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:]


def _are(sites: Sequence[str]) -> str:
    return "is" if len(sites) == 1 else "are"


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
        parts.append(f"{figure(last['seconds'], 1)} s")
    return f"round {last.get('round', '?')} of {status.get('rounds', '?')}: " + ", ".join(parts)


def status_text(status: Status, *, now: float | None = None) -> str:
    """All that `wardround status` says, in lines of one subject each."""
    description = describe(status, now=now)
    sites = status.get("sites") or {}
    best = status.get("best") or {}
    lines = [
        ("sites", "; ".join(f"{site} {stage(part)}" for site, part in sites.items()) if _is_under_way(status) else ""),
        ("cause", description.cause),
        ("next", description.next_step),
        ("notice", clean(str(status.get("notice") or ""))),
        ("expires", expiring(status, time.time() if now is None else now)),
        ("privacy", _privacy(status)),
        ("last", last_round(status)),
        ("best", f"round {best['round']}, validation Dice {figure(best.get('validation_dice'))}" if best else ""),
        ("model", str(status.get("published") or "")),
    ]
    indented = [f"  {label:<8}" + text.replace("\n", "\n" + " " * 10) for label, text in lines if text]
    return "\n".join([description.headline, *indented])


def expiring(status: Status, now: float) -> str:
    """Whose certificate ends soon, and what to do; "" where none does."""
    if not _is_under_way(status):
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
    description = describe(status, now=now)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("site", "stage", "", "batch"):
        table.add_column(heading, no_wrap=True)
    table.add_column("cases", justify="right")
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
        )
    rows: list[RenderableType] = [Text(description.headline, style="bold"), table, Text(description.cause)]
    if not _is_under_way(status):
        del rows[1]
    if description.next_step != _NOTHING:
        rows.append(Text(description.next_step))
    if status.get("notice"):
        rows.append(Text(clean(str(status["notice"])), style="yellow"))
    if soon := expiring(status, time.time() if now is None else now):
        rows.append(Text(soon, style="yellow"))
    if last := last_round(status):
        rows.append(Text("last " + last))
    return Group(*rows)


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
