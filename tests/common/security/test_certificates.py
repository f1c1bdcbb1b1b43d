"""Certificates: OpenSSL and an independent verifier accept what `issue` makes, and refuse what they should."""

import datetime
import errno
import ipaddress
import socket
import ssl
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509 import verification
from cryptography.x509.oid import ExtendedKeyUsageOID

from common.errors import IdentityError, RunFolderError, UsageError
from common.security import certificates, pem_files
from common.security.certificates import (
    create_authority,
    ensure_simulation_identities,
    issue,
    load_identity,
    peer_name,
)

HOSTS = ("localhost", "127.0.0.1")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A study's simulation identities: authority, coordinator, sites/north, sites/south."""
    ensure_simulation_identities(tmp_path / "nuclei", "nuclei", ["north", "south"], HOSTS)
    return tmp_path / "nuclei"


def certificate_in(folder: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate((folder / "identity.crt").read_bytes())


def verifier(folder: Path) -> verification.PolicyBuilder:
    authority = x509.load_pem_x509_certificate((folder / "authority" / "ca.crt").read_bytes())
    return verification.PolicyBuilder().store(verification.Store([authority]))


def test_chains_verify_independently(folder: Path) -> None:
    coordinator = certificate_in(folder / "coordinator")
    for host in (x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))):
        assert len(verifier(folder).build_server_verifier(host).verify(coordinator, [])) == 2
    client = verifier(folder).build_client_verifier().verify(certificate_in(folder / "sites" / "north"), [])
    assert client.subjects == [x509.UniformResourceIdentifier("wardround://nuclei/site/north")]


def test_chain_verification_refuses_other_hosts_roles_and_authorities(folder: Path, tmp_path: Path) -> None:
    ensure_simulation_identities(tmp_path / "other", "nuclei", ["north"], HOSTS)
    local = x509.DNSName("localhost")
    with pytest.raises(verification.VerificationError):
        verifier(folder).build_server_verifier(x509.DNSName("example.org")).verify(
            certificate_in(folder / "coordinator"), []
        )
    with pytest.raises(verification.VerificationError):
        verifier(folder).build_server_verifier(local).verify(certificate_in(folder / "sites" / "north"), [])
    with pytest.raises(verification.VerificationError):
        verifier(folder).build_client_verifier().verify(certificate_in(folder / "coordinator"), [])
    with pytest.raises(verification.VerificationError):
        verifier(folder).build_client_verifier().verify(certificate_in(tmp_path / "other" / "sites" / "north"), [])


def test_certificates_carry_what_their_role_needs(folder: Path) -> None:
    authority = x509.load_pem_x509_certificate((folder / "authority" / "ca.crt").read_bytes())
    coordinator, north, south = (
        certificate_in(folder / name) for name in ("coordinator", "sites/north", "sites/south")
    )
    constraints = authority.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert constraints.value == x509.BasicConstraints(ca=True, path_length=0)
    assert authority.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    assert len({certificate.serial_number for certificate in (authority, coordinator, north, south)}) == 4
    for certificate, usage in (
        (coordinator, ExtendedKeyUsageOID.SERVER_AUTH),
        (north, ExtendedKeyUsageOID.CLIENT_AUTH),
    ):
        assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        assert list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [usage]
        key_usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
        assert key_usage.digital_signature
        assert not key_usage.key_cert_sign
        public_key = certificate.public_key()
        assert isinstance(public_key, ec.EllipticCurvePublicKey)
        assert isinstance(public_key.curve, ec.SECP256R1)
        since = datetime.datetime.now(datetime.UTC) - certificate.not_valid_before_utc
        assert datetime.timedelta(days=1) <= since < datetime.timedelta(days=1, hours=1)
    names = coordinator.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["wardround://nuclei/coordinator"]


def test_private_files_are_private(folder: Path) -> None:
    for path in (folder / "authority", folder / "coordinator", folder / "sites" / "north"):
        assert path.stat().st_mode & 0o777 == 0o700
    for path in (folder / "authority" / "ca.key", folder / "sites" / "north" / "identity.key"):
        assert path.stat().st_mode & 0o777 == 0o600


def test_loaded_identity_says_who_it_is(folder: Path) -> None:
    north = load_identity(folder / "sites" / "north")
    assert (north.role, north.name) == ("site", "north")
    assert north.certificate == (folder / "sites" / "north" / "identity.crt").read_bytes()
    assert north.authority == (folder / "authority" / "ca.crt").read_bytes()
    left = north.not_after - datetime.datetime.now(datetime.UTC)
    assert datetime.timedelta(days=729) < left <= datetime.timedelta(days=730)
    assert "PRIVATE KEY" not in repr(north)
    assert peer_name(load_identity(folder / "coordinator").certificate) == ("coordinator", "coordinator")


def test_unusable_identities_say_what_is_wrong(folder: Path, tmp_path: Path) -> None:
    north, south = folder / "sites" / "north", folder / "sites" / "south"

    def refused(match: str) -> None:
        with pytest.raises(IdentityError, match=match):
            load_identity(north)

    key, certificate = (north / "identity.key").read_bytes(), (north / "identity.crt").read_bytes()
    (north / "identity.key").chmod(0o644)
    refused(r"identity\.key: the private key has mode 0644 and is open to other users; run `chmod 600")
    (north / "identity.key").chmod(0o600)
    load_identity(north)
    (north / "identity.key").write_bytes((south / "identity.key").read_bytes())
    refused(r"identity\.key: the key does not fit the certificate")
    (north / "identity.key").write_bytes(b"-----BEGIN PRIVATE KEY-----\nxyz\n-----END PRIVATE KEY-----\n")
    refused(r"identity\.key: expected a PEM private key")
    (north / "identity.key").write_bytes(key)
    (north / "identity.crt").write_bytes(certificate[:200])
    refused(r"identity\.crt: expected a PEM certificate")
    (north / "identity.crt").unlink()
    refused(r"identity\.crt: does not exist")
    (north / "identity.crt").write_bytes(certificate)
    create_authority(tmp_path / "foreign", "nuclei")
    (north / "ca.crt").write_bytes((tmp_path / "foreign" / "ca.crt").read_bytes())
    refused(r"identity\.crt: was not signed by ca\.crt")


@pytest.mark.parametrize(
    ("difference", "message"),
    [
        (3 * 365, r"identity\.crt: expired on .*; get a new identity"),
        (11 * 365, r"ca\.crt: expired on .*; get a new identity"),
        (-10, "set the clock"),
    ],
)
def test_identity_outside_its_dates_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, difference: int, message: str
) -> None:
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> "Clock":
            return super().now(tz) + datetime.timedelta(days=difference)

    monkeypatch.setattr(certificates.datetime, "datetime", Clock)
    with pytest.raises(IdentityError, match=message):
        load_identity(folder / "sites" / "north")


def test_missing_identities_are_added_and_the_others_kept(folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    ensure_simulation_identities(folder, "nuclei", ["north", "south", "east"], HOSTS)
    assert {path: path.read_bytes() for path in before} == before
    assert load_identity(folder / "sites" / "east").name == "east"
    with pytest.raises(IdentityError, match="expected the authority of study 'organs', found that of 'nuclei'"):
        ensure_simulation_identities(folder, "organs", ["north"], HOSTS)


def test_existing_authority_and_identity_are_never_overwritten(folder: Path) -> None:
    with pytest.raises(IdentityError, match="already holds an authority"):
        create_authority(folder / "authority", "nuclei")
    with pytest.raises(IdentityError, match="already holds an identity"):
        issue(folder / "sites" / "north", folder / "authority", "north", "site")


def test_study_names_need_not_be_fit_for_uris(tmp_path: Path) -> None:
    ensure_simulation_identities(tmp_path, "Zellkerne / Süd 2", ["north"], HOSTS)
    assert load_identity(tmp_path / "sites" / "north").name == "north"
    names = certificate_in(tmp_path / "sites" / "north").extensions.get_extension_for_class(x509.SubjectAlternativeName)
    uris = names.value.get_values_for_type(x509.UniformResourceIdentifier)
    assert uris == ["wardround://Zellkerne%20%2F%20S%C3%BCd%202/site/north"]


@pytest.mark.parametrize(
    ("name", "role", "hosts"),
    [
        ("../north", "site", ()),
        ("", "site", ()),
        ("n" * 64, "site", ()),
        ("north\n", "site", ()),
        ("north", "site", ("localhost",)),
        ("north", "admin", ()),
        ("coordinator", "coordinator", ()),
        ("coordinator", "coordinator", ("localhost:8443",)),
    ],
)
def test_senseless_identities_are_refused(folder: Path, name: str, role: str, hosts: tuple[str, ...]) -> None:
    with pytest.raises(IdentityError):
        issue(folder / "new", folder / "authority", name, role, hosts)  # type: ignore[arg-type]
    assert not (folder / "new").exists()


@pytest.mark.parametrize("pem", [b"", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", b"\xff" * 99])
def test_peer_without_readable_certificate_has_no_name(pem: bytes) -> None:
    with pytest.raises(IdentityError):
        peer_name(pem)


def test_authority_itself_is_no_peer(folder: Path) -> None:
    with pytest.raises(
        IdentityError, match="expected the role coordinator, site, investigator or observer, found 'authority'"
    ):
        peer_name((folder / "authority" / "ca.crt").read_bytes())


def context(folder: Path, purpose: ssl.Purpose, authority: Path | None = None) -> ssl.SSLContext:
    result = ssl.create_default_context(purpose, cafile=str((authority or folder) / "ca.crt"))
    result.verify_mode = ssl.CERT_REQUIRED
    result.load_cert_chain(folder / "identity.crt", folder / "identity.key")
    return result


def shake_hands(server: ssl.SSLContext, client: ssl.SSLContext) -> tuple[str, str]:
    """Role and name that the server reads from the client's certificate; raises what either side raises."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(10)
    outcome: list[tuple[str, str] | OSError] = []

    def serve() -> None:
        try:
            with listener.accept()[0] as plain:
                plain.settimeout(10)
                with server.wrap_socket(plain, server_side=True) as secure:
                    der = secure.getpeercert(binary_form=True)
                    assert der is not None
                    outcome.append(peer_name(ssl.DER_cert_to_PEM_cert(der).encode()))
                    secure.sendall(b"welcome")
        except OSError as error:
            outcome.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with (
            socket.create_connection(listener.getsockname(), timeout=10) as plain,
            client.wrap_socket(plain, server_hostname="localhost") as secure,
        ):
            # In TLS 1.3 the client learns only now whether its certificate was accepted.
            assert secure.recv(7) == b"welcome"
    finally:
        thread.join()
        listener.close()
    (result,) = outcome
    if isinstance(result, OSError):
        raise result
    return result


def test_mutual_tls_handshake_names_the_site(folder: Path) -> None:
    server = context(folder / "coordinator", ssl.Purpose.CLIENT_AUTH)
    client = context(folder / "sites" / "north", ssl.Purpose.SERVER_AUTH)
    assert shake_hands(server, client) == ("site", "north")


def test_mutual_tls_refuses_strangers_and_wrong_roles(folder: Path, tmp_path: Path) -> None:
    ensure_simulation_identities(tmp_path / "other", "nuclei", ["north"], HOSTS)
    server = context(folder / "coordinator", ssl.Purpose.CLIENT_AUTH)
    stranger = context(tmp_path / "other" / "sites" / "north", ssl.Purpose.SERVER_AUTH, folder / "coordinator")
    with pytest.raises(ssl.SSLError):
        shake_hands(server, stranger)
    north = context(folder / "sites" / "north", ssl.Purpose.SERVER_AUTH)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(context(tmp_path / "other" / "coordinator", ssl.Purpose.CLIENT_AUTH, folder / "coordinator"), north)
    with pytest.raises(ssl.SSLCertVerificationError):  # a site that poses as the coordinator
        shake_hands(context(folder / "sites" / "south", ssl.Purpose.CLIENT_AUTH), north)
    with pytest.raises(ssl.SSLError):  # the coordinator that poses as a site
        shake_hands(server, context(folder / "coordinator", ssl.Purpose.SERVER_AUTH))


def test_a_coordinator_s_certificate_for_other_hosts_is_not_kept_in_silence(folder: Path) -> None:
    with pytest.raises(IdentityError, match=r"is not for rounds\.example\.org; move .*coordinator away"):
        ensure_simulation_identities(folder, "nuclei", ["north"], [*HOSTS, "rounds.example.org"])
    ensure_simulation_identities(folder, "nuclei", ["north"], ["LOCALHOST"])  # names of hosts have no case
    (folder / "coordinator").rename(folder / "before")
    ensure_simulation_identities(folder, "nuclei", ["north"], ["rounds.example.org"])
    assert load_identity(folder / "coordinator").authority == load_identity(folder / "before").authority


def test_a_host_that_is_none_is_bad_usage_and_makes_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'bad host:99'"):
        ensure_simulation_identities(tmp_path / "new", "nuclei", ["north"], ["bad host:99"])
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match=r"file/new: cannot be made \(Not a directory\)"):
        ensure_simulation_identities(tmp_path / "file" / "new", "nuclei", ["north"], HOSTS)


@pytest.mark.parametrize("call", ["fsync", "mkdir"])
def test_a_full_disk_is_no_matter_of_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*{"fsync": (pem_files.os, "fsync", full), "mkdir": (Path, "mkdir", full)}[call])
    with pytest.raises(RunFolderError, match=r"cannot be written \(No space left on device\); free space"):
        ensure_simulation_identities(tmp_path / "identities", "nuclei", ["north"], HOSTS)
    with pytest.raises(RunFolderError, match="free space"):
        create_authority(tmp_path / "authority", "nuclei")
