"""What answers is no coordinator, or not the agent's own, or refuses it: told, and final."""

from __future__ import annotations

import http.server
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from common.errors import IdentityError, NetworkError, PlanMismatchError, WardroundError
from common.security.certificates import Identity, ensure_simulation_identities, load_identity
from common.wire import federation_pb2 as pb
from common.wire.channel import Address
from tests.client.stand_ins import (
    PATIENCE,
    PLAN,
    Coordinator,
    Running,
    Worker,
    eventually,
    task,
)


class _Http(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def web(identities: dict[str, Identity], tmp_path: Path) -> Iterator[Callable[[bool], int]]:
    """Starts a web server, with the coordinator's own certificate or without TLS; returns its port."""
    made: list[http.server.ThreadingHTTPServer] = []

    def begin(tls: bool) -> int:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Http)
        server.handle_error = lambda *_: None  # type: ignore[method-assign,assignment]
        if tls:
            pem = tmp_path / "identity.pem"
            pem.write_bytes(identities["coordinator"].certificate + identities["coordinator"].key)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(pem)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        made.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server.server_port

    yield begin
    for server in made:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
def test_a_web_server_is_no_coordinator(identities: dict[str, Identity], web: Callable[[bool], int], tls: bool) -> None:
    port = web(tls)
    site = Running(Address("127.0.0.1", port), identities["alpha"], Worker())
    with pytest.raises(NetworkError, match=rf"127\.0\.0\.1:{port}: .* no coordinator .*; correct --coordinator"):
        site.end.result(PATIENCE)


def test_something_else_that_answers_where_the_coordinator_was_is_waited_for_to_go(
    start: Callable[..., Coordinator], coordinator: Coordinator, identities: dict[str, Identity], site: Running
) -> None:
    eventually(lambda: site.state() == "connected")
    coordinator.stop()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", coordinator.address.port), _Http)  # a VPN's log-in page
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    reports = len(site.reports)
    eventually(lambda: len(site.reports) > reports + 4)
    server.shutdown()
    server.server_close()
    back = start(coordinator.address.port)
    eventually(lambda: back.heard)


def test_a_coordinator_whose_certificate_has_another_name_is_refused(
    coordinator: Coordinator, identities: dict[str, Identity]
) -> None:
    site = Running(Address("localhost", coordinator.address.port), identities["alpha"], Worker())
    with pytest.raises(NetworkError, match=r"does not name 'localhost'; correct --coordinator.* --host localhost"):
        site.end.result(PATIENCE)


def test_a_coordinator_of_another_authority_is_refused(coordinator: Coordinator, tmp_path: Path) -> None:
    ensure_simulation_identities(tmp_path, "digits", ["alpha"], ["127.0.0.1"])
    site = Running(coordinator.address, load_identity(tmp_path / "sites" / "alpha"), Worker())
    with pytest.raises(IdentityError, match="is not the one this site's identity was made for"):
        site.end.result(PATIENCE)


@pytest.mark.parametrize(
    ("code", "error", "words"),
    [
        (grpc.StatusCode.FAILED_PRECONDITION, PlanMismatchError, "use the coordinator's study file"),
        (grpc.StatusCode.PERMISSION_DENIED, IdentityError, "refuses this site: the test says so"),
        (grpc.StatusCode.UNAUTHENTICATED, IdentityError, "refuses this site: the test says so"),
        (grpc.StatusCode.ABORTED, IdentityError, "refuses this site: the test says so"),
        (grpc.StatusCode.UNIMPLEMENTED, NetworkError, "that is no coordinator"),
    ],
    ids=lambda value: value.name if isinstance(value, grpc.StatusCode) else "",
)
def test_a_refusal_is_final(
    coordinator: Coordinator, site: Running, code: grpc.StatusCode, error: type[WardroundError], words: str
) -> None:
    coordinator.says.put(code)
    with pytest.raises(error, match=words):
        site.end.result(PATIENCE)
    assert coordinator.streams == 1


@pytest.mark.parametrize("other", [{"study": "letters"}, {"plan_digest": b"\x08" * 32}, {"site": "beta"}], ids=str)
def test_a_task_of_another_study_plan_or_site_is_not_begun(
    coordinator: Coordinator, site: Running, worker: Worker, other: dict[str, Any]
) -> None:
    envelope = pb.Envelope(**{"study": "digits", "plan_digest": PLAN, "site": "alpha"} | other)
    coordinator.says.put(pb.CoordinatorMessage(envelope=envelope, task=task(1)))
    with pytest.raises(PlanMismatchError):
        site.end.result(PATIENCE)
    assert worker.begun == []
    assert coordinator.downloads == 0
