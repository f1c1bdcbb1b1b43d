"""`wardround-site personalize`: a real published version, real images, real training; short of all of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from client import cli
from client.personalize import tuning_study
from common.inference.golden import load_golden
from common.inference.lite import LiteModel
from common.inference.published import open_published
from common.inference.trust import Trust
from common.inference.version_files import check_files, open_weights
from common.models import build_network
from common.security.authorities import trusted_authority
from common.study import Study, parse_study
from server.publishing import publish
from server.publishing.provenance import Provenance
from server.simulation.hospitals import generate_hospitals
from tests.signers import AUTHORITIES, coordinator_of, identities

pytestmark = pytest.mark.usefixtures("tensorflow")


@pytest.fixture(autouse=True)
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hospital trusts the study's authority."""
    monkeypatch.setenv("WARDROUND_AUTHORITY", str(AUTHORITIES))


@pytest.fixture(scope="module")
def study() -> Study:
    return parse_study(
        """
        study: tiny
        seed: 3
        task: {dimensions: 2, channels: 3, classes: [background, cell], labels: instances}
        model: {filters: 4, depth: 2, head: sigmoid}
        preprocessing: {patch: [32, 32]}
        training:
          rounds: 7
          patches_per_epoch: 80
          batch_size: 8
          client_optimizer: {name: adam, learning_rate: 2e-2}
        cohort: {sites: [east, north]}
        evaluation: {validation_fraction: 0.4}
        publishing: {variants: [float32], tile: [64, 64], explain: true}
        """
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("personalize") / "hospitals"
    generate_hospitals(folder, seed=1, images_per_site={"east": 5}, holdout_per_site=1, size=64)
    return folder / "east"


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory, study: Study) -> Path:
    """Weights that nobody trained."""
    folder = tmp_path_factory.mktemp("version") / "v4"
    weights = [weight.numpy() for weight in build_network(study).initial_weights(study.seed)]
    publish(study, weights, None, folder, details={"round": 7}, provenance=Provenance(signer=coordinator_of("tiny")))
    return folder


def call(capsys: pytest.CaptureFixture[str], version: Path, site: Path, out: Path, *options: str) -> dict[str, object]:
    arguments = ["personalize", str(version), "--data", str(site), "--out", str(out), "--json", *options]
    assert cli.main(arguments) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def test_a_model_that_gained_is_kept_as_a_folder_that_prediction_takes(
    version: Path, site: Path, study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "personal"
    identity = str(identities("tiny") / "sites" / "north")
    report = call(capsys, version, site, out, "--epochs", "4", "--rate", "1", "--identity", identity)
    dice = report["dice"]
    assert isinstance(dice, dict)
    assert dice["after"] > dice["before"] + 0.1
    assert (report["kept"], report["training_cases"], report["validation_cases"]) == (True, 3, 2)
    check_files(out)
    trust = Trust(trusted_authority(AUTHORITIES))
    model = open_published(out, verify=trust)
    assert trust.checked is not None and trust.checked.signed_by is not None
    assert (trust.checked.personal, trust.checked.signed_by.role, trust.checked.signed_by.name) == (
        True,
        "site",
        "north",
    )
    assert (model.version, model.study) == ("v4-personal", study)
    golden = load_golden(out)
    assert golden.difference(LiteModel(model.file)) < 0.05
    personal, base = open_weights(out), open_weights(version)
    assert any(np.any(mine != theirs) for mine, theirs in zip(personal.weights, base.weights, strict=True))
    manifest = json.loads((out / "manifest.json").read_text())
    assert json.loads((version / "manifest.json").read_text())["explanation"] is not None
    assert manifest["explanation"] is None, "it explains the published model, not this one"
    assert str(tmp_path) not in (out / "manifest.json").read_text()
    assert manifest["details"]["personalized_from"]["sha256"] == base.sha256
    float32 = manifest["variants"][0]
    assert float32["dice"] == pytest.approx(dice["after"], abs=1e-3)
    assert {variant["name"] for variant in manifest["variants"]} == {"float32", "dynamic_range"}


def test_a_model_that_did_not_gain_is_not_kept(
    version: Path, site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.personalize._SILENCE_SECONDS", 0.0)
    report = call(capsys, version, site, tmp_path / "personal", "--epochs", "1", "--rate", "1e-12")
    assert report["kept"] is False
    assert not list(tmp_path.iterdir())
    out = str(tmp_path / "personal")
    arguments = ["personalize", str(version), "--data", str(site), "--out", out, "--epochs", "1", "--rate", "1e-12"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "It did not gain, so it was not kept" in printed
    assert "5 cases fit for tiny" in printed
    assert "epoch 1 of 1: loss " in printed
    assert "epoch 1 of 1: 9 of 10 batches" in printed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_nothing_of_the_images_stays_where_it_is_asked_to_stop(
    version: Path,
    site: Path,
    tmp_path: Path,
    number: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    seen: list[Path] = []

    def stopped(*arguments: object) -> None:
        seen.extend((tmp_path / "temporary").iterdir())
        os.kill(os.getpid(), number)

    monkeypatch.setattr("client.personalize.fine_tune", stopped)
    before = signal.signal(number, signal.SIG_DFL)  # who runs the tests may ignore it
    try:
        assert cli.main(["personalize", str(version), "--data", str(site), "--out", str(tmp_path / "own")]) == 130
    finally:
        signal.signal(number, before)
    assert seen
    assert [path.name for path in tmp_path.iterdir()] == ["temporary"]
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize(("option", "value"), [("--epochs", "0"), ("--epochs", "x"), ("--rate", "2"), ("--rate", "x")])
def test_options_that_are_no_numbers_are_told_plainly(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["personalize", "v1", "--data", "d", "--out", "o", option, value])
    assert ended.value.code == 2
    assert f"argument {option}: expected a " in capsys.readouterr().err


def test_a_folder_that_exists_is_refused_before_training(
    version: Path, site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["personalize", str(version), "--data", str(site), "--out", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "out", "reason"),
    [("nowhere", "own", "--data nowhere: neither a registered"), (".", "none/own", "parent folder does not exist")],
)
def test_wrong_folders_are_told_before_tensorflow_is_loaded(
    version: Path, tmp_path: Path, data: str, out: str, reason: str
) -> None:
    script = (
        "import sys; from client.cli import main; code = main(sys.argv[1:]); "
        "sys.exit('heavy' if {'tensorflow', 'keras'} & set(sys.modules) else code)"
    )
    registry = tmp_path / "none.sqlite"
    ended = subprocess.run(
        [sys.executable, "-c", script, "personalize", str(version), "--data", data, "--out", out],
        capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "WARDROUND_SITE_REGISTRY": str(registry), "PYTHONPATH": str(Path(cli.__file__).parents[1])},
    )  # fmt: skip
    assert ended.returncode == 2, ended.stderr
    assert reason in ended.stderr


def test_an_out_folder_that_cannot_be_made_is_told_before_training(
    version: Path, site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(**options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("client.personalize.tempfile.TemporaryFile", refused)
    assert cli.main(["personalize", str(version), "--data", str(site), "--out", str(tmp_path / "own")]) == 2
    assert "Permission denied); check its rights, or give another --out" in capsys.readouterr().err


def test_a_site_without_validation_cases_cannot_tell(
    version: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate_hospitals(tmp_path / "one", seed=1, images_per_site={"east": 1}, holdout_per_site=1, size=64)
    arguments = ["personalize", str(version), "--data", str(tmp_path / "one" / "east"), "--out", str(tmp_path / "p")]
    assert cli.main(arguments) == 3
    assert "1 training and 0 validation cases" in capsys.readouterr().err


def test_the_published_study_is_gone_on_with_gently(study: Study) -> None:
    tuned = tuning_study(study, epochs=3, rate=0.1)
    assert tuned.training.rounds == 3
    assert tuned.training.client_optimizer.learning_rate == pytest.approx(2e-3)
    assert tuned.training.client_optimizer.schedule == "cosine"
    assert (tuned.training.server_optimizer.name, tuned.training.server_optimizer.learning_rate) == ("sgd", 1.0)
    # Which cases validate, and how images are prepared, is as it was.
    assert (tuned.seed, tuned.evaluation, tuned.preprocessing) == (study.seed, study.evaluation, study.preprocessing)


def test_a_model_that_nobody_signed_is_refused_before_anything_is_loaded(
    version: Path, site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = Path(shutil.copytree(version, tmp_path / "v4"))
    (copied / "manifest.sig").unlink()
    arguments = ["personalize", str(copied), "--data", str(site), "--out", str(tmp_path / "own"), "--allow-unsigned"]
    assert cli.main(arguments) == 5
    assert "manifest.sig: is not there, and the manifest says that it was signed" in capsys.readouterr().err
