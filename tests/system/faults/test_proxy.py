"""The proxy does to a line what it says, at the byte it was told."""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.system.faults.proxy import Direction, Fault, Proxy

SENT = bytes(range(256)) * 40  # 10,240 bytes


class Peer:
    """A coordinator of one connection: keeps what it gets, and says how the line ended."""

    def __init__(self) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        self.got = b""
        self.ended = ""
        self.line: socket.socket | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self.line, _ = self._server.accept()
        try:
            while data := self.line.recv(4096):
                self.got += data
            self.ended = "FIN"
        except ConnectionResetError:
            self.ended = "RST"

    def wait(self) -> None:
        self._thread.join(5)
        assert self.ended, "the line was not ended"

    def close(self) -> None:
        self._server.close()
        if self.line is not None:
            self.line.close()


@pytest.fixture
def peer() -> Iterator[Peer]:
    made = Peer()
    yield made
    made.close()


@pytest.fixture
def proxy(peer: Peer) -> Iterator[Proxy]:
    with Proxy(lambda: peer.port) as made:
        yield made


def dial(proxy: Proxy) -> socket.socket:
    line = socket.create_connection(("127.0.0.1", proxy.port), timeout=5)
    line.settimeout(5)
    return line


def test_without_a_fault_everything_passes_and_is_counted(proxy: Proxy, peer: Peer) -> None:
    with dial(proxy) as line:
        line.sendall(SENT)
        line.shutdown(socket.SHUT_WR)
        peer.wait()
        assert peer.line is not None
        peer.line.sendall(b"answer")
        assert line.recv(100) == b"answer"
    assert (peer.got, peer.ended) == (SENT, "FIN")
    assert (proxy.passed[Direction.UP], proxy.passed[Direction.DOWN]) == (len(SENT), 6)


@pytest.mark.parametrize(("kind", "ended"), [("cut", "FIN"), ("half-close", "FIN")])
def test_a_cut_passes_what_was_before_it_and_no_more(proxy: Proxy, peer: Peer, kind: str, ended: str) -> None:
    proxy.place(Fault(kind, Direction.UP, 5000))  # type: ignore[arg-type]
    with dial(proxy) as line:
        line.sendall(SENT)
        peer.wait()
    assert (peer.got, peer.ended) == (SENT[:5000], ended)
    assert [fault.at for fault in proxy.struck] == [5000]


def test_a_half_closed_line_still_carries_the_other_direction(proxy: Proxy, peer: Peer) -> None:
    proxy.place(Fault("half-close", Direction.UP, 5000))
    with dial(proxy) as line:
        line.sendall(SENT)
        peer.wait()
        assert peer.line is not None
        peer.line.sendall(b"answer")
        assert line.recv(100) == b"answer"


def test_a_reset_is_one_on_both_sides(proxy: Proxy, peer: Peer) -> None:
    proxy.place(Fault("reset", Direction.UP, 5000))
    with dial(proxy) as line:
        line.sendall(SENT)
        peer.wait()
        with pytest.raises(ConnectionResetError):
            line.recv(100)
    assert peer.ended == "RST"


def test_a_stall_holds_both_directions_and_then_lets_all_pass(proxy: Proxy, peer: Peer) -> None:
    proxy.place(Fault("stall", Direction.UP, 5000, seconds=0.5))
    with dial(proxy) as line:
        started = time.monotonic()
        line.sendall(SENT)
        time.sleep(0.2)
        assert peer.got == SENT[:5000]
        line.shutdown(socket.SHUT_WR)
        peer.wait()
    assert time.monotonic() - started >= 0.5
    assert peer.got == SENT


def test_a_stall_for_ever_lets_nothing_pass_nor_ends_the_line(proxy: Proxy, peer: Peer) -> None:
    proxy.place(Fault("stall", Direction.UP, 5000, seconds=math.inf))
    with dial(proxy) as line:
        line.sendall(SENT)
        time.sleep(0.3)
        assert (peer.got, peer.ended) == (SENT[:5000], "")


def test_bytes_are_repeated_or_changed_at_their_place(proxy: Proxy, peer: Peer) -> None:
    proxy.place(Fault("duplicate", Direction.UP, 5000), Fault("corrupt", Direction.UP, 6000))
    with dial(proxy) as line:
        line.sendall(SENT)
        line.shutdown(socket.SHUT_WR)
        peer.wait()
    expected = SENT[:5000] + SENT[4936:5000] + SENT[5000:5999] + bytes([SENT[5999] ^ 1]) + SENT[6000:]
    assert peer.got == expected


def test_a_fault_is_placed_again_and_bytes_are_counted_over_connections(peer: Peer) -> None:
    second = Peer()
    targets = iter([peer.port, second.port])
    with Proxy(lambda: next(targets)) as proxy:
        proxy.place(Fault("cut", Direction.UP, 4000, every=3000))
        with dial(proxy) as line:
            line.sendall(SENT)
            peer.wait()
        with dial(proxy) as line:
            line.sendall(SENT)
            second.wait()
    assert (len(peer.got), len(second.got)) == (4000, 3000)
    assert [fault.at for fault in proxy.struck] == [4000, 7000]
    second.close()


def test_a_throttle_bounds_the_speed(proxy: Proxy, peer: Peer) -> None:
    proxy.throttle = 20_000
    started = time.monotonic()
    with dial(proxy) as line:
        line.sendall(SENT)
        line.shutdown(socket.SHUT_WR)
        peer.wait()
    assert time.monotonic() - started >= len(SENT) / 20_000
    assert peer.got == SENT
