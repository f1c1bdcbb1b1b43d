"""A run's status in three sentences: how it stands, who holds it up, what to do next.

Pure functions from what `RunFolder.read_status` holds to text.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.privacy.accounting import BUDGET_SPENT
from common.study import Study
from server.run_folder import plainly
from server.wording import are, clean, count, duration, names, sentence

Status = Mapping[str, Any]

ENDED = ("finished", "failed", "stopped", "repaired")
NOTHING = "Nothing to do."


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


def described(status: Status) -> dict[str, Any]:
    """The status with its description, for programs."""
    said = describe(status)
    words = {"headline": said.headline, "cause": said.cause, "next_step": said.next_step}
    return {**status, "description": words}


def _failed(name: str, status: Status) -> Description:
    headline = f"{name}failed{_in_round(status)}"
    error = clean(str(status.get("error") or "The coordinator did not say why; its log may."))
    if "`wardround repair" not in error:
        if "free space" in error:
            todo = "Free space on the disk of the run folder, then start"
        elif ": expired on " in error:
            todo = "Renew the certificate (`wardround init STUDY --renew`), then start"
        else:
            todo = "Remove the cause, then start"
        todo += " the coordinator again with the same command: it goes on where it was."
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
        return Description(f"{name}starting", "The coordinator prepares the study's plan.", NOTHING)
    if state == "waiting for sites":
        if status.get("kind"):
            return _in_progress(f"{name}waiting for sites, {rounds}", status, now)
        if status.get("round"):
            return Description(
                f"{name}after {rounds}", "The coordinator evaluates the round and prepares the next one.", NOTHING
            )
        return _waiting(f"{name}waiting for sites", status, now)
    if state == "publishing":
        return Description(f"{name}publishing", "The coordinator converts and measures the best model.", NOTHING)
    if state == "evaluating" and status.get("kind") != "evaluate":
        return Description(
            f"{name}evaluating, {rounds}", "The coordinator evaluates the model on its holdout.", NOTHING
        )
    doing = "validation at the sites" if status.get("kind") == "evaluate" else "training"
    return _in_progress(f"{name}{doing}, {rounds}", status, now)


def _waiting(headline: str, status: Status, now: float) -> Description:
    sites = status.get("sites") or {}
    absent = [site for site, part in sites.items() if not part.get("connected")]
    there = len(sites) - len(absent)
    refused = any(sites[site].get("refused_reason") for site in absent)
    if not absent:
        return Description(headline, "All sites are connected; the first round begins.", NOTHING)
    quorum = f" (the quorum is {status['quorum']})" if "quorum" in status else ""
    address = f"; they reach the coordinator at {status['address']}" if status.get("address") else ""
    todo = NOTHING if status.get("simulated") else sentence(" and ".join(_fetching(sites, absent, now))) + f"{address}."
    return Description(
        headline,
        f"{'; '.join(_absence(sites, absent, now))}; {there} of {count(len(sites), 'site')} "
        f"{'is' if there == 1 else 'are'}{' connected' if refused else ''}{quorum}.",
        todo,
    )


def _absence(sites: Mapping[str, Mapping[str, Any]], absent: Sequence[str], now: float) -> list[str]:
    """Why these sites are not there."""
    revoked, expired, refused, away = _kinds_of_absence(sites, absent, now)
    causes = [f"{names(away)} {are(away)} not connected"] if away else []
    causes += [f"{names(revoked)} {'was' if len(revoked) == 1 else 'were'} revoked"] if revoked else []
    certificates = "the certificate" if len(expired) == 1 else "the certificates"
    causes += (
        [f"{certificates} of {names(expired)} {'has' if len(expired) == 1 else 'have'} expired"] if expired else []
    )
    return causes + ([f"{names(refused)} came with another study or version (refused)"] if refused else [])


def _kinds_of_absence(
    sites: Mapping[str, Mapping[str, Any]], absent: Sequence[str], now: float
) -> tuple[list[str], list[str], list[str], list[str]]:
    """Those that were revoked, whose certificate expired, that were sent away, and the others."""
    revoked = [site for site in absent if sites[site].get("revoked")]
    expired = [
        site
        for site in absent
        if site not in revoked and float(sites[site].get("certificate_expires") or now + 1) <= now
    ]
    refused = [site for site in absent if sites[site].get("refused_reason") and site not in (*revoked, *expired)]
    return revoked, expired, refused, [site for site in absent if site not in (*revoked, *expired, *refused)]


def _fetching(sites: Mapping[str, Mapping[str, Any]], absent: Sequence[str], now: float) -> list[str]:
    """What to do to have these sites there."""
    revoked, expired, refused, away = _kinds_of_absence(sites, absent, now)
    todo = [f"to have {names(revoked)} in again, invite and enrol anew (`wardround invite`)"] if revoked else []
    todo += (
        [f"invite {names(expired)} again (`wardround invite`), as an expired certificate is not renewed"]
        if expired
        else []
    )
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
        return Description(headline, "All sites have answered; the coordinator sums their updates.", NOTHING)

    causes = [f"{site} cannot do its part: {clean(_reason(sites[site]))}" for site in failed]
    mendable = [site for site in failed if sites[site].get("reason") != BUDGET_SPENT]
    if absent:
        causes += _absence(sites, absent, now)
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
        todo += _fetching(sites, absent, now)
    if mendable:
        todo.append(f"remove the cause at {names(mendable)}, whose site log says more")
    what = " and ".join(todo) or "nothing to do: a spent budget stays spent"
    able = len(done) + len(working)
    if able < quorum and closed:
        return Description(
            headline,
            cause,
            f"{sentence(what)}: the round was closed with {names(closed)} before, and goes on with all of them alone, "
            "however long that takes.",
        )
    if able < quorum:
        return Description(
            headline,
            cause,
            f"{sentence(what)}: the round needs {count(quorum, 'site')}, {able} can answer. What was "
            f"received is kept; another attempt begins {deadline}.",
        )
    them = "it" if len(failed) + len(absent) == 1 else "them"
    return Description(
        headline,
        cause,
        f"The quorum allows the round to go on without {them} {deadline}. "
        + (f"To have {them} in, {what}." if todo else f"{sentence(what)}."),
    )


_STAGES = ("waiting", "assigned", "download", "training", "evaluation", "ready", "upload", "done", "failed")


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


def is_under_way(status: Status) -> bool:
    """Whether what the status says of the sites still holds: after the end it is what they did last."""
    return bool(status.get("running", True)) and status.get("state") not in ENDED


def _in_round(status: Status) -> str:
    return f" in round {status['round']} of {status.get('rounds', '?')}" if status.get("round") else ""
