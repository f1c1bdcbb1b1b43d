"""A small HTTP endpoint of a running process: what Prometheus scrapes, and whether the process lives and is ready.

`GET /metrics` is the Prometheus text format (or OpenMetrics, where the client asks for it), `GET /healthz` says with
200 or 503 whether the process is alive, `GET /readyz` whether it does its work. It only reads, and runs in threads of
its own: whatever a client does, no round waits for it. It has no passwords: give it an address on loopback, or on a
network of your own, and what it shows is figures alone.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Iterable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from common.errors import NetworkError, UsageError
from common.wire.channel import parse_address

_log = logging.getLogger("wardround.metrics")
_SECONDS = 10.0
"""How long a client may take to say what it wants."""
_MOST_CLIENTS: Final = 16
Condition = Callable[[], str]
"""Says what is missing; "" where nothing is."""


class _Figures(Collector):
    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self._collect = collect

    def describe(self) -> Iterable[Metric]:
        """Nothing: figures are looked at when they are asked for."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """See `Collector`."""
        return self._collect()


class Endpoint:
    """Serves figures and conditions at an address until closed.

    Parameters
    ----------
    address : host:port, or a port on loopback; port 0 is one that the system chooses.
    figures : called at each scrape.
    healthy, ready : called at each question.

    Attributes
    ----------
    port : where it listens.

    Raises
    ------
    NetworkError : it cannot listen there.
    UsageError : `address` is none.
    """

    def __init__(
        self, address: str, figures: Callable[[], Iterable[Metric]], healthy: Condition, ready: Condition
    ) -> None:
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Figures(figures))
        ProcessCollector(registry=registry)
        try:
            host, port = parse_address(address if ":" in address else f"127.0.0.1:{address}")
        except NetworkError as error:
            raise UsageError(f"--metrics: {error}") from error

        class Handler(_Handler):
            pass

        Handler.registry, Handler.conditions = registry, {"/healthz": healthy, "/readyz": ready}
        try:
            self._server = _Server((host, port), Handler, ipv6=":" in host)
        except OSError as error:
            raise NetworkError(
                f"--metrics {address}: cannot listen there ({error.strerror or error}); choose another port"
            ) from error
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True, name="wardround-metrics")
        self._thread.start()
        _log.info("metrics at http://%s:%d/metrics", host, self.port)

    def close(self) -> None:
        """Listens no more."""
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], handler: type[_Handler], *, ipv6: bool) -> None:
        self.address_family = socket.AF_INET6 if ipv6 else socket.AF_INET
        self._free = threading.BoundedSemaphore(_MOST_CLIENTS)
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """One thread a client, and no more clients than a few."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """See `socketserver`."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    registry: CollectorRegistry
    conditions: dict[str, Condition]
    timeout = _SECONDS
    server_version = "wardround"
    sys_version = ""

    def do_GET(self) -> None:
        """One of three pages."""
        path = self.path.partition("?")[0]
        if path == "/metrics":
            encode, kind = choose_encoder(self.headers.get("Accept") or "")
            try:
                self._answer(HTTPStatus.OK, kind, encode(self.registry))
            except OSError:
                raise
            except Exception as error:  # a figure that cannot be made must not end the endpoint
                _log.warning("the figures cannot be made (%s: %s)", type(error).__name__, error)
                self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain", b"the figures cannot be made\n")
        elif path in self.conditions:
            missing = self.conditions[path]()
            status = HTTPStatus.SERVICE_UNAVAILABLE if missing else HTTPStatus.OK
            self._answer(status, "text/plain; charset=utf-8", f"{missing or 'ok'}\n".encode())
        else:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"/metrics, /healthz or /readyz\n")

    def _answer(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        with contextlib.suppress(ConnectionError):
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Scrapes are not logged."""
