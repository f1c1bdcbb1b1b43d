"""Segmentations as files: read again by our own readers they are what was written, where it was segmented."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import highdicom
import imagecodecs
import nibabel
import numpy as np
import pydicom
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.uid import DigitalXRayImageStorageForPresentation as DigitalXRay

from common.errors import DataError, UsageError
from common.imaging.case import Source
from common.imaging.geometry import Orientation
from common.imaging.readers import read_image, read_label
from common.imaging.writers import dicom_seg, nifti, object_masks, overlay, tiff
from common.imaging.writers.codes import ABNORMAL, ANATOMY, TISSUE, Code, codes_of, parse_codes
from common.imaging.writers.whole_file import appearing_whole

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
ALGORITHM = dicom_seg.Algorithm("brain", "v3", "0.1.0")


def some_classes(shape: tuple[int, ...], dtype: Any = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 3, shape).astype(dtype)


# TIFF


OME = {
    "axes": "YX",
    "PhysicalSizeX": 0.325,
    "PhysicalSizeXUnit": "µm",
    "PhysicalSizeY": 325.0,
    "PhysicalSizeYUnit": "nm",
}
STACK = {"axes": "ZYX", "PhysicalSizeX": 0.2, "PhysicalSizeY": 0.2, "PhysicalSizeZ": 1.5}
TIFFS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "nothing stated": ((20, 30), {}),
    "per centimetre, of 1 um": ((20, 30), {"resolution": (10000, 10000), "resolutionunit": 3}),
    "ome of 1 um": ((20, 30), {"ome": True, "metadata": {"axes": "YX", "PhysicalSizeX": 1.0, "PhysicalSizeY": 1.0}}),
    "ome of 1 um along one axis": ((20, 30), {"ome": True, "metadata": {"axes": "YX", "PhysicalSizeX": 1.0}}),
    "ome that states nothing": ((20, 30), {"ome": True, "metadata": {"axes": "YX"}}),
    "ome stack of 1 um": (
        (5, 20, 30),
        {"ome": True, "metadata": {"axes": "ZYX", **{f"PhysicalSize{axis}": 1.0 for axis in "ZYX"}}},
    ),
    "ome stack without a distance of slices": (
        (5, 20, 30),
        {"ome": True, "metadata": {"axes": "ZYX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}},
    ),
    "imagej of 1 um": ((20, 30), {"imagej": True, "resolution": (1, 1), "metadata": {"axes": "YX", "unit": "um"}}),
    "imagej that states nothing": ((20, 30), {"imagej": True, "metadata": {"axes": "YX"}}),
    "shaped of 1 um": ((20, 30), {"metadata": {"axes": "YX", "PhysicalSizeX": 1.0, "PhysicalSizeY": 1.0}}),
    "per centimetre": ((20, 30), {"resolution": (40000, 20000), "resolutionunit": 3}),
    "per inch": ((20, 30), {"resolution": (72, 72), "resolutionunit": 2}),
    "ome": ((20, 30), {"ome": True, "metadata": OME}),
    "ome stack": ((5, 20, 30), {"ome": True, "metadata": STACK}),
    "imagej stack": (
        (5, 20, 30),
        {"imagej": True, "resolution": (4, 4), "metadata": {"axes": "ZYX", "unit": "micron", "spacing": 2.5}},
    ),
    "imagej": ((20, 30), {"imagej": True, "resolution": (4, 5), "metadata": {"axes": "YX", "unit": "um"}}),
    "shaped stack": ((5, 20, 30), {"metadata": STACK}),
    "plain stack": ((5, 20, 30), {}),
    "rgb": ((20, 30, 3), {"photometric": "rgb", "resolution": (40000, 40000), "resolutionunit": 3}),
}


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
@pytest.mark.parametrize("kind", TIFFS)
def test_a_tiff_keeps_the_pixel_size_of_its_image(tmp_path: Path, kind: str, dtype: Any) -> None:
    shape, options = TIFFS[kind]
    source, path = tmp_path / "image.tif", tmp_path / "seg.tif"
    tifffile.imwrite(source, np.zeros(shape, np.uint8), **options)
    image = read_image(source, 3 if len(shape) == 3 and kind != "rgb" else 2)
    classes = some_classes(image.shape, dtype)
    tiff.write(path, classes, image.spacing, source, is_stated=image.stated != "nothing")
    label = read_label(path, 2 if image.shape[0] == 1 else 3)
    assert np.array_equal(label.array[..., 0], classes)
    assert label.spacing == pytest.approx(image.spacing, rel=1e-6)
    assert label.stated == image.stated
    assert tiff.is_ome(path) == tiff.is_ome(source) == kind.startswith("ome")
    if kind.startswith("per"):  # a resolution for printers is kept too, though it is no measurement
        with tifffile.TiffFile(path) as written, tifffile.TiffFile(source) as read:
            assert written.pages.first.resolution == pytest.approx(read.pages.first.resolution)
            assert written.pages.first.resolutionunit == read.pages.first.resolutionunit


@pytest.mark.parametrize("kind", [kind for kind in TIFFS if kind.startswith("ome")])
def test_an_ome_tiff_states_the_axes_that_its_image_states(tmp_path: Path, kind: str) -> None:
    shape, options = TIFFS[kind]
    source, path = tmp_path / "image.ome.tif", tmp_path / "seg.ome.tif"
    tifffile.imwrite(source, np.zeros(shape, np.uint8), **options)
    image = read_image(source, len(shape))
    tiff.write(path, some_classes(image.shape), image.spacing, source, is_stated=image.stated != "nothing")
    with tifffile.TiffFile(path) as written:
        pixels = tifffile.xml2dict(written.ome_metadata or "")["OME"]["Image"]["Pixels"]
    stated = {axis for axis in "ZYX" if f"PhysicalSize{axis}" in options["metadata"]}
    assert {axis for axis in "ZYX" if f"PhysicalSize{axis}" in pixels} == stated
    for axis, size in zip("ZYX", image.spacing, strict=True):
        if axis in stated:
            assert pixels[f"PhysicalSize{axis}"] == pytest.approx(size)
            assert pixels[f"PhysicalSize{axis}Unit"] == "µm"


@pytest.mark.parametrize("kind", ["ome stack", "imagej", "imagej stack", "plain stack", "rgb"])
def test_a_tiff_is_written_strip_by_strip_in_another_type(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiff, "_STRIP", 300)  # five rows of 30 numbers of two bytes
    monkeypatch.setattr(tiff, "_DONE", 100)
    shape, options = TIFFS[kind]
    source, path = tmp_path / "image.tif", tmp_path / "seg.tif"
    tifffile.imwrite(source, np.zeros(shape, np.uint8), **options)
    image = read_image(source, 3 if len(shape) == 3 and kind != "rgb" else 2)
    labels = np.random.default_rng(1).integers(0, 65536, image.shape).astype(np.int32)
    calls: list[None] = []
    tiff.write(
        path,
        labels,
        image.spacing,
        source,
        is_stated=image.stated != "nothing",
        dtype=np.uint16,
        done=lambda: calls.append(None),
    )
    assert np.array_equal(tifffile.imread(path).reshape(labels.shape), labels)
    with tifffile.TiffFile(path) as written:
        assert written.pages.first.dtype == np.uint16
        assert bool(written.is_imagej) == kind.startswith("imagej")
        if not kind.startswith("imagej"):
            assert written.pages.first.rowsperstrip == 5
    assert len(calls) == labels.size // 150


# NIfTI


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_a_nifti_keeps_the_geometry_of_its_image(tmp_path: Path, kind: Any, name: str) -> None:
    affine = np.array([[-1.2, 0.1, 0, 40], [0.1, 1.4, 0, -30], [0, 0, 3, 7], [0, 0, 0, 1.0]])
    image = kind(np.zeros((6, 7, 8), np.float32), affine)
    image.header.set_slope_inter(2.0, 5.0)
    image.header["descrip"] = b"of John Doe"
    image.header.set_xyzt_units("mm", "sec")
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=2)
    nibabel.save(image, tmp_path / name)
    classes = some_classes((8, 7, 6))
    nifti.write(tmp_path / f"seg_{name}", classes, np.eye(4), tmp_path / name)
    written: Any = nibabel.load(tmp_path / f"seg_{name}")
    assert isinstance(written, kind)
    assert written.get_data_dtype() == np.uint8
    assert (int(written.header["qform_code"]), int(written.header["sform_code"])) == (1, 2)
    read: Any = nibabel.load(tmp_path / name)
    for get in ("get_qform", "get_sform"):
        assert np.array_equal(getattr(written, get)(), getattr(read, get)())
    assert written.header.get_xyzt_units() == ("mm", "sec")
    assert b"John" not in bytes(written.header["descrip"])
    label = read_label(tmp_path / f"seg_{name}", 3)
    assert np.array_equal(label.array[..., 0], classes)
    assert np.array_equal(label.affine, read_image(tmp_path / name, 3).affine)


def test_a_nifti_of_another_image_states_the_affine(tmp_path: Path) -> None:
    affine = np.array([[-1.2, 0, 0, 40], [0, 1.4, 0, -30], [0, 0, 3, 7], [0, 0, 0, 1.0]])
    nifti.write(tmp_path / "a.nii.gz", some_classes((4, 5, 6), np.uint16), affine)
    label = read_label(tmp_path / "a.nii.gz", 3)
    np.testing.assert_allclose(label.affine, affine, atol=1e-5)
    assert np.array_equal(label.array[..., 0], some_classes((4, 5, 6)))


# DICOM-SEG


OBLIQUE = np.array([[-0.9, 0.1, 0.3, 40], [-0.1, -1.1, 0.4, -30], [0.2, 0.2, 6.5, 7], [0, 0, 0, 1.0]])
OBLIQUE[:3, 1] -= OBLIQUE[:3, 0] * (OBLIQUE[:3, 0] @ OBLIQUE[:3, 1]) / (OBLIQUE[:3, 0] @ OBLIQUE[:3, 0])
OBLIQUE[:3, 2] = (
    6.5 * np.cross(OBLIQUE[:3, 0], OBLIQUE[:3, 1]) / np.linalg.norm(np.cross(OBLIQUE[:3, 0], OBLIQUE[:3, 1]))
)


@pytest.mark.parametrize("empty", [False, True])
def test_a_dicom_seg_lies_on_its_series(tmp_path: Path, write_series: Callable[..., list[Path]], empty: bool) -> None:
    write_series(tmp_path / "series", np.zeros((7, 12, 10), np.int16), OBLIQUE)
    source = Source(tmp_path / "series")
    image = read_image(source, 3)
    classes = np.zeros(image.shape, np.uint8) if empty else some_classes(image.shape)
    classes[2] = 0  # a slice without a segment
    dicom_seg.write(tmp_path / "seg.dcm", classes, source, ["tumour", "oedema"], ALGORITHM)
    assert np.array_equal(read_label(tmp_path / "seg.dcm", 3, grid=image).array[..., 0], classes)
    segmentation = highdicom.seg.segread(tmp_path / "seg.dcm")
    assert [item.SegmentLabel for item in segmentation.SegmentSequence] == ["tumour", "oedema"]
    first = segmentation.get_segment_description(1)
    assert first.segmented_property_type.value == "108369006"
    assert first.segmented_property_category.value == "49755003"
    assert first.algorithm_identification.version == "v3"
    (series,) = segmentation.ReferencedSeriesSequence
    headers = [pydicom.dcmread(path) for path in sorted((tmp_path / "series").iterdir())]
    assert series.SeriesInstanceUID == headers[0].SeriesInstanceUID
    assert {str(item.ReferencedSOPInstanceUID) for item in series.ReferencedInstanceSequence} == {
        str(header.SOPInstanceUID) for header in headers
    }
    assert segmentation.StudyInstanceUID == headers[0].StudyInstanceUID
    assert segmentation.FrameOfReferenceUID == headers[0].FrameOfReferenceUID


def test_frames_of_one_file_keep_their_order(tmp_path: Path, write_multiframe: Callable[..., Path]) -> None:
    source = Source(write_multiframe(tmp_path / "a.dcm", np.zeros((7, 12, 10), np.int16), OBLIQUE))
    image = read_image(source, 3)
    classes = some_classes(image.shape)
    dicom_seg.write(tmp_path / "seg.dcm", classes, source, ["a", "b"], ALGORITHM)
    assert np.array_equal(read_label(tmp_path / "seg.dcm", 3, grid=image).array[..., 0], classes)


def test_a_projection_without_a_place_in_the_patient_is_segmented(
    tmp_path: Path, write_series: Callable[..., list[Path]]
) -> None:
    def edit(dataset: Dataset, z: int) -> None:
        for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "FrameOfReferenceUID", "SliceThickness"):
            delattr(dataset, keyword)
        dataset.Modality = "DX"

    (path,) = write_series(tmp_path, np.zeros((1, 12, 10), np.int16), OBLIQUE, edit=edit, sop_class=DigitalXRay)
    image = read_image(path, 2)
    classes = some_classes(image.shape)
    dicom_seg.write(tmp_path / "seg.dcm", classes, Source(path), ["a", "b"], ALGORITHM)
    assert np.array_equal(read_label(tmp_path / "seg.dcm", 2, grid=image).array[..., 0], classes)


def test_headers_that_lack_what_a_segmentation_copies_serve(
    tmp_path: Path, write_series: Callable[..., list[Path]]
) -> None:
    def edit(dataset: Dataset, z: int) -> None:
        for keyword in ("PatientName", "StudyID", "AccessionNumber", "ReferringPhysicianName", "PatientSex"):
            delattr(dataset, keyword)

    write_series(tmp_path / "series", np.zeros((3, 8, 9), np.int16), OBLIQUE, edit=edit)
    image = read_image(tmp_path / "series", 3)
    classes = some_classes(image.shape)
    dicom_seg.write(tmp_path / "seg.dcm", classes, Source(tmp_path / "series"), ["a", "b"], ALGORITHM)
    assert np.array_equal(read_label(tmp_path / "seg.dcm", 3, grid=image).array[..., 0], classes)


def test_headers_that_do_not_serve_are_an_error_of_the_data(
    tmp_path: Path, write_series: Callable[..., list[Path]]
) -> None:
    def edit(dataset: Dataset, z: int) -> None:
        dataset.StudyInstanceUID = "1.2." + str(z)  # one series, several examinations

    write_series(tmp_path / "series", np.zeros((3, 8, 9), np.int16), OBLIQUE, edit=edit)
    with pytest.raises(DataError, match="headers do not serve for a DICOM-SEG"):
        dicom_seg.write(
            tmp_path / "seg.dcm", some_classes((3, 8, 9)), Source(tmp_path / "series"), ["a", "b"], ALGORITHM
        )


@pytest.mark.parametrize(
    "keyword",
    [
        "SpecificCharacterSet", "PatientName", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID",
        "AccessionNumber", "ReferringPhysicianName", "SliceThickness", "SeriesNumber", "PositionReferenceIndicator",
        "StudyDescription",
    ],
)  # fmt: skip
def test_an_empty_value_of_a_header_counts_as_absent(
    tmp_path: Path, write_series: Callable[..., list[Path]], keyword: str
) -> None:
    def edit(dataset: Dataset, z: int) -> None:
        setattr(dataset, keyword, None)

    write_series(tmp_path / "series", np.zeros((3, 8, 9), np.int16), OBLIQUE, edit=edit)
    source = Source(tmp_path / "series")
    image = read_image(source, 3)
    dicom_seg.check(source, ["a", "b"], ALGORITHM)
    dicom_seg.write(tmp_path / "seg.dcm", some_classes(image.shape), source, ["a", "b"], ALGORITHM)
    assert np.array_equal(read_label(tmp_path / "seg.dcm", 3, grid=image).array[..., 0], some_classes(image.shape))


@pytest.mark.parametrize(
    ("stated", "name", "written"),
    [
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎", ["ISO 2022 IR 6", "ISO 2022 IR 87"]),
        ("ISO-IR 100", "Müller^Jürgen", "ISO_IR 192"),
        ("ISO_IR 100", "Müller^Jürgen", "ISO_IR 100"),
    ],
)
def test_names_keep_their_letters_whatever_the_character_set_is_called(
    tmp_path: Path, write_series: Callable[..., list[Path]], stated: Any, name: str, written: Any
) -> None:
    def edit(dataset: Dataset, z: int) -> None:
        dataset.SpecificCharacterSet, dataset.PatientName = stated, name
        dataset.PatientBirthDate, dataset.StudyTime, dataset.PatientSex = "00000000", "25:61", "U"

    pydicom.config.settings.writing_validation_mode = pydicom.config.IGNORE
    try:
        write_series(tmp_path / "series", np.zeros((3, 8, 9), np.int16), OBLIQUE, edit=edit)
    finally:
        pydicom.config.settings.writing_validation_mode = None
    source = Source(tmp_path / "series")
    dicom_seg.write(tmp_path / "seg.dcm", some_classes((3, 8, 9)), source, ["a", "b"], ALGORITHM)
    segmentation = pydicom.dcmread(tmp_path / "seg.dcm")
    assert str(segmentation.PatientName) == name
    assert segmentation.SpecificCharacterSet == written
    assert not segmentation.PatientSex


@pytest.mark.skipif(not DATA.exists(), reason="the shared data are not here")
def test_a_clinical_series_with_an_empty_character_set_is_written(tmp_path: Path) -> None:
    source = Source(DATA / "dicom_seg" / "segmentations" / "ct-3slice")
    image = read_image(source, 3)
    classes = some_classes(image.shape)
    dicom_seg.check(source, ["tumour", "oedema"], ALGORITHM)
    dicom_seg.write(tmp_path / "seg.dcm", classes, source, ["tumour", "oedema"], ALGORITHM)
    assert np.array_equal(read_label(tmp_path / "seg.dcm", 3, grid=image).array[..., 0], classes)


@pytest.mark.skipif(not DATA.exists(), reason="the shared data are not here")
def test_a_dicom_seg_of_a_clinical_series_is_read_back() -> None:
    import tempfile

    series = sorted((DATA / "brain_tumor_dicom").glob("*/*/*T1post*"))[0]
    image = read_image(series, 3)
    classes = some_classes(image.shape)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "seg.dcm"
        dicom_seg.write(path, classes, Source(series), ["tumour", "oedema"], ALGORITHM)
        assert np.array_equal(read_label(path, 3, grid=image).array[..., 0], classes)


def test_codes_follow_from_names_or_are_given() -> None:
    assert codes_of("tumour core").type.meaning == "Neoplasm"
    assert codes_of("peritumoral edema").type.meaning == "Edema"
    assert codes_of("Liver").category == ANATOMY
    assert codes_of("something").category == codes_of("something").type == TISSUE
    given = parse_codes(
        ["tumour=SCT:393564001:Glioblastoma", "rim=abnormal/99LOCAL:7:Enhancing: rim"], ["tumour", "rim"]
    )
    assert given["tumour"].category == ABNORMAL
    assert given["tumour"].type == Code("393564001", "SCT", "Glioblastoma")
    assert given["rim"].type == Code("7", "99LOCAL", "Enhancing: rim")
    assert codes_of("rim", given).category == ABNORMAL
    for text, reason in (("tumour", "expected CLASS="), ("x=SCT:1:a", "classes are"), ("rim=odd/SCT:1:a", "category")):
        with pytest.raises(UsageError, match=reason):
            parse_codes([text], ["tumour", "rim"])


# Objects


def decoded(counts: list[int], shape: tuple[int, int]) -> np.ndarray:
    flat = np.repeat(np.arange(len(counts)) % 2, counts)
    return np.pad(flat, (0, shape[0] * shape[1] - len(flat))).reshape(shape[::-1]).T > 0


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 2**32), st.floats(0, 1))
def test_run_lengths_give_the_mask_back(height: int, width: int, seed: int, density: float) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < density
    mask[0, 0] = True
    shape = (height + 2, width + 3)
    for start in ((0, 0), (1, 2), (2, 3)):
        whole = np.zeros(shape, bool)
        whole[start[0] : start[0] + height, start[1] : start[1] + width] = mask
        counts = object_masks.run_lengths(mask, start, shape)
        assert np.array_equal(decoded(counts, shape), whole)
        assert min(counts[1:]) > 0


# Pictures


def test_a_legend_below_an_overlay_has_the_colour_and_name_of_every_class(tmp_path: Path) -> None:
    image = np.full((40, 600, 1), 100, np.uint8)
    labels = np.zeros((40, 600), np.uint8)
    labels[5:30, 5:30], labels[5:30, 50:80] = 1, 2
    planes = [overlay.Plane(image, labels, (1.0, 1.0))]
    overlay.write(tmp_path / "bare.png", planes)
    overlay.write(tmp_path / "a.png", planes, ["liver", "a tumour"])
    bare, picture = (imagecodecs.png_decode((tmp_path / name).read_bytes()) for name in ("bare.png", "a.png"))
    assert picture.shape[1] == bare.shape[1]
    assert np.array_equal(picture[: bare.shape[0]], bare)
    strip = picture[bare.shape[0] :]
    colours = {tuple(colour) for colour in strip.reshape(-1, 3).tolist()}
    assert {tuple(colour) for colour in overlay._COLOURS[:2].tolist()} <= colours
    assert (255, 255, 255) in colours, "the names"
    assert len({tuple(colour) for colour in overlay._COLOURS.tolist()}) == 18
    many = [f"class number {number}" for number in range(30)]
    overlay.write(tmp_path / "many.png", planes, many)
    assert imagecodecs.png_decode((tmp_path / "many.png").read_bytes()).shape[0] > picture.shape[0]


def test_an_overlay_outlines_what_was_found(tmp_path: Path) -> None:
    image = np.zeros((2000, 3000, 1), np.uint8)
    labels = np.zeros((2000, 3000), np.uint8)
    labels[500:1500, 1000:2000] = 1
    overlay.write(tmp_path / "a.png", [overlay.Plane(image, labels, (1.0, 1.0))])
    picture = imagecodecs.png_decode((tmp_path / "a.png").read_bytes())
    assert picture.shape[1] == overlay.LONGEST
    coloured = picture.any(axis=2)
    rows, columns = np.nonzero(coloured)
    scale = overlay.LONGEST / 3000
    assert [rows.min(), rows.max(), columns.min(), columns.max()] == pytest.approx(
        [500 * scale, 1500 * scale, 1000 * scale, 2000 * scale], abs=2
    )
    assert not coloured[picture.shape[0] // 2, picture.shape[1] // 2]  # an outline, not a patch


def test_a_volume_is_drawn_as_radiologists_look_at_it() -> None:
    # Stored with x to the patient's left (LPS): turned, x counts to the right.
    image = np.zeros((4, 5, 6, 1), np.uint8)
    labels = np.zeros((4, 5, 6), np.uint8)
    labels[3, 0, 0] = 1  # superior, anterior, right in LPS
    orientation = Orientation((0, 1, 2), (False, True, True))
    axial, coronal, sagittal = overlay.planes_of_volume(image, labels, (3.0, 2.0, 1.0), orientation, is_patient=True)
    assert np.argwhere(axial.labels).tolist() == [[0, 0]]  # anterior up, right on the left
    assert np.argwhere(coronal.labels).tolist() == [[0, 0]]  # superior up
    assert np.argwhere(sagittal.labels).tolist() == [[0, 0]]  # anterior on the left
    assert [plane.spacing for plane in (axial, coronal, sagittal)] == [(2.0, 1.0), (3.0, 1.0), (3.0, 2.0)]


# Whole files


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.nii.gz"
    with pytest.raises(RuntimeError), appearing_whole(path) as partial:
        assert partial.name == "a.nii.gz"
        partial.write_bytes(b"half")
        raise RuntimeError
    assert list((tmp_path / "new").iterdir()) == []
    with appearing_whole(path) as partial:
        partial.write_bytes(b"whole")
        assert not path.exists()
    assert [p.name for p in path.parent.iterdir()] == ["a.nii.gz"]
    with pytest.raises(UsageError, match="--force"), appearing_whole(path):
        raise AssertionError("not reached")
    with appearing_whole(path, force=True) as partial:
        partial.write_bytes(b"other")
    assert path.read_bytes() == b"other"


def test_a_folder_that_cannot_be_written_to_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="cannot be written"), appearing_whole(tmp_path / "file" / "a.png"):
        raise AssertionError("not reached")
