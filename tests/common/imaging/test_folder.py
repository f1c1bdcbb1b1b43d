"""A site's folder: pairing, checking and splitting its cases."""

from __future__ import annotations

import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import tifffile

from common.errors import DataError
from common.imaging.folder import Case, check_cases, find_cases, split_cases

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"


def make(folder: Path, images: list[str], labels: list[str]) -> Path:
    for kind, names in (("images", images), ("labels", labels)):
        (folder / kind).mkdir(parents=True)
        for name in names:
            (folder / kind / name).write_bytes(b"x")
    return folder


def test_cases_are_paired_by_name_and_sorted(tmp_path: Path) -> None:
    make(tmp_path, ["b.tif", "a.nii.gz", ".DS_Store", "c.1.TIFF"], ["c.1.tif", "a.nii", "b.tif", ".hidden.tif"])
    images, labels = tmp_path / "images", tmp_path / "labels"
    assert find_cases(tmp_path) == [
        Case("a", images / "a.nii.gz", labels / "a.nii"),
        Case("b", images / "b.tif", labels / "b.tif"),
        Case("c.1", images / "c.1.TIFF", labels / "c.1.tif"),
    ]


def test_every_unpaired_file_is_named_in_one_error(tmp_path: Path) -> None:
    make(tmp_path, ["a.tif", "b.tif", "b.tiff"], ["b.tif", "c.tif", "notes.txt"])
    with pytest.raises(DataError) as caught:
        find_cases(tmp_path)
    message = str(caught.value)
    assert "images without a label of the same name: a.tif" in message
    assert "labels without an image of the same name: c.tif" in message
    assert "two files of one name in images/: b.tif, b.tiff" in message
    assert "files of another type in labels/: notes.txt" in message
    assert message.startswith(str(tmp_path))


def test_a_long_list_of_files_is_cut_at_five_and_counted(tmp_path: Path) -> None:
    make(tmp_path, [f"{n}.tif" for n in range(9)], [])
    with pytest.raises(DataError, match=re.escape("0.tif, 1.tif, 2.tif, 3.tif, 4.tif and 4 more")):
        find_cases(tmp_path)


def test_a_missing_or_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="images: the folder does not exist"):
        find_cases(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no cases found"):
        find_cases(make(tmp_path / "empty", [], []))
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "images").write_bytes(b"")
    with pytest.raises(DataError, match="cannot be listed"):
        find_cases(tmp_path / "file")


def save(folder: Path, name: str, image: np.ndarray, label: np.ndarray) -> None:
    for kind, array in (("images", image), ("labels", label)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(folder / kind / f"{name}.tif", array, photometric="rgb" if array.ndim == 3 else "minisblack")


def test_all_problems_of_all_cases_come_in_one_error(tmp_path: Path) -> None:
    grey, rgb = np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.uint8)
    save(tmp_path, "good", rgb, grey)
    save(tmp_path, "grey-serves-for-rgb", grey, grey)
    save(tmp_path, "shape", rgb, np.zeros((8, 9), np.uint8))
    save(tmp_path, "value", rgb, np.full((8, 8), 7, np.uint8))
    save(tmp_path, "torn", rgb, grey)
    torn = tmp_path / "images" / "torn.tif"
    torn.write_bytes(torn.read_bytes()[:-20])
    cases = find_cases(tmp_path)
    with pytest.raises(DataError) as caught:
        check_cases(cases, dimensions=2, channels=3, classes=2, labels="classes")
    first, *problems, last = str(caught.value).splitlines()
    assert first == "3 of 5 cases cannot be used:"
    assert [problem.strip().split(":")[0] for problem in problems] == [
        "label shape.tif",
        "image torn.tif",
        "label value.tif",
    ]
    assert "1 x 8 x 8 (z, y, x), found 1 x 8 x 9" in problems[0]
    assert "indices 0 to 1, found 7" in problems[2]
    assert "move each image" in last


def test_instance_numbers_may_exceed_the_classes(tmp_path: Path) -> None:
    save(tmp_path, "a", np.zeros((8, 8), np.uint8), np.full((8, 8), 700, np.uint16))
    check_cases(find_cases(tmp_path), dimensions=2, channels=1, classes=2, labels="instances")
    with pytest.raises(DataError, match="found 700"):
        check_cases(find_cases(tmp_path), dimensions=2, channels=1, classes=2, labels="classes")


def test_channels_that_cannot_serve_are_refused(tmp_path: Path) -> None:
    save(tmp_path, "a", np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.uint8))
    with pytest.raises(DataError, match="expected 4 channels, found 3"):
        check_cases(find_cases(tmp_path), dimensions=2, channels=4, classes=2, labels="classes")


def test_a_label_that_lost_its_place_in_the_world_is_found(tmp_path: Path) -> None:
    for kind, affine in (("images", np.diag([-1.0, 1.0, 1.0, 1.0])), ("labels", np.eye(4))):
        (tmp_path / kind).mkdir()
        nib.save(nib.Nifti1Image(np.zeros((5, 6, 7), np.uint8), affine), tmp_path / kind / "a.nii")
    # The image covers x from -4 to 0, the label, saved without the image's affine, 0 to 4.
    with pytest.raises(DataError, match=r"label a\.nii: its affine puts it 4\.0 voxels beside"):
        check_cases(find_cases(tmp_path), dimensions=3, channels=1, classes=2, labels="classes")


def cases(count: int) -> list[Case]:
    return [Case(f"case{n:03}", Path("i"), Path("l")) for n in range(count)]


def test_the_split_is_a_partition_that_depends_on_seed_and_names_only() -> None:
    training, validation = split_cases(cases(100), 0.2, seed=7)
    assert len(validation) == 20
    assert sorted([*training, *validation], key=lambda case: case.name) == cases(100)
    assert split_cases(cases(100)[::-1], 0.2, seed=7) == (training, validation)
    assert split_cases(cases(100), 0.2, seed=8) != (training, validation)


def test_a_new_case_moves_few_others() -> None:
    before = {case.name for case in split_cases(cases(100), 0.2, seed=7)[1]}
    after = {case.name for case in split_cases(cases(101), 0.2, seed=7)[1]}
    assert len(before ^ after) <= 2


@pytest.mark.parametrize(
    ("count", "fraction", "expected"),
    # training, validation
    [(1, 0.5, (1, 0)), (2, 0.01, (1, 1)), (2, 0.99, (1, 1)), (5, 0.0, (5, 0)), (10, 0.25, (7, 3)), (0, 0.5, (0, 0))],
)
def test_both_halves_of_the_split_get_a_case_where_possible(
    count: int, fraction: float, expected: tuple[int, int]
) -> None:
    training, validation = split_cases(cases(count), fraction, seed=0)
    assert (len(training), len(validation)) == expected


@pytest.mark.skipif(not (DATA / "hippocampus").is_dir(), reason="needs ../shared/data/hippocampus")
def test_real_sites_pass_the_check() -> None:
    volumes = find_cases(DATA / "hippocampus" / "high-range")
    assert len(volumes) == 20
    check_cases(volumes, dimensions=3, channels=1, classes=3, labels="classes")
    images = find_cases(DATA / "nuclei" / "brightfield_gray")
    assert len(images) == 10
    check_cases(images, dimensions=2, channels=3, classes=2, labels="instances")
