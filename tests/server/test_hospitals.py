"""Generated hospitals: the layout that sites read, the same bytes for the same seed, and images worth training on."""

from __future__ import annotations

import errno
import hashlib
import json
from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from scipy import ndimage

from common.errors import DataError, RunFolderError, UsageError
from common.study import parse_study
from server.simulation.hospitals import (
    HOLDOUT,
    HOSPITALS,
    SETTINGS_FILE,
    example_study,
    generate_hospitals,
    render_case,
)


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def touching_pairs(labels: npt.NDArray[np.uint16]) -> int:
    """Pairs of different cells that meet along a pixel's side."""
    pairs = set()
    for a, b in ((labels[1:], labels[:-1]), (labels[:, 1:], labels[:, :-1])):
        met = (a != b) & (a > 0) & (b > 0)
        pairs |= {(int(min(p)), int(max(p))) for p in zip(a[met], b[met], strict=True)}
    return len(pairs)


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generated") / "hospitals"
    generate_hospitals(folder, seed=1, images_per_site=3, holdout_per_site=2, size=96)
    return folder


def test_layout_is_that_of_five_hospitals_and_a_holdout(hospitals: Path) -> None:
    assert {entry.name for entry in hospitals.iterdir()} == {*HOSPITALS, HOLDOUT, SETTINGS_FILE}
    for site in HOSPITALS:
        names = [path.name for path in sorted((hospitals / site / "images").iterdir())]
        assert names == ["0000.tif", "0001.tif", "0002.tif"]
        assert names == [path.name for path in sorted((hospitals / site / "labels").iterdir())]
    images = {path.name for path in (hospitals / HOLDOUT / "images").iterdir()}
    assert images == {f"{index:04d}-{site}.tif" for site in HOSPITALS for index in range(2)}
    assert images == {path.name for path in (hospitals / HOLDOUT / "labels").iterdir()}


def test_images_are_rgb_bytes_and_labels_number_connected_cells_without_gaps(hospitals: Path) -> None:
    paths = sorted(hospitals.glob("*/images/*.tif"))
    assert len(paths) == 5 * (3 + 2)
    for path in paths:
        image = tifffile.imread(path)
        labels = tifffile.imread(path.parents[1] / "labels" / path.name)
        assert (image.shape, image.dtype) == ((96, 96, 3), np.uint8)
        assert (labels.shape, labels.dtype) == ((96, 96), np.uint16)
        values = np.unique(labels)
        np.testing.assert_array_equal(values, np.arange(values.size))
        assert values.size > 2
        for value in values[1:]:
            assert ndimage.label(labels == value)[1] == 1


@pytest.mark.parametrize("site", HOSPITALS)
def test_cells_touch_and_are_told_from_the_background_by_their_stain(site: str) -> None:
    cases = [render_case(site, "training", index, seed=5) for index in range(4)]
    assert sum(touching_pairs(labels) for _, labels in cases) >= 4
    for image, labels in cases:
        gray = image.mean(axis=-1)
        inside, outside = gray[labels > 0], gray[labels == 0]
        contrast = (inside.mean() - outside.mean()) / np.hypot(inside.std(), outside.std())
        assert contrast > 0.5 if HOSPITALS[site].light == "emission" else contrast < -0.5
        assert 0.03 < (labels > 0).mean() < 0.6


def test_hospitals_differ_in_colour() -> None:
    colours = {
        site: np.mean([render_case(site, "training", i, seed=5)[0].mean(axis=(0, 1)) for i in range(4)], axis=0)
        for site in HOSPITALS
    }
    for a, b in combinations(HOSPITALS, 2):
        assert np.abs(colours[a] - colours[b]).max() > 10


def test_same_seed_gives_the_same_bytes_and_another_seed_other_images(hospitals: Path, tmp_path: Path) -> None:
    generate_hospitals(tmp_path / "again", seed=1, images_per_site=3, holdout_per_site=2, size=96)
    assert digests(tmp_path / "again") == digests(hospitals)
    generate_hospitals(tmp_path / "other", seed=2, images_per_site=3, holdout_per_site=2, size=96)
    same = digests(tmp_path / "other").items() & digests(hospitals).items()
    assert not same


def test_a_case_does_not_depend_on_how_many_others_there_are(hospitals: Path, tmp_path: Path) -> None:
    generate_hospitals(tmp_path / "few", seed=1, images_per_site={"east": 1, "north": 2}, holdout_per_site=1, size=96)
    few = {name: digest for name, digest in digests(tmp_path / "few").items() if name != SETTINGS_FILE}
    assert len(few) == 2 * (1 + 2) + 2 * 2
    assert few.items() <= digests(hospitals).items()


def test_no_case_repeats_another(hospitals: Path) -> None:
    images = [digest for name, digest in digests(hospitals).items() if "/images/" in name]
    assert len(set(images)) == len(images)


def test_complete_data_with_the_same_settings_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "hospitals"
    generate_hospitals(folder, seed=1, images_per_site=1, holdout_per_site=0, size=32)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.tif")}
    generate_hospitals(folder, seed=1, images_per_site=1, holdout_per_site=0, size=32)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.tif")} == before


def test_data_of_other_settings_or_with_missing_files_is_made_anew(tmp_path: Path) -> None:
    folder = tmp_path / "hospitals"
    generate_hospitals(folder, seed=1, images_per_site=2, holdout_per_site=0, size=32)
    first = digests(folder)
    (folder / "east" / "images" / "0001.tif").unlink()
    generate_hospitals(folder, seed=1, images_per_site=2, holdout_per_site=0, size=32)
    assert digests(folder) == first
    generate_hospitals(folder, seed=2, images_per_site=1, holdout_per_site=0, size=32)
    assert json.loads((folder / SETTINGS_FILE).read_text())["seed"] == 2
    assert [path.name for path in (folder / "east" / "images").iterdir()] == ["0000.tif"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["hospitals"]


def test_interrupted_generation_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def stop_at_the_third(path: Path, *arguments: object, **options: object) -> None:
        written.append(path)
        if len(written) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(tifffile, "imwrite", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        generate_hospitals(tmp_path / "hospitals", seed=1, images_per_site=2, size=32)
    assert len(written) == 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["notes.txt", "east"])
def test_folder_that_holds_something_else_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(DataError, match="expected an empty or generated folder"):
        generate_hospitals(tmp_path, seed=1, images_per_site=1, size=32)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_unknown_sites_and_impossible_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="found southeast"):
        generate_hospitals(tmp_path / "h", seed=1, images_per_site={"southeast": 3})
    with pytest.raises(UsageError, match="at least 1 image"):
        generate_hospitals(tmp_path / "h", seed=1, images_per_site=0)
    assert not (tmp_path / "h").exists()


def test_example_study_is_of_the_generated_hospitals() -> None:
    study = parse_study(example_study())
    assert study.cohort.sites == tuple(sorted(HOSPITALS))
    assert (study.task.dimensions, study.task.channels, study.task.labels) == (2, 3, "instances")
    assert study.task.classes == ("background", "cell")


def test_a_full_disk_is_told_with_the_way_out_and_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tifffile, "imwrite", full)
    with pytest.raises(RunFolderError, match=r"hospitals: cannot be written \(No space left on device\); free space"):
        generate_hospitals(tmp_path / "hospitals", seed=1, images_per_site=1, size=32)
    assert list(tmp_path.iterdir()) == []
