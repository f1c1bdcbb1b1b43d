"""What is wrong with a file is a fault on the error, whatever its words; sizes beyond all images are refused unread."""

from __future__ import annotations

import gzip
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import tifffile

from common.imaging.case import Case, Source
from common.imaging.checks import BY_CODE, Requirements, examine_case
from common.imaging.readers import dicom, faults, read_image, read_label
from common.imaging.readers.faults import MOST_VOXELS, Fault, ReadError
from common.imaging.source_checks import _CODES
from common.imaging.volume import scaling_affine
from tests.common.imaging.test_readers_dicom_labels import write_segmentation

AFFINE = scaling_affine((2.5, 0.75, 0.5))
VOXELS = np.random.default_rng(3).integers(0, 900, (4, 9, 11)).astype(np.int16)
TWO = Requirements(2, 1, ("background", "cell"), "instances")
LEVELS = [np.random.default_rng(0).integers(0, 200, (96, 160)).astype(np.uint8)]
LEVELS += [LEVELS[0][::2, ::2], LEVELS[0][::4, ::4]]
WriteSeries = Callable[..., list[Path]]


def fault_of(source: Source | Path, dimensions: int, *, is_label: bool = False) -> Fault:
    with pytest.raises(ReadError) as caught:
        (read_label if is_label else read_image)(source, dimensions)
    return caught.value.fault


def pyramid(path: Path) -> Path:
    tiled = {"tile": (16, 16), "photometric": "minisblack", "compression": "zlib", "resolution": (20000, 20000)}
    with tifffile.TiffWriter(path) as writer:
        writer.write(LEVELS[0], subifds=2, resolutionunit="CENTIMETER", **tiled)
        for level in LEVELS[1:]:
            writer.write(level, subfiletype=1, **tiled)
    return path


def test_every_fault_has_a_code() -> None:
    assert set(_CODES) == set(Fault)
    assert all(code.level == "error" for code in _CODES.values())


def test_words_of_names_and_headers_do_not_decide_the_fault(tmp_path: Path, write_series: WriteSeries) -> None:
    """Descriptions are quoted in messages, and could say anything."""

    def edit(dataset: pydicom.Dataset, z: int) -> None:
        dataset.SeriesDescription = "2 of its files cannot be read, uneven slices"

    for series in ("1.2", "1.3"):
        write_series(tmp_path, VOXELS, AFFINE, edit=edit, series=series)
    _, findings = examine_case(Case("a", "a", {"": Source(tmp_path)}, None))
    assert [finding.code for finding in findings] == ["E113", "E201"]
    assert "files cannot be read, uneven" in findings[0].message


def test_faults_are_those_of_the_innermost_reader(tmp_path: Path, write_series: WriteSeries) -> None:
    write_series(tmp_path / "gap", VOXELS, AFFINE, edit=lambda dataset, z: z != 2)
    assert fault_of(tmp_path / "gap", 3) is Fault.SLICES
    assert fault_of(Source(tmp_path / "gap", "9.9"), 3) is Fault.MISSING_SERIES
    tifffile.imwrite(tmp_path / "a.tif", np.full((4, 4), np.nan, np.float32))
    assert fault_of(tmp_path / "a.tif", 2) is Fault.NOT_FINITE
    assert fault_of(tmp_path / "a.tif", 3) is Fault.DIMENSIONS
    assert fault_of(tmp_path / "gone.tif", 2) is Fault.UNREADABLE
    (tmp_path / "b.tif").write_bytes(b"damaged")
    assert fault_of(tmp_path / "b.tif", 2) is Fault.UNREADABLE
    (tmp_path / "c.nii").touch()
    assert fault_of(tmp_path / "c.nii", 3) is Fault.EMPTY_FILE
    nib.save(nib.Nifti1Image(VOXELS - 500, AFFINE), tmp_path / "d.nii")
    assert fault_of(tmp_path / "d.nii", 3, is_label=True) is Fault.LABEL_VALUES


@pytest.mark.parametrize("column", [1, 0])
def test_axes_in_one_plane_are_no_geometry(tmp_path: Path, column: int) -> None:
    """With axes that are parallel but for rounding, the determinant is not zero."""
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:3, 2] = affine[:3, column] + 1e-6
    image = nib.Nifti1Image(VOXELS, None)
    image.header["sform_code"] = 1
    for row, name in enumerate(("srow_x", "srow_y", "srow_z")):
        image.header[name] = affine[row]
    nib.save(image, tmp_path / "a.nii")
    assert fault_of(tmp_path / "a.nii", 3) is Fault.NO_GEOMETRY


# Sizes


def grown(path: Path, **tags: int) -> Path:
    """The file with other numbers in its first page's tags."""
    with tifffile.TiffFile(path, mode="r+b") as file:
        for name, value in tags.items():
            file.pages[0].tags[name].overwrite(value)
    return path


@pytest.mark.parametrize("is_tiled", [False, True])
def test_small_tiff_that_would_decode_to_more_than_any_image_is_refused_before(tmp_path: Path, is_tiled: bool) -> None:
    options = {"tile": (32, 32)} if is_tiled else {"rowsperstrip": 32}
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((32, 32), np.uint16), compression="zlib", **options)
    if is_tiled:  # the image stays small, its one tile does not
        grown(tmp_path / "a.tif", TileWidth=60_000, TileLength=60_000)
    else:
        grown(tmp_path / "a.tif", ImageWidth=60_000, ImageLength=60_000, RowsPerStrip=60_000)
    tracemalloc.start()
    assert fault_of(tmp_path / "a.tif", 2) is Fault.TOO_LARGE
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()
    _, findings = examine_case(Case("a", "a", {"": Source(tmp_path / "a.tif")}, None), TWO)
    assert [finding.code for finding in findings] == ["E116", "E201"]
    assert findings[0].message == f"image a.tif: it decodes to 3600000000 voxels, of at most {MOST_VOXELS}"


def test_of_a_pyramid_that_is_too_large_a_smaller_level_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyramid(tmp_path / "a.tif")
    monkeypatch.setattr(faults, "MOST_VOXELS", LEVELS[1].size)
    assert fault_of(tmp_path / "a.tif", 2) is Fault.TOO_LARGE
    assert np.array_equal(read_image(Source(tmp_path / "a.tif", level=1), 2).array[0, ..., 0], LEVELS[1])


def test_nifti_that_announces_too_much_is_too_large_or_cut(tmp_path: Path) -> None:
    header = nib.Nifti2Header()
    header.set_data_shape((1 << 11, 1 << 11, 1 << 10))
    header.set_data_dtype(np.uint8)
    content = header.binaryblock + bytes(4096)
    (tmp_path / "a.nii").write_bytes(content)
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(content))
    assert fault_of(tmp_path / "a.nii", 3) is Fault.UNREADABLE
    assert fault_of(tmp_path / "a.nii.gz", 3) is Fault.TOO_LARGE


def test_dicom_that_announces_too_much_is_not_decoded(
    tmp_path: Path, write_series: WriteSeries, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write_series(tmp_path / "image", VOXELS, AFFINE)
    masks = (VOXELS > 400).astype(np.uint8)[..., np.newaxis]
    label = write_segmentation(tmp_path / "label", paths, masks, "BINARY")
    monkeypatch.setattr(faults, "MOST_VOXELS", VOXELS.size - 1)
    monkeypatch.setattr(dicom, "voxels_of", lambda *arguments: pytest.fail("the voxels were decoded"))
    assert fault_of(tmp_path / "image", 3) is Fault.TOO_LARGE
    assert fault_of(label, 3, is_label=True) is Fault.TOO_LARGE


# Levels


def test_image_and_label_are_read_and_checked_at_the_level_of_their_sources(tmp_path: Path) -> None:
    image, label = pyramid(tmp_path / "image.tif"), tmp_path / "label.tif"
    mask = np.zeros((96, 160), np.uint8)
    mask[16:48, 32:96] = 7
    with tifffile.TiffWriter(label) as writer:
        options = {"resolution": (20000, 20000)}
        writer.write(mask, subifds=1, resolutionunit="CENTIMETER", tile=(16, 16), **options)
        writer.write(mask[::2, ::2], subfiletype=1, tile=(16, 16), **options)

    def examine(image_level: int, label_level: int) -> tuple[object, list[str]]:
        case = Case("a", "a", {"": Source(image, level=image_level)}, Source(label, level=label_level))
        facts, findings = examine_case(case, TWO)
        return facts, [finding.code for finding in findings]

    facts, codes = examine(1, 1)
    assert codes == [] and facts is not None
    assert facts.images[""].shape == facts.label.shape == (1, 48, 80)  # type: ignore[attr-defined]
    assert facts.images[""].spacing == pytest.approx((1.0, 1.0, 1.0))  # type: ignore[attr-defined]
    assert facts.label.foreground == 16 * 32  # type: ignore[attr-defined]
    assert examine(1, 0)[1] == ["E205"]
    assert examine(2, 2) == (None, ["E115"]), "the label has no such level"


def test_formats_without_levels_have_no_other_than_the_first(tmp_path: Path, write_series: WriteSeries) -> None:
    nib.save(nib.Nifti1Image(VOXELS, AFFINE), tmp_path / "a.nii")
    write_series(tmp_path / "series", VOXELS, AFFINE)
    for name in ("a.nii", "series"):
        assert fault_of(Source(tmp_path / name, level=1), 3) is Fault.NO_LEVEL
        _, findings = examine_case(Case("a", "a", {"": Source(tmp_path / name, level=1)}, None))
        assert findings[0].code == "E115" and findings[0].advice.startswith("Register the data again without --level")
        assert BY_CODE["E115"].level == "error"
