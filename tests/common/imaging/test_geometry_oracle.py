"""Real images against SimpleITK, which reads them with code of its own: where each voxel lies, and what it holds."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from common.errors import DataError
from common.imaging.case import Source
from common.imaging.readers import read_image, read_label
from common.imaging.readers.dicom_folder import Series, find_series
from common.imaging.volume import Volume

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
SEGMENTATIONS = DATA / "dicom_seg" / "segmentations"
MILLIMETRES = 1e-3


def needs(folder: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not (DATA / folder).is_dir(), reason=f"needs ../shared/data/{folder}")


def largest_distance(volume: Volume, image: sitk.Image) -> float:
    """Over the corners and a hundred voxels at random, in the unit of the image."""
    z, y, x = volume.shape
    corners = [(i, j, k) for i in (0, x - 1) for j in (0, y - 1) for k in (0, z - 1)]
    inner = np.random.default_rng(0).integers(0, (x, y, z), (100, 3)).tolist()
    distances = []
    for index in [*corners, *inner]:
        left, posterior, superior = image.TransformContinuousIndexToPhysicalPoint([float(i) for i in index])
        ours = (volume.affine @ (*index, 1))[:3]
        distances.append(np.linalg.norm(ours - (-left, -posterior, superior)))
    return float(max(distances))


def assert_agree(volume: Volume, image: sitk.Image) -> None:
    assert volume.spacing == pytest.approx(image.GetSpacing()[::-1], rel=1e-6)
    assert largest_distance(volume, image) < MILLIMETRES
    assert np.array_equal(volume.array[..., 0], sitk.GetArrayFromImage(image))


def read_with_simpleitk(folder: Path, series: Series) -> sitk.Image:
    """SimpleITK's own grouping and sorting of the files."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder), series.uid))
    return reader.Execute()


@needs("hippocampus")
def test_nifti_agrees_with_simpleitk() -> None:
    images = [
        path
        for site in sorted((DATA / "hippocampus").iterdir())
        if (site / "images").is_dir()
        for path in sorted((site / "images").glob("*.nii.gz"))[: None if site.name == "holdout" else 3]
    ]
    assert len(images) > 40
    for path in images:
        assert_agree(read_image(path, 3), sitk.ReadImage(str(path)))
        label = path.parents[1] / "labels" / path.name
        assert_agree(read_label(label, 3), sitk.ReadImage(str(label)))


@needs("brain_tumor_dicom")
def test_brain_series_agree_with_simpleitk_and_are_6_5_mm_apart() -> None:
    folders = sorted((DATA / "brain_tumor_dicom").glob("*/*/*"))
    assert len(folders) == 15
    for folder in folders:
        (series,) = find_series(folder)
        volume = read_image(folder, 3)
        assert_agree(volume, read_with_simpleitk(folder, series))
        assert volume.spacing == pytest.approx((6.5, 0.6875, 0.6875), abs=1e-5)
        assert volume.shape[0] == len(series.files) == series.frames


@needs("brain_tumor_dicom")
def test_brain_masks_lie_on_the_images_of_their_session() -> None:
    for session in sorted((DATA / "brain_tumor_dicom").glob("*/*")):
        (mask_folder,) = session.glob("*MaskTumor*")
        alone = read_label(mask_folder, 3)
        assert np.unique(alone.array).tolist() == [0, 1]
        for folder in session.iterdir():
            image = read_image(folder, 3)
            # The positions are those of the image but for their last digits; on its grid, they are the same.
            assert np.abs(alone.affine - image.affine).max() < 0.01
        mask = read_label(Source(mask_folder), 3, grid=image)
        assert np.array_equal(mask.affine, image.affine)
        assert np.array_equal(mask.array, alone.array)


@needs("dicom_seg")
@pytest.mark.parametrize("name", ["ct-3slice", "23x38x3/image", "24x38x3/image"])
def test_ct_series_agree_with_simpleitk(name: str) -> None:
    folder = SEGMENTATIONS / name
    (series,) = find_series(folder)
    assert_agree(read_image(folder, 3), read_with_simpleitk(folder, series))


@needs("dicom_seg")
@pytest.mark.parametrize("name", ["23x38x3", "24x38x3"])
def test_multi_frame_ct_agrees_with_simpleitk_and_with_its_single_frames(name: str) -> None:
    path = SEGMENTATIONS / name / "multiframe" / "mf.dcm"
    volume = read_image(path, 3)
    assert_agree(volume, sitk.ReadImage(str(path)))
    single_frames = read_image(SEGMENTATIONS / name / "image", 3)
    assert np.array_equal(volume.array, single_frames.array)
    assert np.allclose(volume.affine, single_frames.affine)


@needs("dicom_fixtures")
def test_single_slices_agree_with_simpleitk() -> None:
    path = DATA / "dicom_fixtures" / "ct_image.dcm"
    volume, image = read_image(path, 2), sitk.ReadImage(str(path))
    assert largest_distance(volume, image) < MILLIMETRES
    assert np.array_equal(volume.array[..., 0], sitk.GetArrayFromImage(image))
    # Where 0 is white, SimpleITK inverts, too.
    path = DATA / "dicom_fixtures" / "dx_image.dcm"
    inverted = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    assert np.array_equal(read_image(path, 2).array[..., 0], inverted)
    assert np.array_equal(read_label(path, 2).array[..., 0], 255 - inverted)


@needs("dicom_seg")
@pytest.mark.parametrize(
    ("segmentation", "image", "mask"),
    [
        ("liver.dcm", "ct-3slice", "liver_seg.nrrd"),
        ("23x38x3/seg/label.seg", "23x38x3/image", "23x38x3/nrrd/label.nrrd"),
        ("24x38x3/seg/label.seg", "24x38x3/multiframe/mf.dcm", "24x38x3/nrrd/label.nrrd"),
        ("sparse-labelmap-noppv.dcm", "24x38x3/image", "sparse_labelmap_noppv_seg.nrrd"),
        ("sparse-labelmap-ppv5.dcm", "24x38x3/image", "sparse_labelmap_ppv5_seg.nrrd"),
    ],
)
def test_segmentations_agree_with_the_masks_they_were_made_of(segmentation: str, image: str, mask: str) -> None:
    reference = sitk.ReadImage(str(SEGMENTATIONS / mask))
    expected = sitk.GetArrayFromImage(reference)
    if "ppv5" in mask:
        expected = np.where(expected == 5, 0, expected)  # the number that this file uses for "no segment"
    grid = read_image(SEGMENTATIONS / image, 3)
    on_image = read_label(SEGMENTATIONS / segmentation, 3, grid=grid)
    assert np.array_equal(on_image.array[..., 0], expected)
    assert np.array_equal(on_image.affine, grid.affine)
    alone = read_label(SEGMENTATIONS / segmentation, 3)
    assert np.array_equal(alone.array[..., 0], expected)
    for volume in (on_image, alone):
        assert largest_distance(volume, reference) < MILLIMETRES


@needs("dicom_seg")
def test_overlapping_segments_are_refused_by_the_voxels_that_their_masks_share() -> None:
    grid = read_image(SEGMENTATIONS / "ct-3slice", 3)
    masks = [sitk.GetArrayFromImage(sitk.ReadImage(str(p))) for p in SEGMENTATIONS.glob("partial_overlaps-*.nrrd")]
    parts = {int(number): mask == number for mask in masks for number in np.unique(mask) if number}
    shared = {(a, b): int((parts[a] & parts[b]).sum()) for a, b in itertools.combinations(sorted(parts), 2)}
    first, second = min(pair for pair, count in shared.items() if count)
    message = rf"{first} \(.*\), {second} \(.*\) share {shared[first, second]} voxels"
    with pytest.raises(DataError, match=message):
        read_label(SEGMENTATIONS / "partial_overlaps.dcm", 3, grid=grid)
