"""DICOM labels: segmentations and series of masks, laid onto the image that they were drawn on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest
from pydicom.sr.codedict import codes

from common.errors import DataError
from common.imaging.case import Source
from common.imaging.readers import dicom_seg, read_image, read_label
from common.imaging.readers.dicom_folder import find_series
from common.imaging.volume import Volume, scaling_affine

FIXTURES = Path(__file__).resolve().parents[4] / "shared" / "data" / "dicom_fixtures"
needs_fixtures = pytest.mark.skipif(not FIXTURES.is_dir(), reason="needs ../shared/data/dicom_fixtures")

AFFINE = scaling_affine((2.5, 0.75, 0.5))
WriteSeries = Callable[..., list[Path]]


def voxels(dtype: Any = np.int16) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 120, (6, 9, 11)).astype(dtype)


def leaving_out(*left: int) -> Callable[[pydicom.Dataset, int], bool]:
    return lambda dataset, z: z not in left


# Labels that are series


def test_a_label_series_of_some_slices_is_laid_onto_its_image(tmp_path: Path, write_series: WriteSeries) -> None:
    label = voxels(dtype=np.uint8) % 3
    write_series(tmp_path / "image", voxels(), AFFINE)
    write_series(tmp_path / "label", label, AFFINE, edit=leaving_out(0, 2, 5))
    grid = read_image(tmp_path / "image", 3)
    laid = read_label(tmp_path / "label", 3, grid=grid)
    label[[0, 2, 5]] = 0
    assert np.array_equal(laid.array[..., 0], label)
    assert np.array_equal(laid.affine, grid.affine)


def turned(angle: float) -> np.ndarray:
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return turn @ AFFINE


@pytest.mark.parametrize(
    ("affine", "complaint"),
    [
        (AFFINE + np.eye(4, k=3) * 0.3, "0.60 voxels beside"),
        (scaling_affine((2.5, 0.8, 0.5)), "voxels beside"),
        (scaling_affine((2.0, 0.75, 0.5)), "voxels beside"),
        (turned(0.1), "voxels beside"),
    ],
)
def test_a_label_beside_its_image_is_refused(
    tmp_path: Path, write_series: WriteSeries, affine: np.ndarray, complaint: str
) -> None:
    write_series(tmp_path / "image", voxels(), AFFINE)
    write_series(tmp_path / "label", voxels(dtype=np.uint8), affine)
    grid = read_image(tmp_path / "image", 3)
    with pytest.raises(DataError, match=complaint):
        read_label(tmp_path / "label", 3, grid=grid)


def test_a_label_outside_of_its_image_is_refused(tmp_path: Path, write_series: WriteSeries) -> None:
    above = AFFINE.copy()
    above[2, 3] = 4 * 2.5
    write_series(tmp_path / "image", voxels(), AFFINE)
    write_series(tmp_path / "label", voxels(dtype=np.uint8), above)
    with pytest.raises(DataError, match="lies outside the image, at slice 6 of 6"):
        read_label(tmp_path / "label", 3, grid=read_image(tmp_path / "image", 3))


# Segmentations

KINDS = ("BINARY", "FRACTIONAL", "LABELMAP")


def write_segmentation(path: Path, sources: list[Path], masks: np.ndarray, kind: str) -> Path:
    """`masks` has shape (z, y, x, segment), in the order of `sources`."""
    described = [
        highdicom.seg.SegmentDescription(
            segment_number=number + 1,
            segment_label=f"part {number + 1}",
            segmented_property_category=codes.SCT.Tissue,
            segmented_property_type=codes.SCT.Liver,
            algorithm_type="MANUAL",
        )
        for number in range(masks.shape[-1])
    ]
    highdicom.seg.Segmentation(
        source_images=[pydicom.dcmread(source) for source in sources],
        pixel_array=masks,
        segmentation_type=kind,
        segment_descriptions=described,
        series_instance_uid=highdicom.UID(),
        series_number=2,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="none",
        manufacturer_model_name="none",
        software_versions="1",
        device_serial_number="1",
        max_fractional_value=200,
    ).save_as(path)
    return path


@pytest.fixture
def study(tmp_path: Path, write_series: WriteSeries) -> tuple[Path, list[Path], Volume]:
    sources = write_series(tmp_path / "image", voxels(), turned(0.3))
    return tmp_path, sources, read_image(tmp_path / "image", 3)


@pytest.mark.parametrize("kind", KINDS)
def test_segments_become_label_values_where_their_frames_lie(study: tuple[Path, list[Path], Volume], kind: str) -> None:
    folder, sources, grid = study
    masks = np.zeros((6, 9, 11, 2), np.uint8)
    masks[1:3, 2:5, 3:9, 0] = 1
    masks[4, 6:8, 1:4, 1] = 1  # the slices 0, 3 and 5 are empty and left out of the file
    path = write_segmentation(folder / "label", sources, masks.astype(float) if kind == "FRACTIONAL" else masks, kind)
    expected = masks[..., 0] + 2 * masks[..., 1]
    assert np.array_equal(read_label(path, 3, grid=grid).array[..., 0], expected)
    # The grid of its own begins with the first slice that has a segment.
    alone = read_label(path, 3)
    assert np.array_equal(alone.array[..., 0], expected[1:5])
    assert np.allclose(alone.affine @ (3, 2, 0, 1), grid.affine @ (3, 2, 1, 1), atol=1e-4)
    assert alone.spacing == pytest.approx(grid.spacing, abs=1e-4)


def test_a_label_map_with_values_that_are_no_segment_is_refused(study: tuple[Path, list[Path], Volume]) -> None:
    folder, sources, grid = study
    path = write_segmentation(folder / "label", sources, np.ones((6, 9, 11, 1), np.uint8), "LABELMAP")
    dataset = pydicom.dcmread(path)
    dataset.PixelData = dataset.PixelData[:-20] + b"\7" + dataset.PixelData[-19:]
    dataset.save_as(path)
    with pytest.raises(DataError, match=r"frame 6 have the value 7, which is no segment of it\. It has 1 \(part 1\)"):
        read_label(path, 3, grid=grid)


def test_fractions_count_from_one_half(study: tuple[Path, list[Path], Volume]) -> None:
    folder, sources, grid = study
    masks = np.zeros((6, 9, 11, 1))
    masks[2, 3, :4, 0] = (0.25, 0.495, 0.5, 0.75)
    path = write_segmentation(folder / "label", sources, masks, "FRACTIONAL")
    assert read_label(path, 3, grid=grid).array[2, 3, :5, 0].tolist() == [0, 0, 1, 1, 0]


def test_overlapping_segments_are_refused(study: tuple[Path, list[Path], Volume]) -> None:
    folder, sources, grid = study
    masks = np.zeros((6, 9, 11, 3), np.uint8)
    masks[1, 2:5, 2:5, 0] = 1
    masks[1, 4:7, 4:7, 2] = 1
    masks[3, 0, 0, 1] = 1
    path = write_segmentation(folder / "label", sources, masks, "BINARY")
    with pytest.raises(DataError, match=r"segments overlap: 1 \(part 1\), 3 \(part 3\) share 1 voxels"):
        read_label(path, 3, grid=grid)


def test_a_segmentation_of_another_image_is_refused(
    study: tuple[Path, list[Path], Volume], write_series: WriteSeries
) -> None:
    folder, sources, _ = study
    path = write_segmentation(folder / "label", sources, np.ones((6, 9, 11, 1), np.uint8), "BINARY")
    write_series(folder / "straight", voxels(), AFFINE)
    with pytest.raises(DataError, match=r"label label: label frame 1 does not lie on a slice of the image"):
        read_label(path, 3, grid=read_image(folder / "straight", 3))
    write_series(folder / "part", voxels(), turned(0.3), edit=leaving_out(4, 5))
    with pytest.raises(DataError, match=r"outside the image, at slice [45] of 4"):
        read_label(path, 3, grid=read_image(folder / "part", 3))


def test_a_segmentation_in_the_folder_of_its_image_is_found_by_its_series(
    study: tuple[Path, list[Path], Volume],
) -> None:
    folder, sources, grid = study
    masks = np.ones((6, 9, 11, 1), np.uint8)
    path = write_segmentation(folder / "image" / "seg", sources, masks, "BINARY")
    (segmentation,) = [series for series in find_series(folder / "image") if series.is_segmentation]
    assert read_label(Source(folder / "image", segmentation.uid), 3, grid=grid).array.all()
    # The image is still the only one.
    assert np.array_equal(read_image(folder / "image", 3).array, grid.array)
    with pytest.raises(DataError, match="2 series"):
        read_label(folder / "image", 3)
    with pytest.raises(DataError, match="found a segmentation"):
        read_image(path, 3)
    again = pydicom.dcmread(path)
    again.SOPInstanceUID = highdicom.UID()
    again.save_as(folder / "image" / "seg2")
    with pytest.raises(DataError, match=r"holds 2 segmentations: seg, seg2"):
        read_label(Source(folder / "image", segmentation.uid), 3, grid=grid)


def test_a_damaged_segmentation_is_refused(study: tuple[Path, list[Path], Volume]) -> None:
    folder, sources, grid = study
    path = write_segmentation(folder / "label", sources, np.ones((6, 9, 11, 1), np.uint8), "BINARY")
    whole = path.read_bytes()
    for length in [*range(0, len(whole), len(whole) // 20), len(whole) - 2]:  # the last byte is padding
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"^label label: .+\. .+"):
            read_label(path, 3, grid=grid)
    shutil.copy(sources[0], path)
    with pytest.raises(DataError, match=r"cannot be read as DICOM"):
        dicom_seg.read(path)


@needs_fixtures
def test_segmentations_of_other_writers_are_read() -> None:
    for name in ("seg_image_ct_binary.dcm", "seg_image_ct_binary_fractional.dcm", "seg_image_ct_true_fractional.dcm"):
        label = read_label(FIXTURES / name, 3)
        assert label.shape == (3, 16, 16)
        assert label.spacing == pytest.approx((1.25, 0.488281, 0.488281))
        assert np.unique(label.array).tolist() == [0, 1]
    image = read_image(FIXTURES / "ct_image.dcm", 2)
    assert read_label(FIXTURES / "seg_image_ct_binary_single_frame.dcm", 2, grid=image).shape == image.shape
    with pytest.raises(DataError, match="segments overlap"):
        read_label(FIXTURES / "seg_image_ct_binary_overlap.dcm", 3)
    with pytest.raises(DataError, match="tiles"):
        read_label(FIXTURES / "seg_image_sm_dots.dcm", 2)
