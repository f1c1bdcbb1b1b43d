"""Updates whose upload breaks, and updates that come more than once: over gRPC and TLS, as in `test_updates`."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.wire import federation_pb2 as pb
from common.wire.partial import PartialBlob
from common.wire.tensors import TensorSpec
from server import intake
from server.intake import Offer
from server.rounds import Kind, Stage
from tests.server.service.digits import (
    PATIENCE,
    PLAN,
    SIZE,
    WHOLE,
    Coordinator,
    Site,
    Upload,
    begun_upload,
    blob_of,
    eventually,
    refusal,
    sha256,
    summed,
    update_of,
)

# An upload that breaks. ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half_close", [False, True], ids=["cut", "ended early"])
def test_an_upload_that_breaks_off_goes_on_where_it_was(
    coordinator: Coordinator, alpha: Site, half_close: bool
) -> None:
    coordinator.open()
    upload = begun_upload(coordinator, alpha, WHOLE, 300)
    if half_close:
        assert upload.end().again
    else:
        upload.break_off()
    assert coordinator.files() == [f"000001-train-alpha-{sha256(WHOLE).hex()[:16]}.upload"]
    again = alpha.begin_upload(WHOLE)
    assert again.next() == 300
    again.send(WHOLE[300:])
    assert again.end().accepted
    (file,) = coordinator.files()
    assert (coordinator.updates / file).read_bytes() == WHOLE


def test_an_upload_goes_on_after_the_coordinator_was_started_again(
    started: Callable[..., Coordinator], connect: Callable[..., Site]
) -> None:
    first = started()
    first.open()
    begun_upload(first, connect(first, "alpha"), WHOLE, 300)
    first.stop()
    second = started()
    second.open()
    again = connect(second, "alpha").begin_upload(WHOLE)
    assert again.next() == 300
    again.send(WHOLE[300:])
    assert again.end().accepted


def test_bytes_that_were_damaged_meanwhile_are_found_and_asked_for_again(
    started: Callable[..., Coordinator], connect: Callable[..., Site]
) -> None:
    first = started()
    first.open()
    begun_upload(first, connect(first, "alpha"), WHOLE, 300)
    first.stop()
    (path,) = first.updates.glob("*.upload")
    path.write_bytes(b"\0" * 300)
    second = started()
    second.open()
    alpha = connect(second, "alpha")
    again = alpha.begin_upload(WHOLE)
    assert again.next() == 300
    again.send(WHOLE[300:])
    assert again.end().again
    assert alpha.upload().accepted


@pytest.mark.parametrize("name", ["upload", "tensors"])
def test_an_update_that_was_whole_before_the_coordinator_was_killed_needs_no_bytes(
    started: Callable[..., Coordinator], connect: Callable[..., Site], name: str
) -> None:
    coordinator = started()
    coordinator.open()
    (coordinator.updates / f"000001-train-alpha-{sha256(WHOLE).hex()[:16]}.{name}").write_bytes(WHOLE)
    upload = connect(coordinator, "alpha").begin_upload(WHOLE)
    assert upload.next().accepted
    assert coordinator.files() == [f"000001-train-alpha-{sha256(WHOLE).hex()[:16]}.tensors"]
    assert len(coordinator.journal.events("received")) == 1


def test_a_part_of_another_update_of_the_site_is_not_kept(coordinator: Coordinator, alpha: Site) -> None:
    coordinator.open()
    begun_upload(coordinator, alpha, blob_of([np.full(SIZE, 9, np.float32), np.int32(1)]), 300).break_off()
    assert alpha.upload().accepted
    assert len(coordinator.files()) == 1


def test_a_newer_upload_of_a_site_goes_on_with_one_whose_line_is_dead(coordinator: Coordinator, alpha: Site) -> None:
    coordinator.open()
    older = begun_upload(coordinator, alpha, WHOLE, 300)
    newer = alpha.begin_upload(WHOLE)
    assert newer.next() == 300
    assert refusal(older.next)[0] is grpc.StatusCode.UNAVAILABLE
    newer.send(WHOLE[300:])
    assert newer.end().accepted
    assert len(coordinator.journal.events("received")) == 1


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(0, 900), max_size=6), piece=st.integers(1, 400), restart=st.booleans())
def test_whatever_cuts_an_upload_it_ends_whole_and_nothing_that_was_stored_is_asked_for_again(
    started: Callable[..., Coordinator],
    connect: Callable[..., Site],
    cuts: list[int],
    piece: int,
    restart: bool,
) -> None:
    coordinator = started()
    _forget(coordinator)
    coordinator.open()
    alpha, position = connect(coordinator, "alpha"), 0
    for cut in cuts:
        upload = alpha.begin_upload(WHOLE)
        assert upload.next() == position
        end = min(position + cut, len(WHOLE) - 1)
        upload.send(WHOLE[position:end], piece)
        upload.end() if cut % 2 else _until_stored(coordinator, end)
        upload.break_off()
        position = end
        if restart:
            coordinator.stop()
            coordinator = started()
            coordinator.open()
            alpha = connect(coordinator, "alpha")
    upload = alpha.begin_upload(WHOLE)
    assert upload.next() == position
    upload.send(WHOLE[position:], piece)
    assert upload.end().accepted
    stored = coordinator.updates / coordinator.journal.events("received")[-1]["file"]
    assert stored.read_bytes() == WHOLE
    coordinator.stop()


def _forget(coordinator: Coordinator) -> None:
    """As if nothing had been received: an example of Hypothesis does not go on from the one before."""
    for path in coordinator.updates.iterdir():
        path.unlink()
    with contextlib.closing(sqlite3.connect(coordinator.journal_file)) as database, database:
        database.execute("DELETE FROM events")
    coordinator.federation.history = coordinator.journal.history()


def _until_stored(coordinator: Coordinator, size: int) -> None:
    if size:
        eventually(lambda: [path.stat().st_size for path in coordinator.updates.glob("*.upload")] == [size])


def test_uploads_of_several_sites_do_not_disturb_each_other(coordinator: Coordinator, alpha: Site, beta: Site) -> None:
    coordinator.open()
    other = blob_of(update_of("beta"))
    one = begun_upload(coordinator, alpha, WHOLE, 300)
    two = beta.begin_upload(other)
    two.send(other)
    one.send(WHOLE[300:])
    assert two.end().accepted
    assert one.end().accepted


# An update once more. -----------------------------------------------------------------------------------------------


def test_an_update_offered_again_is_accepted_again_without_a_byte_and_counts_once(
    coordinator: Coordinator, alpha: Site, beta: Site, gamma: Site
) -> None:
    result = coordinator.open()
    assert alpha.upload().accepted
    assert alpha.begin_upload(WHOLE).next().accepted
    beta.upload()
    gamma.upload()
    assert summed(result) == 123
    assert alpha.begin_upload(WHOLE).next().accepted  # the round is closed
    assert len(coordinator.journal.events("received")) == 3
    coordinator.open(2)
    assert alpha.begin_upload(WHOLE).next().accepted
    assert not coordinator.journal.events("late")


def test_a_second_update_is_refused_and_does_not_replace_the_first(
    coordinator: Coordinator, alpha: Site, beta: Site, gamma: Site
) -> None:
    result = coordinator.open()
    assert alpha.upload().accepted
    files = coordinator.files()
    receipt = alpha.upload([np.full(SIZE, 9, np.float32), np.int32(1)])
    assert (receipt.accepted, receipt.again) == (False, False)
    assert "is here already" in receipt.reason
    assert coordinator.files() == files
    assert coordinator.stage("alpha") is Stage.DONE
    beta.upload()
    gamma.upload()
    assert summed(result) == 123


def test_an_update_on_other_weights_is_refused(coordinator: Coordinator, alpha: Site) -> None:
    coordinator.open()
    receipt = alpha.upload(weight=2.0)
    assert (receipt.accepted, receipt.again) == (False, False)
    assert "other weights" in receipt.reason
    assert alpha.upload().accepted


def test_a_late_update_is_journaled_once_however_often_it_comes(
    coordinator: Coordinator, alpha: Site, beta: Site, gamma: Site
) -> None:
    result = coordinator.open()
    alpha.upload()
    beta.upload()
    coordinator.pass_deadline()
    assert summed(result) == 12
    for _ in range(3):
        assert gamma.upload().reason == "round 1 is closed"
    (event,) = coordinator.journal.events("late")
    assert (event["site"], event["round"], event["reason"]) == ("gamma", 1, "round 1 is closed")


# What is worth nothing. ---------------------------------------------------------------------------------------------


def _offered(site: Site, tensors: list[Any], kind: pb.TaskKind, cases: int) -> pb.UploadReceipt:
    blob = blob_of(tensors)
    header = site.header(blob)
    header.task.kind = kind
    header.timing.cases = cases
    upload = Upload(site, header)
    assert upload.next() == 0
    upload.send(blob)
    return upload.next()


def test_an_upload_that_is_superseded_as_it_begins_does_not_remove_the_newer_one(
    coordinator: Coordinator, alpha: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening the file of an update removes those of others of its site; in a thread, which cannot be cancelled."""
    slow, entered, go_on = blob_of([np.full(SIZE, 9, np.float32), np.int32(1)]), threading.Event(), threading.Event()

    def opened(path: Path, offer: Offer) -> PartialBlob:
        if offer.sha256 == sha256(slow):
            entered.set()
            go_on.wait(PATIENCE)
        return real(path, offer)

    real = intake._open
    monkeypatch.setattr(intake, "_open", opened)
    coordinator.open()
    older = alpha.begin_upload(slow)
    assert entered.wait(PATIENCE)
    newer = alpha.begin_upload(WHOLE)
    threading.Timer(0.2, go_on.set).start()
    assert newer.next() == 0
    assert go_on.wait(PATIENCE)
    newer.send(WHOLE[:300])
    eventually(lambda: [path.stat().st_size for path in coordinator.updates.glob("*.upload")] == [300])
    newer.send(WHOLE[300:])
    assert newer.end().accepted
    assert coordinator.call is not None and coordinator.call.failure is None
    assert refusal(older.next)[0] is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(("weight", "accepted"), [(3, True), (4, False), (1e30, False), (-1, False)])
def test_an_update_weighs_no_more_than_its_site_has_patches(
    coordinator: Coordinator, alpha: Site, monkeypatch: pytest.MonkeyPatch, weight: float, accepted: bool
) -> None:
    monkeypatch.setattr(PLAN.train, "sent", (TensorSpec("float32", (SIZE,)), TensorSpec("float32", ())))
    coordinator.open()
    receipt = _offered(alpha, [np.ones(SIZE, np.float32), np.float32(weight)], pb.TRAIN, cases=3)
    assert receipt.accepted is accepted
    assert accepted or ("its weight of" in receipt.reason and coordinator.stage("alpha") is Stage.FAILED)


@pytest.mark.parametrize(("dice", "accepted"), [(0.9, True), (1.1, False), (-0.1, False)])
def test_an_evaluation_with_an_impossible_dice_chooses_no_model(
    coordinator: Coordinator, alpha: Site, dice: float, accepted: bool
) -> None:
    coordinator.open()
    assert coordinator.call is not None
    coordinator.call.round.kind = Kind.EVALUATE
    receipt = _offered(alpha, [np.full(SIZE, dice, np.float32), np.int32(1)], pb.EVALUATE, cases=3)
    assert receipt.accepted is accepted
    assert accepted or "not from 0 to 1" in receipt.reason


def test_after_the_end_a_site_hears_of_an_update_that_was_not_taken(coordinator: Coordinator, alpha: Site) -> None:
    """Also where the coordinator was started again after the last round, and no round has begun in it."""
    assert "only just started" in refusal(lambda: alpha.upload())[1]
    coordinator.finish()
    eventually(lambda: coordinator.federation.finished)
    assert not alpha.upload().accepted
