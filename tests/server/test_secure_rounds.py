"""Secure rounds over gRPC and TLS: sums, sites that drop out, coordinators that are stopped, and what is never seen."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from common.errors import RoundSkippedError
from common.secure_aggregation.messages import DeliveredShares, Roster, SurvivorSet, UnmaskRequest
from common.secure_aggregation.session import SitePolicy, decode_session
from common.security.certificates import load_identity
from common.wire import federation_pb2 as pb
from common.wire import federation_pb2_grpc as rpc
from common.wire.channel import CHANNEL_OPTIONS, channel_credentials
from common.wire.tensors import encode_chunks
from server import secure_rounds
from server.service import FederationService
from tests.server.secure_cohort import (
    PATIENCE,
    PLAN,
    SITES,
    Coordinator,
    Identities,
    RunningSite,
    eventually,
    sum_of,
    update_of,
)

FOUR = SITES[:4]
STAGES = ("advertise", "share", "mask", "confirm", "unmask")


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> Identities:
    return Identities(tmp_path_factory.mktemp("identities"))


@pytest.fixture
def coordinator(identities: Identities, tmp_path: Path) -> Iterator[Coordinator]:
    made = Coordinator(tmp_path / "run", identities)
    yield made
    made.stop()


@pytest.fixture
def start(identities: Identities, tmp_path: Path) -> Iterator[Callable[..., RunningSite]]:
    """Starts sites; all are stopped at the end."""
    made: list[RunningSite] = []

    def begin(name: str, coordinator: Coordinator, **how: Any) -> RunningSite:
        made.append(RunningSite(name, coordinator, identities, tmp_path / "sites", **how))
        return made[-1]

    yield begin
    for site in made:
        site.stop()


def summed(result: Any) -> tuple[list[int], int]:
    found = result.result(PATIENCE)
    return np.asarray(found["state"]["weights"]).tolist(), int(found["metrics"]["count"])


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    """The details of an audit log's entries of one event."""
    lines = (folder / "audit.log").read_text().splitlines()
    return [entry["details"] for entry in map(json.loads, lines) if entry["event"] == name]


def test_five_sites_are_summed(coordinator: Coordinator, start: Callable[..., RunningSite], tmp_path: Path) -> None:
    for site in SITES:
        start(site, coordinator)
    result = coordinator.open()

    assert summed(result) == sum_of(SITES)
    assert coordinator.closed[0].round.included == list(SITES)
    assert [one["survivors"] for one in coordinator.journal.events("summed")] == [list(SITES)]
    assert len(events(tmp_path / "run", "masked-input-received")) == len(SITES)
    assert events(tmp_path / "sites" / "alpha", "secure-sum-unmasked")[0]["survivors"] == list(SITES)


@pytest.mark.parametrize("stage", range(5), ids=STAGES)
def test_a_site_drops_out(
    stage: int, coordinator: Coordinator, start: Callable[..., RunningSite], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secure_rounds, "_LATE_PART", 0.01)  # of 5 minutes, for the stages after the deadline
    for site in FOUR:
        start(site, coordinator)
    lost = start(SITES[4], coordinator, drop_at=stage)
    result = coordinator.open()
    assert lost.dropped.wait(PATIENCE)
    eventually(lambda: SITES[4] not in coordinator.federation.connections)
    asked = eventually(lambda: coordinator.call)
    eventually(lambda: asked.secure.waiting_for == (SITES[4],) or result.done())
    coordinator.pass_deadline()
    assert summed(result) == sum_of(FOUR if stage <= 2 else SITES)


def test_a_site_that_floods_the_round_takes_no_memory_and_stops_nobody(
    coordinator: Coordinator, start: Callable[..., RunningSite], caplog: pytest.LogCaptureFixture
) -> None:
    for site in FOUR:
        start(site, coordinator)
    result = coordinator.open()
    assert coordinator.flood(SITES[4], 1000) == secure_rounds._MOST_UNREAD
    assert sum("more steps than there are" in message for message in caplog.messages) == 1
    start(SITES[4], coordinator)
    assert summed(result) == sum_of(SITES)


def test_an_attempt_that_loses_too_many_is_made_again_with_fresh_keys(
    coordinator: Coordinator, start: Callable[..., RunningSite]
) -> None:
    for site in SITES[:3]:
        start(site, coordinator)
    lost = [start(site, coordinator, drop_at=2) for site in SITES[3:]]
    result = coordinator.open()
    for site in lost:
        assert site.dropped.wait(PATIENCE)
        site.stop()
    start(SITES[3], coordinator)
    start(SITES[4], coordinator)

    assert summed(result) == sum_of(SITES)
    assert [one["attempt"] for one in coordinator.journal.events("asked")] == [1, 2]
    assert len(coordinator.journal.events("summed")) == 1


def test_a_line_that_breaks_costs_nothing(coordinator: Coordinator, start: Callable[..., RunningSite]) -> None:
    cut: list[int] = []

    def cut_once(stage: int, step: Any) -> None:
        if (
            stage not in cut
        ):  # before its answer, which goes out on the line that ends: it is asked again on the new one
            cut.append(stage)
            coordinator.cut("gamma")
            eventually(lambda: "gamma" not in coordinator.federation.connections)

    for site in FOUR:
        start(site, coordinator)
    start("gamma", coordinator, hook=cut_once)
    assert summed(coordinator.open()) == sum_of(SITES)
    assert cut[:3] == [0, 1, 2]
    assert [one["attempt"] for one in coordinator.journal.events("asked")] == [1]


def test_a_coordinator_that_is_killed_before_unmasking_asks_for_another_sum(
    identities: Identities, start: Callable[..., RunningSite], tmp_path: Path
) -> None:
    second = _started_again(identities, start, tmp_path / "run", at=3, reached=any)
    try:
        assert summed(second.open()) == sum_of(SITES)
        assert [one["attempt"] for one in second.journal.events("asked")] == [1, 2]
    finally:
        second.stop()


def _started_again(
    identities: Identities,
    start: Callable[..., RunningSite],
    run: Path,
    *,
    at: int,
    reached: Callable[[Iterable[bool]], bool],
) -> Coordinator:
    """The next coordinator of a run whose first was killed when any, or all, of its sites were at a stage."""
    first = Coordinator(run, identities)
    sites = [start(site, first, hook=lambda stage, step: _wait_at(at, stage, step, first)) for site in SITES]
    first.open()
    eventually(lambda: reached(site.secure.stage == at for site in sites))
    port = first.address.port
    first.stop()
    return Coordinator(run, identities, port)


def _wait_at(at: int, stage: int, step: Any, coordinator: Coordinator) -> None:
    if stage == at and step.attempt == 1:
        eventually(lambda: coordinator.stopped)


def test_a_coordinator_that_is_killed_while_unmasking_skips_the_round(
    identities: Identities, start: Callable[..., RunningSite], tmp_path: Path
) -> None:
    second = _started_again(identities, start, tmp_path / "run", at=4, reached=all)
    try:
        with pytest.raises(RoundSkippedError, match="stopped while the sites unmasked"):
            second.open().result(PATIENCE)
        assert summed(second.open(2)) == sum_of(SITES)
        assert "skipped" in second.federation.notice or second.journal.events("skipped")
    finally:
        second.stop()


def test_a_sum_that_was_made_survives_the_coordinator(
    identities: Identities, start: Callable[..., RunningSite], tmp_path: Path
) -> None:
    first = Coordinator(tmp_path / "run", identities)
    sites = [start(site, first) for site in SITES]
    assert summed(first.open()) == sum_of(SITES)
    for site in sites:
        site.stop()
    first.stop()
    second = Coordinator(tmp_path / "run", identities)
    try:
        assert summed(second.open()) == sum_of(SITES)  # without any site
        assert second.closed[0].round.included == list(SITES)
    finally:
        second.stop()


@pytest.mark.parametrize("restarted", [False, True], ids=["same-process", "restarted"])
def test_no_site_unmasks_a_round_twice_even_for_a_coordinator_that_forgot(
    restarted: bool, identities: Identities, start: Callable[..., RunningSite], tmp_path: Path
) -> None:
    """As one that wants the sum with a site and the one without it."""
    first = Coordinator(tmp_path / "run", identities)
    sites = [start(site, first) for site in SITES]
    assert summed(first.open()) == sum_of(SITES)
    port = first.address.port
    if restarted:
        for site in sites:
            site.stop()
    else:
        sites[4].stop()
    first.stop()
    second = Coordinator(tmp_path / "forgotten", identities, port)
    try:
        if restarted:
            sites = [start(site, second) for site in FOUR]
        result = second.open()
        eventually(lambda: result.done() or second.call.secure.ready == frozenset(FOUR))  # type: ignore[union-attr]
        second.pass_deadline()
        with pytest.raises(RoundSkippedError, match="have unmasked it before"):
            result.result(PATIENCE)
        assert not second.journal.events("summed")
        assert "begun to unmask it" in sites[0].notices()
        assert events(tmp_path / "sites" / "alpha", "secure-step-refused")[-1]["reason"] == "UnmaskingBegunError"
    finally:
        second.stop()


def test_a_site_asks_for_its_own_cohort(
    coordinator: Coordinator, start: Callable[..., RunningSite], tmp_path: Path
) -> None:
    for site in SITES[1:4]:
        start(site, coordinator)
    careful = start(SITES[0], coordinator, policy=SitePolicy(5, 4))
    coordinator.open()
    eventually(lambda: coordinator.call is not None and len(coordinator.federation.connections) == 4)
    eventually(lambda: coordinator.call.secure.ready == frozenset(FOUR))  # type: ignore[union-attr]
    coordinator.pass_deadline()
    eventually(lambda: "expected 5 or more sites invited, found 4" in careful.notices())
    assert events(tmp_path / "sites" / "alpha", "secure-step-refused")[-1]["reason"] == "CohortTooSmallError"


def found_in(content: bytes, site: str) -> list[str]:
    """Which of a site's numbers a byte string holds, as they are or as floats: a run of three is no chance."""
    numbers, _ = update_of(site)
    kinds = ("<u4", "<i8", "<f4", "<f8")
    runs = [numbers[begin : begin + 3] for begin in (0, 50, 197)]
    return [kind for kind in kinds if any(run.astype(kind).tobytes() in content for run in runs)]


def test_nothing_of_one_site_reaches_the_coordinator(
    coordinator: Coordinator, start: Callable[..., RunningSite], tmp_path: Path
) -> None:
    for site in SITES:
        start(site, coordinator)
    assert summed(coordinator.open()) == sum_of(SITES)

    assert len(coordinator.heard) > 5 * len(SITES)
    stored = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    for content in [b"".join(coordinator.heard), *coordinator.heard, *stored]:
        assert not any(found_in(content, site) for site in SITES)
    held = b"".join(path.read_bytes() for path in (tmp_path / "sites").rglob("update.tensors"))
    assert all(found_in(held, site) for site in SITES)  # at the sites they are: the detector finds them
    assert coordinator.said
    for message in coordinator.said:
        assert not message.progress.batches and not message.hello.training_cases


def test_a_plain_answer_is_not_taken_in_a_secure_round(
    coordinator: Coordinator, identities: Identities, start: Callable[..., RunningSite]
) -> None:
    """A site of another version that would send its update as it is."""
    blob = b"".join(encode_chunks(update_of("alpha")))
    coordinator.open()
    call = coordinator.call
    assert call is not None
    channel = grpc.secure_channel(
        str(coordinator.address),
        channel_credentials(load_identity(identities.of("alpha"))),
        options=CHANNEL_OPTIONS,
    )
    header = pb.UploadHeader(
        envelope=pb.Envelope(study="sums", plan_digest=PLAN.digest, site="alpha"),
        task=pb.TaskName(kind=pb.TRAIN, round=1, attempt=1),
        blob=pb.Blob(sha256=hashlib.sha256(blob).digest(), size=len(blob)),
        broadcast_sha256=call.broadcast.digest,
    )
    with channel:
        stub: Any = rpc.FederationStub(channel)  # type: ignore[no-untyped-call]
        replies = list(stub.Upload(iter([pb.UploadMessage(header=header)]), timeout=PATIENCE))
    assert replies[0].receipt.reason == "attempt 1 of round 1 takes no masked input now"
    assert not any(found_in(content, "alpha") for content in coordinator.heard)


# A coordinator that cannot be trusted. ------------------------------------------------------------------------------


Change = Callable[[str, bytes, bytes], tuple[bytes, bytes]]


def tamper(monkeypatch: pytest.MonkeyPatch, stage: int, change: Change) -> None:
    """Has the coordinator change what it sends to alpha before its answer in a stage (0 to 4), as it goes out."""
    honest = secure_rounds.SecureRound._ask
    asked: dict[int, int] = {}

    def ask(self: Any, sites: Any, contents: Any, proposal: bytes = b"") -> None:
        number = asked[id(self)] = 0 if proposal else asked[id(self)] + 1
        if number == stage:
            told, proposal_told = change("alpha", contents["alpha"], proposal)
            honest(self, ["alpha"], {"alpha": told}, proposal_told)
            rest = [site for site in sites if site != "alpha"]
            kept = dict(self._asked)
            honest(self, rest, contents, proposal)
            self._asked |= kept
            return
        honest(self, sites, contents, proposal)

    monkeypatch.setattr(secure_rounds.SecureRound, "_ask", ask)


def _other_keys(site: str, content: bytes, proposal: bytes) -> tuple[bytes, bytes]:
    roster = Roster.decode(content)
    own = next(one for one in roster.advertisements if one.site == site)
    forged = dataclasses.replace(own, mask_key=bytes(range(32)))
    others = [forged if one.site == site else one for one in roster.advertisements]
    return dataclasses.replace(roster, advertisements=tuple(others)).encode(), proposal


def _others_keys(site: str, content: bytes, proposal: bytes) -> tuple[bytes, bytes]:
    roster = Roster.decode(content)
    forged = [
        dataclasses.replace(one, mask_key=bytes(range(32))) if one.site == "beta" else one
        for one in roster.advertisements
    ]
    return dataclasses.replace(roster, advertisements=tuple(forged)).encode(), proposal


def _both_shares(site: str, content: bytes, proposal: bytes) -> tuple[bytes, bytes]:
    request = UnmaskRequest.decode(content)
    return dataclasses.replace(request, dropped=("beta",)).encode(), proposal


def _other_sets(site: str, content: bytes, proposal: bytes) -> tuple[bytes, bytes]:
    request = UnmaskRequest.decode(content)
    return dataclasses.replace(request, survivors=request.survivors[:4], dropped=("gamma",)).encode(), proposal


def _without_it(site: str, content: bytes, proposal: bytes) -> tuple[bytes, bytes]:
    survivors = SurvivorSet.decode(content)
    return dataclasses.replace(survivors, survivors=survivors.survivors[1:]).encode(), proposal


def _few_confirmations(site: str, content: bytes, proposal: bytes) -> tuple[bytes, bytes]:
    request = UnmaskRequest.decode(content)
    return dataclasses.replace(request, confirmations=request.confirmations[:3]).encode(), proposal


def _other_threshold(site: str, content: bytes, proposal: bytes) -> tuple[bytes, bytes]:
    return content, dataclasses.replace(decode_session(proposal), threshold=3).encode()


def _a_stranger(site: str, content: bytes, proposal: bytes) -> tuple[bytes, bytes]:
    session = decode_session(proposal)
    return content, dataclasses.replace(session, sites=(*session.sites[:4], "zeta")).encode()


def _an_older_attempt(site: str, content: bytes, proposal: bytes) -> tuple[bytes, bytes]:
    return content, dataclasses.replace(decode_session(proposal), attempt=0).encode()


def _of_another_session(site: str, content: bytes, proposal: bytes) -> tuple[bytes, bytes]:
    return dataclasses.replace(DeliveredShares.decode(content), session=bytes(32)).encode(), proposal


def _for_another(site: str, content: bytes, proposal: bytes) -> tuple[bytes, bytes]:
    return dataclasses.replace(DeliveredShares.decode(content), recipient="beta").encode(), proposal


@pytest.mark.parametrize(
    ("stage", "change", "name"),
    [
        (0, _other_threshold, "WrongSessionError"),
        (0, _a_stranger, "UnknownSiteError"),
        (0, _an_older_attempt, "WrongSessionError"),
        (1, _other_keys, "OwnKeyReplacedError"),
        (1, _others_keys, "BadSignatureError"),
        (2, _of_another_session, "WrongSessionError"),
        (2, _for_another, "UnknownSiteError"),
        (3, _without_it, "NotASurvivorError"),
        (4, _both_shares, "BothSharesAskedError"),
        (4, _other_sets, "SetChangedError"),
        (4, _few_confirmations, "TooFewConfirmationsError"),
    ],
)
def test_a_site_refuses_a_coordinator_that_cheats(
    stage: int,
    change: Change,
    name: str,
    coordinator: Coordinator,
    start: Callable[..., RunningSite],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    tamper(monkeypatch, stage, change)
    for site in SITES:
        start(site, coordinator)
    result = coordinator.open()

    assert summed(result) == sum_of(SITES[1:] if stage <= 2 else SITES)  # the others go on without it
    assert events(tmp_path / "sites" / "alpha", "secure-step-refused")[-1]["reason"] == name
    assert not events(tmp_path / "sites" / "alpha", "secure-sum-unmasked")


def test_a_site_that_was_given_other_weights_than_its_peers_takes_no_part(
    coordinator: Coordinator, start: Callable[..., RunningSite], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Else the coordinator gives the peers weights from which nothing is learned, and the sum is one site's update."""
    honest = FederationService._message

    def message(self: Any, site: str, **body: Any) -> pb.CoordinatorMessage:
        if site == "alpha" and "task" in body:
            body["task"].scalars = b"".join(encode_chunks([np.float32(0.25)]))
        return honest(self, site, **body)

    monkeypatch.setattr(FederationService, "_message", message)
    for site in SITES:
        start(site, coordinator)

    assert summed(coordinator.open()) == sum_of(SITES[1:])
    assert events(tmp_path / "sites" / "alpha", "secure-step-refused")[-1]["reason"] == "WrongSessionError"


def test_other_weights_in_the_middle_of_an_attempt_are_not_summed(
    coordinator: Coordinator, start: Callable[..., RunningSite], tmp_path: Path
) -> None:
    """The update that is masked is the one for which the session was joined."""

    def exchanged(stage: int, step: Any) -> Any:
        return dataclasses.replace(step, broadcast=bytes(32)) if stage == 2 else None

    for site in FOUR:
        start(site, coordinator)
    start(SITES[4], coordinator, hook=exchanged)

    assert summed(coordinator.open()) == sum_of(FOUR)
    assert events(tmp_path / "sites" / SITES[4], "secure-step-refused")[-1]["reason"] == "OutOfTurnError"


def test_sites_that_were_shown_different_sets_do_not_unmask(
    coordinator: Coordinator, start: Callable[..., RunningSite], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The coordinator hides gamma from alpha, and has it unmask with what the others signed."""
    honest = secure_rounds.SecureRound._ask

    def ask(self: Any, sites: Any, contents: Any, proposal: bytes = b"") -> None:
        changed = dict(contents)
        first = next(iter(contents.values()))
        if first[4:5] == bytes([SurvivorSet.kind]):
            survivors = SurvivorSet.decode(first)
            changed["alpha"] = dataclasses.replace(survivors, survivors=survivors.survivors[:4]).encode()
        if first[4:5] == bytes([UnmaskRequest.kind]):
            request = UnmaskRequest.decode(first)
            confirmations = tuple(one for one in request.confirmations if one[0] != "gamma")
            changed["alpha"] = UnmaskRequest(request.session, request.survivors[:4], ("gamma",), confirmations).encode()
            self._lost.discard("alpha")
        honest(self, list(changed), changed, proposal)

    monkeypatch.setattr(secure_rounds.SecureRound, "_ask", ask)
    for site in SITES:
        start(site, coordinator)
    result = coordinator.open()
    assert summed(result) == sum_of(SITES)
    eventually(lambda: events(tmp_path / "sites" / "alpha", "secure-step-refused"))
    assert events(tmp_path / "sites" / "alpha", "secure-step-refused")[-1]["reason"] == "InconsistentSetsError"
