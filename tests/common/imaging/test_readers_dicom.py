"""DICOM: which series a folder holds, in which order slices lie, what their numbers mean, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
)

from common.errors import DataError
from common.imaging.case import Source
from common.imaging.readers import read_image, read_label
from common.imaging.readers.dicom import read_series
from common.imaging.readers.dicom_folder import find_series, scan_folder
from common.imaging.volume import scaling_affine

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
FIXTURES = DATA / "dicom_fixtures"
needs_fixtures = pytest.mark.skipif(not FIXTURES.is_dir(), reason="needs ../shared/data/dicom_fixtures")

SPACING = (2.5, 0.75, 0.5)
AFFINE = scaling_affine(SPACING)
WriteSeries = Callable[..., list[Path]]
WriteFile = Callable[..., Path]


def voxels(depth: int = 6, dtype: Any = np.int16) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 120, (depth, 9, 11)).astype(dtype)


def complaint_of(folder: Path, dimensions: int = 3) -> str:
    with pytest.raises(DataError) as caught:
        read_image(folder, dimensions)
    return str(caught.value)


# A folder's series


def test_series_are_told_apart_by_their_headers(tmp_path: Path, write_series: WriteSeries) -> None:
    def describe(text: str) -> Callable[[Dataset, int], None]:
        def edit(dataset: Dataset, z: int) -> None:
            dataset.SeriesDescription, dataset.Modality = text, "MR"
            dataset.BurnedInAnnotation = "YES" if text == "T2" and z == 2 else "NO"

        return edit

    write_series(tmp_path, voxels(3), AFFINE, edit=describe("T2"), series="1.2.3.2222")
    write_series(tmp_path, voxels(5), AFFINE, edit=describe("FLAIR"), series="1.2.3.1111")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".DS_Store").write_bytes(b"x")
    flair, t2 = find_series(tmp_path)
    assert (flair.uid, flair.description, flair.frames) == ("1.2.3.1111", "FLAIR", 5)
    assert (t2.uid, t2.description, len(t2.files)) == ("1.2.3.2222", "T2", 3)
    assert (t2.patient, t2.modality, t2.kind) == ("P-7", "MR", "CT Image Storage")
    assert t2.burned_in_annotation
    assert not flair.burned_in_annotation
    assert not t2.is_segmentation
    assert t2.study != flair.study
    assert scan_folder(tmp_path).ignored == (tmp_path / "notes.txt",)


def test_the_series_must_be_named_where_a_folder_holds_several(tmp_path: Path, write_series: WriteSeries) -> None:
    write_series(tmp_path, voxels(3), AFFINE, series="1.2.3.2222")
    write_series(tmp_path, voxels(5), AFFINE, series="1.2.3.1111")
    complaint = complaint_of(tmp_path)
    assert "2 series" in complaint
    assert "1.2.3.1111 (CT, thorax)" in complaint
    assert "1.2.3.2222 (CT, thorax)" in complaint
    assert read_image(Source(tmp_path, "1.2.3.2222"), 3).shape == (3, 9, 11)
    assert read_image(Source(tmp_path, "1.2.3.1111"), 3).shape == (5, 9, 11)
    with pytest.raises(DataError, match=r"holds no series 9\.9\. It holds 1\.2\.3\.1111"):
        read_image(Source(tmp_path, "9.9"), 3)


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    assert "holds no DICOM images" in complaint_of(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    assert "holds no DICOM images" in complaint_of(tmp_path)


def broken_link(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("nowhere"))


def link_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:200]),
        lambda path: path.rename(path.with_suffix(".dcm")).write_text("something else"),
        broken_link,
        link_loop,
    ],
)
def test_a_damaged_file_beside_a_series_is_not_passed_over(
    tmp_path: Path, write_series: WriteSeries, damage: Callable[[Path], object]
) -> None:
    # The last slice: without it, the others still make a regular grid.
    paths = write_series(tmp_path, voxels(), AFFINE)
    damage(paths[-1])
    assert f"1 of its files cannot be read as DICOM, the first is {paths[-1].stem}" in complaint_of(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_not_passed_over(tmp_path: Path, write_series: WriteSeries) -> None:
    paths = write_series(tmp_path, voxels(), AFFINE)
    paths[-1].chmod(0)
    assert "Permission denied" in complaint_of(tmp_path)


def test_a_pipe_is_refused_and_does_not_block(tmp_path: Path, write_series: WriteSeries) -> None:
    write_series(tmp_path / "series", voxels(), AFFINE)
    os.mkfifo(tmp_path / "series" / "pipe")
    os.mkfifo(tmp_path / "pipe.dcm")
    assert read_image(tmp_path / "series", 3).shape == (6, 9, 11)
    with pytest.raises(DataError, match=r"empty|pipe"):
        read_image(tmp_path / "pipe.dcm", 3)


# Geometry


def test_neither_file_order_nor_thickness_nor_stated_distance_count(tmp_path: Path, write_series: WriteSeries) -> None:
    def edit(dataset: Dataset, z: int) -> None:
        dataset.SliceThickness, dataset.SpacingBetweenSlices, dataset.SliceLocation = "5", "7", str(-z)

    stored = voxels()
    write_series(tmp_path, stored, AFFINE, edit=edit)
    volume = read_image(tmp_path, 3)
    assert volume.spacing == pytest.approx(SPACING)
    assert np.array_equal(volume.array[..., 0], stored)


def test_slices_grow_along_their_normal_whichever_way_they_were_acquired(
    tmp_path: Path, write_series: WriteSeries
) -> None:
    stored = voxels()
    backwards = AFFINE @ np.diag([1.0, 1.0, -1.0, 1.0])  # left-handed: no order of slices can keep it
    write_series(tmp_path, stored, backwards)
    volume = read_image(tmp_path, 3)
    assert np.linalg.det(volume.affine) > 0
    assert np.array_equal(volume.array[..., 0], stored[::-1])
    assert np.allclose(volume.affine @ (0, 0, 5, 1), backwards @ (0, 0, 0, 1))


def leaving_out(*left: int) -> Callable[[Dataset, int], bool]:
    return lambda dataset, z: z not in left


def moved(which: int, by: tuple[float, float, float]) -> Callable[[Dataset, int], None]:
    def edit(dataset: Dataset, z: int) -> None:
        if z == which:
            dataset.ImagePositionPatient = [a + b for a, b in zip(dataset.ImagePositionPatient, by, strict=True)]

    return edit


def tilted(dataset: Dataset, z: int) -> None:
    x, y, up = dataset.ImagePositionPatient
    dataset.ImagePositionPatient = [x, y + 0.2 * z, up]


def with_value(keyword: str, value: Any, which: int = 2) -> Callable[[Dataset, int], None]:
    def edit(dataset: Dataset, z: int) -> None:
        if z == which or which < 0:
            setattr(dataset, keyword, value)

    return edit


def without(keyword: str) -> Callable[[Dataset, int], None]:
    def edit(dataset: Dataset, z: int) -> None:
        delattr(dataset, keyword)

    return edit


def smaller(dataset: Dataset, z: int) -> None:
    if z == 2:
        dataset.Rows, dataset.Columns, dataset.PixelData = 4, 5, b"\0" * 40


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (leaving_out(3), "missing slices: 1, between IM13.* and IM23.* are 5 mm where 2.5 mm are usual"),
        (leaving_out(2, 3), "missing slices: 2, between IM08.* and IM23.* are 7.5 mm where 2.5"),
        (leaving_out(1, 4), "missing slices: 2, between IM03.* and IM13.* are 5 mm where 2.5"),
        (moved(3, (0, 0, 0.4)), "uneven slices: between IM13.* and IM18.* are 2.9 mm where 2.5 mm are usual"),
        (moved(5, (0, 0, 0.4)), "uneven slices: between IM23.* and IM28"),
        (moved(3, (0, 0, -2.5)), "two slices at one position: IM(13|18).* and IM(13|18)"),
        (tilted, "slices shifted sideways: IM28.* gantry tilt of 4.6 degrees"),
        (moved(4, (1.0, 0, 0)), "slices shifted sideways: IM23.* by 1 mm"),
        (with_value("ImageOrientationPatient", [1, 0, 0, 0, 0, 1]), "different orientation: IM03.* and IM13"),
        (with_value("ImageOrientationPatient", [1, 0, 0, 1, 0, 0], -1), "not perpendicular"),
        (with_value("ImageOrientationPatient", [1, 0, 0, 0, 1], -1), "ImageOrientationPatient is .* 6 finite"),
        (with_value("PixelSpacing", [1, 1]), "different PixelSpacing: IM03.* 0.75, 0.5 mm .*IM13.* has 1, 1 mm"),
        (with_value("PixelSpacing", [0, 1], -1), "PixelSpacing of 0, 1 mm"),
        (smaller, "different size: IM03.* has 9 x 11 voxels .*, IM13.* has 4 x 5"),
        (without("ImagePositionPatient"), "IM03.* states no ImagePositionPatient"),
        (without("ImageOrientationPatient"), "IM03.* states no ImageOrientationPatient"),
        (without("PixelSpacing"), "IM03.* states no PixelSpacing"),
        (without("Rows"), "holds no DICOM images"),
    ],
)
def test_slices_that_make_no_regular_grid_are_refused(
    tmp_path: Path, write_series: WriteSeries, edit: Callable[[Dataset, int], bool | None], complaint: str
) -> None:
    write_series(tmp_path / "series", voxels(), AFFINE, edit=edit)
    with pytest.raises(DataError, match=f"^image series: .*{complaint}.*\\. [A-Z]"):
        read_image(tmp_path / "series", 3)


def test_distances_that_change_little_by_little_are_refused(tmp_path: Path, write_series: WriteSeries) -> None:
    def stretched(dataset: Dataset, z: int) -> None:
        x, y, up = dataset.ImagePositionPatient
        dataset.ImagePositionPatient = [x, y, up + 0.002 * z * z]

    write_series(tmp_path, voxels(41), AFFINE, edit=stretched)
    assert "uneven slices: the distance changes along the series, by 0.8 mm in all" in complaint_of(tmp_path)


def test_positions_rounded_to_a_tenth_of_a_millimetre_are_even(tmp_path: Path, write_series: WriteSeries) -> None:
    def rounded(dataset: Dataset, z: int) -> None:
        dataset.ImagePositionPatient = [f"{float(n):.1f}" for n in dataset.ImagePositionPatient]

    write_series(tmp_path, voxels(21), scaling_affine((1.25, 0.7, 0.7)), edit=rounded)
    assert read_image(tmp_path, 3).spacing[0] == pytest.approx(1.25, abs=1e-3)


def test_a_single_image_without_position_is_2d(tmp_path: Path, write_series: WriteSeries) -> None:
    def edit(dataset: Dataset, z: int) -> None:
        del dataset.ImagePositionPatient, dataset.ImageOrientationPatient

    (path,) = write_series(tmp_path, voxels(1), AFFINE, edit=edit)
    volume = read_image(path, 2)
    assert volume.spacing == (1.0, 0.75, 0.5)
    assert np.array_equal(volume.affine, scaling_affine((1.0, 0.75, 0.5)))


# Numbers


def test_whole_rescaling_keeps_integers_and_other_rescaling_makes_floats(
    tmp_path: Path, write_series: WriteSeries
) -> None:
    stored = voxels(dtype=np.uint16)

    def rescaled(slope: str, intercept: str) -> Callable[[Dataset, int], None]:
        def edit(dataset: Dataset, z: int) -> None:
            dataset.BitsStored, dataset.HighBit = 12, 11
            dataset.RescaleSlope, dataset.RescaleIntercept = slope, intercept

        return edit

    write_series(tmp_path / "ct", stored, AFFINE, edit=rescaled("1.0", "-1024"))
    ct = read_image(tmp_path / "ct", 3).array
    assert ct.dtype == np.int16
    assert np.array_equal(ct[..., 0], stored.astype(int) - 1024)
    write_series(tmp_path / "pet", stored, AFFINE, edit=rescaled("0.25", "-3"))
    pet = read_image(tmp_path / "pet", 3).array
    assert pet.dtype == np.float32
    assert np.array_equal(pet[..., 0], stored * 0.25 - 3)
    write_series(tmp_path / "half", stored, AFFINE, edit=rescaled("1", "0.5"))
    assert np.array_equal(read_image(tmp_path / "half", 3).array[..., 0], stored + 0.5)


def test_every_slice_has_its_own_rescaling(tmp_path: Path, write_series: WriteSeries) -> None:
    def edit(dataset: Dataset, z: int) -> None:
        dataset.RescaleSlope, dataset.RescaleIntercept = str(z + 1), "0"

    stored = voxels()
    write_series(tmp_path, stored, AFFINE, edit=edit)
    factors = np.arange(1, 7)[:, np.newaxis, np.newaxis]
    assert np.array_equal(read_image(tmp_path, 3).array[..., 0], stored * factors)


def test_numbers_beyond_the_stated_bits_do_not_wrap(tmp_path: Path, write_series: WriteSeries) -> None:
    def edit(dataset: Dataset, z: int) -> None:
        dataset.BitsStored, dataset.HighBit, dataset.RescaleIntercept, dataset.RescaleSlope = 16, 15, "-1024", "1"

    stored = voxels()
    stored[2] = -32768  # what some scanners put outside of the circle that they see
    write_series(tmp_path, stored, AFFINE, edit=edit)
    assert np.array_equal(read_image(tmp_path, 3).array[..., 0], stored.astype(int) - 1024)


def test_a_lookup_table_is_refused(tmp_path: Path, write_series: WriteSeries) -> None:
    def edit(dataset: Dataset, z: int) -> None:
        dataset.ModalityLUTSequence = [Dataset()]

    write_series(tmp_path, voxels(), AFFINE, edit=edit)
    assert "ModalityLUTSequence" in complaint_of(tmp_path)


def test_images_where_zero_is_white_are_inverted_and_labels_are_not(tmp_path: Path, write_series: WriteSeries) -> None:
    def edit(dataset: Dataset, z: int) -> None:
        dataset.PhotometricInterpretation, dataset.BitsStored, dataset.HighBit = "MONOCHROME1", 10, 9

    stored = voxels(dtype=np.uint16)
    write_series(tmp_path, stored, AFFINE, edit=edit)
    assert np.array_equal(read_image(tmp_path, 3).array[..., 0], 1023 - stored)
    assert np.array_equal(read_label(tmp_path, 3).array[..., 0], stored)


def test_colours_are_taken_where_they_were_seen_and_refused_where_they_were_drawn(
    tmp_path: Path, write_series: WriteSeries
) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (4, 9, 11, 3), dtype=np.uint8)
    write_series(tmp_path / "ct", colours, AFFINE)
    assert "expected grey voxels, found colours (RGB, CT Image Storage)" in complaint_of(tmp_path / "ct")
    write_series(tmp_path / "capture", colours, AFFINE, sop_class=SecondaryCaptureImageStorage)
    assert np.array_equal(read_image(tmp_path / "capture", 3).array, colours)
    with pytest.raises(DataError, match="found 3 channels"):
        read_label(tmp_path / "capture", 3)


def test_palette_numbers_are_labels_but_no_image(tmp_path: Path, write_series: WriteSeries) -> None:
    def edit(dataset: Dataset, z: int) -> None:
        dataset.PhotometricInterpretation = "PALETTE COLOR"

    stored = voxels(dtype=np.uint8)
    write_series(tmp_path, stored, AFFINE, edit=edit)
    assert "palette" in complaint_of(tmp_path)
    assert np.array_equal(read_label(tmp_path, 3).array[..., 0], stored)


def test_grey_and_colour_in_one_series_are_refused(tmp_path: Path, write_series: WriteSeries) -> None:
    write_series(tmp_path, voxels(), AFFINE, edit=with_value("PhotometricInterpretation", "MONOCHROME1"))
    assert "slices of different kinds: IM03" in complaint_of(tmp_path)


# Encodings

JPEG_OPTIONS = {"lossless": True, "bitspersample": 16}


@pytest.mark.parametrize(
    ("syntax", "encode", "tolerance"),
    [
        (JPEGLossless, lambda a: imagecodecs.jpeg8_encode(a, predictor=4, **JPEG_OPTIONS), 0),
        (JPEGLosslessSV1, lambda a: imagecodecs.jpeg8_encode(a, predictor=1, **JPEG_OPTIONS), 0),
        (JPEGExtended12Bit, lambda a: imagecodecs.jpeg8_encode(a, level=98, bitspersample=12), 8),
        (JPEG2000Lossless, lambda a: imagecodecs.jpeg2k_encode(a, reversible=True, codecformat="j2k"), 0),
        (JPEGLSLossless, imagecodecs.jpegls_encode, 0),
        (RLELossless, None, 0),
    ],
)
def test_compressed_voxels_come_back_and_are_refused_when_cut_short(
    tmp_path: Path, write_series: WriteSeries, syntax: Any, encode: Any, tolerance: int
) -> None:
    def edit(dataset: Dataset, z: int) -> None:
        dataset.BitsStored, dataset.HighBit = (12, 11) if syntax == JPEGExtended12Bit else (16, 15)
        if encode is None:
            dataset.compress(syntax, encoding_plugin="pydicom")
        else:
            dataset.PixelData = encapsulate([encode(stored[z])])
            dataset["PixelData"].is_undefined_length = True
            dataset.file_meta.TransferSyntaxUID = syntax

    y, x = np.mgrid[:40, :50]
    stored = np.stack([(y * 37 + x * x + z * 100) % 4000 for z in range(3)]).astype(np.uint16)
    if tolerance:
        stored = np.stack([y * 20 + x * 30 + z * 100 for z in range(3)]).astype(np.uint16)
    paths = write_series(tmp_path / "series", stored, AFFINE, edit=edit)
    read = read_image(tmp_path / "series", 3).array[..., 0]
    assert np.abs(read.astype(int) - stored).max() <= tolerance
    whole = paths[1].read_bytes()
    for length in [*range(len(whole) // 2, len(whole) - 20, max(1, len(whole) // 13)), len(whole) - 20]:
        paths[1].write_bytes(whole[:length])
        assert paths[1].name in complaint_of(tmp_path / "series")


def test_8_bit_jpeg_colours_are_rgb(tmp_path: Path, write_series: WriteSeries) -> None:
    def edit(dataset: Dataset, z: int) -> None:
        dataset.PhotometricInterpretation = "YBR_FULL_422"
        dataset.PixelData = encapsulate([imagecodecs.jpeg8_encode(colours[z], level=98)])
        dataset["PixelData"].is_undefined_length = True
        dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit

    y, x = np.mgrid[:32, :32]
    colours = np.stack([y * 4, x * 4, 255 - y * 4], axis=-1).astype(np.uint8)[np.newaxis]
    (path,) = write_series(tmp_path, colours, AFFINE, edit=edit, sop_class=SecondaryCaptureImageStorage)
    assert np.abs(read_image(path, 2).array.astype(int) - colours).max() <= 12


def test_an_encoding_without_decoder_is_refused(tmp_path: Path, write_series: WriteSeries) -> None:
    def edit(dataset: Dataset, z: int) -> None:
        dataset.PixelData = encapsulate([b"\0\0\1\xb3" * 10])
        dataset["PixelData"].is_undefined_length = True
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.MPEG2MPML

    (path,) = write_series(tmp_path, voxels(1), AFFINE, edit=edit)
    assert f"{path.name} cannot be read as DICOM" in complaint_of(path, 2)


def test_odd_headers_print_nothing(tmp_path: Path, write_series: WriteSeries) -> None:
    def edit(dataset: Dataset, z: int) -> None:
        dataset.PixelData += b"\0" * 6  # trailing bytes, an impossible date, a UID with letters: pydicom would remark
        dataset.add_new("StudyDate", "DA", "31.12.99")
        dataset.add_new("InstanceCreatorUID", "UI", "not.a.uid")

    write_series(tmp_path, voxels(), AFFINE, edit=edit)
    script = f"from pathlib import Path; from common.imaging.readers import *; read_image(Path({str(tmp_path)!r}), 3)"
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


# Files of several frames


def test_frames_have_their_own_position_and_rescaling(tmp_path: Path, write_multiframe: WriteFile) -> None:
    stored = voxels()
    path = write_multiframe(tmp_path / "a.bin", stored, AFFINE, rescale=lambda z: (2.0, float(z)))
    volume = read_image(path, 3)
    assert np.array_equal(volume.array[..., 0], stored * 2 + np.arange(6)[:, np.newaxis, np.newaxis])
    assert volume.spacing == pytest.approx(SPACING)


def test_frames_of_several_time_points_are_refused(tmp_path: Path, write_multiframe: WriteFile) -> None:
    def twice(dataset: Dataset) -> None:
        dataset.PixelData = dataset.PixelData * 2
        dataset.NumberOfFrames = 12
        dataset.PerFrameFunctionalGroupsSequence = [*dataset.PerFrameFunctionalGroupsSequence] * 2

    path = write_multiframe(tmp_path / "a.dcm", voxels(), AFFINE, edit=twice)
    assert "two slices at one position: a.dcm frame" in complaint_of(path)
    assert "time points" in complaint_of(path)


def test_frames_without_a_position_of_their_own_are_refused(tmp_path: Path, write_multiframe: WriteFile) -> None:
    def edit(dataset: Dataset) -> None:
        del dataset.PerFrameFunctionalGroupsSequence
        dataset.ImagePositionPatient = [0, 0, 0]

    path = write_multiframe(tmp_path / "a.dcm", voxels(), AFFINE, edit=edit)
    assert "holds 6 frames and does not say where each of them lies" in complaint_of(path)


def test_frames_that_are_described_but_missing_are_refused(tmp_path: Path, write_multiframe: WriteFile) -> None:
    def edit(dataset: Dataset) -> None:
        dataset.PerFrameFunctionalGroupsSequence = [*dataset.PerFrameFunctionalGroupsSequence][:-1]

    path = write_multiframe(tmp_path / "a.dcm", voxels(), AFFINE, edit=edit)
    assert "describes 5 frames and holds 6" in complaint_of(path)


@needs_fixtures
def test_slides_reports_and_annotations_are_no_patient_images() -> None:
    for name in ("sm_image.dcm", "sm_annotations.dcm", "sr_document.dcm", "seg_image_ct_binary.dcm"):
        with pytest.raises(DataError, match=rf"image {name}: .+\. .+"):
            read_image(FIXTURES / name, 2)


def test_a_read_series_is_the_read_folder(tmp_path: Path, write_series: WriteSeries) -> None:
    write_series(tmp_path, voxels(), AFFINE)
    (series,) = find_series(tmp_path)
    assert np.array_equal(read_series(series).array, read_image(tmp_path, 3).array)
