"""Channels: a real gRPC server in its own process, and clients that it must let in or refuse."""

import os
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import IdentityError, NetworkError
from common.security.certificates import ensure_simulation_identities, load_identity
from common.wire import channel
from common.wire.channel import CHANNEL_OPTIONS, SERVER_OPTIONS, Address, parse_address
from common.wire.tensors import MAX_MESSAGE_BYTES

import grpc  # isort: skip  (after common.wire.channel, which sets what grpc reads at import)
from grpc._cython import cygrpc  # isort: skip

ROOT = Path(__file__).parents[3]

# In its own process, because the list of cipher suites is fixed by whoever imports gRPC first.
SERVER = """
import sys
from concurrent import futures
from pathlib import Path
from common.security.certificates import load_identity, peer_name
from common.wire.channel import SERVER_OPTIONS, server_credentials
import grpc

def answer(request, context):
    return " ".join(peer_name(context.auth_context()["x509_pem_cert"][0])).encode() + request[:0]

class Handler(grpc.GenericRpcHandler):
    def service(self, details):
        return grpc.unary_unary_rpc_method_handler(answer)

server = grpc.server(futures.ThreadPoolExecutor(2), [Handler()], options=SERVER_OPTIONS)
port = server.add_secure_port(sys.argv[2], server_credentials(load_identity(Path(sys.argv[1]))))
server.start()
print(port, flush=True)
sys.stdin.read()
server.stop(0).wait()
"""


def start(identity: Path, address: str = "127.0.0.1:0", code: str = SERVER) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_SSL_CIPHER_SUITES"}
    return subprocess.Popen(
        [sys.executable, "-c", code, str(identity), address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    result = tmp_path_factory.mktemp("identities")
    ensure_simulation_identities(result / "nuclei", "nuclei", ["north", "south"], ["localhost", "127.0.0.1"])
    ensure_simulation_identities(result / "other", "nuclei", ["north"], ["localhost", "127.0.0.1"])
    return result


@pytest.fixture(scope="module")
def port(folder: Path) -> Iterator[int]:
    with start(folder / "nuclei" / "coordinator") as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        try:
            assert line, process.communicate()[1]
            yield int(line)
        finally:
            process.communicate()


def call(port: int, credentials: grpc.ChannelCredentials, message: bytes = b"", host: str = "localhost") -> str:
    with grpc.secure_channel(f"{host}:{port}", credentials, options=CHANNEL_OPTIONS) as opened:
        answer: bytes = opened.unary_unary("/test/Who")(message, timeout=10)
    return answer.decode()


def refused(port: int, credentials: grpc.ChannelCredentials) -> None:
    with pytest.raises(grpc.RpcError) as refusal:
        call(port, credentials)
    assert refusal.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_site_is_let_in_and_named(folder: Path, port: int, host: str) -> None:
    credentials = channel.channel_credentials(load_identity(folder / "nuclei" / "sites" / "south"))
    assert call(port, credentials, host=host) == "site south"


def test_largest_message_passes(folder: Path, port: int) -> None:
    credentials = channel.channel_credentials(load_identity(folder / "nuclei" / "sites" / "north"))
    assert call(port, credentials, bytes(MAX_MESSAGE_BYTES)) == "site north"
    with pytest.raises(grpc.RpcError) as refusal:
        call(port, credentials, bytes(MAX_MESSAGE_BYTES + 128 * 1024))
    assert refusal.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_client_without_certificate_is_refused(folder: Path, port: int) -> None:
    refused(port, grpc.ssl_channel_credentials((folder / "nuclei" / "authority" / "ca.crt").read_bytes()))


def test_client_of_another_authority_is_refused(folder: Path, port: int) -> None:
    stranger = load_identity(folder / "other" / "sites" / "north")
    authority = (folder / "nuclei" / "authority" / "ca.crt").read_bytes()
    refused(port, grpc.ssl_channel_credentials(authority, stranger.key, stranger.certificate))
    refused(port, channel.channel_credentials(stranger))  # here the client does not believe the server


def handshake(folder: Path, port: int, version: ssl.TLSVersion) -> str | None:
    site = folder / "nuclei" / "sites" / "north"
    context = ssl.create_default_context(cafile=str(site / "ca.crt"))
    context.load_cert_chain(site / "identity.crt", site / "identity.key")
    context.set_alpn_protocols(["h2"])
    context.minimum_version = context.maximum_version = version
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secure,
    ):
        assert secure.recv(1)  # HTTP/2 settings: the server accepted the client's certificate, too
        return secure.version()


def test_only_tls_1_3_is_spoken(folder: Path, port: int) -> None:
    assert handshake(folder, port, ssl.TLSVersion.TLSv1_3) == "TLSv1.3"
    with pytest.raises((ssl.SSLError, ConnectionResetError)):
        handshake(folder, port, ssl.TLSVersion.TLSv1_2)


def test_port_in_use_is_an_error(folder: Path, port: int) -> None:
    with start(folder / "nuclei" / "coordinator", f"127.0.0.1:{port}") as process:
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (1, "")
    assert f"Failed to bind to address 127.0.0.1:{port}" in errors


def test_server_refuses_to_run_where_grpc_came_first(folder: Path) -> None:
    with start(folder / "nuclei" / "coordinator", code="import grpc" + SERVER) as process:
        output, errors = process.communicate(timeout=60)
    assert output == ""
    assert "would accept TLS 1.2" in errors


def test_module_loads_no_tensorflow() -> None:
    code = "import sys, common.wire.channel; sys.exit(any(name.startswith('tensorflow') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_identities_of_the_wrong_role_are_refused(folder: Path) -> None:
    with pytest.raises(IdentityError, match="expected the coordinator's, found a site's"):
        channel.server_credentials(load_identity(folder / "nuclei" / "sites" / "north"))
    with pytest.raises(IdentityError, match="expected a site's, found a coordinator's"):
        channel.channel_credentials(load_identity(folder / "nuclei" / "coordinator"))


def test_grpc_knows_every_option() -> None:
    """It says nothing of one that it does not know, such as a misspelt one."""
    binary = Path(cygrpc.__file__).read_bytes()
    assert [name for name, _ in (*CHANNEL_OPTIONS, *SERVER_OPTIONS) if name.encode() + b"\0" not in binary] == []


def test_keepalive_of_sites_is_tolerated_by_the_server() -> None:
    client, server = dict(CHANNEL_OPTIONS), dict(SERVER_OPTIONS)
    assert client["grpc.keepalive_time_ms"] + client["grpc.keepalive_timeout_ms"] == 30_000
    assert server["grpc.http2.min_ping_interval_without_data_ms"] < client["grpc.keepalive_time_ms"]


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("coordinator.example.org:8443", ("coordinator.example.org", 8443)),
        ("localhost:0", ("localhost", 0)),
        ("127.0.0.1:65535", ("127.0.0.1", 65535)),
        ("[2001:db8::1]:8443", ("2001:db8::1", 8443)),
        ("compose_coordinator:8443", ("compose_coordinator", 8443)),
    ],
)
def test_addresses_are_read_and_written_back(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address
    assert str(Address(*address)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "localhost",
        "localhost:",
        ":8443",
        "localhost:65536",
        "localhost:-1",
        "localhost:https",
        "localhost:٣",
        "https://localhost:8443",
        "user@localhost:8443",
        "2001:db8::1:8443",
        "[127.0.0.1]:8443",
        "[localhost]:8443",
        "1.2.3:8443",
        "1.2.3.400:8443",
        "-host:8443",
        "a..b:8443",
        "local host:8443",
        "localhost:8443\n",
        "a" * 64 + ":1",
    ],
)
def test_nonsense_is_no_address(text: str) -> None:
    with pytest.raises(NetworkError, match="expected host:port"):
        parse_address(text)


def test_a_refusal_that_is_tried_again_is_told_in_words_for_people() -> None:
    raw = "Tls handshake failed (TSI_PROTOCOL_FAILURE): CERTIFICATE_VERIFY_FAILED: unable to get issuer: OK"
    said = channel.connection_trouble(Address("127.0.0.1", 8443), raw)
    assert "is not the one this site's identity was made for (unable to get issuer)" in said
    assert "TSI_PROTOCOL" not in said
