"""Who gets through to a coordinator's calls, and what happens to open ones when their owner is revoked."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from common.errors import IdentityError
from common.security.certificates import Identity, ensure_simulation_identities, issue, load_identity
from common.security.profile import serial_of
from common.security.revocation import RevocationFile, revoke
from common.security.signing import load_signer
from common.wire import federation_pb2 as pb
from common.wire import federation_pb2_grpc as rpc
from common.wire.channel import Address, channel_credentials
from server.access import Access
from server.serving import bind

PATIENCE = 20.0
CALLS = ("Attend", "Upload", "Download", "Fetch")


class Endless(rpc.FederationServicer):
    """Answers each call at once, and then holds it open."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.ended: list[str] = []

    async def _hold(self, name: str, message: Any) -> AsyncIterator[Any]:
        self.begun.append(name)
        try:
            yield message
            await asyncio.sleep(3600)
        finally:
            self.ended.append(name)

    async def Attend(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        async for message in self._hold("Attend", pb.CoordinatorMessage()):
            yield message

    async def Upload(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        async for message in self._hold("Upload", pb.UploadReply()):
            yield message

    async def Download(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async for message in self._hold("Download", pb.Chunk()):
            yield message

    async def Fetch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async for message in self._hold("Fetch", pb.FetchMessage()):
            yield message


def _later() -> grpc.GenericRpcHandler:
    """A service that this version does not know."""

    async def say(request: bytes, context: Any) -> bytes:
        return request

    handlers = {"Say": grpc.unary_unary_rpc_method_handler(say)}
    return grpc.method_handlers_generic_handler("wardround.v1.Later", handlers)


class Served:
    """Such a service behind `Access`, on a real port."""

    def __init__(self, folder: Path, loop: asyncio.AbstractEventLoop) -> None:
        self.folder = folder
        self.service = Endless()
        self.told: list[str] = []
        self._loop = loop
        self._do(self._start())

    async def _start(self) -> None:
        identity = load_identity(self.folder / "coordinator")
        self.access = Access.of(self.folder / "coordinator", identity.authority)
        self.access.on_revoked = lambda entry: self.told.append(f"{entry.role} {entry.name}")
        self._server, self.port = bind(Address("127.0.0.1", 0), identity, self.access)
        rpc.add_FederationServicer_to_server(self.service, self._server)  # type: ignore[no-untyped-call]
        self._server.add_generic_rpc_handlers((_later(),))
        await self._server.start()
        self._watching = contextlib.ExitStack()
        self._watching.enter_context(self.access.watching())

    async def _stop(self) -> None:
        self._watching.close()
        await self._server.stop(0)

    def stop(self) -> None:
        self._do(self._stop())

    def _do(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(PATIENCE)

    def identity(self, name: str, role: Any = "site") -> Identity:
        """That of a member, made where it is not there."""
        folder = self.folder / f"{role}-{name}"
        if not folder.exists():
            issue(folder, self.folder / "authority", name, role)
        return load_identity(folder)

    @property
    def file(self) -> RevocationFile:
        return RevocationFile(self.folder / "coordinator", (self.folder / "authority" / "ca.crt").read_bytes())

    def revoke(self, name: str, role: Any = "site", reason: str = "") -> None:
        revoke(self.file, load_signer(self.folder / "coordinator"), role, name, reason, time.time())


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    ensure_simulation_identities(tmp_path / "ids", "nuclei", [], ["localhost"])
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    made = Served(tmp_path / "ids", loop)
    yield made
    made.stop()
    loop.call_soon_threadsafe(loop.stop)
    thread.join(PATIENCE)


class Line:
    """A member's connection."""

    def __init__(self, served: Served, name: str, role: Any = "site") -> None:
        credentials = channel_credentials(served.identity(name, role))
        self._channel = grpc.secure_channel(f"localhost:{served.port}", credentials)
        self._stub: Any = rpc.FederationStub(self._channel)  # type: ignore[no-untyped-call]
        self._waiting = threading.Event()

    def call(self, name: str) -> Any:
        """An open call."""
        if name in ("Attend", "Upload"):

            def requests() -> Iterator[Any]:
                yield pb.SiteMessage() if name == "Attend" else pb.UploadMessage()
                self._waiting.wait(PATIENCE)

            return getattr(self._stub, name)(requests(), timeout=PATIENCE)
        return getattr(self._stub, name)(
            {"Download": pb.DownloadRequest, "Fetch": pb.FetchRequest}[name](), timeout=PATIENCE
        )

    def close(self) -> None:
        self._waiting.set()
        self._channel.close()


@pytest.fixture
def line(served: Served) -> Iterator[Callable[..., Line]]:
    lines: list[Line] = []

    def make(name: str, role: str = "site") -> Line:
        lines.append(Line(served, name, role))
        return lines[-1]

    yield make
    for each in lines:
        each.close()


def refusal(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as refused:
        for _ in call:
            pass
    return refused.value.code(), refused.value.details()


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("role", ["observer", "investigator"])
def test_a_sites_calls_are_for_sites_alone(line: Callable[..., Line], call: str, role: str) -> None:
    open_ = line("kim", role).call(call)
    if (role, call) == ("investigator", "Fetch"):
        next(open_)
        return
    code, words = refusal(open_)
    assert code is grpc.StatusCode.PERMISSION_DENIED
    allowed = "site and investigator" if call == "Fetch" else "site"
    assert words == f"the certificate is of {role} 'kim', and this is for {allowed} alone"


def test_a_call_that_no_table_names_is_for_sites_alone(served: Served) -> None:
    """What a later version adds is open to nobody by accident."""
    for role, is_in in (("observer", False), ("investigator", False), ("site", True)):
        credentials = channel_credentials(served.identity("kim", role))
        with grpc.secure_channel(f"localhost:{served.port}", credentials) as channel:
            later = channel.unary_unary("/wardround.v1.Later/Say")
            if is_in:
                assert later(b"hello", timeout=PATIENCE) == b"hello"
                continue
            with pytest.raises(grpc.RpcError) as refused:
                later(b"hello", timeout=PATIENCE)
            assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize("call", CALLS)
def test_an_open_call_of_who_is_revoked_is_cut_within_a_second(
    served: Served, line: Callable[..., Line], call: str
) -> None:
    theirs, others = line("north").call(call), line("south").call(call)
    next(theirs), next(others)
    began = time.monotonic()
    served.revoke("north", reason="laptop stolen")
    code, words = refusal(theirs)
    assert time.monotonic() - began < 5  # looked at twice a second; the machine may be busy
    assert code is grpc.StatusCode.PERMISSION_DENIED
    assert words.startswith("the certificate of site 'north' was revoked on ")
    assert "(laptop stolen); ask the study's coordinator for a new invitation" in words
    assert served.told == ["site north"]
    assert served.service.ended == [call]  # what held the call open was ended, in good order
    assert others.is_active()


def test_new_calls_of_who_was_revoked_are_refused_whatever_the_certificate(
    served: Served, line: Callable[..., Line]
) -> None:
    north = line("north")  # its line is up before
    next(north.call("Attend"))
    served.revoke("north")
    for call in CALLS:
        assert refusal(north.call(call))[0] is grpc.StatusCode.PERMISSION_DENIED
    issue(served.folder / "twin", served.folder / "authority", "north", "site")  # one that nobody has on record
    (served.folder / "site-north").rename(served.folder / "old")
    (served.folder / "twin").rename(served.folder / "site-north")
    assert "was revoked" in refusal(line("north").call("Attend"))[1]
    assert served.service.begun == ["Attend"]  # that of before
    next(line("south").call("Attend"))


def test_who_is_invited_again_gets_in_by_the_new_certificate_alone(served: Served, line: Callable[..., Line]) -> None:
    old = line("north")
    next(old.call("Attend"))
    served.revoke("north")
    assert refusal(old.call("Attend"))[0] is grpc.StatusCode.PERMISSION_DENIED
    (served.folder / "site-north").rename(served.folder / "old")
    from cryptography import x509

    new = x509.load_pem_x509_certificate(served.identity("north").certificate)
    with served.file.changing(load_signer(served.folder / "coordinator")) as changing:
        changing.list = changing.list.with_valid("site", "north", (serial_of(new),))
    again = line("north").call("Attend")
    next(again)
    assert refusal(old.call("Attend"))[0] is grpc.StatusCode.PERMISSION_DENIED
    assert again.is_active()
    served.revoke("north")
    assert refusal(again)[0] is grpc.StatusCode.PERMISSION_DENIED


def test_a_list_that_is_damaged_meanwhile_lets_nobody_in_again(served: Served, line: Callable[..., Line]) -> None:
    north = line("north")
    served.revoke("north")
    assert refusal(north.call("Attend"))[0] is grpc.StatusCode.PERMISSION_DENIED
    path = served.folder / "coordinator" / "revoked.json"
    for change in (lambda: path.write_text("{}"), path.unlink):
        change()
        assert refusal(north.call("Attend"))[0] is grpc.StatusCode.PERMISSION_DENIED
        next(line("south").call("Attend"))
    path.write_text("{}")
    with pytest.raises(IdentityError, match="damaged; restore it"):  # and nothing starts with it
        Access.of(served.folder / "coordinator", served.identity("north").authority)


def test_who_was_revoked_before_the_start_is_told_of_too(served: Served) -> None:
    served.revoke("north")
    end = time.monotonic() + PATIENCE
    while not served.told:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert served.access.revoked("site", "north") is not None
    assert served.access.revoked("site", "south") is None


def test_the_end_of_a_sites_certificate_is_known(served: Served, line: Callable[..., Line]) -> None:
    next(line("north").call("Attend"))
    assert served.access.expiries == {"north": served.identity("north").not_after.timestamp()}


def test_a_caller_that_goes_is_no_revocation(served: Served, line: Callable[..., Line]) -> None:
    call = line("north").call("Attend")
    next(call)
    call.cancel()
    end = time.monotonic() + PATIENCE
    while served.access._open:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert served.service.ended == ["Attend"]
