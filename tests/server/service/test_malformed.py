"""Messages that no site sends: each is refused with a status and a sentence, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import pytest

from common.wire import federation_pb2 as pb
from server.rounds import Stage
from tests.server.service.digits import (
    PATIENCE,
    STUDY,
    WHOLE,
    Coordinator,
    Site,
    Upload,
    begun_upload,
    broadcast_of,
    eventually,
    refusal,
    sha256,
)

_TASK = pb.TaskName(kind=pb.TRAIN, round=1, attempt=1)
_BAD_WORDS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "hello once more": {"hello": pb.Hello(version="test")},
    "an unknown stage": {"progress": pb.Progress(task=_TASK, stage="holiday")},
    "a stage that is the coordinator's to say": {"progress": pb.Progress(task=_TASK, stage="done")},
    "a huge stage": {"progress": pb.Progress(task=_TASK, stage="x" * 1_000_000)},
    "more batches than there are": {"progress": pb.Progress(task=_TASK, stage="training", batch=2, batches=1)},
    "a huge reason": {"failure": pb.Failure(task=_TASK, reason="x" * 1_000_000)},
    "a huge farewell": {"leaving": pb.Leaving(reason="x" * 1_000_000)},
}


@pytest.mark.parametrize("words", _BAD_WORDS)
def test_a_control_stream_with_a_malformed_message_ends_with_a_sentence(
    coordinator: Coordinator, alpha: Site, words: str
) -> None:
    coordinator.open()
    stream = alpha.attend()
    assert [type(stream.next()) for _ in range(2)] == [pb.Welcome, pb.Task]
    stream.say(alpha.envelope, **_BAD_WORDS[words])
    code, details = stream.refusal()
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert 0 < len(details) < 300
    eventually(lambda: "alpha" not in coordinator.federation.connections)
    assert coordinator.stage("alpha") is Stage.WAITING
    stream.close()


@pytest.mark.parametrize(
    "first",
    [
        [],
        [{}],
        [{"progress": pb.Progress(task=_TASK, stage="training")}],
        [{"hello": pb.Hello(version="x" * 1000)}],
        [{"hello": pb.Hello(process=b"x" * 1000)}],
    ],
    ids=["none", "empty", "no hello", "a huge version", "a huge process"],
)
def test_a_control_stream_that_begins_otherwise_is_refused(
    coordinator: Coordinator, alpha: Site, first: list[dict[str, Any]]
) -> None:
    messages = [pb.SiteMessage(envelope=alpha.envelope, **body) for body in first]
    code, _ = refusal(lambda: list(alpha.stub.Attend(iter(messages), timeout=PATIENCE)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert coordinator.federation.connections == {}


_BAD_HEADERS: dict[str, Callable[[pb.UploadHeader], Any]] = {
    "no kind": lambda header: setattr(header.task, "kind", 0),
    "an unknown kind": lambda header: setattr(header.task, "kind", 7),
    "round 0": lambda header: setattr(header.task, "round", 0),
    "a round after the last": lambda header: setattr(header.task, "round", STUDY.training.rounds + 1),
    "no digest": lambda header: setattr(header.blob, "sha256", b""),
    "a short digest": lambda header: setattr(header.blob, "sha256", b"x" * 31),
    "a huge digest": lambda header: setattr(header.blob, "sha256", b"x" * 1_000_000),
    "no broadcast": lambda header: setattr(header, "broadcast_sha256", b""),
    "no bytes": lambda header: setattr(header.blob, "size", 0),
    "2^63 bytes": lambda header: setattr(header.blob, "size", 2**63),
    "no blob": lambda header: header.ClearField("blob"),
    "no task": lambda header: header.ClearField("task"),
    "a negative time": lambda header: setattr(header.timing, "work", -1.0),
    "no time": lambda header: setattr(header.timing, "download", float("nan")),
    "privacy where the study has none": lambda header: setattr(header.privacy, "epsilon", 1.0),
    "endless time": lambda header: setattr(header.timing, "work", float("inf")),
}


@pytest.mark.parametrize("change", _BAD_HEADERS)
def test_an_upload_with_a_malformed_header_is_refused(coordinator: Coordinator, alpha: Site, change: str) -> None:
    coordinator.open()
    header = alpha.header(WHOLE)
    _BAD_HEADERS[change](header)
    code, words = refusal(Upload(alpha, header).next)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert 0 < len(words) < 300
    assert coordinator.files() == []
    assert coordinator.stage("alpha") is Stage.WAITING
    assert coordinator.journal.events("refused") == coordinator.journal.events("late") == []


@pytest.mark.parametrize(
    "then",
    [
        {},
        {"data": b""},
        {"header": pb.UploadHeader()},
    ],
    ids=["nothing", "an empty piece", "a header once more"],
)
@pytest.mark.parametrize("begun", [0, 300])
def test_an_upload_with_a_malformed_message_ends_and_keeps_what_came_before(
    coordinator: Coordinator, alpha: Site, then: dict[str, Any], begun: int
) -> None:
    coordinator.open()
    upload = begun_upload(coordinator, alpha, WHOLE, begun)
    upload.say(**then)
    assert refusal(upload.next)[0] is grpc.StatusCode.INVALID_ARGUMENT
    again = alpha.begin_upload(WHOLE)
    assert again.next() == begun
    again.send(WHOLE[begun:])
    assert again.end().accepted


@pytest.mark.parametrize(
    "first", [[], [pb.UploadMessage()], [pb.UploadMessage(data=b"x")]], ids=["no", "empty", "data"]
)
def test_an_upload_that_does_not_begin_with_a_header_is_refused(
    coordinator: Coordinator, alpha: Site, first: list[pb.UploadMessage]
) -> None:
    coordinator.open()
    code, _ = refusal(lambda: list(alpha.stub.Upload(iter(first), timeout=PATIENCE)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT


def test_a_piece_that_is_too_large_ends_the_upload_and_nothing_else(coordinator: Coordinator, alpha: Site) -> None:
    coordinator.open()
    upload = alpha.begin_upload(WHOLE)
    assert upload.next() == 0
    upload.say(data=bytes(5 * 1024 * 1024))
    assert refusal(upload.next)[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert alpha.upload().accepted


@pytest.mark.parametrize("offset", [len(broadcast_of(0)) + 1, 2**64 - 1], ids=str)
def test_an_offset_beyond_the_end_of_the_broadcast_is_refused(
    coordinator: Coordinator, alpha: Site, offset: int
) -> None:
    coordinator.open()
    request = pb.DownloadRequest(envelope=alpha.envelope, sha256=sha256(broadcast_of(0)), offset=offset)
    assert refusal(lambda: list(alpha.stub.Download(request)))[0] is grpc.StatusCode.OUT_OF_RANGE
