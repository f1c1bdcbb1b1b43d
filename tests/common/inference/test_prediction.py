"""Predictions of whole cases: the same however the image is read, on its own grid, in bounded memory."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import tifffile

from common.errors import DataError
from common.imaging.case import Case, Source
from common.imaging.loading import load_case
from common.imaging.sliding_window import predict_tiled
from common.inference.images import LazyImage, open_case
from common.inference.lite import class_indices
from common.inference.prediction import predict_case
from common.study import Study, parse_study

STUDY = """
study: cells
task: {{dimensions: {dimensions}, channels: {channels}, classes: [{classes}], labels: {labels}{modalities}}}
model: {{filters: 4, depth: 2, head: {head}}}
preprocessing: {{patch: {patch}, {preprocessing}}}
training: {{rounds: 3}}
cohort: {{sites: [north]}}
evaluation: {{overlap: 0.5}}
"""


def study_of(
    dimensions: int = 2,
    channels: int = 1,
    *,
    classes: str = "background, cell",
    labels: str = "classes",
    head: str = "softmax",
    preprocessing: str = "intensity: zscore",
    modalities: str = "",
) -> Study:
    patch = [16, 24] if dimensions == 2 else [8, 16, 24]
    if modalities:
        modalities = f", modalities: [{modalities}], missing_modality: zero"
    return parse_study(STUDY.format(**locals()))


class Network:
    """Stands in for LiteRT: says of each voxel what its neighbours within the tile say, so that tiles matter."""

    def __init__(self, study: Study, outputs: int) -> None:
        tile = study.publishing.tile
        self.input_shape = (1, *tile, study.task.channels)
        self.output_shape = (1, *tile, outputs)
        self._softmax = study.model.head == "softmax"

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        smooth = (batch + np.roll(batch, 1, axis=1) + np.roll(batch, 1, axis=2)).mean(axis=-1, keepdims=True) / 3
        count = self.output_shape[-1]
        logits = np.concatenate([smooth * (1 - output) + 0.3 * output for output in range(count)], axis=-1)
        if self._softmax:
            parts = np.exp(-logits)
            return np.asarray(parts / parts.sum(axis=-1, keepdims=True), np.float32)
        return np.asarray(1 / (1 + np.exp(-logits)), np.float32)


def predicted(study: Study, case: Case, outputs: int = 2, **options: Any) -> Any:
    return predict_case(Network(study, outputs), study, case, **options)  # type: ignore[arg-type]


def case_of(*paths: Path, names: tuple[str, ...] = ("",)) -> Case:
    return Case("one", "", {name: Source(path) for name, path in zip(names, paths, strict=True)}, None)


@pytest.mark.parametrize("intensity", ["zscore", "percentile", "none", "window"])
@pytest.mark.parametrize(
    "form", [{}, {"tile": (32, 48)}, {"compression": "zlib", "rowsperstrip": 19}, {"byteorder": ">"}], ids=str
)
@pytest.mark.parametrize(("samples", "channels"), [(1, 1), (1, 3), (3, 3), (3, 1)])
def test_tiles_are_prepared_as_the_whole_image_is(
    tmp_path: Path, samples: int, channels: int, form: dict[str, Any], intensity: str
) -> None:
    window = ", window: [100, 40000]" if intensity == "window" else ""
    study = study_of(channels=channels, preprocessing=f"intensity: {intensity}{window}")
    rng = np.random.default_rng(0)
    image = (rng.normal(size=(70, 91, samples)).cumsum(axis=0) * 900 + 20000).clip(0, 65535).astype(np.uint16)
    photometric = "rgb" if samples == 3 else "minisblack"
    path = tmp_path / "image.tif"
    tifffile.imwrite(path, image[..., 0] if samples == 1 else image, photometric=photometric, **form)
    whole = load_case(case_of(path), study)
    opened = open_case(case_of(path), study, large=1)
    assert opened.grid.to_json() == whole.grid.to_json()
    if (samples, channels, intensity) != (3, 1, "percentile"):  # there is no counting luminances
        assert isinstance(opened.image, LazyImage)
        assert type(opened.stored).__name__ == "BandedTiff"
    for window_ in ((slice(0, 70), slice(0, 91)), (slice(11, 43), slice(20, 60)), (slice(11, 43), slice(60, 91))):
        np.testing.assert_allclose(opened.image.read(window_), whole.image[window_], rtol=0, atol=2e-6)
    opened.close()


def test_volumes_of_several_modalities_are_prepared_in_tiles(tmp_path: Path) -> None:
    study = study_of(3, 3, modalities="T1, T2, FLAIR")
    rng = np.random.default_rng(1)
    affine = np.array([[0, -1.5, 0, 4], [2, 0, 0, -3], [0, 0, -1, 7], [0, 0, 0, 1.0]])  # turned and flipped
    paths = [tmp_path / f"{name}.nii" for name in ("t1", "flair")]
    for path in paths:
        nibabel.save(nibabel.Nifti1Image(rng.integers(0, 900, (30, 22, 11)).astype(np.int16), affine), path)
    case = case_of(*paths, names=("T1", "FLAIR"))  # T2 is missing: zeros
    whole, opened = load_case(case, study), open_case(case, study, large=1)
    assert isinstance(opened.image, LazyImage)
    assert opened.grid.to_json() == whole.grid.to_json()
    read = opened.image.read(tuple(slice(0, n) for n in whole.image.shape[:3]))
    np.testing.assert_allclose(read, whole.image, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "preprocessing",
    [
        "intensity: zscore",
        "spacing: [2, 1.3, 1.7]",
        "spacing: [0.7, 1, 1]",
        "crop: foreground",
        "spacing: [3, 2, 2], crop: foreground",
    ],
)
@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_classes_come_back_on_the_stored_grid_as_from_the_whole_image(
    tmp_path: Path, preprocessing: str, head: str
) -> None:
    study = study_of(3, classes="background, a, b", head=head, preprocessing=preprocessing)
    rng = np.random.default_rng(2)
    voxels = np.zeros((33, 40, 29), np.float32)
    voxels[4:30, 5:37, 6:25] = rng.normal(size=(26, 32, 19)).cumsum(axis=0) + 9
    affine = np.array([[0, 0, 1.4, 4], [-1, 0.05, 0, -3], [0, 1.1, 0, 7], [0, 0, 0, 1.0]])
    nibabel.save(nibabel.Nifti1Image(voxels, affine), tmp_path / "image.nii.gz")
    case = case_of(tmp_path / "image.nii.gz")
    outputs = 3 if head == "softmax" else 2
    found = predicted(study, case, outputs).classes
    prepared = load_case(case, study)
    model = Network(study, outputs)
    expected = prepared.grid.restore_probabilities(
        predict_tiled(model, prepared.image, study.publishing.tile, 0.5, 1), head
    )
    assert found.shape == expected.shape == (29, 40, 33)
    assert np.array_equal(found.affine, expected.affine)
    assert len(np.unique(found.array)) > 1
    # A slab at a time rounds differently where two classes are as likely.
    assert np.mean(found.array != expected.array) < 1e-4


def test_a_plane_is_resampled_back_in_slabs(tmp_path: Path) -> None:
    study = study_of(head="sigmoid", preprocessing="spacing: [1.5, 0.8]")
    image = np.random.default_rng(3).integers(0, 200, (120, 90), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", image, resolution=(1e4, 1e4), resolutionunit=3)
    case = case_of(tmp_path / "a.tif")
    found = predicted(study, case, 1).classes
    prepared = load_case(case, study)
    whole = predict_tiled(Network(study, 1), prepared.image, study.publishing.tile, 0.5, 1)
    expected = prepared.grid.restore_probabilities(whole, "sigmoid")
    assert np.array_equal(found.array, expected.array)


def test_mirroring_is_the_mean_over_all_mirror_images(tmp_path: Path) -> None:
    study = study_of(head="sigmoid")
    image = np.random.default_rng(4).integers(0, 200, (16, 24), np.uint8)  # one tile
    tifffile.imwrite(tmp_path / "a.tif", image)
    prepared = load_case(case_of(tmp_path / "a.tif"), study).image[np.newaxis]
    model = Network(study, 1)
    mirrored = [np.flip(model(np.flip(prepared, axes)), axes) for axes in ((), (1,), (2,), (1, 2))]
    expected = class_indices(np.mean(mirrored, axis=0, dtype=np.float32)[0], "sigmoid")
    assert not np.array_equal(expected, class_indices(mirrored[0][0], "sigmoid"))
    found = predicted(study, case_of(tmp_path / "a.tif"), 1, mirror=True)
    assert np.array_equal(found.classes.array[0, ..., 0], expected)


def test_objects_are_told_apart_on_the_stored_grid_also_from_a_file_on_disk(tmp_path: Path) -> None:
    study = study_of(labels="instances", head="sigmoid", preprocessing="intensity: zscore")
    image = np.full((90, 80), 20, np.uint8)
    for y, x in ((10, 10), (10, 50), (50, 30)):
        image[y : y + 15, x : x + 15] = 200
    tifffile.imwrite(tmp_path / "a.tif", image)

    class Brightness(Network):
        """Needs no neighbours."""

        def __call__(self, batch: np.ndarray) -> np.ndarray:
            return np.asarray(1 / (1 + np.exp(-batch)), np.float32)

    case, model = case_of(tmp_path / "a.tif"), Brightness(study, 1)
    for large in (1 << 24, 1):
        found = predict_case(model, study, case, large=large, temporary=tmp_path)  # type: ignore[arg-type]
        assert found.object_count == 3
        assert np.array_equal(found.objects > 0, found.classes.array[..., 0] > 0)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tif"]


def test_a_full_disk_fails_the_case_and_not_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_of(labels="instances", head="sigmoid", preprocessing="intensity: zscore")
    tifffile.imwrite(tmp_path / "a.tif", np.full((90, 80), 20, np.uint8))

    def full(*arguments: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(DataError, match=r"No space left on device.*free space in OUT"):
        predicted(study, case_of(tmp_path / "a.tif"), 1, large=1, temporary=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tif"]


MEASURE = """
import sys
from pathlib import Path
import numpy as np
from common.imaging.case import Case, Source
from common.inference.instance_masks import numbered_masks
from common.inference.prediction import predict_case
from common.study import load_study

study = load_study(Path(sys.argv[1]))

class Network:
    input_shape, output_shape = (1, 64, 64, 1), (1, 64, 64, 1)
    def __call__(self, batch):
        return 1 / (1 + np.exp(-batch))

def high_water():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

def predict(path):
    case = Case("one", "", {"": Source(Path(path))}, None)
    result = predict_case(Network(), study, case, large=1, temporary=Path(path).parent)
    result.case.close()
    assert sum(1 for _ in numbered_masks(result.objects)) == result.object_count
    return result.object_count

first = predict(sys.argv[2])  # what is loaded and set up once, and several blocks of objects
before = high_water()
print(first, predict(sys.argv[3]), high_water() - before)
"""


@pytest.mark.parametrize("form", [{}, {"tile": (64, 64), "compression": "zlib"}], ids=["plain", "tiled"])
def test_memory_does_not_grow_with_the_image(tmp_path: Path, form: dict[str, Any]) -> None:
    (tmp_path / "study.yaml").write_text(study_of(labels="instances", head="sigmoid").to_yaml())
    block = np.random.default_rng(0).integers(0, 50, (512, 512), np.uint8)
    for at in np.ndindex(16, 16):
        y, x = (32 * index + 8 for index in at)
        block[y : y + 12, x : x + 12] = 200
    for name, count in (("small", 12), ("large", 48)):
        tifffile.imwrite(tmp_path / f"{name}.tif", np.tile(block, (count, 1)), **form)
    script = textwrap.dedent(MEASURE)
    command = [sys.executable, "-c", script, *(str(tmp_path / n) for n in ("study.yaml", "small.tif", "large.tif"))]
    small, large, grown = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert (small, large) == (12 * 256, 48 * 256)
    # The pixels that are more: in float32 they would take 38 MB, and so would each output of the network, the numbers
    # of their components, their depths and their objects.
    assert grown < 12 * 2**20


def test_no_tensorflow_is_imported() -> None:
    script = (
        "import sys, client.predict, client.predict_inputs, client.predict_outputs, common.inference.instances\n"
        "import common.inference.prediction\n"
        "sys.exit('tensorflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_touching_objects_are_parted_by_the_distance_that_the_network_predicts(tmp_path: Path) -> None:
    study = study_of(labels="instances", head="distance", preprocessing="intensity: none")
    image = np.zeros((40, 60), np.uint8)
    image[10:30, 10:50] = 255  # two squares that touch
    tifffile.imwrite(tmp_path / "a.tif", image)
    columns = np.abs(np.arange(60) - 29.5)
    depth = np.minimum(columns, 20 - columns).clip(0) / 10  # 0 where they touch, 1 in the middle of each

    class Distance(Network):
        def __call__(self, batch: np.ndarray) -> np.ndarray:
            return np.concatenate([batch, batch * depth[np.newaxis, np.newaxis, :, np.newaxis]], -1, dtype=np.float32)

    model = Distance(study, 2)
    model.input_shape, model.output_shape = (1, 40, 60, 1), (1, 40, 60, 2)  # one tile, so that columns are known
    for large in (1 << 24, 1):
        found = predict_case(model, study, case_of(tmp_path / "a.tif"), large=large)  # type: ignore[arg-type]
        assert np.array_equal(found.classes.array[0, ..., 0], image > 0)
        assert found.object_count == 2
        assert found.objects is not None
        assert found.objects[0, 20, 20] != found.objects[0, 20, 40]
