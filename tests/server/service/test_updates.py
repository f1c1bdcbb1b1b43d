"""Which updates the coordinator takes and refuses, and which broadcasts it serves: over gRPC and TLS."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest

from common.errors import RunFolderError
from common.security.audit import Audit
from common.security.certificates import Identity
from common.wire import federation_pb2 as pb
from common.wire import federation_pb2_grpc as rpc
from common.wire.channel import SERVER_OPTIONS, Address, server_credentials
from common.wire.tensors import decode
from server.rounds import Stage
from server.serving import FinishedService
from tests.server.service.digits import (
    PATIENCE,
    SIZE,
    STUDY,
    WHOLE,
    Coordinator,
    Site,
    blob_of,
    broadcast_of,
    eventually,
    refusal,
    sha256,
    summed,
    update_of,
)

_OTHER_TYPE = blob_of([np.full(SIZE, 1, np.int32), np.float32(1)])
_FLIPPED = WHOLE[:-7] + bytes([WHOLE[-7] ^ 1]) + WHOLE[-6:]


def test_a_damaged_update_leaves_no_file_and_can_be_sent_again(coordinator: Coordinator, alpha: Site) -> None:
    coordinator.open()
    upload = alpha.begin_upload(WHOLE)
    upload.send(_FLIPPED)
    receipt = upload.end()
    assert (receipt.accepted, receipt.again) == (False, True)
    assert "damaged on its way" in receipt.reason
    assert coordinator.files() == []
    assert coordinator.stage("alpha") is not Stage.DONE

    assert alpha.upload().accepted
    (file,) = coordinator.files()
    assert (coordinator.updates / file).read_bytes() == WHOLE
    assert [event["site"] for event in coordinator.journal.events("received")] == ["alpha"]


def test_an_update_with_more_bytes_than_it_says_is_not_taken(coordinator: Coordinator, alpha: Site) -> None:
    coordinator.open()
    upload = alpha.begin_upload(WHOLE)
    upload.say(data=WHOLE + b"x")
    receipt = upload.end()
    assert (receipt.accepted, receipt.again) == (False, True)
    assert coordinator.files() == []
    assert alpha.upload().accepted


def test_an_update_of_another_size_is_refused_before_it_is_received(coordinator: Coordinator, alpha: Site) -> None:
    coordinator.open()
    receipt = alpha.upload([np.zeros(SIZE * 1000, np.float32), np.int32(1)])
    assert (receipt.accepted, receipt.again) == (False, False)
    assert f"an update has {len(WHOLE)} bytes" in receipt.reason
    assert coordinator.files() == []
    assert coordinator.stage("alpha") is Stage.FAILED


_POISON: dict[str, tuple[list[Any], str]] = {
    "not a number": ([np.full(SIZE, np.nan, np.float32), np.int32(1)], "not finite"),
    "infinite": ([np.full(SIZE, -np.inf, np.float32), np.int32(1)], "not finite"),
    "one value": ([np.array([0] * (SIZE - 1) + [np.inf], np.float32), np.int32(1)], "not finite"),
    "absurd": ([np.full(SIZE, 1e6, np.float32), np.int32(1)], "absurd"),
    "beyond float32's squares": ([np.full(SIZE, 3e38, np.float32), np.int32(1)], "absurd"),
    "another type": ([np.full(SIZE, 1, np.int32), np.float32(1)], "expected float32"),
}


@pytest.mark.parametrize("poison", _POISON)
def test_a_poisoned_update_is_refused_for_good_and_the_round_goes_on_without_its_site(
    coordinator: Coordinator, alpha: Site, beta: Site, gamma: Site, poison: str
) -> None:
    result = coordinator.open()
    tensors, words = _POISON[poison]
    receipt = alpha.upload(tensors)
    assert (receipt.accepted, receipt.again) == (False, False)
    assert words in receipt.reason
    assert coordinator.files() == []
    assert coordinator.stage("alpha") is Stage.FAILED
    assert coordinator.call is not None
    assert coordinator.call.round.answers["alpha"].reason == receipt.reason
    (event,) = coordinator.journal.events("refused")
    assert (event["site"], event["reason"]) == ("alpha", receipt.reason)
    assert beta.upload().accepted
    assert gamma.upload().accepted
    assert summed(result) == 23


def test_a_large_broadcast_allows_for_larger_updates(coordinator: Coordinator, alpha: Site) -> None:
    coordinator.open(weight=1e3)
    assert alpha.upload([np.full(SIZE, 1e5, np.float32), np.int32(1)], weight=1e3).accepted


# Broadcasts, and updates out of time. ---------------------------------------------------------------------------------


@pytest.mark.parametrize("next_round", [False, True], ids=["nothing", "the next round"])
def test_an_update_that_arrives_after_its_round_was_closed_is_refused_and_leaves_no_file(
    coordinator: Coordinator, alpha: Site, beta: Site, gamma: Site, next_round: bool
) -> None:
    result = coordinator.open()
    alpha.upload()
    beta.upload()
    blob = blob_of(update_of("gamma"))
    upload = gamma.begin_upload(blob)
    upload.send(blob[:300])
    eventually(lambda: len(coordinator.files()) == 3)
    coordinator.pass_deadline()
    assert summed(result) == 12
    if next_round:
        coordinator.open(2)
    upload.send(blob[300:])
    receipt = upload.end()
    assert (receipt.accepted, receipt.again) == (False, False)
    assert "closed" in receipt.reason
    assert not [name for name in coordinator.files() if "gamma" in name]

    receipt = gamma.upload()
    assert (receipt.accepted, receipt.reason) == (False, "round 1 is closed")
    assert not [name for name in coordinator.files() if "gamma" in name]
    if next_round:
        assert gamma.upload(number=2).accepted


def test_a_broadcast_of_no_round_under_way_is_not_served(coordinator: Coordinator, alpha: Site) -> None:
    coordinator.open()
    request = pb.DownloadRequest(envelope=alpha.envelope, sha256=bytes(32))
    assert refusal(lambda: list(alpha.stub.Download(request)))[0] is grpc.StatusCode.NOT_FOUND


def test_a_task_names_the_broadcast_that_is_served(coordinator: Coordinator, alpha: Site) -> None:
    coordinator.open(weight=0.25)
    stream = alpha.attend()
    stream.next()
    task = stream.next()
    request = pb.DownloadRequest(envelope=alpha.envelope, task=task.name, sha256=task.broadcast.sha256)
    blob = b"".join(chunk.data for chunk in alpha.stub.Download(request))
    assert (len(blob), sha256(blob)) == (task.broadcast.size, task.broadcast.sha256)
    np.testing.assert_array_equal(decode(blob)[0], np.full(SIZE, 0.25, np.float32))
    assert decode(task.scalars) == [np.float32(0.5)]


def test_a_broadcast_is_served_from_the_byte_on_that_is_asked_for(coordinator: Coordinator, alpha: Site) -> None:
    coordinator.open(weight=0.25)
    whole = broadcast_of(0.25)
    for offset in (0, 1, 63, 64, len(whole) - 1, len(whole)):
        request = pb.DownloadRequest(envelope=alpha.envelope, sha256=sha256(whole), offset=offset)
        assert b"".join(chunk.data for chunk in alpha.stub.Download(request)) == whole[offset:]


class FullDisk(Audit):
    """An audit log that can take nothing more."""

    def record(self, event: str, **details: Any) -> None:
        raise RunFolderError("run/audit.log: cannot be written (No space left on device); free space")


@pytest.mark.parametrize("call", ["attend", "download", "upload"])
def test_a_call_whose_audit_entry_meets_a_full_disk_says_so_and_ends_the_round(
    coordinator: Coordinator,
    alpha: Site,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    call: str,
) -> None:
    round_ = coordinator.open(weight=0.25)
    monkeypatch.setattr(coordinator.federation, "_audit", FullDisk())
    request = pb.DownloadRequest(envelope=alpha.envelope, sha256=sha256(broadcast_of(0.25)))
    calls: dict[str, Callable[[], Any]] = {
        "attend": lambda: alpha.attend().refusal(),
        "download": lambda: refusal(lambda: list(alpha.stub.Download(request))),
        "upload": lambda: refusal(lambda: alpha.upload(weight=0.25)),
    }
    code, words = calls[call]()
    assert (code, "No space left" in words) == (grpc.StatusCode.UNAVAILABLE, True)
    assert isinstance(round_.exception(PATIENCE), RunFolderError)
    gc.collect()  # a task whose error nobody heard says so when it goes
    assert "Traceback" not in caplog.text


def test_an_update_of_a_round_to_come_is_refused(coordinator: Coordinator, alpha: Site) -> None:
    coordinator.open()
    assert alpha.upload(number=2).reason == "round 2 is not under way"


def test_an_update_that_comes_before_the_first_round_since_a_start_is_told_to_come_again(
    coordinator: Coordinator, alpha: Site
) -> None:
    code, words = refusal(alpha.upload)
    assert code is grpc.StatusCode.UNAVAILABLE
    assert "come again" in words
    coordinator.open()
    assert alpha.upload().accepted


@pytest.mark.parametrize("site", ["alpha", "gamma"])
def test_after_the_end_a_site_hears_whether_its_update_was_taken(
    started: Callable[..., Coordinator],
    connect: Callable[..., Site],
    loop: asyncio.AbstractEventLoop,
    identities: dict[str, Identity],
    site: str,
) -> None:
    coordinator = started()
    result = coordinator.open()
    for each in ("alpha", "beta"):
        connect(coordinator, each).upload()
    coordinator.pass_deadline()
    assert summed(result) == 12
    coordinator.stop()

    async def serve() -> tuple[Any, int]:
        server = grpc.aio.server(options=SERVER_OPTIONS)
        port = server.add_secure_port("127.0.0.1:0", server_credentials(identities["coordinator"]))
        service = FinishedService(STUDY, coordinator.published, coordinator.journal_file)
        rpc.add_FederationServicer_to_server(service, server)  # type: ignore[no-untyped-call]
        await server.start()
        return server, port

    server, port = asyncio.run_coroutine_threadsafe(serve(), loop).result(PATIENCE)
    coordinator.address = Address("127.0.0.1", port)
    late = connect(coordinator, site)
    receipt = late.upload()
    assert (receipt.accepted, receipt.again) == (site == "alpha", False)
    stream = late.attend()
    assert [type(stream.next()) for _ in range(2)] == [pb.Welcome, pb.Finished]
    stream.close()
    other = late.begin_upload(blob_of([np.full(SIZE, 9, np.float32), np.int32(1)]))
    assert other.next().reason == "round 1 is closed"
    asyncio.run_coroutine_threadsafe(server.stop(0), loop).result(PATIENCE)
