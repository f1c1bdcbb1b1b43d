"""What every reader promises, whatever the format: axes, spacing, affine, types, and the numbers that were written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import DataError
from common.imaging.case import Source
from common.imaging.readers import read_image, read_label
from common.imaging.volume import scaling_affine

Write = Callable[[Path, np.ndarray, np.ndarray], Path]


@dataclass(frozen=True)
class Format:
    """How a format stores (z, y, x) voxels and an affine from (x, y, z) to RAS.

    `dimensions` is 2 where only single slices can be written, `oriented` whether the file keeps the affine or only the
    spacing, `types` what it can store.
    """

    name: str
    write: Write
    dimensions: int
    oriented: bool
    types: tuple[Any, ...]


def _write_tiff(folder: Path, voxels: np.ndarray, affine: np.ndarray) -> Path:
    x, y, _ = np.linalg.norm(affine[:3, :3], axis=0)
    resolution = {"resolution": (1e4 / x, 1e4 / y), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(folder / "a.tif", voxels[0], metadata=None, compression="zlib", **resolution)
    return folder / "a.tif"


def _write_nifti(suffix: str, kind: Any) -> Write:
    def write(folder: Path, voxels: np.ndarray, affine: np.ndarray) -> Path:
        image = kind(voxels.transpose(2, 1, 0), affine)
        image.header.set_xyzt_units("mm")
        nib.save(image, folder / f"a{suffix}")
        return folder / f"a{suffix}"

    return write


@pytest.fixture(params=["TIFF", "NIfTI-1", "NIfTI-2", "DICOM series", "DICOM multi-frame", "DICOM single slice"])
def file_format(request: pytest.FixtureRequest, write_series: Any, write_multiframe: Any) -> Format:
    def series(folder: Path, voxels: np.ndarray, affine: np.ndarray) -> Path:
        write_series(folder / "series", voxels, affine)
        return folder / "series"

    def multiframe(folder: Path, voxels: np.ndarray, affine: np.ndarray) -> Path:
        path: Path = write_multiframe(folder / "a.dcm", voxels, affine)
        return path

    def single(folder: Path, voxels: np.ndarray, affine: np.ndarray) -> Path:
        def edit(dataset: Any, z: int) -> None:
            dataset.SliceThickness = f"{np.linalg.norm(affine[:3, 2]):.10f}"

        path: Path = write_series(folder / "slice", voxels, affine, edit=edit)[0]
        return path

    integers = (np.uint8, np.int16, np.uint16)
    formats = [
        Format("TIFF", _write_tiff, 2, False, (*integers, np.float32)),
        Format("NIfTI-1", _write_nifti(".nii", nib.Nifti1Image), 3, True, (*integers, np.int32, np.float32)),
        Format("NIfTI-2", _write_nifti(".nii.gz", nib.Nifti2Image), 3, True, (*integers, np.int32, np.float32)),
        Format("DICOM series", series, 3, True, integers),
        Format("DICOM multi-frame", multiframe, 3, True, integers),
        Format("DICOM single slice", single, 2, True, integers),
    ]
    return next(found for found in formats if found.name == request.param)


def voxels_of(file_format: Format, dtype: Any, shape: tuple[int, int, int] = (4, 5, 7)) -> np.ndarray:
    """Every voxel has its own number, so that no axis can be mistaken for another."""
    depth = 1 if file_format.dimensions == 2 else shape[0]
    return np.arange(depth * shape[1] * shape[2]).reshape(depth, *shape[1:]).astype(dtype)


def oblique(spacing: tuple[float, float, float], angles: tuple[float, float, float]) -> np.ndarray:
    """A right-handed affine: `spacing` (z, y, x), turned about the three axes by `angles` in radians."""
    affine = scaling_affine(spacing)
    for axis, angle in enumerate(angles):
        turn = np.eye(4)
        i, j = (axis + 1) % 3, (axis + 2) % 3
        turn[[i, i, j, j], [i, j, i, j]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        affine = turn @ affine
    affine[:3, 3] = (-31.5, 12.25, 100.125)
    return affine


def test_axes_are_z_y_x_channel_and_numbers_come_back(file_format: Format, tmp_path: Path) -> None:
    for dtype in file_format.types:
        stored = voxels_of(file_format, dtype)
        path = file_format.write(tmp_path, stored, np.eye(4))
        volume = read_image(path, file_format.dimensions)
        assert np.array_equal(volume.array[..., 0], stored)
        assert volume.array.shape == (*stored.shape, 1)
        assert volume.array.dtype == dtype
        assert volume.array.flags.c_contiguous
        for old in (tmp_path / "series", tmp_path / "slice"):
            for file in old.glob("*"):
                file.unlink()


def test_labels_are_int32_with_the_stored_numbers(file_format: Format, tmp_path: Path) -> None:
    stored = voxels_of(file_format, np.uint8)
    label = read_label(file_format.write(tmp_path, stored, np.eye(4)), file_format.dimensions)
    assert label.array.dtype == np.int32
    assert np.array_equal(label.array[..., 0], stored)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    spacing=st.tuples(*[st.floats(0.2, 8.0)] * 3),
    angles=st.tuples(*[st.floats(-3.1, 3.1)] * 3),
)
def test_every_voxel_keeps_its_place_in_the_world(
    file_format: Format,
    tmp_path_factory: pytest.TempPathFactory,
    spacing: tuple[float, float, float],
    angles: tuple[float, float, float],
) -> None:
    stored = voxels_of(file_format, np.int16)
    affine = oblique(spacing, angles)
    path = file_format.write(tmp_path_factory.mktemp("case"), stored, affine)
    volume = read_image(path, file_format.dimensions)
    assert volume.spacing[1:] == pytest.approx(spacing[1:], rel=1e-5)
    if file_format.dimensions == 3:
        assert volume.spacing[0] == pytest.approx(spacing[0], rel=1e-5)
    expected = affine if file_format.oriented else scaling_affine(volume.spacing)
    z, y, x = stored.shape
    for index in [(0, 0, 0), (x - 1, 0, 0), (0, y - 1, 0), (0, 0, z - 1), (x - 1, y - 1, z - 1), (2, 1, z // 2)]:
        assert np.allclose(volume.affine @ (*index, 1), expected @ (*index, 1), atol=1e-4)
    assert np.array_equal(volume.array[..., 0], stored)


def test_other_dimensions_are_refused(file_format: Format, tmp_path: Path) -> None:
    path = file_format.write(tmp_path, voxels_of(file_format, np.uint8), np.eye(4))
    with pytest.raises(DataError, match=rf"image {path.name}: expected a .D"):
        read_image(path, 5 - file_format.dimensions)


def test_a_file_cut_short_is_refused(file_format: Format, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = file_format.write(tmp_path, voxels_of(file_format, np.uint8, (4, 50, 70)), np.eye(4))
    file = path if path.is_file() else sorted(path.iterdir())[-1]
    whole = file.read_bytes()
    for length in [*range(0, len(whole), len(whole) // 30), len(whole) - 1]:
        file.write_bytes(whole[:length])
        with pytest.raises(DataError, match=rf"image {path.name}: .+\. .+"):
            read_image(path, file_format.dimensions)
    assert not caplog.records  # the libraries would print them to stderr


def test_damaged_bytes_raise_a_data_error_at_most(
    file_format: Format, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = file_format.write(tmp_path, voxels_of(file_format, np.uint8), np.eye(4))
    file = path if path.is_file() else sorted(path.iterdir())[-1]
    whole = file.read_bytes()
    rng = np.random.default_rng(1)
    for _ in range(100):
        damaged = bytearray(whole)
        for position in rng.integers(0, min(len(whole), 1200), 4):
            damaged[position] = rng.integers(256)
        file.write_bytes(bytes(damaged))
        try:
            read_image(path, file_format.dimensions)
        except DataError as error:
            assert str(error).startswith(f"image {path.name}: ")
    assert not caplog.records


def test_a_level_that_does_not_exist_is_refused(file_format: Format, tmp_path: Path) -> None:
    path = file_format.write(tmp_path, voxels_of(file_format, np.uint8), np.eye(4))
    with pytest.raises(DataError, match=r"level"):
        read_image(Source(path, level=3), file_format.dimensions)
