"""Who may speak to the coordinator and fetch from it: over gRPC and TLS, without training."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import grpc
import pytest

from client.fetch import fetch
from common.errors import IdentityError, PlanMismatchError
from common.security.certificates import Identity
from common.wire import federation_pb2 as pb
from server.rounds import Stage
from tests.server.service.digits import (
    PATIENCE,
    PLAN,
    STUDY,
    Coordinator,
    Site,
    Worker,
    eventually,
    refusal,
    sha256,
)

_CALLS: dict[str, Callable[[Site, pb.Envelope], Any]] = {
    "attend": lambda site, envelope: list(site.stub.Attend(iter([_hello(envelope)]), timeout=PATIENCE)),
    "download": lambda site, envelope: list(site.stub.Download(pb.DownloadRequest(envelope=envelope))),
    "upload": lambda site, envelope: site.upload(envelope=envelope),
}


def _hello(envelope: pb.Envelope) -> pb.SiteMessage:
    return pb.SiteMessage(envelope=envelope, hello=pb.Hello(version="test"))


@pytest.mark.parametrize("call", _CALLS)
def test_a_message_in_the_name_of_another_site_is_refused(coordinator: Coordinator, alpha: Site, call: str) -> None:
    coordinator.open()
    envelope = pb.Envelope(study="digits", plan_digest=PLAN.digest, site="beta")
    code, words = refusal(lambda: _CALLS[call](alpha, envelope))
    assert code is grpc.StatusCode.PERMISSION_DENIED
    assert "'alpha'" in words
    assert "'beta'" in words
    assert coordinator.files() == []


def test_a_later_message_in_the_name_of_another_site_ends_the_stream(coordinator: Coordinator, alpha: Site) -> None:
    coordinator.open()
    stream = alpha.attend()
    stream.next()
    task = stream.next()
    stolen = pb.Envelope(study="digits", plan_digest=PLAN.digest, site="beta")
    stream.say(stolen, failure=pb.Failure(task=task.name, reason="not mine to say"))
    assert stream.refusal()[0] is grpc.StatusCode.PERMISSION_DENIED
    assert coordinator.stage("beta") is Stage.WAITING


@pytest.mark.parametrize("call", _CALLS)
def test_a_site_outside_the_cohort_is_refused(
    coordinator: Coordinator, connect: Callable[..., Site], call: str
) -> None:
    delta = connect(coordinator, "delta")
    code, words = refusal(lambda: _CALLS[call](delta, delta.envelope))
    assert code is grpc.StatusCode.PERMISSION_DENIED
    assert "'delta' is not in the cohort" in words
    assert "delta" not in coordinator.federation.connections


@pytest.mark.parametrize("call", _CALLS)
@pytest.mark.parametrize("role", ["observer", "investigator"])
def test_a_certificate_of_another_role_is_refused_whatever_its_name(
    coordinator: Coordinator, identities: dict[str, Identity], call: str, role: str
) -> None:
    """Here without `server.access` before it: the service looks for itself."""
    coordinator.open()
    site = Site(coordinator, "alpha", identities[role])
    code, words = refusal(lambda: _CALLS[call](site, site.envelope))
    site.close()
    assert code is grpc.StatusCode.PERMISSION_DENIED
    assert f"the certificate is of {role} 'alpha'" in words
    assert "alpha" not in coordinator.federation.connections


def test_a_site_that_is_barred_is_not_waited_for(
    coordinator: Coordinator, alpha: Site, beta: Site, gamma: Site
) -> None:
    round_ = coordinator.open()
    stream = gamma.attend()
    stream.next(), stream.next()
    alpha.upload()
    beta.upload()
    assert not round_.done()
    coordinator.federation.barred = lambda site: "its certificate was revoked" if site == "gamma" else ""
    coordinator.touch("gamma")
    assert round_.result(PATIENCE)["state"]["weights"][0] == 12
    round_ = coordinator.open(2)  # nor in the next one
    assert coordinator.stage("gamma") is Stage.FAILED
    alpha.upload(number=2)
    beta.upload(number=2)
    assert round_.result(PATIENCE)["state"]["weights"][0] == 12


@pytest.mark.parametrize("call", _CALLS)
@pytest.mark.parametrize("other", [{"plan_digest": b"\x08" * 32}, {"study": "letters"}], ids=["plan", "study"])
def test_another_plan_or_study_is_refused(
    coordinator: Coordinator, alpha: Site, call: str, other: dict[str, Any]
) -> None:
    envelope = pb.Envelope(**{"study": "digits", "plan_digest": PLAN.digest, "site": "alpha"} | other)
    code, words = refusal(lambda: _CALLS[call](alpha, envelope))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert words.startswith("plan: the coordinator runs study 'digits' with plan 0707070707070707")


def test_an_agent_with_another_plan_gives_up(coordinator: Coordinator, run: Callable[..., Future[str]]) -> None:
    end = run(coordinator, "alpha", Worker("alpha", digest=b"\x08" * 32))
    with pytest.raises(
        PlanMismatchError, match=r"0707070707070707.*0808080808080808.*use the coordinator's study file"
    ):
        end.result(PATIENCE)


def test_a_site_with_another_plan_is_told_of_once_at_the_coordinator_until_it_comes_with_the_right_one(
    coordinator: Coordinator, alpha: Site, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "wardround.coordinator")

    def come(plan: int) -> None:
        stream = alpha.attend(pb.Envelope(study="digits", plan_digest=bytes([plan]) * 32, site="alpha"))
        assert stream.refusal()[0] is grpc.StatusCode.FAILED_PRECONDITION

    for _ in range(3):
        come(8)
    assert coordinator.federation.rejected == {"alpha": "study 'digits' and plan 0808080808080808"}
    (words,) = caplog.messages
    assert words.startswith("alpha came with another plan: study 'digits' and plan 0808080808080808, the coordinator")
    assert "with plan 0707070707070707; start the site with the coordinator's study file" in words
    for plan in range(20, 50):
        come(plan)
    assert len(caplog.messages) == 10  # whatever it comes with: the log is not to be filled
    right = alpha.attend()
    assert isinstance(right.next(), pb.Welcome)
    eventually(lambda: not coordinator.federation.rejected)
    come(8)
    assert coordinator.federation.rejected == {}  # the site is here; somebody else has started a second one
    right.close()


def test_a_second_stream_of_a_site_takes_over_and_the_first_is_told(coordinator: Coordinator, alpha: Site) -> None:
    coordinator.open()
    first = alpha.attend()
    assert [type(first.next()) for _ in range(2)] == [pb.Welcome, pb.Task]
    second = alpha.attend()
    assert [type(second.next()) for _ in range(2)] == [pb.Welcome, pb.Task]
    code, words = first.refusal()
    assert code is grpc.StatusCode.ABORTED
    assert "another process attends as 'alpha'" in words
    assert coordinator.stage("alpha") is Stage.ASSIGNED  # the end of the first stream is not the end of the site
    second.close()
    eventually(lambda: coordinator.stage("alpha") is Stage.WAITING)


def test_a_second_stream_of_the_same_process_is_its_own_after_a_broken_line(
    coordinator: Coordinator, alpha: Site
) -> None:
    coordinator.open()
    first = alpha.attend(process=b"one process")
    assert [type(first.next()) for _ in range(2)] == [pb.Welcome, pb.Task]
    second = alpha.attend(process=b"one process")
    assert [type(second.next()) for _ in range(2)] == [pb.Welcome, pb.Task]
    assert first.refusal()[0] is grpc.StatusCode.UNAVAILABLE  # which no site takes as final
    second.close()


def test_a_site_that_leaves_is_taken_off_at_once(coordinator: Coordinator, alpha: Site) -> None:
    coordinator.open()
    stream = alpha.attend()
    assert [type(stream.next()) for _ in range(2)] == [pb.Welcome, pb.Task]
    stream.say(alpha.envelope, leaving=pb.Leaving(reason="stopped by its operator"))
    eventually(lambda: "alpha" not in coordinator.federation.connections)
    assert coordinator.stage("alpha") is Stage.WAITING
    stream.close()


def test_a_coordinator_that_pauses_tells_its_sites(coordinator: Coordinator, alpha: Site) -> None:
    coordinator.open()
    stream = alpha.attend()
    assert [type(stream.next()) for _ in range(2)] == [pb.Welcome, pb.Task]
    coordinator.pause("stopped by its operator")
    assert stream.next().reason == "stopped by its operator"
    stream.close()


def test_of_two_agents_for_one_site_the_first_gives_up(
    coordinator: Coordinator, run: Callable[..., Future[str]]
) -> None:
    first = run(coordinator, "alpha", Worker("alpha"))
    eventually(lambda: "alpha" in coordinator.federation.connections)
    second = run(coordinator, "alpha", Worker("alpha"))
    with pytest.raises(IdentityError, match="another process attends as 'alpha'"):
        first.result(PATIENCE)
    assert "alpha" in coordinator.federation.connections
    coordinator.finish()
    assert second.result(PATIENCE) == "over"


# What sites fetch. -------------------------------------------------------------------------------------------------


def test_a_site_fetches_a_version_while_a_round_is_under_way_and_needs_no_plan(
    coordinator: Coordinator, identities: dict[str, Identity], tmp_path: Path
) -> None:
    round_ = coordinator.open()
    version = coordinator.published / "v1"
    version.mkdir(parents=True)
    (version / "model.tflite").write_bytes(b"x" * 1000)
    entry = {"file": "model.tflite", "sha256": sha256(b"x" * 1000).hex()}
    manifest = {"format": 1, "study": "digits", "version": "v1", "variants": [entry], "documents": {}}
    (version / "manifest.json").write_text(json.dumps(manifest))
    seen: list[bytes] = []

    def verify(manifest: bytes, folder: Path) -> None:
        seen.append(manifest)

    found = fetch(coordinator.address, identities["beta"], tmp_path / "out", study="digits", verify=verify)
    assert seen == [(version / "manifest.json").read_bytes()]
    assert (found.folder / "model.tflite").read_bytes() == b"x" * 1000
    assert not round_.done()
    with pytest.raises(IdentityError, match="'delta' is not in the cohort"):
        fetch(coordinator.address, identities["delta"], tmp_path / "out", verify=verify)


def test_a_site_that_first_connects_in_a_later_round_is_given_that_rounds_task(
    coordinator: Coordinator, alpha: Site, beta: Site, gamma: Site
) -> None:
    for number in (1, 2):
        result = coordinator.open(number)
        alpha.upload(number=number)
        beta.upload(number=number)
        if number == 1:
            coordinator.pass_deadline()
            result.result(PATIENCE)
    stream = gamma.attend()
    assert stream.next().rounds == STUDY.training.rounds  # the welcome
    assert stream.next().name.round == 2
    assert gamma.upload(number=2).accepted
    state = result.result(PATIENCE)["state"]
    assert state["weights"][0] == 123  # the digits of alpha, beta and gamma
    stream.close()
