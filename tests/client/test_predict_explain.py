"""`wardround-site predict --explain`: pictures of where a model saw what it predicts, from LiteRT alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import imagecodecs
import nibabel
import numpy as np
import numpy.typing as npt
import pytest
import tifffile

from client.cli import main
from common.errors import PublishError
from common.imaging.case import Case, Source
from common.inference.explanation import explained_planes, open_explanation
from common.inference.lite import LiteModel
from common.inference.prediction import predict_case
from common.inference.published import open_published
from common.inference.version_files import check_files
from common.study import Study, parse_study
from tests.common.inference.published_version import sign
from tests.signers import AUTHORITIES, coordinator_of

STUDY = """
study: discs
task: {{dimensions: {dimensions}, channels: 1, classes: [background, {classes}]}}
model: {{filters: 4, depth: 2, head: {head}}}
preprocessing: {{patch: {patch}, intensity: none}}
training: {{rounds: 1}}
cohort: {{sites: [north]}}
publishing: {{variants: [float32], explain: {explain}}}
"""
SIZE = 32
RADIUS = 5


def disc(height: float, width: float, shape: tuple[int, int] = (SIZE, SIZE)) -> npt.NDArray[np.bool_]:
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    found: npt.NDArray[np.bool_] = (rows - height) ** 2 + (columns - width) ** 2 <= RADIUS**2
    return found


def scene(
    rng: np.random.Generator, shape: tuple[int, int] = (SIZE, SIZE)
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """Noise with a bright disc, which is the class, and a dark one, which is not; apart from each other."""
    places = [(rng.integers(RADIUS, shape[0] - RADIUS), side + rng.integers(-2, 3)) for side in (8, shape[1] - 9)]
    if rng.integers(2):
        places.reverse()
    image = 100 + 8 * rng.standard_normal(shape)
    wanted, other = disc(*places[0], shape), disc(*places[1], shape)
    image[wanted] += 80
    image[other] -= 80
    return np.clip(image, 0, 255).astype(np.uint8), wanted


def trained(study: Study) -> list[npt.NDArray[np.float32]]:
    """A network that finds bright discs, after some seconds."""
    import tensorflow as tf

    from common.metrics.losses import dice_cross_entropy
    from common.models import build_network

    network = build_network(study)
    weights = [tf.Variable(weight) for weight in network.initial_weights(1)]
    optimizer = tf.keras.optimizers.legacy.Adam(1e-2)
    rng = np.random.default_rng(0)

    @tf.function(autograph=False)
    def step(images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = dice_cross_entropy(network([tf.identity(w) for w in weights], images), labels, head="sigmoid")
        optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        return loss

    for _ in range(150):
        images, labels = zip(*(scene(rng) for _ in range(8)), strict=True)
        batch = np.stack(images)[..., np.newaxis].astype(np.float32) / 255
        loss = step(tf.constant(batch), tf.constant(np.stack(labels).astype(np.uint8)))
    assert float(loss) < 0.2
    return [weight.numpy() for weight in weights]


def publish_to(folder: Path, study: Study, weights: list[npt.NDArray[np.float32]]) -> Path:
    from server.publishing import publish
    from server.publishing.provenance import Provenance

    folder.mkdir()
    provenance = Provenance(signer=coordinator_of(study.name))
    publish(study, weights, None, folder / "v1", details={"round": 1}, provenance=provenance)
    return folder / "v1"


@pytest.fixture(autouse=True)
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hospital trusts the authorities of the studies here."""
    monkeypatch.setenv("WARDROUND_AUTHORITY", str(AUTHORITIES))


@pytest.fixture(scope="module")
def discs(tmp_path_factory: pytest.TempPathFactory, tensorflow: None) -> Path:
    """A trained model of planes."""
    text = STUDY.format(dimensions=2, classes="disc", head="sigmoid", patch=[SIZE, SIZE], explain="true")
    study = parse_study(text)
    return publish_to(tmp_path_factory.mktemp("discs") / "published", study, trained(study))


@pytest.fixture(scope="module")
def organs(tmp_path_factory: pytest.TempPathFactory, tensorflow: None) -> Path:
    """An untrained model of volumes, with class names that cannot be parts of file names."""
    from common.models import build_network

    study = parse_study(
        STUDY.format(
            dimensions=3, classes="'liver/left', 'liver left'", head="softmax", patch=[8, 16, 16], explain="true"
        )
    )
    weights = [weight.numpy() for weight in build_network(study).initial_weights(3)]
    return publish_to(tmp_path_factory.mktemp("organs") / "published", study, weights)


def test_the_map_is_higher_on_the_object_that_the_class_depends_on_than_elsewhere(discs: Path, tmp_path: Path) -> None:
    published = open_published(discs)
    # Larger than a tile, so that maps of tiles are put together.
    image, wanted = scene(np.random.default_rng(5), (50, 70))
    tifffile.imwrite(tmp_path / "scene.tif", image)
    case = Case("scene", "", {"": Source(tmp_path / "scene.tif")}, None)
    predicted = predict_case(LiteModel(published.file), published.study, case)
    assert np.mean(predicted.classes.array[0, ..., 0][wanted]) > 0.9
    ((plane,),) = explained_planes(open_explanation(published), published.study, predicted, is_patient=False)
    assert plane.heat is not None
    assert plane.heat.shape == image.shape
    assert plane.heat.min() >= 0
    assert plane.heat.max() == pytest.approx(1, abs=1e-5)
    near = np.zeros_like(wanted)  # a map has the resolution of the deepest features: 4 pixels
    for row, column in np.argwhere(wanted):
        near[max(row - 4, 0) : row + 5, max(column - 4, 0) : column + 5] = True
    assert plane.heat[wanted].mean() > 3 * plane.heat[~near].mean()
    assert near.ravel()[plane.heat.argmax()]


def test_a_class_that_is_not_predicted_has_no_heat(discs: Path, tmp_path: Path) -> None:
    published = open_published(discs)
    tifffile.imwrite(tmp_path / "empty.tif", np.full((40, 40), 100, np.uint8))
    case = Case("empty", "", {"": Source(tmp_path / "empty.tif")}, None)
    predicted = predict_case(LiteModel(published.file), published.study, case)
    assert not predicted.classes.array.any()
    ((plane,),) = explained_planes(open_explanation(published), published.study, predicted, is_patient=False)
    assert plane.heat is not None
    assert not plane.heat.any()


def test_a_large_plane_is_thinned_as_its_overlay_is(
    discs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = open_published(discs)
    image, _ = scene(np.random.default_rng(5), (50, 70))
    tifffile.imwrite(tmp_path / "scene.tif", image)
    case = Case("scene", "", {"": Source(tmp_path / "scene.tif")}, None)
    predicted = predict_case(LiteModel(published.file), published.study, case)
    explaining = open_explanation(published)
    ((whole,),) = explained_planes(explaining, published.study, predicted, is_patient=False)
    monkeypatch.setattr("common.inference.pictures.LONGEST", 24)
    ((thin,),) = explained_planes(explaining, published.study, predicted, is_patient=False)
    assert thin.image.shape[:2] == thin.labels.shape == (17, 24)
    assert whole.heat is not None
    assert thin.heat is not None
    np.testing.assert_array_equal(thin.heat, whole.heat[::3, ::3])


def test_pictures_lie_beside_the_overlay(discs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, _ = scene(np.random.default_rng(5), (50, 70))
    tifffile.imwrite(tmp_path / "scene.tif", image)
    out = tmp_path / "out"
    command = ["predict", str(discs), str(tmp_path / "scene.tif"), "--out", str(out), "--threads", "1"]
    assert main([*command, "--overlay", "--explain", "--json"]) == 0
    (written,) = json.loads(capsys.readouterr().out)["written"]
    assert written["files"]["explanation of disc"] == str(out / "scene_explain_disc.png")
    drawn = [imagecodecs.png_decode((out / f"scene_{kind}.png").read_bytes()) for kind in ("overlay", "explain_disc")]
    assert drawn[0].shape[0] > drawn[1].shape[0], "the legend"
    assert drawn[0].shape[1] == drawn[1].shape[1]
    coloured = [(picture.max(axis=2) - picture.min(axis=2) > 20).mean() for picture in drawn]
    assert coloured[1] > 2 * coloured[0] > 0
    assert main([*command, "--explain"]) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_volume_has_a_picture_for_each_class(organs: Path, tmp_path: Path) -> None:
    volume = np.random.default_rng(0).integers(0, 200, (20, 24, 10)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(volume, np.diag([-1.5, 2, 3, 1])), tmp_path / "scan.nii.gz")
    out = tmp_path / "out"
    assert main(["predict", str(organs), str(tmp_path / "scan.nii.gz"), "--out", str(out), "--explain"]) == 0
    assert {path.name for path in out.glob("*.png")} == {
        "scan_explain_liver_left_1.png", "scan_explain_liver_left_2.png",
    }  # fmt: skip


def test_explaining_loads_no_tensorflow(discs: Path, tmp_path: Path) -> None:
    image, _ = scene(np.random.default_rng(5))
    tifffile.imwrite(tmp_path / "scene.tif", image)
    arguments = ["predict", str(discs), str(tmp_path / "scene.tif"), "--out", str(tmp_path / "out"), "--explain"]
    code = f"import sys; from client.cli import main; main({arguments!r}); assert 'tensorflow' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_manifest_lists_the_file_and_damage_is_refused(discs: Path, tmp_path: Path) -> None:
    check_files(discs)
    manifest = json.loads((discs / "manifest.json").read_text())
    assert manifest["explanation"]["maps"] == ["disc"]
    assert manifest["explanation"]["output"]["shape"] == [1, SIZE, SIZE, 2]
    assert "`model_explain.tflite`" in (discs / "model_card.md").read_text()
    copy = Path(shutil.copytree(discs, tmp_path / "v1"))
    file = copy / "model_explain.tflite"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(PublishError, match=r"model_explain\.tflite: damaged or changed"):
        open_explanation(open_published(copy))
    file.unlink()
    with pytest.raises(PublishError, match=r"model_explain\.tflite: the manifest names this file, which is not there"):
        open_explanation(open_published(copy))
    assert main(["predict", str(copy), str(copy / "study.yaml"), "--out", str(tmp_path / "out"), "--explain"]) == 9


def test_a_version_without_the_file_says_so_before_any_work(
    discs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(discs, tmp_path / "v1"))
    manifest = json.loads((copy / "manifest.json").read_text()) | {"explanation": None}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    sign(copy, coordinator_of(str(manifest["study"])))
    tifffile.imwrite(tmp_path / "scene.tif", scene(np.random.default_rng(5))[0])
    command = ["predict", str(copy), str(tmp_path / "scene.tif"), "--out", str(tmp_path / "out")]
    assert main([*command, "--explain"]) == 9
    assert "published without the file that explains it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(command) == 0
