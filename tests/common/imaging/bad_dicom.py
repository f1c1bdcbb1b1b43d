"""The part of the corpus of bad inputs that is DICOM; importing it adds to `bad_inputs.CORPUS`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from common.imaging.case import Case, Source
from tests.common.imaging.bad_inputs import AFFINE, SHAPE, Place, bad, case_of, cut, organ, voxels
from tests.common.imaging.test_dicom_folder import report_beside

Edit = Callable[[Dataset, int], bool | None]
_STORED = voxels(dtype=np.uint16)


def with_series(at: Place, edit: Edit = lambda dataset, z: None, stored: np.ndarray = _STORED) -> Case:
    """A case whose image is a series of CT slices, each changed by `edit`, with a sound label."""
    at.series(at.image("bad"), stored, AFFINE, edit=edit)
    return case_of(at.image("bad"), at.nifti(at.label("bad.nii.gz"), organ()))


def a_file(at: Place) -> Path:
    return sorted(at.image("bad").iterdir())[3]


@bad("E101")
def truncated_slice(at: Place) -> Case:
    case = with_series(at)
    cut(a_file(at), 0.9)
    return case


@bad("E101")
def slice_cut_in_its_header(at: Place) -> Case:
    case = with_series(at)
    cut(a_file(at), 0.3)
    return case


@bad("E101")
def slice_of_no_bytes(at: Place) -> Case:
    case = with_series(at)
    path = a_file(at)
    path.unlink()
    path.with_suffix(".dcm").touch()
    return case


@bad("E101")
def slice_without_dicoms_mark(at: Place) -> Case:
    case = with_series(at)
    a_file(at).unlink()
    (at.image("bad") / "lost.dcm").write_bytes(bytes(400))
    return case


@bad("E101")
def link_of_a_slice_to_nothing(at: Place) -> Case:
    case = with_series(at)
    path = a_file(at)
    path.unlink()
    path.symlink_to(at.folder / "moved away")
    return case


@bad("E101")
def slices_without_pixels(at: Place) -> Case:
    def edit(dataset: Dataset, z: int) -> None:
        del dataset.PixelData

    return with_series(at, edit)


@bad("E107")
def reports_in_place_of_images(at: Place) -> Case:
    def edit(dataset: Dataset, z: int) -> None:
        for keyword in ("PixelData", "Rows", "Columns"):
            delattr(dataset, keyword)
        dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.88.33"

    at.series(at.image("bad"), _STORED[:1], AFFINE, edit=edit)
    (path,) = at.image("bad").iterdir()
    return case_of(path, at.nifti(at.label("bad.nii.gz"), organ()))


@bad("E103")
def table_of_contents_alone(at: Place) -> Case:
    """A folder whose only DICOM file is a DICOMDIR."""
    case = with_series(at)
    first, *others = sorted(at.image("bad").iterdir())
    dataset = pydicom.dcmread(first)
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.1.3.10"
    del dataset.PixelData
    dataset.save_as(at.image("bad") / "DICOMDIR", enforce_file_format=True)
    for path in (first, *others):
        path.unlink()
    return case


@bad("E103")
def empty_folder(at: Place) -> Case:
    at.image("bad").mkdir()
    return case_of(at.image("bad"), at.nifti(at.label("bad.nii.gz"), organ()))


@bad("E102")
def series_that_is_not_in_the_folder(at: Place) -> Case:
    with_series(at)
    return case_of(Source(at.image("bad"), "1.2.3.4"), at.label("bad.nii.gz"))


@bad("E113")
def two_series_in_one_folder(at: Place) -> Case:
    with_series(at)
    return with_series(at, stored=voxels(1, dtype=np.uint16))


@bad("E112")
def missing_slice(at: Place) -> Case:
    return with_series(at, lambda dataset, z: z != 4)


@bad("E112")
def uneven_slices(at: Place) -> Case:
    def edit(dataset: Dataset, z: int) -> None:
        x, y, height = (float(value) for value in dataset.ImagePositionPatient)
        dataset.ImagePositionPatient = [x, y, height + 1.1 * (z > 4)]

    return with_series(at, edit)


@bad("E112")
def slice_given_twice(at: Place) -> Case:
    case = with_series(at)
    path = a_file(at)
    dataset = pydicom.dcmread(path)
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.save_as(path.with_name("again"), enforce_file_format=True)
    return case


@bad("E112")
def slice_of_another_size(at: Place) -> Case:
    def edit(dataset: Dataset, z: int) -> None:
        if z == 2:
            dataset.Rows //= 2
            dataset.PixelData = dataset.PixelData[: len(dataset.PixelData) // 2]

    return with_series(at, edit)


@bad("E112")
def scout_among_the_slices(at: Place) -> Case:
    def edit(dataset: Dataset, z: int) -> None:
        if z == 0:
            dataset.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]

    return with_series(at, edit)


@bad("E112")
def tilted_gantry(at: Place) -> Case:
    def edit(dataset: Dataset, z: int) -> None:
        x, y, height = (float(value) for value in dataset.ImagePositionPatient)
        dataset.ImagePositionPatient = [x, y + 1.5 * z, height]

    return with_series(at, edit)


@bad("E114")
def slices_without_position(at: Place) -> Case:
    def edit(dataset: Dataset, z: int) -> None:
        del dataset.ImagePositionPatient

    return with_series(at, edit)


@bad("E114")
def slices_of_no_spacing(at: Place) -> Case:
    def edit(dataset: Dataset, z: int) -> None:
        dataset.PixelSpacing = [0, 0]

    return with_series(at, edit)


@bad("E114")
def slices_with_crooked_axes(at: Place) -> Case:
    def edit(dataset: Dataset, z: int) -> None:
        dataset.ImageOrientationPatient = [1, 0, 0, 1, 0, 0]

    return with_series(at, edit)


@bad("E107")
def rendering_in_place_of_an_image(at: Place) -> Case:
    return with_series(at, stored=voxels(0, (*SHAPE, 3), np.uint8))


@bad("W120")
def text_burnt_into_the_pixels(at: Place) -> Case:
    def edit(dataset: Dataset, z: int) -> None:
        if z == 5:
            dataset.BurnedInAnnotation = "YES"

    return with_series(at, edit)


def with_label_series(at: Place, affine: np.ndarray, stored: np.ndarray) -> Case:
    case = with_series(at)
    at.series(at.label("bad"), stored, affine)
    return case_of(case.images[""], at.label("bad"))


@bad("E207")
def label_series_beside_its_image(at: Place) -> Case:
    affine = AFFINE.copy()
    affine[0, 3] += 9
    return with_label_series(at, affine, organ().astype(np.uint16))


@bad("E205")
def label_series_of_another_size(at: Place) -> Case:
    return with_label_series(at, AFFINE, organ().astype(np.uint16)[:, :6])


@bad()
def fine_label_series_of_some_slices(at: Place) -> Case:
    affine = AFFINE.copy()
    affine[:3, 3] += 2 * AFFINE[:3, 2]
    return with_label_series(at, affine, organ().astype(np.uint16)[2:5])


@bad()
def fine_series_with_a_report_that_bears_its_number(at: Place) -> Case:
    case = with_series(at)
    report_beside(a_file(at))
    return case


@bad()
def fine_series_with_notes_beside_it(at: Place) -> Case:
    case = with_series(at)
    (at.image("bad") / "notes.txt").write_text("seen")
    return case
