"""A TCP proxy on loopback, between a site and the coordinator, that breaks the line at a given byte.

It sees TLS only, so whatever it does is what a bad line does; certificates name 127.0.0.1 and hold at any port. Bytes
are counted by direction, over all connections since the proxy was made: a fault placed at byte 10,000 of `UP` strikes
when the ten-thousandth byte from the site has been passed on, whichever connection that is in.
"""

from __future__ import annotations

import contextlib
import enum
import math
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

_PIECE = 64 * 1024
_REPEATED = 64


class Direction(enum.Enum):
    """Which way bytes go."""

    UP = "up"  # from the site to the coordinator
    DOWN = "down"


Kind = Literal["cut", "reset", "stall", "half-close", "duplicate", "corrupt"]


@dataclass(frozen=True)
class Fault:
    """What happens to the connection in which byte `at` of a direction passes.

    - `cut` closes both sides (FIN), `reset` breaks both (RST);
    - `stall` passes nothing on, either way, for `seconds`; math.inf: never again, as a firewall that forgot it;
    - `half-close` ends this direction, and lets the other go on;
    - `duplicate` sends the last bytes twice, `corrupt` changes the last bit of one: both break TLS.

    `every` places the same fault again so many bytes further on, again and again.
    """

    kind: Kind
    direction: Direction
    at: int
    seconds: float = 0.0
    every: int = 0


@dataclass
class _Connection:
    site: socket.socket
    coordinator: socket.socket
    stalled: threading.Event = field(default_factory=threading.Event)
    closed: threading.Event = field(default_factory=threading.Event)

    def close(self, *, reset: bool = False) -> None:
        """Ends both sides."""
        self.closed.set()
        for one in (self.site, self.coordinator):
            with contextlib.suppress(OSError):
                if reset:
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    # A pump that waits in `recv` holds the socket open; it wakes by a shutdown of reading, which sends
                    # nothing.
                    one.shutdown(socket.SHUT_RD)
                else:
                    one.shutdown(socket.SHUT_RDWR)
            one.close()


class Proxy:
    """Listens at `port`; passes on to the coordinator's.

    Attributes
    ----------
    port : of 127.0.0.1, where sites dial.
    passed : bytes passed on so far, by direction.
    connections : how many were opened so far.
    struck : the faults that happened, in order.
    throttle : bytes a second that pass in each direction; math.inf: all.
    delay : seconds by which everything is late, each piece for itself.
    refusing : new connections are reset at once.
    """

    def __init__(self, target: Callable[[], int], *, throttle: float = math.inf, delay: float = 0.0) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]
        self.passed = dict.fromkeys(Direction, 0)
        self.connections = 0
        self.struck: list[Fault] = []
        self.throttle = throttle
        self.delay = delay
        self.refusing = False
        self._faults: list[Fault] = []
        self._open: list[_Connection] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        threading.Thread(target=self._accept, daemon=True, name="proxy-accept").start()

    def place(self, *faults: Fault) -> None:
        """Has these faults happen once their byte comes by; a byte that has passed already never does."""
        with self._lock:
            self._faults += faults

    def break_all(self, *, reset: bool = False) -> None:
        """Ends every connection that is open now."""
        with self._lock:
            broken, self._open = self._open, []
        for connection in broken:
            connection.close(reset=reset)

    def stall_all(self, seconds: float) -> None:
        """Passes nothing on for so long in the connections that are open now."""
        with self._lock:
            held = list(self._open)
        for connection in held:
            connection.stalled.set()

        def go_on() -> None:
            for connection in held:
                connection.stalled.clear()

        timer = threading.Timer(seconds, go_on)
        timer.daemon = True
        timer.start()

    def close(self) -> None:
        """Ends everything."""
        self._closing.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.break_all()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- the threads ------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                site, _ = self._listener.accept()
            except OSError:
                return
            try:
                if self.refusing:
                    raise ConnectionRefusedError
                coordinator = socket.create_connection(("127.0.0.1", self._target()), timeout=5)
            except OSError:
                site.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                site.close()
                continue
            coordinator.settimeout(None)
            for one in (site, coordinator):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = _Connection(site, coordinator)
            with self._lock:
                self.connections += 1
                self._open.append(connection)
            for direction in Direction:
                threading.Thread(
                    target=self._pump, args=(connection, direction), daemon=True, name=f"proxy-{direction.value}"
                ).start()

    def _pump(self, connection: _Connection, direction: Direction) -> None:
        up = direction is Direction.UP
        source, sink = (connection.site, connection.coordinator) if up else (connection.coordinator, connection.site)
        try:
            while data := source.recv(_PIECE):
                if not self._pass_on(connection, direction, sink, data):
                    return
            self._wait_while_stalled(connection)
            if not connection.closed.is_set():
                sink.shutdown(socket.SHUT_WR)
        except OSError:
            self._drop(connection)

    def _pass_on(self, connection: _Connection, direction: Direction, sink: socket.socket, data: bytes) -> bool:
        """Whether this direction goes on."""
        if self.delay:
            time.sleep(self.delay)
        while data:
            self._wait_while_stalled(connection)
            piece, fault = self._until_fault(direction, data)
            if fault is not None and fault.kind == "corrupt":
                piece = piece[:-1] + bytes([piece[-1] ^ 1])
            sink.sendall(piece)
            if self.throttle < math.inf:
                time.sleep(len(piece) / self.throttle)
            data = data[len(piece) :]
            if fault is not None and not self._strike(connection, sink, fault, piece):
                return False
        return True

    def _until_fault(self, direction: Direction, data: bytes) -> tuple[bytes, Fault | None]:
        """As much of the data as passes before the next fault, that fault, and the count moved on."""
        with self._lock:
            start = self.passed[direction]
            due = [one for one in self._faults if one.direction is direction and start < one.at <= start + len(data)]
            fault = min(due, key=lambda one: one.at, default=None)
            end = fault.at if fault is not None else start + len(data)
            self.passed[direction] = end
            if fault is not None:
                self._faults.remove(fault)
                self.struck.append(fault)
                if fault.every:
                    self._faults.append(
                        Fault(fault.kind, direction, fault.at + fault.every, fault.seconds, fault.every)
                    )
            return data[: end - start], fault

    def _strike(self, connection: _Connection, sink: socket.socket, fault: Fault, piece: bytes) -> bool:
        """Does what the fault says; returns whether this direction goes on."""
        match fault.kind:
            case "cut" | "reset":
                self._drop(connection, reset=fault.kind == "reset")
                return False
            case "half-close":
                sink.shutdown(socket.SHUT_WR)
                return False
            case "stall":
                connection.stalled.set()
                if fault.seconds < math.inf:
                    self._closing.wait(fault.seconds)
                    connection.stalled.clear()
            case "duplicate":
                sink.sendall(piece[-_REPEATED:])
            case "corrupt":
                pass
        return True

    def _wait_while_stalled(self, connection: _Connection) -> None:
        while connection.stalled.is_set():
            if self._closing.is_set() or connection.closed.is_set():
                raise OSError("closed while stalled")
            time.sleep(0.02)

    def _drop(self, connection: _Connection, *, reset: bool = False) -> None:
        with self._lock:
            if connection in self._open:
                self._open.remove(connection)
        connection.close(reset=reset)
