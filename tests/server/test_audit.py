"""What the coordinator records of a round, before it takes effect; also where it is killed and goes on."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import RunFolderError
from common.security.audit import AuditLog, Entry
from common.security.audit_check import check_log
from common.security.authorities import trusted_authority
from common.security.certificates import ensure_simulation_identities
from common.security.signing import load_signer
from server.calls import Connection
from server.cli import main
from tests.server.test_federation import SITES, Coordinator, killed, play
from tests.signers import AUTHORITIES, coordinator_of, identities


def start(run: Path) -> tuple[Coordinator, AuditLog]:
    audit = AuditLog(run, "coordinator", coordinator_of("digits"))
    return Coordinator(run, audit=audit), audit


def entries(run: Path, event: str = "") -> list[Entry]:
    found = check_log(run).entries
    return [entry for entry in found if event in ("", entry.event)]


def test_a_round_is_recorded_step_by_step(tmp_path: Path) -> None:
    async def scene() -> None:
        coordinator, audit = start(tmp_path)
        line = Connection("alpha", "ipv4:127.0.0.1:1")
        coordinator.federation.connect(line)
        task = await coordinator.open()
        for site in SITES:
            coordinator.send(site)
        await task
        coordinator.federation.disconnect(line)
        audit.close()

    play(scene)
    found = list(check_log(tmp_path, trusted_authority(AUTHORITIES)).entries)
    assert [entry.event for entry in found] == [
        "site-connected", "round-opened", "task-handed-out",
        "update-received", "update-received", "update-received", "round-closed", "head-signed", "site-left",
    ]  # fmt: skip
    opened, handed = found[1].details, found[2].details
    assert (opened["kind"], opened["round"], opened["attempt"], opened["sites"]) == ("train", 1, 1, list(SITES))
    assert handed["site"] == "alpha" and handed["broadcast"] == opened["broadcast"]
    update = found[3].details
    assert update["site"] == "alpha" and update["bytes"] > 0 and len(update["sha256"]) == 64
    assert found[6].details["cohort"] == list(SITES)


def test_the_journal_never_knows_more_than_the_log(tmp_path: Path) -> None:
    async def scene() -> None:
        coordinator, _ = start(tmp_path)
        coordinator.journal.received = _dies  # type: ignore[method-assign]
        task = await coordinator.open()
        with pytest.raises(KeyboardInterrupt):
            coordinator.send("alpha")
        await killed(task, coordinator)
        again, _ = start(tmp_path)
        task = await again.open()
        for site in SITES:
            again.send(site)
        await task

    play(scene)
    received = [entry.details["site"] for entry in entries(tmp_path, "update-received")]
    assert received == ["alpha", "alpha", "beta", "gamma"]  # once more, never a gap
    assert len(entries(tmp_path, "round-opened")) == 2
    assert len(entries(tmp_path, "round-closed")) == 1


def _dies(*arguments: Any, **details: Any) -> None:
    raise KeyboardInterrupt


def test_what_a_site_says_of_itself_is_not_written_down(tmp_path: Path) -> None:
    secret = "patient-4711.dcm"

    async def scene() -> None:
        coordinator, audit = start(tmp_path)
        coordinator.federation.connect(Connection("alpha", "ipv4:127.0.0.1:1"))
        coordinator.federation.reject("delta", f"study {secret!r}")
        task = await coordinator.open()
        coordinator.federation.failed("alpha", secret)
        coordinator.federation.left("alpha", secret)
        task.cancel()
        await asyncio.wait([task])
        audit.close()

    play(scene)
    assert entries(tmp_path, "site-refused")[0].details == {"site": "delta"}
    assert secret not in (tmp_path / "audit.log").read_text()


def test_a_log_that_cannot_be_written_ends_the_round(tmp_path: Path) -> None:
    class Full(AuditLog):
        def record(self, event: str, **details: Any) -> None:
            if event == "update-received":
                raise RunFolderError("audit.log: cannot be written (No space left on device); free space")
            super().record(event, **details)

    async def scene() -> None:
        coordinator = Coordinator(tmp_path, audit=Full(tmp_path, "coordinator"))
        task = await coordinator.open()
        with pytest.raises(RunFolderError, match="No space left"):
            coordinator.send("alpha")
        with pytest.raises(RunFolderError, match="No space left"):
            await task
        assert not coordinator.events("received")

    play(scene)


def test_the_command_says_whether_a_log_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    audit = AuditLog(tmp_path, "coordinator", coordinator_of("digits"))
    audit.record("study-started", study="digits")
    audit.sign_head()
    audit.close()
    authority = str(identities("digits") / "authority" / "ca.crt")
    assert main(["audit", "verify", str(tmp_path), "--authority", authority]) == 0
    assert "whole, 2 entries, each as it was written" in capsys.readouterr().out
    assert main(["audit", "verify", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["entries"], found["signed_up_to"], found["authority"]) == (2, 1, None)
    log = tmp_path / "audit.log"
    log.write_bytes(log.read_bytes().replace(b"digits", b"organs"))
    assert main(["audit", "verify", str(tmp_path)]) == 7
    assert "entry 1 is not as it was written" in capsys.readouterr().err
    assert main(["audit", "verify", str(tmp_path / "none")]) == 7
    assert "no audit log here" in capsys.readouterr().err


def test_the_authority_in_the_folder_is_the_last_that_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ensure_simulation_identities(tmp_path / "identity", "digits", ["north"], ["localhost"])
    audit = AuditLog(tmp_path, "coordinator", load_signer(tmp_path / "identity" / "coordinator"))
    audit.record("study-started", study="digits")
    audit.sign_head()
    audit.close()
    assert main(["audit", "verify", str(tmp_path)]) == 0
    assert "warning: the authority was taken from the folder itself" in capsys.readouterr().err
    monkeypatch.setenv("WARDROUND_AUTHORITY", str(identities("digits") / "authority" / "ca.crt"))
    assert main(["audit", "verify", str(tmp_path)]) == 5
    assert "was not issued by the authority" in capsys.readouterr().err
    own = str(tmp_path / "identity" / "coordinator" / "ca.crt")
    assert main(["audit", "verify", str(tmp_path), "--authority", own]) == 0
    assert "warning" not in capsys.readouterr().err


def test_the_command_loads_no_tensorflow(tmp_path: Path) -> None:
    AuditLog(tmp_path, "coordinator").close()
    code = (
        "import sys\nfrom server.cli import main\nassert main(sys.argv[1:]) == 0\n"
        "assert not {'tensorflow', 'tensorflow_federated', 'grpc', 'numpy'} & set(sys.modules)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, "audit", "verify", str(tmp_path)], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr


def test_details_are_plain(tmp_path: Path) -> None:
    audit = AuditLog(tmp_path, "coordinator")
    with pytest.raises(TypeError):
        audit.record("event", value=np.float32(1))
    assert entries(tmp_path) == []
