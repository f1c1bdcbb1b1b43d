"""What somebody should know of a study without having asked: a pure function from a snapshot to alerts.

An alert says how bad it is, what it is, where, and what to do. It is told apart from others by its `key`, which stays
the same as long as the cause does, so that it is shown and sent once. Alerts speak of sites, rounds and figures; never
of images, files or patients.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from common.security.expiry import expiry_words
from common.watching.alert import SEVERITIES, Alert

if TYPE_CHECKING:
    from server.watching.snapshot import RunSnapshot

COORDINATOR: Final = "coordinator"
FINISHED: Final = "finished"
"""The alert that is good news; status has it as its headline."""
_SEE_LOG: Final = "See why in sites.csv, and in `wardround logs --round N`."
_ENDED = ("finished", "failed", "stopped", "repaired")


@dataclass(frozen=True)
class AlertRules:
    """When to warn.

    Attributes
    ----------
    dice_drop : warn when Dice is further than this below the highest of the rounds before.
    silent_seconds : warn when a site that a round waits for was not heard of for so long.
    disk_gb : warn when less is free on the run folder's disk.
    budget_share : warn when so much of the privacy budget is spent.
    """

    dice_drop: float = 0.05
    silent_seconds: float = 60.0
    disk_gb: float = 2.0
    budget_share: float = 0.9


_FIRST_BATCH: Final = 5
"""So many times as long a site may take for the first batch of its work: it prepares its cases and the graphs."""


def alerts_of(snapshot: RunSnapshot, rules: AlertRules) -> tuple[Alert, ...]:
    """All that is wrong at the moment of the snapshot, the most severe first."""
    running = bool(snapshot.status.get("running")) and snapshot.status.get("state") not in _ENDED
    found = [*_of_coordinator(snapshot), *_of_figures(snapshot, rules), *_of_budget(snapshot, rules)]
    if running:
        found += [*_of_round(snapshot, rules), *_of_sites(snapshot, rules), *_of_certificates(snapshot)]
    if snapshot.status.get("state") != "finished":
        found += _of_disk(snapshot, rules)
    return tuple(sorted(found, key=lambda alert: SEVERITIES.index(alert.severity)))


def _of_coordinator(snapshot: RunSnapshot) -> Iterator[Alert]:
    status, again = snapshot.status, "Start the coordinator again with the same command."
    number = int(status.get("round") or 0) or None
    if status.get("state") == "failed":
        detail = str(status.get("error") or "it did not say why; its log may")
        yield Alert("coordinator-failed", "critical", "The coordinator failed.", COORDINATOR, again, number, detail)
    elif "pid" in status and not status.get("running") and status.get("state") not in _ENDED:
        what = "The coordinator ended without a word, as when it is killed or the machine goes down."
        yield Alert("coordinator-gone", "critical", what, COORDINATOR, again, number)
    if ended := status.get("ended"):
        what, why = f"The study ended early, after round {ended.get('round')}.", str(ended.get("reason") or "")
        todo = "See whether its model is good enough."
        yield Alert("ended-early", "warning", what, COORDINATOR, todo, number, why)
    for problem in snapshot.problems:
        todo = "Read it again in a moment; if it stays, `wardround repair --dry-run` says what is damaged."
        yield Alert("unreadable", "info", "A file of the run cannot be read.", COORDINATOR, todo, None, problem)
    if status.get("state") == "finished" and status.get("published"):
        what = f"The study is finished; its model is published as {Path(str(status['published'])).name}."
        yield Alert(FINISHED, "info", what, COORDINATOR, "Read its model_card.md.", number)


def _of_round(snapshot: RunSnapshot, rules: AlertRules) -> Iterator[Alert]:
    status = snapshot.status
    number, attempt = int(status.get("round") or 0), int(status.get("attempt") or 1)
    waits = status.get("state") == "waiting for sites" and _age(snapshot) >= rules.silent_seconds
    if status.get("kind") and (waits or attempt > 1):
        missing = [
            str(site["name"])
            for site in snapshot.sites
            if site.get("asked", True) and site.get("stage") != "done" and not site.get("connected")
        ]
        whom = f" for {', '.join(missing)}" if missing else ""
        which = f", attempt {attempt}," if attempt > 1 else ""
        what = f"Round {number}{which} waits below its quorum{whom}."
        todo = "Bring the missing sites back; what was received is kept."
        yield Alert("below-quorum", "critical", what, COORDINATOR, todo, number)


def _age(snapshot: RunSnapshot) -> float:
    """Seconds since the call of the sites that is under way began: until then they may be on their way."""
    return snapshot.read_at - float(snapshot.status.get("round_started_at") or 0.0)


def _of_sites(snapshot: RunSnapshot, rules: AlertRules) -> Iterator[Alert]:
    number = int(snapshot.status.get("round") or 0)
    under_way = bool(snapshot.status.get("kind"))
    for site in snapshot.sites:
        name = str(site["name"])
        if site.get("revoked") or not site.get("asked", True) or site.get("stage") == "done":
            continue
        if site.get("refused_reason"):
            what = f"{name} came with another study or version, and is refused."
            todo = f"Start {name} with the coordinator's study file and version of Wardround."
            yield Alert("site-refused", "warning", what, name, todo, number or None)
        elif under_way and site.get("stage") == "failed":
            what, detail = f"{name} cannot do its part of round {number}.", str(site.get("reason") or "")
            todo = f"Remove the cause at {name}; its log says more."
            yield Alert("site-failed", "warning", what, name, todo, number, detail)
        elif under_way and (silent := _silent(site, snapshot, rules.silent_seconds)):
            todo = f"See to {name}; started again with the same command it goes on where it was."
            if site.get("connected"):
                todo = f"Nothing, if {name}'s log shows that it is only slow. {todo}"
            yield Alert("site-silent", "warning", f"Round {number} waits for {name}, {silent}.", name, todo, number)


def _silent(site: Mapping[str, Any], snapshot: RunSnapshot, most: float) -> str:
    """How a site was not heard of for too long; "" where it was."""
    if site.get("connected"):
        idle = float(site.get("no_progress_seconds") or 0)
        if site.get("stage") in ("assigned", "training", "evaluation") and not site.get("batch"):
            most *= _FIRST_BATCH
        return f"which shows no progress for {idle:.0f} s" if idle >= most else ""
    seen = site.get("last_seen_at")
    if seen is None:
        return "which has not connected yet" if _age(snapshot) >= most else ""
    gone = snapshot.read_at - float(seen)
    return f"which was last seen {gone:.0f} s ago" if gone >= most else ""


def _of_figures(snapshot: RunSnapshot, rules: AlertRules) -> Iterator[Alert]:
    if not snapshot.rounds:
        return
    last = snapshot.rounds[-1]
    number = int(last["round"])
    loss = last.get("train/loss")
    if isinstance(loss, float) and not math.isfinite(loss):
        todo = "Stop the study; lower the learning rate, or clip gradients (training.clip_norm), in a new one."
        yield Alert(
            "loss-not-finite", "critical", f"The training loss of round {number} is {loss}.", COORDINATOR, todo, number
        )
    for column, label in (("validation/dice", "Validation"), ("holdout/dice", "Holdout")):
        before = [float(row[column]) for row in snapshot.rounds[:-1] if _is_finite(row.get(column))]
        if before and _is_finite(last.get(column)) and max(before) - float(last[column]) > rules.dice_drop:
            what = f"{label} Dice fell to {last[column]:.3f} in round {number}, from {max(before):.3f} at its highest."
            todo = "See which site or class it is (sites.csv, the holdout by site); the best round's weights are kept."
            yield Alert("dice-fell", "warning", what, column.split("/")[0], todo, number)
    rounds = [int(row["round"]) for row in snapshot.rounds]
    if last.get("sites") == 0:
        yield Alert("round-skipped", "warning", f"Round {number} was skipped.", COORDINATOR, _SEE_LOG, number)
    elif missing := sorted(set(range(rounds[0], number)) - set(rounds)):
        what = f"{_rounds(missing)} left no figures."
        yield Alert("round-skipped", "warning", what, COORDINATOR, _SEE_LOG, missing[-1])
    taken = int(last.get("sites") or 0)
    if snapshot.study is not None and 0 < taken < len(snapshot.study.cohort.sites):
        rows = [row for row in snapshot.site_rounds if row.get("round") == number and row.get("kind") == "train"]
        without = [str(row["site"]) for row in rows if row.get("outcome") != "included"]
        if without:
            what = f"Round {number} went on without {', '.join(without)}."
            yield Alert("left-out", "info", what, COORDINATOR, "See why in sites.csv.", number)


def _of_budget(snapshot: RunSnapshot, rules: AlertRules) -> Iterator[Alert]:
    privacy = snapshot.privacy
    if not privacy or not (budget := float(privacy.get("budget") or 0)):
        return
    if privacy.get("bound") == "upper":  # the budget itself: no site says what it has spent
        return
    by_site: Mapping[str, Any] = privacy.get("sites") or {}
    spent = [(name, float(value)) for name, value in by_site.items()]
    for where, epsilon in spent or [(COORDINATOR, float(privacy.get("epsilon") or 0))]:
        if epsilon >= rules.budget_share * budget:
            whose = "The study" if where == COORDINATOR else where
            what = f"{whose} has spent epsilon {epsilon:.2f} of the budget of {budget:g}."
            todo = "Nothing: no round begins that would pass it. More rounds need another study, with another budget."
            yield Alert("budget-ending", "warning", what, where, todo)


def _of_certificates(snapshot: RunSnapshot) -> Iterator[Alert]:
    ends = [(COORDINATOR, snapshot.status.get("certificate_expires"))]
    ends += [(str(site["name"]), site.get("certificate_expires")) for site in snapshot.sites if not site.get("revoked")]
    for where, until in ends:
        if words := expiry_words(until, snapshot.read_at):
            over = until is not None and until <= snapshot.read_at
            todo = (
                "`wardround init STUDY --renew`, then start the coordinator again."
                if where == COORDINATOR
                else f"At {where}: `wardround-site rotate`"
                + (", or a new invitation (`wardround invite`)." if over else ".")
            )
            whose = "The coordinator's certificate" if where == COORDINATOR else f"The certificate of {where}"
            yield Alert("certificate-ending", "critical" if over else "warning", f"{whose} {words}.", where, todo)


def _of_disk(snapshot: RunSnapshot, rules: AlertRules) -> Iterator[Alert]:
    if snapshot.disk_free is not None and snapshot.disk_free < rules.disk_gb * 1e9:
        what = f"The run folder's disk has {snapshot.disk_free / 1e9:.2f} GB left."
        todo = "Free space; a coordinator whose disk is full ends, and goes on when it is started again."
        yield Alert("disk-low", "warning", what, COORDINATOR, todo)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _rounds(numbers: Sequence[int]) -> str:
    return f"Round {numbers[0]}" if len(numbers) == 1 else f"Rounds {', '.join(map(str, numbers))}"
