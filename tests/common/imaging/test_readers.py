"""Images and labels from files: what is refused in every format, and what is special about TIFF and NIfTI."""

from __future__ import annotations

import gzip
import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import tifffile

from common.errors import DataError
from common.imaging.readers import read_image, read_label
from common.imaging.volume import Volume, scaling_affine

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
FORMATS = [("tif", 2), ("nii", 3), ("nii.gz", 3)]


def needs(folder: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not (DATA / folder).is_dir(), reason=f"needs ../shared/data/{folder}")


def write(path: Path, array: np.ndarray) -> Path:
    """Store (y, x) or (x, y, z) voxels without metadata beyond the required."""
    if path.suffix == ".tif":
        tifffile.imwrite(path, array, compression="zlib")
    else:
        nib.save(nib.Nifti1Image(array, np.eye(4)), path)
    return path


def voxels(dimensions: int, dtype: type = np.uint8) -> np.ndarray:
    return (np.random.default_rng(0).integers(0, 200, (20, 30, 12)[:dimensions])).astype(dtype)


# Every format; `test_reader_contract` has what all of them give


@pytest.mark.parametrize(("suffix", "dimensions"), FORMATS)
def test_every_format_refuses_what_is_no_image(tmp_path: Path, suffix: str, dimensions: int) -> None:
    path = tmp_path / f"scan.{suffix}"
    with pytest.raises(DataError, match=r"image scan.*No such file"):
        read_image(path, dimensions)
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"image scan.*empty"):
        read_image(path, dimensions)
    path.write_text("Thursday: buy milk.\n" * 100)
    with pytest.raises(DataError, match=r"label scan.*cannot be read"):
        read_label(path, dimensions)
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match=r"image scan.*found a folder"):
        read_image(path, dimensions)


@pytest.mark.parametrize(("suffix", "dimensions"), FORMATS)
def test_every_format_refuses_pixels_that_are_not_finite(tmp_path: Path, suffix: str, dimensions: int) -> None:
    stored = voxels(dimensions, np.float32)
    stored[3, 3] = np.nan
    damaged = 1 if dimensions == 2 else 12
    with pytest.raises(DataError, match=rf"scan\.{suffix}: {damaged} of .* not finite"):
        read_image(write(tmp_path / f"scan.{suffix}", stored), dimensions)


@pytest.mark.parametrize(("suffix", "dimensions"), FORMATS)
def test_labels_stored_as_whole_floats_become_integers(tmp_path: Path, suffix: str, dimensions: int) -> None:
    label = read_label(write(tmp_path / f"a.{suffix}", voxels(dimensions, np.float32)), dimensions)
    assert label.array.dtype == np.int32
    assert np.array_equal(np.sort(label.array, axis=None), np.sort(voxels(dimensions), axis=None))


@pytest.mark.parametrize(("value", "complaint"), [(0.5, "not whole numbers"), (-1.0, "from 0, found -1")])
@pytest.mark.parametrize(("suffix", "dimensions"), FORMATS)
def test_labels_that_are_no_numbering_are_refused(
    tmp_path: Path, suffix: str, dimensions: int, value: float, complaint: str
) -> None:
    stored = voxels(dimensions, np.float32)
    stored[0, 0] = value
    with pytest.raises(DataError, match=complaint):
        read_label(write(tmp_path / f"a.{suffix}", stored), dimensions)


def test_a_file_type_without_reader_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x" * 200)
    with pytest.raises(DataError, match=r"image a\.jpg.*Convert it to one of \.tif"):
        read_image(tmp_path / "a.jpg", 2)


# TIFF


@pytest.mark.parametrize("compression", [None, "lzw", "jpeg", "packbits", "zstd"])
@pytest.mark.parametrize("rows", [16, 64])
def test_tiff_of_any_compression_is_refused_when_cut_short(tmp_path: Path, rows: int, compression: str | None) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, voxels(2).repeat(4, 0).repeat(4, 1), rowsperstrip=rows, compression=compression)
    whole = path.read_bytes()
    for length in range(len(whole) // 2, len(whole), 99):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"image a\.tif"):
            read_image(path, 2)


def test_tiff_with_strips_that_were_never_written_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.full((64, 64), 9, np.uint8), rowsperstrip=16)
    with tifffile.TiffFile(path, mode="r+") as file:
        file.pages[0].tags["StripByteCounts"].overwrite((1024, 1024, 0, 0))
    with pytest.raises(DataError, match="never written"):
        read_image(path, 2)


def test_tiff_keeps_rgb_and_drops_alpha(tmp_path: Path) -> None:
    rgba = np.random.default_rng(0).integers(0, 256, (5, 7, 4), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "rgba.tif", rgba, photometric="rgb", extrasamples=["unassalpha"])
    tifffile.imwrite(tmp_path / "planes.tif", np.moveaxis(rgba[..., :3], -1, 0), photometric="rgb", planarconfig=2)
    assert np.array_equal(read_image(tmp_path / "rgba.tif", 2).array[0], rgba[..., :3])
    assert np.array_equal(read_image(tmp_path / "planes.tif", 2).array[0], rgba[..., :3])


@pytest.mark.parametrize("compression", [None, "lzw", "jpeg", "packbits", "zstd"])
def test_tiff_reads_common_compressions(tmp_path: Path, compression: str | None) -> None:
    ramp = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1))
    tifffile.imwrite(tmp_path / "a.tif", ramp, compression=compression)
    difference = read_image(tmp_path / "a.tif", 2).array[0, ..., 0].astype(int) - ramp
    assert np.abs(difference).max() <= (3 if compression == "jpeg" else 0)


def test_tiff_where_zero_is_white_is_inverted_unless_a_label(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.array([[0, 1], [254, 255]], np.uint8), photometric="miniswhite")
    assert read_image(tmp_path / "a.tif", 2).array[0, ..., 0].tolist() == [[255, 254], [1, 0]]
    assert read_label(tmp_path / "a.tif", 2).array[0, ..., 0].tolist() == [[0, 1], [254, 255]]


def test_tiff_palette_holds_labels_but_no_image(tmp_path: Path) -> None:
    palette = np.random.default_rng(0).integers(0, 65536, (3, 256), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", np.eye(4, dtype=np.uint8), photometric="palette", colormap=palette)
    assert read_label(tmp_path / "a.tif", 2).array[0, ..., 0].tolist() == np.eye(4).tolist()
    with pytest.raises(DataError, match="palette"):
        read_image(tmp_path / "a.tif", 2)


def test_tiff_states_its_pixel_size_in_micrometres(tmp_path: Path) -> None:
    image = np.zeros((4, 4), np.uint8)
    # 4 pixels a micrometre along x, 2 along y.
    tifffile.imwrite(tmp_path / "imagej.tif", image, imagej=True, resolution=(4.0, 2.0), metadata={"unit": "um"})
    # 20,000 pixels a centimetre are 0.5 micrometres each.
    tifffile.imwrite(tmp_path / "cm.tif", image, resolution=(20000, 20000), resolutionunit="CENTIMETER")
    ome = {"PhysicalSizeX": 250, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 0.5, "PhysicalSizeYUnit": "µm"}
    tifffile.imwrite(tmp_path / "a.ome.tif", image, ome=True, metadata=ome)
    tifffile.imwrite(tmp_path / "dpi.tif", image, resolution=(72, 72), resolutionunit="INCH")
    assert read_image(tmp_path / "imagej.tif", 2).spacing == pytest.approx((1.0, 0.5, 0.25))
    assert read_image(tmp_path / "cm.tif", 2).spacing == pytest.approx((1.0, 0.5, 0.5))
    assert read_image(tmp_path / "a.ome.tif", 2).spacing == pytest.approx((1.0, 0.5, 0.25))
    assert read_image(tmp_path / "dpi.tif", 2).spacing == (1.0, 1.0, 1.0)
    assert np.diag(read_image(tmp_path / "imagej.tif", 2).affine).tolist() == pytest.approx([0.25, 0.5, 1.0, 1.0])


def test_rgb_label_is_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((4, 4, 3), np.uint8), photometric="rgb")
    with pytest.raises(DataError, match="found 3 channels"):
        read_label(tmp_path / "a.tif", 2)


# NIfTI


def test_nifti_stays_as_stored_and_its_affine_says_where(tmp_path: Path) -> None:
    # Stored as (anterior to posterior, right to left, inferior to superior), voxels of 2 x 3 x 4 mm.
    stored = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    affine = np.array([[0, -3, 0, 10], [-2, 0, 0, 20], [0, 0, 4, 30], [0, 0, 0, 1]], dtype=np.float64)
    nib.save(nib.Nifti1Image(stored, affine), tmp_path / "a.nii")
    volume = read_image(tmp_path / "a.nii", 3)
    assert volume.spacing == (4.0, 3.0, 2.0)
    assert np.array_equal(volume.array[..., 0], stored.T)
    assert np.array_equal(volume.affine, affine)


def test_nifti_unpacks_to_no_more_than_its_header_announces(tmp_path: Path) -> None:
    write(tmp_path / "a.nii", voxels(3))
    content = (tmp_path / "a.nii").read_bytes()
    (tmp_path / "filled.nii.gz").write_bytes(gzip.compress(content + bytes(4096)))
    assert read_image(tmp_path / "filled.nii.gz", 3).shape == (12, 30, 20)
    with gzip.open(tmp_path / "bomb.nii.gz", "wb", compresslevel=1) as file:
        file.write(content)
        for _ in range(256):
            file.write(bytes(1 << 20))
    tracemalloc.start()
    with pytest.raises(DataError, match=r"bomb\.nii\.gz.*more follow"):
        read_image(tmp_path / "bomb.nii.gz", 3)
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()


@pytest.mark.parametrize("suffix", ["nii", "nii.gz"])
def test_nifti_that_announces_more_than_any_image_has_is_refused(tmp_path: Path, suffix: str) -> None:
    header = nib.Nifti2Header()
    header.set_data_shape((1 << 11, 1 << 11, 1 << 10))
    header.set_data_dtype(np.uint8)
    content = header.binaryblock + bytes(4096)
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(gzip.compress(content) if suffix == "nii.gz" else content)
    with pytest.raises(DataError, match="announces 4294967296 voxels"):
        read_image(path, 3)


def test_nifti_rescaling_is_applied(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.arange(8, dtype=np.int16).reshape(2, 2, 2), np.eye(4))
    image.header.set_slope_inter(0.5, -1024)
    nib.save(image, tmp_path / "a.nii.gz")
    raw = bytearray(gzip.decompress((tmp_path / "a.nii.gz").read_bytes()))
    raw[352:368] = np.arange(8, dtype=np.int16).tobytes()  # nibabel stores unscaled numbers: put back what was meant
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(bytes(raw)))
    volume = read_image(tmp_path / "a.nii.gz", 3)
    assert volume.array.dtype == np.float32
    assert sorted(volume.array.ravel().tolist()) == [-1024 + 0.5 * n for n in range(8)]


def test_nifti_channels_big_endian_and_version_2(tmp_path: Path) -> None:
    stored = np.random.default_rng(0).integers(0, 1000, (3, 4, 5, 2)).astype(">i2")
    header = nib.Nifti2Header(endianness=">")
    nib.save(nib.Nifti2Image(stored, np.eye(4), header), tmp_path / "a.nii")
    volume = read_image(tmp_path / "a.nii", 3)
    assert volume.array.dtype.isnative
    assert np.array_equal(volume.array, stored.transpose(2, 1, 0, 3))


def test_nifti_units_become_millimetres(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.ones((2, 2, 2), np.uint8), np.diag([500.0, 500.0, 2000.0, 1.0]))
    image.header.set_xyzt_units("micron")
    nib.save(image, tmp_path / "a.nii")
    assert read_image(tmp_path / "a.nii", 3).spacing == pytest.approx((2.0, 0.5, 0.5))


def test_nifti_of_one_slice_is_a_2d_image(tmp_path: Path) -> None:
    for name, shape in (("flat.nii", (5, 7)), ("slice.nii", (5, 7, 1))):
        nib.save(nib.Nifti1Image(np.zeros(shape, np.uint8), np.eye(4)), tmp_path / name)
        assert read_image(tmp_path / name, 2).array.shape == (1, 7, 5, 1)


def test_nifti_damage_that_decompresses_is_found_by_the_checksum(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nii.gz", voxels(3))
    # Stored blocks: a flipped voxel bit still decompresses.
    content = bytearray(gzip.compress(gzip.decompress(path.read_bytes()), compresslevel=0))
    content[-1000] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match="CRC"):
        read_image(path, 3)


# The volume


@pytest.mark.parametrize(
    ("array", "spacing", "affine"),
    [
        (np.zeros((4, 4, 1)), (1.0, 1.0, 1.0), np.eye(4)),
        (np.zeros((0, 4, 4, 1)), (1.0, 1.0, 1.0), np.eye(4)),
        (np.zeros((1, 4, 4, 1), complex), (1.0, 1.0, 1.0), np.eye(4)),
        (np.zeros((1, 4, 4, 1)), (1.0, 0.0, 1.0), np.diag([1.0, 0.0, 1.0, 1.0])),
        (np.zeros((1, 4, 4, 1)), (3.0, 2.0, 1.0), np.diag([3.0, 2.0, 1.0, 1.0])),  # (z, y, x) against (x, y, z)
        (np.zeros((1, 4, 4, 1)), (1.0, 1.0, 1.0), np.eye(3)),
        (np.zeros((1, 4, 4, 1)), (1.0, 1.0, 1.0), np.full((4, 4), np.nan)),
    ],
)
def test_volume_refuses_parts_that_do_not_fit(
    array: np.ndarray, spacing: tuple[float, float, float], affine: np.ndarray
) -> None:
    with pytest.raises(ValueError, match=r"expected|affine"):
        Volume(array, spacing, affine)


def test_volume_takes_spacing_and_affine_in_their_own_orders() -> None:
    volume = Volume(np.zeros((2, 3, 4, 1)), (3.0, 2.0, 1.0), scaling_affine((3.0, 2.0, 1.0)))
    assert np.diag(volume.affine).tolist() == [1.0, 2.0, 3.0, 1.0]
    assert volume.shape == (2, 3, 4)


# Real files


@needs("nuclei")
def test_real_microscopy_reads_as_rgb_with_its_instances() -> None:
    for image_path in sorted((DATA / "nuclei").glob("*/images/*.tif"))[::25]:
        image = read_image(image_path, 2)
        label = read_label(image_path.parents[1] / "labels" / image_path.name, 2)
        assert image.channels == 3
        assert image.array.dtype == np.uint8
        assert image.shape == label.shape
        # An instance is numbered because it is there.
        assert len(np.unique(label.array)) == label.array.max() + 1


@needs("hippocampus")
def test_real_volumes_agree_with_nibabel_voxel_by_voxel() -> None:
    for path in sorted((DATA / "hippocampus").glob("*/images/*.nii.gz"))[::25]:
        volume = read_image(path, 3)
        reference = nib.load(path)
        assert np.array_equal(volume.array[..., 0], np.asarray(reference.dataobj, dtype=np.float32).T)
        assert np.allclose(volume.affine, reference.affine)
        label = read_label(path.parents[1] / "labels" / path.name, 3)
        assert set(np.unique(label.array).tolist()) == {0, 1, 2}
