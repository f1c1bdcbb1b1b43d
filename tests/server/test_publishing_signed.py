"""A signed version, as published and as `wardround verify` sees it: complete, under pseudonyms, every change told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile

from common.errors import IdentityError, RunFolderError
from common.inference.version_files import listed_files
from common.models import build_network
from common.security.certificates import ensure_simulation_identities
from common.security.signing import load_signer
from common.study import Study, parse_study
from server.cli import main
from server.evaluation import Holdout
from server.journal import Journal
from server.publishing import publish
from server.publishing.provenance import provenance_of
from server.results import coordinators_signer
from server.run_folder import RunFolder
from tests.common.inference.published_version import sign
from tests.signers import AUTHORITIES, coordinator_of, identities, site_of

pytestmark = pytest.mark.usefixtures("tensorflow")

STUDY = """
study: cells
seed: 3
task: {dimensions: 2, channels: 1, classes: [background, cell]}
model: {filters: 2, depth: 1, head: sigmoid}
preprocessing: {patch: [16, 16]}
training: {rounds: 3}
cohort: {sites: [north, south], quorum: 1}
publishing: {variants: [float32], tile: [16, 16]}
"""


@pytest.fixture(scope="module")
def study() -> Study:
    return parse_study(STUDY)


@pytest.fixture(scope="module")
def run(study: Study, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of three rounds, the last of which north missed, that published its initial weights."""
    run = RunFolder(tmp_path_factory.mktemp("runs") / "first")
    run.prepare(study)
    journal = Journal(run.journal)
    journal.note("plan", digest="ab" * 32)
    for number in (1, 2, 3):
        journal.opened("train", number, ["north", "south"], bytes([number]) * 32)
        journal.closed("train", number, 1, ["north", "south"] if number < 3 else ["south"])
    journal.close()
    images = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(3)
    for name in ("a-north", "b-south"):
        for kind in ("images", "labels"):
            (images / kind).mkdir(exist_ok=True)
            array = rng.integers(0, 2 if kind == "labels" else 99, (16, 16)).astype(np.uint8)
            tifffile.imwrite(images / kind / f"{name}.tif", array)
    weights = [weight.numpy() for weight in build_network(study).initial_weights(1)]
    provenance = provenance_of(study, run, 3, coordinator_of("cells"))
    holdout = Holdout(study, images)
    publish(study, weights, holdout, run.published / "v1", details={"round": 3, "rounds": 3}, provenance=provenance)
    return run


@pytest.fixture
def version(run: RunFolder, tmp_path: Path) -> Path:
    """A copy, outside the run."""
    return Path(shutil.copytree(run.published / "v1", tmp_path / "v1"))


def test_the_manifest_covers_every_file_and_says_where_they_come_from(run: RunFolder) -> None:
    folder = run.published / "v1"
    text = (folder / "manifest.json").read_bytes()
    names = {path.name for path in folder.iterdir()}
    assert names == {*listed_files(text), "manifest.json", "manifest.sig"}
    assert {"sbom.json", "model_card.md", "study.yaml", "golden.npz", "weights.tensors"} < names
    manifest = json.loads(text)
    assert (manifest["study"], manifest["plan"]) == ("cells", "ab" * 32)
    assert manifest["details"] == {"round": 3, "rounds": 3}
    assert sorted(site["rounds"] for site in manifest["sites"]) == [2, 3]
    assert manifest["signer"]["role"] == "coordinator"
    assert {"python", "wardround", "tensorflow", "tensorflow-federated", "numpy"} <= set(manifest["software"])
    (holdout,) = [entry["holdout"] for entry in manifest["variants"]]
    assert set(holdout["site"]) == {site["name"] for site in manifest["sites"]} == set(manifest["holdout"]["sites"])


def test_sites_are_named_by_pseudonyms_that_stay(run: RunFolder, study: Study, tmp_path: Path) -> None:
    folder = run.published / "v1"
    for path in folder.iterdir():
        if path.suffix in (".json", ".md", ".yaml"):
            text = path.read_text()
            assert "north" not in text and "south" not in text, path
    manifest = json.loads((folder / "manifest.json").read_text())
    again = provenance_of(study, run, 3, coordinator_of("cells"))
    assert again.sites(study) == manifest["sites"]
    assert run.pseudonyms.stat().st_mode & 0o777 == 0o600
    other = RunFolder(tmp_path / "other")
    other.prepare(study)
    elsewhere = provenance_of(study, other, 3, coordinator_of("cells"))
    assert not {site["name"] for site in elsewhere.sites(study)} & {site["name"] for site in manifest["sites"]}
    other.pseudonyms.write_text("short")
    with pytest.raises(RunFolderError, match=r"pseudonyms\.key: damaged; restore it"):
        provenance_of(study, other, 3, coordinator_of("cells"))


def test_the_bill_of_materials_names_what_is_installed(run: RunFolder) -> None:
    content = json.loads((run.published / "v1" / "sbom.json").read_text())
    assert (content["bomFormat"], content["specVersion"]) == ("CycloneDX", "1.5")
    found = {one["name"]: one for one in content["components"]}
    from importlib.metadata import version

    for name in ("numpy", "cryptography", "tensorflow-federated"):
        assert found[name]["purl"] == f"pkg:pypi/{name}@{version(name)}"
    assert all(set(one) <= {"type", "bom-ref", "name", "version", "purl", "licenses"} for one in found.values())


def verified(version: Path, capsys: pytest.CaptureFixture[str], *options: object) -> tuple[int, str, str]:
    code = main(["verify", str(version), *map(str, options)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_verify_accepts_what_was_published(
    run: RunFolder,
    version: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code, out, _ = verified(version, capsys, "--authority", AUTHORITIES)
    assert code == 0
    assert "cells v1: signed by coordinator 'coordinator' under" in out
    assert coordinator_of("cells").fingerprint in out
    code, out, _ = verified(version, capsys, "--authority", AUTHORITIES, "--json")
    found = json.loads(out)
    assert (code, found["study"], found["version"]) == (0, "cells", "v1")
    assert found["files"] == len(list(version.iterdir())) - 2
    code, _, err = verified(version, capsys)
    assert code == 2
    assert "no authority to check it against; give the study's ca.crt with --authority" in err
    monkeypatch.setenv("WARDROUND_AUTHORITY", str(AUTHORITIES))
    assert verified(version, capsys)[0] == 0
    monkeypatch.delenv("WARDROUND_AUTHORITY")
    shutil.copytree(identities("cells") / "coordinator", run.identity / "coordinator")
    code, _, err = verified(run.published / "v1", capsys)
    assert code == 0  # by the authority of its run
    assert "warning: the authority was taken from the folder itself" in err
    ensure_simulation_identities(tmp_path / "other", "cells", ["north"], ["localhost"])
    monkeypatch.setenv("WARDROUND_AUTHORITY", str(tmp_path / "other" / "authority" / "ca.crt"))
    code, _, err = verified(run.published / "v1", capsys)
    assert code == 5
    assert "was not issued by the authority that is trusted here" in err


def _changed(version: Path) -> None:
    path = version / "model_float32.tflite"
    content = path.read_bytes()
    path.write_bytes(content[:999] + bytes([content[999] ^ 1]) + content[1000:])


def _stranger(version: Path) -> None:
    folder = version.parent / "stranger"
    ensure_simulation_identities(folder, "cells", ["north"], ["localhost"])
    sign(version, load_signer(folder / "coordinator"))


@pytest.mark.parametrize(
    ("attack", "code", "said"),
    [
        (_changed, 9, "model_float32.tflite: damaged or changed; its SHA-256 is not the manifest's"),
        (lambda version: (version / "sbom.json").unlink(), 9, "sbom.json is missing"),
        (lambda version: (version / "extra.so").touch(), 9, "extra.so is not in the manifest"),
        (lambda version: (version / "manifest.sig").unlink(), 5, "the manifest says that it was signed"),
        (lambda version: (version / "manifest.sig").write_text("{}"), 5, "damaged, no signature can be read"),
        (lambda version: (version / "manifest.json").open("a").write(" "), 5, "gave for this content; it or what"),
        (_stranger, 5, "was not issued by the authority that is trusted here"),
        (lambda version: sign(version, site_of("cells")), 5, "only a study's coordinator signs its versions"),
    ],
)
def test_verify_refuses_every_change(
    version: Path, capsys: pytest.CaptureFixture[str], attack: Callable[[Path], object], code: int, said: str
) -> None:
    attack(version)
    found, out, err = verified(version, capsys, "--authority", AUTHORITIES)
    assert (found, out) == (code, "")
    assert said in err


def test_a_personal_model_passes_only_where_one_is_expected(version: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sign(version, site_of("cells"), personal={"gain": 0.1})
    code, out, err = verified(version, capsys, "--authority", AUTHORITIES)
    assert (code, out) == (5, "")
    assert "a personal model, made and signed by site 'north'" in err and "--personal" in err
    code, out, err = verified(version, capsys, "--authority", AUTHORITIES, "--personal")
    assert code == 0
    assert "signed by site 'north' under" in out
    assert "warning: a personal model" in err


def test_only_coordinators_sign_for_a_study() -> None:
    with pytest.raises(IdentityError, match="the identity is of site 'north', and a coordinator signs"):
        coordinators_signer(identities("cells") / "sites" / "north")
