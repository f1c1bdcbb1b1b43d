"""What series a folder holds: looked through once for all of them, again when a file changes, reports left aside."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.uid import CTImageStorage, generate_uid

from common.errors import DataError
from common.imaging.case import Source
from common.imaging.checks import examine_case
from common.imaging.discovery import discover
from common.imaging.readers import read_image
from common.imaging.readers.dicom_folder import find_series, scan_folder
from common.imaging.volume import scaling_affine

AFFINE = scaling_affine((2.5, 0.75, 0.5))
VOXELS = np.random.default_rng(3).integers(0, 900, (4, 9, 11)).astype(np.int16)
REPORT = "1.2.840.10008.5.1.4.1.1.88.33"
WriteSeries = Callable[..., list[Path]]


def report_beside(image: Path, sop_class: str = REPORT) -> Path:
    """A file without an image that bears the series' number and comes before its files by name."""
    dataset = pydicom.dcmread(image)
    for keyword in ("PixelData", "Rows", "Columns", "SeriesDescription", "ImagePositionPatient"):
        delattr(dataset, keyword)
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = sop_class
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.Modality = "SR"
    path = image.with_name("0report")
    dataset.save_as(path, enforce_file_format=True)
    return path


def test_report_that_bears_the_number_of_a_series_is_left_aside(tmp_path: Path, write_series: WriteSeries) -> None:
    paths = write_series(tmp_path, VOXELS, AFFINE)
    report = report_beside(paths[0])
    (series,) = find_series(tmp_path)
    assert (series.description, series.modality, series.kind) == ("thorax", "CT", "CT Image Storage")
    assert series.files == tuple(sorted(paths)) and series.frames == len(VOXELS)
    assert scan_folder(tmp_path).left_aside == {report: "Comprehensive SR Storage"}
    for source in (Source(tmp_path), Source(tmp_path, series.uid)):
        assert np.array_equal(read_image(source, 3).array[..., 0], VOXELS)
    found = discover(tmp_path)
    (case,) = found.cases
    (finding,) = found.findings
    assert (finding.code, finding.case, finding.level) == ("W521", "", "warning")
    assert finding.message == "a file holds no images (Comprehensive SR Storage): 0report"
    facts, findings = examine_case(case)
    assert facts is not None and [finding.code for finding in findings] == ["E201"]


def test_file_of_the_images_class_without_an_image_is_not_left_aside(tmp_path: Path, write_series: WriteSeries) -> None:
    """It may be the last slice: without it, the others still make a regular grid."""
    report_beside(write_series(tmp_path, VOXELS, AFFINE)[0], CTImageStorage)
    with pytest.raises(DataError, match="0report holds no image"):
        read_image(tmp_path, 3)


def test_reports_alone_are_a_series_without_images(tmp_path: Path, write_series: WriteSeries) -> None:
    paths = write_series(tmp_path, VOXELS[:1], AFFINE)
    report_beside(paths[0])
    paths[0].unlink()
    (series,) = find_series(tmp_path)
    assert (series.frames, series.kind) == (0, "Comprehensive SR Storage")
    with pytest.raises(DataError, match="holds no DICOM images"):
        read_image(tmp_path, 3)


@pytest.fixture
def headers_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are looked into for what series they are of."""
    names: list[str] = []
    read = pydicom.dcmread

    def counting(path: Path, *rest: Any, **options: Any) -> Any:
        if "Rows" in (options.get("specific_tags") or ()):
            names.append(path.name)
        return read(path, *rest, **options)

    monkeypatch.setattr(pydicom, "dcmread", counting)
    return names


def test_flat_export_is_looked_through_once_for_all_its_series(
    tmp_path: Path, write_series: WriteSeries, headers_read: list[str]
) -> None:
    for number, description in enumerate(("T1post", "T2", "FLAIR", "mask")):

        def edit(dataset: pydicom.Dataset, z: int, description: str = description) -> None:
            dataset.SeriesDescription, dataset.Modality, dataset.StudyInstanceUID = description, "MR", "1.2.3"

        write_series(tmp_path, VOXELS % (2 if description == "mask" else 900), AFFINE, edit=edit, series=f"1.{number}")
    files = [path.name for path in tmp_path.iterdir()]
    (case,) = discover(tmp_path).cases
    facts, findings = examine_case(case)
    assert facts is not None and [finding for finding in findings if finding.level == "error"] == []
    assert len(facts.images) == 3 and facts.label is not None
    assert sorted(headers_read) == sorted(files) and len(files) == 4 * len(VOXELS)


@pytest.mark.parametrize("change", ["content", "gone", "new", "link"])
def test_folder_is_looked_through_again_when_a_file_changes(
    tmp_path: Path, write_series: WriteSeries, headers_read: list[str], change: str
) -> None:
    paths = write_series(tmp_path / "series", VOXELS, AFFINE)
    before = scan_folder(tmp_path / "series")
    assert scan_folder(tmp_path / "series") is before and len(headers_read) == len(VOXELS)
    if change == "content":
        dataset = pydicom.dcmread(paths[0])
        dataset.SeriesInstanceUID = generate_uid()
        dataset.save_as(paths[0], enforce_file_format=True)
        expected = [1, 3]
    elif change == "gone":
        paths[0].unlink()
        expected = [3]
    elif change == "new":
        write_series(tmp_path / "series", VOXELS[:2], AFFINE)
        expected = [2, 4]
    else:
        paths[0].rename(tmp_path / "elsewhere")
        paths[0].symlink_to(tmp_path / "elsewhere")
        expected = [4]
    after = scan_folder(tmp_path / "series")
    assert after is not before and sorted(series.frames for series in after.series) == expected


def test_folder_is_looked_through_again_where_a_file_could_not_be_opened(
    tmp_path: Path, write_series: WriteSeries, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What hinders reading, such as a network drive that is away, may pass without a change of the files."""
    write_series(tmp_path, VOXELS, AFFINE)

    def busy(*arguments: object, **options: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(pydicom, "dcmread", busy)
        assert len(scan_folder(tmp_path).damaged) == len(VOXELS)
    assert not scan_folder(tmp_path).damaged


def test_scans_of_the_last_few_folders_are_kept(
    tmp_path: Path, write_series: WriteSeries, headers_read: list[str]
) -> None:
    for number in range(20):
        write_series(tmp_path / str(number), VOXELS[:1], AFFINE)
    for _ in range(2):
        for number in range(20):
            scan_folder(tmp_path / str(number))
    assert len(headers_read) == 40, "twenty folders are more than are kept"
    scan_folder(tmp_path / "19")
    assert len(headers_read) == 40
