"""What a site records of a study, and the page that it makes of it: what left this hospital."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from client.cli import main
from client.work import Spent
from common.errors import RunFolderError
from common.security.audit import AuditLog, Entry
from common.security.audit_check import check_log
from common.security.authorities import trusted_authority
from common.security.certificates import Identity
from common.wire import federation_pb2 as pb
from common.wire.channel import Address
from tests.client.stand_ins import (
    Coordinator,
    Running,
    Worker,
    eventually,
    task,
)
from tests.signers import AUTHORITIES, site_of


@pytest.fixture
def work(
    coordinator: Coordinator,
    identities: dict[str, Identity],
    worker: Worker,
    tmp_path: Path,
) -> Path:
    """The work folder of a site that took part in two rounds, of which the second update was not taken."""
    audit = AuditLog(tmp_path, "site alpha", site_of("digits", "alpha"))
    site = Running(coordinator.address, identities["alpha"], worker, tmp_path, audit=audit)
    coordinator.say(task=task(1, pb.TRAIN))
    eventually(lambda: len(coordinator.uploads) == 1)
    coordinator.answers = [lambda receipt: _refuse(receipt)]
    coordinator.say(task=task(2, pb.EVALUATE))
    eventually(lambda: len(coordinator.uploads) == 2)
    eventually(lambda: len(_entries(tmp_path, "update-answered")) == 2)
    site.stop()
    audit.close()
    return tmp_path


def _refuse(receipt: pb.UploadReceipt) -> None:
    receipt.accepted, receipt.reason = False, "round 2 is closed"


def _entries(work: Path, event: str) -> list[Entry]:
    return [entry for entry in check_log(work, trusted_authority(AUTHORITIES)).entries if entry.event == event]


def test_all_that_comes_and_goes_is_recorded(work: Path, coordinator: Coordinator) -> None:
    found = [entry.event for entry in check_log(work, trusted_authority(AUTHORITIES)).entries]
    assert found == [
        "started", "head-signed", "dialled", "connected",
        "task-received", "broadcast-received", "update-offered", "update-sent", "update-answered", "head-signed",
        "task-received", "broadcast-received", "update-offered", "update-sent", "update-answered", "head-signed",
        "stopped", "head-signed",
    ]  # fmt: skip
    started = _entries(work, "started")[0].details
    assert (started["study"], started["training_cases"], started["validation_cases"]) == ("digits", 3, 1)
    first, second = (entry.details for entry in _entries(work, "broadcast-received"))
    assert first["bytes"] > 0 and second["bytes"] == 0  # it was here already
    for entry, (header, data) in zip(_entries(work, "update-sent"), coordinator.uploads, strict=True):
        sent = entry.details
        assert (sent["bytes"], sent["of_bytes"]) == (len(data), header.blob.size)
        assert sent["sha256"] == header.blob.sha256.hex()
        assert (sent["round"], sent["cases"], sent["tensors"]) == (header.task.round, header.timing.cases, 1)
    assert "change of the model's weights" in _entries(work, "update-sent")[0].details["contents"]
    assert [entry.details["accepted"] for entry in _entries(work, "update-answered")] == [True, False]
    told = sum(message.WhichOneof("body") == "progress" for message in coordinator.heard)
    recorded = [*_entries(work, "update-answered"), *_entries(work, "stopped")]
    assert sum(entry.details["progress_messages"] for entry in recorded) == told > 0


def test_what_a_private_site_sends_is_called_what_it_is(
    coordinator: Coordinator,
    identities: dict[str, Identity],
    tmp_path: Path,
) -> None:
    class Private(Worker):
        def for_run(self, run: bytes) -> Worker:
            return self

        def spent(self) -> Spent:
            return Spent(1.5, 1e-5)

        def finished(self) -> None:
            pass

    audit = AuditLog(tmp_path, "site alpha", site_of("digits", "alpha"))
    site = Running(coordinator.address, identities["alpha"], Private(), tmp_path, audit=audit)
    coordinator.say(task=task(1))
    eventually(lambda: coordinator.uploads)
    site.stop()
    audit.close()
    (sent,) = _entries(tmp_path, "update-sent")
    assert "with this site's noise" in sent.details["contents"] and "epsilon" in sent.details["contents"]
    assert "loss" not in sent.details["contents"] and "patches" not in sent.details["contents"]
    progress = [message.progress for message in coordinator.heard if message.WhichOneof("body") == "progress"]
    assert {one.stage for one in progress} >= {"download", "training", "upload"}
    assert {(one.batch, one.batches) for one in progress} == {(0, 0)}  # steps' times tell how many were drawn


def test_an_update_is_recorded_before_its_first_byte_leaves(
    coordinator: Coordinator,
    identities: dict[str, Identity],
    worker: Worker,
    tmp_path: Path,
) -> None:
    class Full(AuditLog):
        def record(self, event: str, **details: object) -> None:
            if event == "update-sent":
                raise RunFolderError("audit.log: cannot be written")
            super().record(event, **details)

    audit = Full(tmp_path, "site alpha", site_of("digits", "alpha"))
    site = Running(coordinator.address, identities["alpha"], worker, tmp_path, audit=audit)
    coordinator.say(task=task(1))
    with pytest.raises(Exception, match="cannot be written"):
        site.end.result(30)
    assert not [data for _, data in coordinator.uploads if data]
    assert _entries(tmp_path, "failure-sent")


def test_what_is_said_without_an_answer_is_recorded_before_and_once(
    identities: dict[str, Identity],
    worker: Worker,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    audit = AuditLog(tmp_path, "site alpha")
    address = Address("127.0.0.1", 1)  # nobody is there
    site = Running(address, identities["alpha"], worker, tmp_path, audit=audit)
    eventually(lambda: site.state() == "reconnecting")
    time.sleep(1)  # for some more dials
    site.stop()
    audit.close()
    started, dialled, stopped = check_log(tmp_path).entries
    assert [entry.event for entry in (started, dialled, stopped)] == ["started", "dialled", "stopped"]
    assert dialled.details["coordinator"] == str(address)
    assert (dialled.details["training_cases"], dialled.details["validation_cases"]) == (3, 1)
    assert main(["audit", "summary", str(tmp_path)]) == 0
    assert "besides: 0 connections and 1 dial without an answer, each with this version" in capsys.readouterr().out


def test_the_budget_that_goes_with_an_update_is_recorded_before(
    coordinator: Coordinator,
    identities: dict[str, Identity],
    tmp_path: Path,
) -> None:
    class Spending(Worker):
        def for_run(self, run: bytes) -> Worker:
            return self

        def spent(self) -> Spent:
            return Spent(1.5, 1e-5)

        def finished(self) -> None:
            pass

    class Full(AuditLog):
        def record(self, event: str, **details: object) -> None:
            super().record(event, **details)
            if event == "update-offered":
                raise RunFolderError("audit.log: cannot be written")

    audit = Full(tmp_path, "site alpha")
    site = Running(coordinator.address, identities["alpha"], Spending(), tmp_path, audit=audit)
    coordinator.say(task=task(1, pb.TRAIN))
    with pytest.raises(RunFolderError, match="cannot be written"):
        site.end.result(30)
    assert not coordinator.uploads
    (offered,) = [entry.details for entry in check_log(tmp_path).entries if entry.event == "update-offered"]
    assert (offered["round"], offered["cases"], offered["epsilon"], offered["delta"]) == (1, 3, 1.5, 1e-5)


def test_the_summary_is_one_page(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "summary", str(work), "--authority", str(AUTHORITIES)]) == 0
    page = capsys.readouterr().out
    lines = page.splitlines()
    assert lines[0] == "What left this hospital"
    assert lines[2].startswith("Study digits, plan ") and lines[2].endswith(" bytes in all")
    digest = _entries(work, "update-sent")[0].details["sha256"][:12]
    (row,) = [line for line in lines if digest in line and " train " in line]
    assert row.split()[:5] == ["1", "train", str(_entries(work, "update-sent")[0].details["bytes"]), "1x", "yes"]
    assert "  - images and labels, whole or in part" in lines
    assert "whole, 18 entries" in page and "signed up to entry 17 by site 'alpha'" in page
    assert "not signed" not in page
    assert len(lines) < 40
    assert main(["audit", "summary", str(work), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (study,) = found["studies"]
    assert [(one["round"], one["kind"], one["times"], one["taken"]) for one in study["sent"]] == [
        (1, "train", 1, True),
        (2, "evaluate", 1, False),
    ]
    assert study["bytes"] == sum(one["bytes"] for one in study["sent"])
    assert found["log"]["entries"] == 18


def test_a_log_that_was_changed_gives_no_summary(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = work / "audit.log"
    found = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(found[:6] + found[7:]))  # the first update was never sent, it says
    for action in ("summary", "verify"):
        assert main(["audit", action, str(work)]) == 7
        said = capsys.readouterr()
        assert said.out == ""
        assert "entry 7 does not follow the one before: entries were removed or moved" in said.err


def test_verify_loads_no_tensorflow_and_starts_at_once(work: Path) -> None:
    code = (
        "import sys\nfrom client.cli import main\nassert main(sys.argv[1:]) == 0\n"
        "assert not {'tensorflow', 'numpy', 'grpc'} & set(sys.modules)"
    )
    for action in ("verify", "summary"):
        ended = subprocess.run([sys.executable, "-c", code, "audit", action, str(work)], capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr


def test_a_site_that_sent_nothing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = AuditLog(tmp_path, "site alpha")
    log.close()
    assert main(["audit", "summary", str(tmp_path)]) == 0
    assert "Nothing: this site has taken part in no study yet." in capsys.readouterr().out


@pytest.mark.parametrize(
    "details",
    [
        {},
        {"round": [1], "kind": "train", "sha256": "cd", "contents": "a change", "cases": 3, "bytes": 1},
        {"round": "one", "kind": "train", "sha256": "cd", "contents": "a change", "cases": 3, "bytes": 1},
        {"round": 1, "kind": "train", "sha256": "cd", "contents": "a change", "cases": 3, "bytes": "many"},
    ],
)
def test_an_entry_with_other_details_gives_no_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], details: dict[str, object]
) -> None:
    log = AuditLog(tmp_path, "site alpha")
    log.record("started", study="digits", plan="ab", training_cases=3, validation_cases=1)
    log.record("update-sent", **details)
    log.close()
    assert main(["audit", "summary", str(tmp_path)]) == 7
    assert "entry 2 (update-sent) has not the details that a site records of it" in capsys.readouterr().err


def test_an_update_sent_again_counts_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = AuditLog(tmp_path, "site alpha")
    log.record("started", study="digits", plan="ab", training_cases=3, validation_cases=1)
    sent = {"round": 1, "kind": "train", "sha256": "cd" * 32, "contents": "a change", "cases": 3}
    log.record("update-sent", **sent, bytes=1000)
    log.record("update-sent", **sent, bytes=400)  # the line broke, the rest went out later
    log.close()
    assert main(["audit", "summary", str(tmp_path), "--json"]) == 0
    (one,) = json.loads(capsys.readouterr().out)["studies"][0]["sent"]
    assert (one["times"], one["bytes"], one["taken"]) == (2, 1400, None)
