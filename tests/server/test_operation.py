"""What investigators and observers may ask of a coordinator from another machine: by gRPC, TLS and the commands."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from common.errors import IdentityError, NetworkError, PublishError, RunFolderError, UsageError, WardroundError
from common.security.audit import AuditLog
from common.security.audit_check import check_log
from common.security.certificates import ensure_simulation_identities, issue, load_identity
from common.security.revocation import RevocationFile, revoke
from common.security.signing import load_signer
from common.study import parse_study
from common.wire import operation_pb2 as pb
from common.wire import operation_pb2_grpc as rpc
from common.wire.channel import Address, channel_credentials
from server.access import Access
from server.cli import main
from server.operation import OperationService, add_operation
from server.publisher import Publisher
from server.remote import Remote
from server.run_folder import RunFolder
from server.serving import bind, denied
from server.shown import figures_for, status_for
from tests.server.test_cli import modules_of

PATIENCE = 20.0
STUDY = parse_study(
    """
study: nuclei
seed: 1
task: {dimensions: 2, channels: 1, classes: [background, cell]}
model: {filters: 4, depth: 2}
preprocessing: {patch: [16, 16]}
training: {rounds: 9}
cohort: {sites: [north, south], quorum: 1, deadline: 10m}
"""
)
SITE = {
    "connected": True,
    "stage": "training",
    "batch": 3,
    "batches": 12,
    "asked": True,
    "revoked": False,
    "reason": "its data can no longer be read",
    "refused_reason": "",
    "no_progress_seconds": None,
    "training_cases": 24,
    "validation_cases": 5,
    "epsilon": 1.5,
    "certificate_expires": 2e9,
}
STATUS = {
    "study": "nuclei",
    "plan": "ab",
    "pid": 1,
    "state": "training",
    "round": 2,
    "rounds": 9,
    "quorum": 1,
    "needed": 1,
    "attempt": 1,
    "kind": "train",
    "deadline_at": 2e9,
    "started_at": 1.0,
    "updated_at": 2.0,
    "address": "0.0.0.0:8443",
    "notice": "round 1 went on without south (its data can no longer be read)",
    "error": "/srv/run: full",
    "published": "/srv/run/published/v1",
    "ended": None,
    "closed_with": None,
    "last": {"round": 1, "train_loss": 0.5, "validation_dice": 0.6, "holdout_dice": 0.7, "seconds": 4.0},
    "best": {"round": 1, "validation_dice": 0.6},
    "privacy": {
        "unit": "patient",
        "protects": "each patient of each site",
        "epsilon": 1.5,
        "budget": 8.0,
        "delta": 1e-5,
        "sites": {"north": 1.5, "south": 1.0},
    },
    "sites": {"north": SITE, "south": SITE},
}
HEADER = (
    "round,attempt,sites,seconds,train/loss,train/patches,validation/dice,holdout/site/north/dice,holdout/case/p7/dice"
)
ROWS = f"{HEADER}\n1,1,2,4.0,0.5,96,0.6,0.7,0.8\n2,1,2,4.1,0.4,96,0.65,0.7,0.8\n"
PUBLISHES = """
import json, sys, time
arguments = sys.argv[1:]
open({calls!r}, "a").write(json.dumps(arguments) + "\\n")
if "--round" in arguments and arguments[arguments.index("--round") + 1] == "7":
    sys.exit(print("error: round 7: its weights were not kept", file=sys.stderr) or 7)
time.sleep({seconds})
print(json.dumps({{"best_round": 2, "publication": {{"version": "v3"}}}}))
"""


class Served:
    """The service of a run behind `Access`, on a real port, in the loop of another thread."""

    def __init__(self, folder: Path, publishing_takes: float = 0.0) -> None:
        self.ids, self.run = folder / "ids", RunFolder(folder / "run")
        ensure_simulation_identities(self.ids, "nuclei", ["north"], ["localhost"])
        self.run.prepare(STUDY)
        (self.run.published / "v1").mkdir()
        self._held = contextlib.ExitStack()
        self._held.enter_context(self.run.locked())  # as by a coordinator that runs
        self.run.write_status(STATUS)
        self.run.rounds.write_text(ROWS)
        self.calls = folder / "calls"
        self.stopped = threading.Event()
        self.now = 0.0
        self._command = folder / "publish.py"
        self._command.write_text(PUBLISHES.format(calls=str(self.calls), seconds=publishing_takes))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.do(self._start())

    async def _start(self) -> None:
        identity = load_identity(self.ids / "coordinator")
        access = Access.of(self.ids / "coordinator", identity.authority)
        self._server, self.port = bind(Address("127.0.0.1", 0), identity, access)
        self.audit = AuditLog(self.run.path, "coordinator", load_signer(self.ids / "coordinator"))
        access.on_denied = functools.partial(denied, self.audit)
        self.publisher = Publisher(self.run, self.ids / "coordinator", command=[sys.executable, str(self._command)])
        service = OperationService(
            self.run, self.publisher, self.audit.record, self.stopped.set, clock=lambda: self.now
        )
        add_operation(self._server, service)
        await self._server.start()

    def do(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(PATIENCE)

    def close(self) -> None:
        self.do(self._server.stop(0))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE)
        self._held.close()
        self.audit.close()

    def identity(self, name: str, role: Any) -> Path:
        """Folder of a member's, made where it is not there."""
        folder = self.ids / f"{role}-{name}"
        if not folder.exists():
            issue(folder, self.ids / "authority", name, role)
        return folder

    @property
    def address(self) -> str:
        return f"localhost:{self.port}"

    def remote(self, role: str, name: str = "kim") -> Remote:
        return Remote(self.address, self.identity(name, role))

    def events(self) -> list[tuple[str, Any]]:
        """What the audit log has, with who asked."""
        return [(entry.event, entry.details.get("member")) for entry in check_log(self.run.path).entries]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    made = Served(tmp_path)
    yield made
    made.close()


def first(call: Any) -> Any:
    return next(iter(call)) if hasattr(call, "__next__") else call


CALLS: dict[str, Callable[[Any], Any]] = {
    "Status": lambda stub: first(stub.Status(pb.StatusRequest(), timeout=PATIENCE)),
    "Rounds": lambda stub: first(stub.Rounds(pb.RoundsRequest(), timeout=PATIENCE)),
    "Stop": lambda stub: stub.Stop(pb.StopRequest(), timeout=PATIENCE),
    "Publish": lambda stub: stub.Publish(pb.PublishRequest(), timeout=PATIENCE),
}
MAY = {"Status": ("observer", "investigator"), "Rounds": ("observer", "investigator")}


@pytest.mark.parametrize("role", ["site", "observer", "investigator"])
@pytest.mark.parametrize("call", CALLS)
def test_each_call_is_for_its_roles_alone_and_recorded_with_who_asked(served: Served, call: str, role: str) -> None:
    allowed = MAY.get(call, ("investigator",))
    credentials = channel_credentials(load_identity(served.identity("kim", role)))
    with grpc.secure_channel(served.address, credentials) as channel:
        stub = rpc.OperationStub(channel)  # type: ignore[no-untyped-call]
        if role in allowed:
            CALLS[call](stub)
            asked = {"Status": "status-asked", "Rounds": "rounds-asked", "Stop": "stop-asked"}.get(
                call, "publish-asked"
            )
            assert served.events() == [(asked, f"{role} kim")]
            return
        for _ in range(3):
            with pytest.raises(grpc.RpcError) as refused:
                CALLS[call](stub)
            assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
            words = f"the certificate is of {role} 'kim', and this is for {' and '.join(allowed)} alone"
            assert refused.value.details() == words
        assert served.events() == [("call-denied", f"{role} kim")]  # once
        assert not served.stopped.wait(0.3) and not served.calls.exists()


def test_an_observer_sees_the_study_and_no_site_by_figures(served: Served) -> None:
    with served.remote("observer") as coordinator:
        status, rounds = coordinator.status(), coordinator.rounds()
    assert status["last"] == STATUS["last"] and status["state"] == "training"
    assert status["sites"]["north"] == {"connected": True, "asked": True, "stage": "training", "revoked": False}
    assert rounds[1] == {
        "round": "2",
        "attempt": "1",
        "sites": "2",
        "seconds": "4.1",
        "train/loss": "0.4",
        "validation/dice": "0.65",
    }
    text = json.dumps([status, rounds])
    for hidden in ("24", "cases", "batches", "reason", "notice", "error", "/srv", "96", "p7", "holdout/site"):
        assert hidden not in text, hidden
    assert "sites" not in status["privacy"] and status["privacy"]["epsilon"] == 1.5


def test_an_investigator_sees_what_the_operator_does_but_for_paths_and_cases(served: Served) -> None:
    with served.remote("investigator") as coordinator:
        status, rounds = coordinator.status(), coordinator.rounds()
    assert status["sites"]["north"] == SITE and status["privacy"] == STATUS["privacy"]
    assert status["published"] == "v1" and "plan" in status and "address" not in status
    assert rounds[0]["train/patches"] == "96" and rounds[0]["holdout/site/north/dice"] == "0.7"
    assert "p7" not in json.dumps(rounds)


def test_what_a_later_version_adds_is_shown_to_nobody_by_accident() -> None:
    sites = {"north": {"scanner": "x"}}
    for role in ("observer", "investigator"):
        assert status_for(role, {"secret": 1, "sites": sites}) == {"running": True, "sites": {"north": {}}}
    assert figures_for("observer", {"train/cases_of_north": 3, "validation/class/cell": 1}) == {
        "validation/class/cell": "1"
    }


def test_stopping_is_answered_and_then_done(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    identity = str(served.identity("kim", "investigator"))
    code = main(["stop", "--coordinator", served.address, "--identity", identity, "--reason", "a wrong study"])
    assert code == 0 and "goes on where it was" in capsys.readouterr().out
    assert served.stopped.wait(PATIENCE)
    (entry,) = check_log(served.run.path).entries
    assert entry.details == {"member": "investigator kim", "reason": "a wrong study"}


def test_a_reason_that_would_spoil_the_log_is_refused(served: Served) -> None:
    with served.remote("investigator") as coordinator:
        for reason in ("x" * 301, "two\nlines", "\x1b[2J"):
            with pytest.raises(UsageError, match="printable letters in one line"):
                coordinator.stop(reason)
    assert not served.stopped.is_set()


def test_a_round_is_published_by_the_coordinators_own_identity(
    served: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    identity = str(served.identity("kim", "investigator"))
    given = ["publish", "--coordinator", served.address, "--identity", identity, "--round", "2", "--explain"]
    assert main(given) == 0
    assert "Published v3, of round 2" in capsys.readouterr().out
    places = ["--run", str(served.run.path), "--identity", str(served.ids / "coordinator"), "--without-holdout"]
    assert json.loads(served.calls.read_text()) == ["--json", *places, "--round", "2", "--explain"]
    with served.remote("investigator") as coordinator, pytest.raises(PublishError, match=r"its weights were not kept$"):
        coordinator.publish(7, explain=False)


def test_one_version_is_published_at_a_time_and_none_beside_the_studys_own(tmp_path: Path) -> None:
    served = Served(tmp_path, publishing_takes=3.0)
    with served.remote("investigator") as one, served.remote("investigator", "lee") as other:
        made: list[Any] = []
        thread = threading.Thread(target=lambda: made.append(one.publish(None, explain=False)))
        thread.start()
        end = time.monotonic() + PATIENCE
        while not served.calls.exists():
            assert time.monotonic() < end
            time.sleep(0.02)
        assert served.publisher.held == (1,)  # the best so far: its weights stay meanwhile
        with pytest.raises(PublishError, match="is being published already"):
            other.publish(None, explain=False)
        thread.join(PATIENCE)
        assert made == [("v3", 2)] and served.publisher.held == ()

        async def alone() -> None:
            async with served.publisher.alone():
                with pytest.raises(PublishError, match="already"):
                    await served.publisher.publish(None, explain=False)

        served.do(alone())
    served.close()


def test_whoever_follows_sees_each_change_by_one_call_and_hears_the_end(served: Served) -> None:
    with served.remote("observer") as coordinator:
        seen = coordinator.statuses()
        assert next(seen)["round"] == 2
        served.run.write_status({**STATUS, "updated_at": 3.0})  # no change
        served.run.write_status({**STATUS, "round": 3})
        assert next(seen)["round"] == 3
        served.run.write_status({**STATUS, "state": "stopped"})
        assert [status["running"] for status in seen] == [False]
    assert served.events() == [("status-asked", "observer kim")]


@pytest.mark.parametrize(("state", "code"), [("stopped", 0), ("failed", 10), ("training", 4)])
def test_a_line_that_ends_after_the_last_word_is_no_failure(
    served: Served, monkeypatch: pytest.MonkeyPatch, state: str, code: int
) -> None:
    def statuses(_: Remote) -> Iterator[dict[str, Any]]:
        yield status_for("observer", {**STATUS, "state": state, "running": True})
        raise NetworkError("no connection")

    monkeypatch.setattr(Remote, "statuses", statuses)
    identity = str(served.identity("kim", "observer"))
    assert main(["watch", "--coordinator", served.address, "--identity", identity]) == code


def test_who_is_revoked_is_cut_off_and_gets_no_more(served: Served) -> None:
    authority = (served.ids / "authority" / "ca.crt").read_bytes()
    with served.remote("investigator") as coordinator:
        coordinator.status()
        file = RevocationFile(served.ids / "coordinator", authority)
        revoke(file, load_signer(served.ids / "coordinator"), "investigator", "kim", "left", time.time())
        with pytest.raises(IdentityError, match=r"investigator 'kim' was revoked on .* \(left\)"):
            coordinator.stop("")
    assert not served.stopped.is_set()


def test_calls_in_a_minute_are_limited_for_each_member(served: Served) -> None:
    with served.remote("observer") as coordinator, served.remote("investigator") as other:
        for _ in range(60):
            coordinator.rounds()
        with pytest.raises(NetworkError, match="60 calls in a minute are too many"):
            coordinator.rounds()
        other.rounds()
        served.now = 61.0
        coordinator.rounds()
    assert len(served.events()) == 62


def test_what_cannot_be_recorded_is_not_answered(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise RunFolderError("audit.log: the disk is full")

    monkeypatch.setattr(served.audit, "_with_room", full)
    with served.remote("investigator") as coordinator:
        with pytest.raises(NetworkError, match="its operator has to see to its disk"):
            coordinator.stop("")
        with pytest.raises(NetworkError):
            coordinator.status()
    assert not served.stopped.wait(0.3)


def test_the_commands_answer_from_another_machine(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--coordinator", served.address, "--identity", str(served.identity("kim", "observer"))]
    assert main(["status", *asked]) == 0
    assert "nuclei: training, round 2 of 9" in capsys.readouterr().out
    assert main(["status", *asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["description"]["headline"] == "nuclei: training, round 2 of 9"
    assert main(["rounds", *asked]) == 0
    assert "0.650" in capsys.readouterr().out
    served.run.write_status({**STATUS, "state": "failed"})
    assert main(["watch", *asked]) == 10
    assert main(["stop", *asked]) == 5
    assert "this is for investigator alone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["status", "--coordinator", "localhost:1"], "--identity: give the folder"),
        (["status", "--coordinator", "localhost:1", "--run", "x"], "--run: of this machine"),
        (["publish", "--coordinator", "localhost:1", "--holdout", "x"], "--holdout: of this machine"),
    ],
)
def test_what_contradicts_is_told(command: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) == 2
    assert words in capsys.readouterr().err


def test_nobody_there_and_the_wrong_identity_are_told(served: Served, tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="is the coordinator's own"):
        Remote(served.address, served.ids / "coordinator")
    with Remote("localhost:1", served.identity("kim", "observer")) as nobody, pytest.raises(WardroundError) as error:
        nobody.status()
    assert "cannot be reached" in str(error.value)


def test_asking_from_another_machine_loads_no_tensorflow(served: Served) -> None:
    asked = ["--coordinator", served.address, "--identity", str(served.identity("kim", "observer"))]
    assert not modules_of("status", *asked) & {"tensorflow", "tensorflow_federated"}
