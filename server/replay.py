"""What a journal's events mean for a coordinator that starts: a pure fold from events to a run's history.

    >>> events = [
    ...     {"event": "opened", "kind": "train", "round": 1, "sites": ["east", "north"], "broadcast": "ab"},
    ...     {"event": "received", "kind": "train", "round": 1, "attempt": 1, "site": "east",
    ...      "file": "u", "sha256": "cd", "bytes": 7},
    ...     {"event": "retried", "kind": "train", "round": 1, "attempt": 2, "missing": ["north"]},
    ... ]
    >>> history = replay(events)
    >>> found = history.rounds[RoundKey("train", 1, "ab")]
    >>> found.attempt, sorted(found.received), found.closed
    (2, ['east'], None)
    >>> replay(events[2:], replay(events[:2])) == history
    True

It is total: events that do not fit what came before them (of a journal that was salvaged, or of a later version) change
nothing. Everything that a restart needs is in the history; nothing else in a run is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

Event = Mapping[str, Any]
"""As `Journal.events` returns it: "event", "kind", "round", "attempt", "site", and the event's detail."""


class RoundKey(NamedTuple):
    """One call of the cohort: what is asked ("train", "evaluate"), in which round, with which broadcast (hex SHA-256).

    A round that is computed again from another state, as with privacy noise, is another one.
    """

    kind: str
    number: int
    broadcast: str


@dataclass(frozen=True)
class Received:
    """An update that is on disk, and how long (in seconds) the site was at which part of it.

    Attributes
    ----------
    epsilon : what the site has spent of its privacy budget by then; None where there is none.
    outdated : its site has answered an earlier round anew since, as the run went back or lost an update. What a site
        keeps to itself from round to round (`training.personal`) is of that round then, and no longer of this one.
    """

    file: str
    sha256: str
    bytes: int
    attempt: int = 1
    cases: int = 0
    download: float = 0.0
    work: float = 0.0
    upload: float = 0.0
    outdated: bool = False
    epsilon: float | None = None


@dataclass(frozen=True)
class Summed:
    """A secure sum that is on disk: of which sites, each of which sent so many bytes."""

    file: str
    sha256: str
    survivors: tuple[str, ...]
    attempt: int
    sent: int


@dataclass(frozen=True)
class RoundHistory:
    """What is decided of a round.

    Attributes
    ----------
    attempt : the newest, from 1.
    received : by site. Where the round is closed, of its cohort alone.
    refused : by site, why its update was refused in the newest attempt.
    closed : the cohort that the round was closed with, in name order; None while it is open.
    given_up : sites whose lost updates somebody gave up (`wardround repair --give-up`).
    asked : the newest attempt in which a secure sum was asked for; 0 before any.
    unmasking : whether the sites were asked to unmask one, which they do once.
    summed : the secure sum, where there is one.
    skipped : why the run went on without this round; "" where it did not.
    """

    sites: tuple[str, ...]
    attempt: int = 1
    received: Mapping[str, Received] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    closed: tuple[str, ...] | None = None
    given_up: tuple[str, ...] = ()
    asked: int = 0
    unmasking: bool = False
    summed: Summed | None = None
    skipped: str = ""


@dataclass(frozen=True)
class RunHistory:
    """What is decided of a run.

    Attributes
    ----------
    current : of each kind and round, the broadcast that it was opened with last.
    states, models : the hex SHA-256 of what was written of a round. Older ones may have been removed since.
    trained : whether the last round is done.
    published : the version that the study ended with; "" before that.
    plan : the hex digest of the plan that the last coordinator compiled; "" where none said so.
    ended : why it ended after the last saved round, before its last one; "" where it did not.
    noised : the draws of noise that were added to sums of this run, each counts once.
    told : the most that each site has said that it has spent of its privacy budget, also with updates not taken.
    """

    rounds: Mapping[RoundKey, RoundHistory] = field(default_factory=dict)
    current: Mapping[tuple[str, int], str] = field(default_factory=dict)
    states: Mapping[int, str] = field(default_factory=dict)
    models: Mapping[int, str] = field(default_factory=dict)
    trained: bool = False
    published: str = ""
    plan: str = ""
    ended: str = ""
    noised: frozenset[str] = frozenset()
    told: Mapping[str, float] = field(default_factory=dict)

    @property
    def saved(self) -> int:
        """The last round whose state is saved; 0 before the first."""
        return max(self.states, default=0)

    @property
    def sums(self) -> int:
        """How many sums were noised, at least: of a journal that was lost the saved rounds alone are known."""
        return max(len(self.noised), self.saved)

    @property
    def spent(self) -> dict[str, float]:
        """The most that each site has said that it has spent of its privacy budget; it may have spent more since."""
        found = dict(self.told)
        for round_ in self.rounds.values():
            for site, received in round_.received.items():
                if received.epsilon is not None:
                    found[site] = max(received.epsilon, found.get(site, 0.0))
        return found

    def find(self, kind: str, number: int, broadcast: str | None = None) -> RoundHistory | None:
        """The round of this broadcast, or of the last one that it was opened with."""
        opened = self.current.get((kind, number)) if broadcast is None else broadcast
        return None if opened is None else self.rounds.get(RoundKey(kind, number, opened))


def replay(events: Iterable[Event], before: RunHistory | None = None) -> RunHistory:
    """The history after these events, which happened after those of `before`."""
    start = RunHistory() if before is None else before
    rounds, current = dict(start.rounds), dict(start.current)
    states, models = dict(start.states), dict(start.models)
    trained, published, plan = start.trained, start.published, start.plan
    ended, noised, told = start.ended, set(start.noised), dict(start.told)
    last = max((key.number for key in rounds), default=0)
    for event in events:
        name = event["event"]
        if name == "opened":
            key = RoundKey(event["kind"], event["round"], event["broadcast"])
            current[key.kind, key.number] = key.broadcast
            rounds.setdefault(key, RoundHistory(tuple(sorted(event["sites"]))))
            last = max(last, key.number)
        elif name == "state":
            states[event["round"]] = event["sha256"]
        elif name == "model":
            models[event["round"]] = event["sha256"]
        elif name == "returned":
            states = {number: digest for number, digest in states.items() if number <= event["round"]}
            trained, published, ended = False, "", ""
        elif name == "plan":
            plan = event.get("digest") or ""
        elif name == "trained":
            trained = True
        elif name == "ended":
            ended = event.get("reason") or ""
        elif name == "noised":
            noised.add(event.get("draw") or "")
        elif name == "spent":
            told[event["site"]] = max(event.get("epsilon") or 0.0, told.get(event["site"], 0.0))
        elif name == "published":
            published = event.get("version") or "" if trained else published
        else:
            opened = current.get((event.get("kind") or "", event.get("round") or 0))
            if opened is not None:
                key = RoundKey(event["kind"], event["round"], opened)
                rounds[key] = after(rounds[key], event)
                if name == "received" and key.number < last:
                    _outdate(rounds, event["site"], event["round"])
    return RunHistory(rounds, current, states, models, trained, published, plan, ended, frozenset(noised), told)


def after(round_: RoundHistory, event: Event) -> RoundHistory:
    """A round that was opened, after one more event of it."""
    name, site = event["event"], event.get("site") or ""
    attempt = max(round_.attempt, event.get("attempt") or 1)
    if name == "received":
        if site not in (round_.sites if round_.closed is None else round_.closed):
            return round_
        taken = Received(
            event["file"],
            event["sha256"],
            event["bytes"],
            event.get("attempt") or 1,
            event.get("cases", 0),
            event.get("download", 0.0),
            event.get("work", 0.0),
            event.get("upload", 0.0),
            epsilon=event.get("epsilon"),
        )
        refused = {other: reason for other, reason in round_.refused.items() if other != site}
        return replace(round_, attempt=attempt, received={**round_.received, site: taken}, refused=refused)
    if name == "refused":
        if site not in round_.sites or site in round_.received or attempt != event.get("attempt"):
            return round_
        kept = round_.refused if attempt == round_.attempt else {}
        return replace(round_, attempt=attempt, refused={**kept, site: event.get("reason", "")})
    if name == "retried":
        return replace(round_, attempt=attempt, refused=round_.refused if attempt == round_.attempt else {})
    if name in _SECURE:
        return _SECURE[name](replace(round_, attempt=attempt), event)
    if name == "closed" and round_.closed is None:
        closed = tuple(site for site in round_.sites if site in event["included"] and site not in round_.given_up)
        return replace(round_, attempt=attempt, closed=closed, received=_of(closed, round_.received))
    if name == "given_up" and site in round_.sites:
        received = _of([other for other in round_.sites if other != site], round_.received)
        given_up = tuple(sorted({*round_.given_up, site}))
        left = None if round_.closed is None else tuple(other for other in round_.closed if other != site)
        if left is not None and len(left) < max(1, event.get("quorum", 1)):
            return replace(round_, received=received, closed=None, given_up=())  # open again, to everyone
        return replace(round_, received=received, closed=left, given_up=given_up)
    return round_


def _summed(round_: RoundHistory, event: Event) -> RoundHistory:
    survivors = tuple(event["survivors"])
    summed = Summed(event["file"], event["sha256"], survivors, round_.attempt, event.get("sent") or 0)
    return replace(round_, summed=summed)


_SECURE: Mapping[str, Callable[[RoundHistory, Event], RoundHistory]] = {
    "asked": lambda round_, event: replace(round_, asked=max(round_.asked, event.get("attempt") or 1)),
    "unmasking": lambda round_, event: replace(round_, unmasking=True),
    "summed": _summed,
    "skipped": lambda round_, event: replace(round_, skipped=event.get("reason") or "its sum was lost"),
}
"""What the events of secure sums change of a round."""


def _outdate(rounds: dict[RoundKey, RoundHistory], site: str, number: int) -> None:
    for key, round_ in rounds.items():
        if key.number > number and site in round_.received:
            received = {**round_.received, site: replace(round_.received[site], outdated=True)}
            rounds[key] = replace(round_, received=received)


def _of(sites: Iterable[str], received: Mapping[str, Received]) -> dict[str, Received]:
    return {site: received[site] for site in sites if site in received}
