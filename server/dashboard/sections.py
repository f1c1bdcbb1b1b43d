"""What each part of the page says: plain values for the templates, from a snapshot and for a viewer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from common.privacy.report import bound_words, privacy_report
from common.study import NO_SECURE_AGGREGATION
from server.dashboard.figures import chosen
from server.dashboard.history import Curves, History, last, mean, number
from server.dashboard.pictures import Pictures
from server.dashboard.viewer import Viewer
from server.description import ENDED, describe, stage
from server.watching.alerts import COORDINATOR, FINISHED
from server.watching.snapshot import RunSnapshot
from server.wording import duration

SECTIONS: Final = ("now", "alerts", "cohort", "quality", "samples", "time", "versions", "privacy", "audit")
"""The parts of a page, from its top down; each is a template of the same name."""
MOST_ROWS: Final = 40
"""Rounds in the table beside the charts: more are thinned, as in the charts."""
_RECENT: Final = 10

_CHIPS: Final[Mapping[str, str]] = {
    "training": "busy",
    "evaluating": "busy",
    "publishing": "busy",
    "starting": "busy",
    "finished": "good",
    "failed": "error",
    "stopped": "warning",
    "repaired": "warning",
    "waiting for sites": "warning",
}
_LEVELS: Final[Mapping[str, str]] = {"critical": "error", "warning": "warning", "info": "info"}
_FOR_ALL: Final = ("below-quorum", "coordinator-gone", "dice-fell", "round-skipped", "ended-early")
"""Alerts that say nothing of a site's own numbers, nor of the coordinator's machine."""
_WAITS: Final[Mapping[str, str]] = {
    "assigned": "the weights of this round",
    "download": "the rest of the weights",
    "training": "nothing: it trains",
    "evaluation": "nothing: it evaluates",
    "upload": "its update to arrive",
    "done": "the other sites",
}


def content(snapshot: RunSnapshot, history: History, viewer: Viewer, pictures: Pictures) -> dict[str, Any]:
    """What the templates need, by name of the section, and "title", "heading" and "viewer"."""
    status = viewer.shown(snapshot.status)
    made: dict[str, Any] = {
        "now": _now(status, history, snapshot.read_at),
        "alerts": _alerts(snapshot, status, viewer),
        "cohort": _cohort(status, history, viewer),
        "quality": history.once(("quality", viewer.audience), lambda: _quality(history, viewer)),
        "samples": (pictures if viewer.sees_all else Pictures()).shown(),
        "time": history.once("time", lambda: _time(history.curves)),
        "versions": versions_of(snapshot),
        "privacy": _privacy(snapshot, status, viewer),
        "audit": dict(snapshot.audit_head or {}),
        "viewer": viewer,
        "heading": str(status.get("study", "study")),
    }
    made["title"] = f"{made['now']['title']} · {made['heading']}"
    return made


def versions_of(snapshot: RunSnapshot) -> list[dict[str, Any]]:
    """The published versions, the newest first, each with its files."""
    return [
        {"name": version["name"], "variants": list(version["manifest"].get("variants") or ())}
        for version in reversed(snapshot.versions)
    ]


# Now. --------------------------------------------------------------------------------------------------------------


def state_of(status: Mapping[str, Any]) -> tuple[str, str]:
    """A word for how a run stands, and the kind of chip that it is shown in."""
    state = str(status.get("state", "starting"))
    if not status.get("running") and state not in ENDED:
        return ("not running", "error") if "pid" in status else ("not started", "warning")
    return state, _CHIPS.get(state, "busy")


def _now(status: Mapping[str, Any], history: History, at: float) -> dict[str, Any]:
    said = describe(status, now=at)
    state, chip = state_of(status)
    curves = history.curves
    rounds, done = int(status.get("rounds") or 0), curves.rounds[-1] if curves.rounds else 0
    best = curves.best("holdout/dice") or curves.best("validation/dice")
    sites = status.get("sites") or {}
    dice = curves.last("holdout/dice")
    private = status.get("privacy") or {}
    return {
        "title": f"{state}, {done} of {rounds}",
        "state": state,
        "chip": chip,
        "kind": chip if chip != "busy" else "" if said.next_step.startswith("Nothing to do") else "warning",
        "headline": _sentence(said.headline.removeprefix(f"{status.get('study', 'study')}: ")),
        "cause": said.cause,
        "next": said.next_step,
        "rounds": rounds,
        "done": done,
        "round": int(status.get("round") or 0),
        "attempt": int(status.get("attempt") or 1),
        "dice": dice,
        "gain": _gain(curves.column("holdout/dice")),
        "best": best,
        "validation": curves.last("validation/dice"),
        "loss": curves.last("train/loss"),
        "connected": sum(bool(part.get("connected")) for part in sites.values()),
        "sites": len(sites),
        "quorum": status.get("quorum"),
        "seconds": _recent_seconds(curves),
        "left": _left(curves, rounds - done) if status.get("running") else "",
        "epsilon": private.get("epsilon"),
        "bound": bound_words(private),
        "budget": private.get("budget"),
        "updated_at": status.get("updated_at"),
        "running": bool(status.get("running")),
    }


def _gain(column: list[float | None]) -> float | None:
    """How far the mean of the newest rounds is above that of as many before: whether it is getting better."""
    found = [value for value in column if value is not None][-_RECENT:]
    half = len(found) // 2
    before, after = mean(found[:half]), mean(found[half:])
    return after - before if before is not None and after is not None else None


def _recent_seconds(curves: Curves) -> float | None:
    """How long a round takes, by those of late."""
    places = range(max(len(curves.rounds) - _RECENT, 0), len(curves.rounds))
    return mean(curves.seconds(place) for place in places) or None


def _left(curves: Curves, rounds: int) -> str:
    """How long the other rounds take, by those of late."""
    seconds = _recent_seconds(curves)
    return duration(seconds * rounds) if seconds and rounds > 0 else ""


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:]


# Alerts. -----------------------------------------------------------------------------------------------------------


def _alerts(snapshot: RunSnapshot, status: Mapping[str, Any], viewer: Viewer) -> list[dict[str, str]]:
    """What somebody should look at, the worst first: "level", "what", "where", "todo"."""
    found = [
        {
            "level": _LEVELS[alert.severity],
            "what": alert.what,
            "where": alert.where,
            "todo": alert.todo,
            "detail": alert.detail if viewer.sees_all or viewer.sees_numbers_of(alert.where) else "",
        }
        for alert in snapshot.alerts
        if alert.code != FINISHED and (viewer.sees_all or alert.code in _FOR_ALL or viewer.sees_numbers_of(alert.where))
    ]
    if status.get("notice"):
        found.append({"level": "info", "what": str(status["notice"]), "where": COORDINATOR, "todo": "", "detail": ""})
    return found


# The cohort. -------------------------------------------------------------------------------------------------------


def _cohort(status: Mapping[str, Any], history: History, viewer: Viewer) -> dict[str, Any]:
    under_way = bool(status.get("running")) and status.get("state") not in ENDED
    parts: Mapping[str, Mapping[str, Any]] = status.get("sites") or {}
    rows = [_site(site, part, status, history, viewer, under_way=under_way) for site, part in parts.items()]
    rows.sort(key=lambda row: (row["rank"], row["site"]))
    return {
        "rows": rows,
        "under_way": under_way,
        "counts": {kind: sum(row["kind"] == kind for row in rows) for kind in ("error", "warning", "busy", "good")},
        "numbers": viewer.role != "observer",
        "private": any(row["epsilon"] is not None for row in rows),
        "deadline_at": status.get("deadline_at") if under_way else None,
        "needed": status.get("needed"),
        "attempt": int(status.get("attempt") or 1),
        "working": any(row["batches"] for row in rows) and under_way,
    }


def _site(
    site: str, part: Mapping[str, Any], status: Mapping[str, Any], history: History, viewer: Viewer, *, under_way: bool
) -> dict[str, Any]:
    name = str(part.get("stage") or "waiting")
    kind, waits = _standing(site, part, name, status)
    record = history.sites.get(site)
    own = viewer.sees_numbers_of(site)
    newest = record.last if record is not None and own else {}
    seen = part.get("last_seen_at") or (status.get("updated_at") if part.get("connected") else None)
    batches = int(part.get("batches") or 0)
    cases = [part.get("training_cases"), part.get("validation_cases")]
    return {
        "site": site,
        "kind": kind if under_way else "soft",
        "rank": ("error", "warning", "busy", "good").index(kind) if under_way else 0,
        "state": stage({**part, "batches": 0, "no_progress_seconds": 0}),
        "idle": int(part.get("no_progress_seconds") or 0),
        "batch": int(part.get("batch") or 0),
        "batches": batches if name in ("training", "evaluation") else 0,
        "done": name == "done",
        "seen": seen,
        "waits": waits if under_way else "",
        "attempt": int(status.get("attempt") or 1) if part.get("asked", True) and status.get("kind") else None,
        "cases": cases if own and any(cases) else None,
        "included": record.included if record is not None and own else None,
        "left_out": record.left_out if record is not None and own else None,
        "seconds": [number(newest.get(f"seconds_{what}")) for what in ("download", "work", "upload")]
        if newest
        else None,
        "expires": part.get("certificate_expires") if own else None,
        "epsilon": part.get("epsilon") if own else None,
    }


def _standing(site: str, part: Mapping[str, Any], name: str, status: Mapping[str, Any]) -> tuple[str, str]:
    """The kind of chip for a site, and what it waits for."""
    if part.get("revoked") and name != "done":
        return "error", f"a new invitation: `wardround invite {site}`"
    if name == "failed":
        return "error", str(part.get("reason") or "it gave no reason")
    if name == "done":
        return "good", _WAITS["done"]
    if part.get("refused_reason"):
        return "error", "the coordinator's study file and version"
    if not part.get("connected"):
        how = "the simulation starts it" if status.get("simulated") else "`wardround-site start` there"
        return "warning", f"its site to dial in: {how}"
    if name == "waiting":
        return "good", "the next round" if part.get("asked", True) else "a round that asks it"
    return "busy", _WAITS.get(name, "")


# Figures in tables. ------------------------------------------------------------------------------------------------


def _quality(history: History, viewer: Viewer) -> dict[str, Any]:
    curves = history.curves
    return {
        "rounds": rounds_rows(curves),
        "thinned": len(curves.rounds) > MOST_ROWS,
        "classes": _measured(curves, "holdout/class/"),
        "origins": _measured(curves, "holdout/site/", viewer),
        "cases": curves.last("holdout/cases"),
        "loss": curves.last("train/loss") is not None,
        "best": curves.best("holdout/dice"),
        "holdout": curves.last("holdout/dice") is not None,
        "version": history.version,
    }


def rounds_rows(curves: Curves, most: int = MOST_ROWS) -> list[dict[str, Any]]:
    """The figures of rounds, the newest first; at most so many, and then evenly chosen."""
    best = curves.best("holdout/dice") or curves.best("validation/dice")
    columns = {
        name: curves.column(key)
        for name, key in (
            ("loss", "train/loss"),
            ("validation", "validation/dice"),
            ("dice", "holdout/dice"),
            ("iou", "holdout/iou"),
            ("sites", "sites"),
            ("attempt", "attempt"),
            ("epsilon", "epsilon"),
        )
    }
    return [
        {
            "round": curves.rounds[place],
            "best": best is not None and curves.rounds[place] == best[0],
            **{name: column[place] for name, column in columns.items()},
        }
        for place in reversed(chosen(len(curves.rounds), most))
    ]


def _measured(curves: Curves, prefix: str, viewer: Viewer | None = None) -> list[dict[str, Any]]:
    """Dice and IoU of the holdout by what stands behind the prefix: the newest, and the best with its round."""
    iou, cases = ({name: last(c) for name, c in curves.named(prefix, end).items()} for end in ("/iou", "/cases"))
    rows = []
    for name, column in sorted(curves.named(prefix, "/dice").items()):
        known = [(value, -place) for place, value in enumerate(column) if value is not None]
        highest, place = max(known, default=(None, 0))
        rows.append(
            {
                "name": name,
                "dice": last(column),
                "iou": iou.get(name),
                "best": highest,
                "best_round": curves.rounds[-place] if known else None,
                "cases": cases.get(name) if viewer is None or viewer.sees_numbers_of(name) else None,
            }
        )
    return rows


def _time(curves: Curves) -> dict[str, Any]:
    columns = curves.times()
    places = reversed(chosen(len(curves.rounds), MOST_ROWS))
    return {
        "parts": list(columns),
        "rows": [
            {"round": curves.rounds[place], "parts": [column[place] for column in columns.values()]} for place in places
        ],
        "means": [mean(column[-_RECENT:]) for column in columns.values()],
        "recent": min(_RECENT, len(curves.rounds)),
    }


def _privacy(snapshot: RunSnapshot, status: Mapping[str, Any], viewer: Viewer) -> dict[str, Any]:
    """What the noise hides and what is spent, none before the first round; and what the coordinator sees of a site."""
    study = snapshot.study
    private = status.get("privacy") or (snapshot.report or {}).get("privacy") or {}
    if not private and study is not None:
        private = privacy_report(study, {}, 0.0) or {}
    secure = study.secure_aggregation if study is not None else NO_SECURE_AGGREGATION
    sites = {site: spent for site, spent in (private.get("sites") or {}).items() if viewer.sees_numbers_of(site)}
    return {
        "unit": "none",
        "bound": "lower",
        **private,
        "sites": sites,
        "private": bool(private),
        "spent": bound_words(private),
        "minimum_cohort": secure.minimum_cohort if secure.required else 0,
    }
