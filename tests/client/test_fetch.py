"""`wardround-site fetch` against a real coordinator's service over mutual TLS, without TensorFlow."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from client import cli, fetch
from common.errors import IdentityError, NetworkError, PublishError, RunFolderError, UsageError, WireError
from common.inference.trust import Trust
from common.inference.version_files import check_files, listed_files
from common.security.authorities import trusted_authority
from common.security.certificates import Identity, ensure_simulation_identities, load_identity
from common.security.signing import load_signer
from common.study import Study
from common.wire import federation_pb2 as pb
from common.wire import federation_pb2_grpc as rpc
from common.wire.channel import SERVER_OPTIONS, Address, server_credentials
from server.serving import FinishedService
from tests.common.inference.published_version import sign


def write_version(folder: Path, study: Study, files: dict[str, bytes], **changes: Any) -> Path:
    """A folder as publishing leaves it, of files that nobody runs; `changes` go into the manifest."""
    folder.mkdir(parents=True)
    text = study.to_yaml().encode()
    (folder / "study.yaml").write_bytes(text)
    variants: list[dict[str, Any]] = [{"name": "broken", "file": None, "failed": True}]
    for name, content in files.items():
        path = folder / f"model_{name}.tflite"
        path.write_bytes(content)
        variants.append({"name": name, "file": path.name, "sha256": hashlib.sha256(content).hexdigest()})
    manifest = {
        "format": 1,
        "study": study.name,
        "version": folder.name,
        "variants": variants,
        "documents": {"study.yaml": {"sha256": hashlib.sha256(text).hexdigest()}},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("identities")
    ensure_simulation_identities(folder, "tiny", ["alpha", "delta"], ["127.0.0.1"])
    return folder


@pytest.fixture
def alpha(folders: Path) -> Identity:
    return load_identity(folders / "sites" / "alpha")


@pytest.fixture
def published(tmp_path: Path) -> Path:
    folder = tmp_path / "published"
    folder.mkdir()
    return folder


@pytest.fixture
def address(tiny_study: Callable[..., Study], folders: Path, published: Path) -> Iterator[Address]:
    """Where a coordinator serves the folder `published` of a study whose only sites are alpha and beta."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def start() -> tuple[Any, int]:
        server = grpc.aio.server(options=SERVER_OPTIONS)
        port = server.add_secure_port("127.0.0.1:0", server_credentials(load_identity(folders / "coordinator")))
        rpc.add_FederationServicer_to_server(
            FinishedService(tiny_study(), published, published.parent / "journal.sqlite"),  # type: ignore[no-untyped-call]
            server,
        )
        await server.start()
        return server, port

    server, port = asyncio.run_coroutine_threadsafe(start(), loop).result(20)
    yield Address("127.0.0.1", port)
    asyncio.run_coroutine_threadsafe(server.stop(0), loop).result(20)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture
def publish(tiny_study: Callable[..., Study], published: Path, folders: Path) -> Callable[..., Path]:
    """Publishes a version whose files span several chunks and do not end with one."""

    def make(version: str = "v1", **changes: Any) -> Path:
        content = bytes(range(256)) * 3000
        folder = write_version(published / version, tiny_study(), {"float32": content, "int8": b"small"}, **changes)
        return sign(folder, load_signer(folders / "coordinator"))

    return make


@pytest.fixture
def trust(folders: Path) -> Trust:
    return Trust(trusted_authority(folders / "sites" / "alpha" / "ca.crt"))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_newest_version_arrives_whole(
    address: Address, alpha: Identity, trust: Trust, publish: Callable[..., Path], tmp_path: Path
) -> None:
    publish("v2")
    newest = publish("v10")
    found = fetch.fetch(address, alpha, tmp_path / "site" / "models", verify=trust)
    assert found.folder == tmp_path / "site" / "models" / "v10"
    assert (found.study, found.version, found.was_here) == ("tiny", "v10", False)
    assert content(found.folder) == content(newest)
    assert found.size == sum(map(len, content(newest).values()))
    assert [path.name for path in found.folder.parent.iterdir()] == ["v10"]


def test_a_version_that_is_here_is_not_fetched_again(
    address: Address, alpha: Identity, trust: Trust, publish: Callable[..., Path], tmp_path: Path
) -> None:
    publish()
    fetch.fetch(address, alpha, tmp_path, verify=trust)
    assert fetch.fetch(address, alpha, tmp_path, study="tiny", version="v1", verify=trust).was_here
    (tmp_path / "v1" / "model_int8.tflite").write_bytes(b"other")
    with pytest.raises(
        PublishError, match=r"model_int8\.tflite: damaged .*; delete or move away .*/v1, then fetch again$"
    ):
        fetch.fetch(address, alpha, tmp_path, verify=trust)
    (tmp_path / "v1" / "model_int8.tflite").unlink()
    with pytest.raises(PublishError, match=r"int8\.tflite is missing; delete or move away .*/v1, then fetch again$"):
        fetch.fetch(address, alpha, tmp_path, verify=trust)


def test_another_model_of_that_name_is_left_alone(
    address: Address, alpha: Identity, trust: Trust, publish: Callable[..., Path], tmp_path: Path
) -> None:
    publish()
    (tmp_path / "v1").mkdir()
    with pytest.raises(UsageError, match="of another study or run"):
        fetch.fetch(address, alpha, tmp_path, verify=trust)
    assert content(tmp_path / "v1") == {}


def test_nothing_published_yet_and_unknown_versions_are_told_apart(
    address: Address, alpha: Identity, trust: Trust, publish: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(PublishError, match="has published nothing yet"):
        fetch.fetch(address, alpha, tmp_path, verify=trust)
    publish("v3")
    with pytest.raises(UsageError, match="no version 'v4'; there is v3"):
        fetch.fetch(address, alpha, tmp_path, version="v4", verify=trust)
    with pytest.raises(UsageError, match=r"no version '\.\./v3'"):
        fetch.fetch(address, alpha, tmp_path, version="../v3", verify=trust)
    with pytest.raises(UsageError, match="runs study 'tiny', not 'other'"):
        fetch.fetch(address, alpha, tmp_path, study="other", verify=trust)
    assert not list(tmp_path.glob("v*"))


def test_only_sites_of_the_cohort_may_fetch(
    address: Address, folders: Path, publish: Callable[..., Path], trust: Trust, tmp_path: Path
) -> None:
    publish()
    with pytest.raises(IdentityError, match="'delta' is not in the cohort"):
        fetch.fetch(address, load_identity(folders / "sites" / "delta"), tmp_path, verify=trust)


def test_files_that_differ_from_the_manifest_at_the_coordinator_are_not_kept(
    address: Address, alpha: Identity, trust: Trust, publish: Callable[..., Path], tmp_path: Path
) -> None:
    (publish() / "model_int8.tflite").write_bytes(b"wrong")  # of the size that the manifest says
    with pytest.raises(WireError, match=r"model_int8\.tflite: expected SHA-256"):
        fetch.fetch(address, alpha, tmp_path / "out", verify=trust)
    assert content_names(tmp_path / "out") == []


def test_a_version_with_a_missing_file_is_not_kept(
    address: Address, alpha: Identity, trust: Trust, publish: Callable[..., Path], tmp_path: Path
) -> None:
    (publish() / "model_int8.tflite").unlink()
    with pytest.raises(PublishError, match="'v1' is damaged at the coordinator"):
        fetch.fetch(address, alpha, tmp_path / "out", verify=trust)


def content_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_full_disk_is_told_before_anything_is_written(
    address: Address,
    alpha: Identity,
    trust: Trust,
    publish: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    publish()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_500_000))
    with pytest.raises(RunFolderError, match=r"the disk has 1\.5 MB left, the version needs 1\.8 MB"):
        fetch.fetch(address, alpha, tmp_path / "out", verify=trust)
    assert content_names(tmp_path / "out") == []


def test_a_disk_that_fills_up_leaves_nothing_behind(
    address: Address,
    alpha: Identity,
    trust: Trust,
    publish: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    publish()

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("common.wire.tensors.os.fsync", full)
    with pytest.raises(RunFolderError, match=r"No space left on device.*free space"):
        fetch.fetch(address, alpha, tmp_path / "out", verify=trust)
    assert content_names(tmp_path / "out") == []


@pytest.mark.parametrize("changes", [{"study": "other"}, {"version": "v2"}])
def test_a_manifest_of_another_study_or_version_than_announced_is_not_kept(
    folders: Path,
    address: Address,
    alpha: Identity,
    trust: Trust,
    publish: Callable[..., Path],
    tmp_path: Path,
    changes: dict[str, str],
) -> None:
    sign(publish(), load_signer(folders / "coordinator"), **changes)
    refused = "the signer is of study 'tiny'|the coordinator announced 'tiny' 'v1'"
    with pytest.raises((PublishError, IdentityError), match=refused):
        fetch.fetch(address, alpha, tmp_path / "out", verify=trust)
    assert content_names(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("study", "version", "asked"),
    [("evil", "v1", ("tiny", "")), ("tiny", "v2", ("", "v1")), ("tiny", "v" * 201, ("", ""))],
)
def test_what_was_not_asked_for_or_has_no_name_for_a_folder_is_refused(
    study: str, version: str, asked: tuple[str, str]
) -> None:
    files = [pb.PublishedFile(name="manifest.json", blob=pb.Blob(sha256=b"", size=1))]
    with pytest.raises(PublishError, match="the coordinator announces"):
        fetch._check_head(pb.PublishedVersion(study=study, version=version, files=files), *asked)


def test_a_manifest_that_cannot_be_read_here_is_named(
    address: Address,
    alpha: Identity,
    trust: Trust,
    publish: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    publish()
    folder = fetch.fetch(address, alpha, tmp_path / "out", verify=trust).folder
    read = Path.read_bytes

    def refused(path: Path) -> bytes:
        if path.parent == folder:
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(PublishError, match=r"manifest\.json: cannot be read \(Permission denied\)"):
        fetch.fetch(address, alpha, tmp_path / "out", verify=trust)


def test_nobody_at_the_address_is_said_at_once(alpha: Identity, trust: Trust, tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match="nothing listens there"):
        fetch.fetch(Address("127.0.0.1", 1), alpha, tmp_path, verify=trust)


def test_the_command_prints_where_the_version_lies(
    address: Address,
    folders: Path,
    publish: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    publish()
    command = ["fetch", "--coordinator", str(address), "--identity", str(folders / "sites" / "alpha")]
    assert cli.main([*command, "--out", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["folder"] == str(tmp_path / "v1")
    assert cli.main([*command, "--out", str(tmp_path)]) == 0
    assert "is here already, undamaged" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "", ".hidden", "a\\b", "manifest.json"])
def test_a_manifest_may_name_plain_files_alone(tiny_study: Callable[..., Study], tmp_path: Path, name: str) -> None:
    folder = write_version(tmp_path / "v1", tiny_study(), {"float32": b"x"}, documents={name: {"sha256": "00"}})
    with pytest.raises(PublishError, match="outside the version's folder"):
        listed_files((folder / "manifest.json").read_bytes())


def test_a_file_that_no_manifest_lists_is_refused(publish: Callable[..., Path]) -> None:
    folder = publish()
    check_files(folder)
    unlisted = {"manifest.json", "manifest.sig"}
    assert set(listed_files((folder / "manifest.json").read_bytes())) == set(content(folder)) - unlisted
    (folder / "extra.py").write_bytes(b"")
    with pytest.raises(PublishError, match=r"extra.py is not in the manifest"):
        check_files(folder)


def test_digests_are_of_the_files(publish: Callable[..., Path]) -> None:
    folder = publish()
    for name, digest in listed_files((folder / "manifest.json").read_bytes()).items():
        assert digest == hashlib.sha256((folder / name).read_bytes()).hexdigest()


# Whose a version is. -----------------------------------------------------------------------------------------------


def test_a_version_that_the_coordinator_did_not_sign_is_not_kept(
    address: Address, alpha: Identity, trust: Trust, folders: Path, publish: Callable[..., Path], tmp_path: Path
) -> None:
    version = publish()
    sign(version, load_signer(folders / "sites" / "delta"))
    with pytest.raises(IdentityError, match=r"out/v1/manifest\.sig: signed by site 'delta', and only a study's coord"):
        fetch.fetch(address, alpha, tmp_path / "out", verify=trust)
    ensure_simulation_identities(tmp_path / "other", "tiny", ["alpha"], ["127.0.0.1"])
    sign(version, load_signer(tmp_path / "other" / "coordinator"))
    with pytest.raises(IdentityError, match="was not issued by the authority that is trusted here"):
        fetch.fetch(address, alpha, tmp_path / "out", verify=trust)
    sign(version, load_signer(folders / "coordinator"))
    (version / "manifest.sig").unlink()
    with pytest.raises(IdentityError, match=r"manifest\.sig: is not there, and the manifest says that it was signed"):
        fetch.fetch(address, alpha, tmp_path / "out", verify=trust)
    assert content_names(tmp_path / "out") == []


def test_a_version_of_before_signatures_needs_to_be_allowed(
    address: Address,
    folders: Path,
    published: Path,
    tiny_study: Callable[..., Study],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_version(published / "v1", tiny_study(), {"float32": b"x"})
    command = ["fetch", "--coordinator", str(address), "--identity", str(folders / "sites" / "alpha")]
    assert cli.main([*command, "--out", str(tmp_path / "out")]) == 5
    assert "not signed (manifest.sig is not in it)" in capsys.readouterr().err
    assert cli.main([*command, "--out", str(tmp_path / "out"), "--allow-unsigned"]) == 0
    assert "warning: this version is not signed: nobody can tell who made it" in capsys.readouterr().err
