"""What a journal's events mean: replayed in parts as at once, and consistent after any prefix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from server.replay import RoundKey, RunHistory, replay

SITES = ("east", "north", "south")
QUORUM = 2


def event(name: str, kind: str | None = None, number: int | None = None, **detail: Any) -> dict[str, Any]:
    return {"at": 0.0, "event": name, "kind": kind, "round": number, "attempt": None, "site": None, **detail}


def opened(kind: str = "train", number: int = 1, broadcast: str = "aa") -> dict[str, Any]:
    return event("opened", kind, number, sites=list(SITES), broadcast=broadcast)


def received(site: str, kind: str = "train", number: int = 1, attempt: int = 1, sha256: str = "bb") -> dict[str, Any]:
    detail = {"file": f"{site}-{sha256}", "sha256": sha256, "bytes": 7, "cases": 3, "work": 1.5}
    return event("received", kind, number, site=site, attempt=attempt, **detail)


def closed(*included: str, kind: str = "train", number: int = 1, attempt: int = 1) -> dict[str, Any]:
    return event("closed", kind, number, attempt=attempt, included=list(included))


_KINDS = st.sampled_from(["train", "evaluate"])
_NUMBERS = st.integers(1, 3)
_SITE = st.sampled_from([*SITES, "elsewhere"])
_ATTEMPTS = st.integers(1, 3)
_HEX = st.sampled_from(["aa", "bb"])
ANY_EVENT = st.one_of(
    st.builds(opened, _KINDS, _NUMBERS, _HEX),
    st.builds(received, _SITE, _KINDS, _NUMBERS, _ATTEMPTS, _HEX),
    st.builds(
        lambda site, kind, number, attempt: event("refused", kind, number, site=site, attempt=attempt, reason="NaN"),
        *(_SITE, _KINDS, _NUMBERS, _ATTEMPTS),
    ),
    st.builds(
        lambda kind, number, attempt: event("retried", kind, number, attempt=attempt, missing=[]),
        *(_KINDS, _NUMBERS, _ATTEMPTS),
    ),
    st.builds(
        lambda sites, kind, number, attempt: closed(*sites, kind=kind, number=number, attempt=attempt),
        *(st.lists(_SITE, unique=True), _KINDS, _NUMBERS, _ATTEMPTS),
    ),
    st.builds(
        lambda site, kind, number: event("given_up", kind, number, site=site, quorum=QUORUM), _SITE, _KINDS, _NUMBERS
    ),
    st.builds(lambda number, digest: event("state", None, number, sha256=digest), _NUMBERS, _HEX),
    st.builds(lambda number, digest: event("model", None, number, sha256=digest), _NUMBERS, _HEX),
    st.builds(lambda number: event("returned", None, number), st.integers(0, 3)),
    st.builds(lambda: event("trained", rounds=3)),
    st.builds(lambda: event("published", version="v1")),
    st.builds(lambda: event("started", version="0.1")),
)
EVENTS = st.lists(ANY_EVENT, max_size=40)


def check(history: RunHistory) -> None:
    """What holds of every history, whatever is missing of the journal."""
    for key, found in history.rounds.items():
        cohort = found.sites if found.closed is None else found.closed
        assert set(cohort) <= set(found.sites) == set(SITES)
        assert list(cohort) == sorted(cohort)
        assert set(found.received) <= set(cohort)
        assert not set(found.refused) & set(found.received)
        assert not set(found.given_up) & set(cohort if found.closed is not None else ())
        assert found.attempt >= max([1, *(update.attempt for update in found.received.values())])
        assert (key.kind, key.number) in history.current
    for (kind, number), broadcast in history.current.items():
        assert RoundKey(kind, number, broadcast) in history.rounds
    assert history.saved == max([0, *history.states])
    assert history.trained or not history.published


@given(events=EVENTS)
def test_any_prefix_of_any_events_is_a_consistent_history(events: list[dict[str, Any]]) -> None:
    for length in range(len(events) + 1):
        check(replay(events[:length]))


@given(events=EVENTS, cut=st.integers(0, 40))
def test_a_prefix_and_then_the_rest_is_the_whole(events: list[dict[str, Any]], cut: int) -> None:
    assert replay(events[cut:], replay(events[:cut])) == replay(events)


@given(events=EVENTS, after=EVENTS)
def test_a_cohort_that_was_closed_stays_whatever_comes_but_for_sites_that_are_given_up(
    events: list[dict[str, Any]], after: list[dict[str, Any]]
) -> None:
    before = replay(events)
    later = replay([each for each in after if each["event"] != "given_up"], before)
    for key, found in before.rounds.items():
        if found.closed is not None:
            assert later.rounds[key].closed == found.closed


def test_attempt_updates_and_refusals_of_a_round_survive() -> None:
    events = [opened(), received("east"), event("retried", "train", 1, attempt=2, missing=["north", "south"])]
    events += [event("refused", "train", 1, site="south", attempt=2, reason="NaN"), opened()]
    found = replay(events).find("train", 1)
    assert found is not None
    assert (found.attempt, found.refused, found.closed) == (2, {"south": "NaN"}, None)
    update = found.received["east"]
    assert (update.file, update.cases, update.work, update.download) == ("east-bb", 3, 1.5, 0.0)


def test_a_refusal_is_forgotten_in_the_next_attempt_and_where_the_site_then_sends_a_good_one() -> None:
    refused = event("refused", "train", 1, site="south", attempt=1, reason="NaN")
    for what in (received("south"), event("retried", "train", 1, attempt=2, missing=["south"])):
        found = replay([opened(), refused, what]).find("train", 1)
        assert found is not None
        assert not found.refused


def test_updates_of_another_broadcast_of_the_same_round_are_not_of_this_one() -> None:
    history = replay([opened(broadcast="aa"), received("east"), opened(broadcast="cc"), received("north")])
    assert [sorted(found.received) for found in history.rounds.values()] == [["east"], ["north"]]
    assert history.find("train", 1) == history.rounds["train", 1, "cc"]  # type: ignore[index]


def given_up(*events: dict[str, Any]) -> tuple[Sequence[str] | None, list[str]]:
    whole = [opened(), *(received(site) for site in SITES), closed(*SITES), *events]
    found = replay(whole).find("train", 1)
    assert found is not None
    return found.closed, sorted(found.received)


def test_a_site_that_is_given_up_leaves_the_closed_cohort() -> None:
    up = event("given_up", "train", 1, site="south", quorum=QUORUM)
    assert given_up(up) == (("east", "north"), ["east", "north"])
    assert given_up(up, closed(*SITES)) == (("east", "north"), ["east", "north"])


def test_below_the_quorum_a_round_with_sites_given_up_is_open_again_to_everyone() -> None:
    events = [event("given_up", "train", 1, site=site, quorum=QUORUM) for site in ("south", "north")]
    assert given_up(*events) == (None, ["east"])
    assert given_up(*events, received("south"), closed("east", "south")) == (("east", "south"), ["east", "south"])


def test_going_back_forgets_later_states_and_the_end_but_no_cohort() -> None:
    events = [opened(), received("east"), closed("east"), event("state", None, 1, sha256="11")]
    events += [event("state", None, 2, sha256="22"), event("trained"), event("published", version="v1")]
    whole = replay(events)
    assert (whole.saved, whole.trained, whole.published) == (2, True, "v1")
    back = replay([event("returned", None, 0)], whole)
    assert (back.saved, back.trained, back.published) == (0, False, "")
    assert back.rounds == whole.rounds


def test_a_site_that_answers_an_earlier_round_anew_has_outdated_what_it_sent_later() -> None:
    ahead = [opened(), received("east"), opened(number=2), received("east", number=2), received("north", number=2)]
    assert not any(update.outdated for found in replay(ahead).rounds.values() for update in found.received.values())
    for again in (received("east"), received("east", "evaluate")):
        history = replay([opened("evaluate"), *ahead, event("returned", None, 0), again])
        later = history.find("train", 2)
        assert later is not None
        assert {site: update.outdated for site, update in later.received.items()} == {"east": True, "north": False}
    anew = replay([received("east", number=2)], history).find("train", 2)
    assert anew is not None and not anew.received["east"].outdated


def test_a_version_that_was_published_before_the_end_is_not_the_study_s_own() -> None:
    assert replay([event("published", version="v1")]).published == ""


def test_journals_of_earlier_versions_are_read() -> None:
    old = {"event": "received", "kind": "train", "round": 1, "attempt": 1, "site": "east"}
    found = replay([opened(), {**old, "sha256": "bb", "bytes": 7, "file": "u"}]).find("train", 1)
    assert found is not None
    assert (found.received["east"].sha256, found.received["east"].cases) == ("bb", 0)
