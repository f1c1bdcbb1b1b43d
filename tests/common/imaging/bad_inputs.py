"""The corpus of bad inputs: each is built in a folder beside sound cases and names the codes it must be found with.

`images/` and `labels/` are the layout; every bad case is called "bad", so that it can also be found by discovery. What
is DICOM is in `bad_dicom.py`.
"""

from __future__ import annotations

import gzip
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import tifffile

from common.imaging.case import Case, Source
from common.imaging.checks import Requirements

SHAPE = (8, 12, 10)  # z, y, x
AFFINE = np.array([[1.5, 0, 0, -20], [0, 1.25, 0, 30], [0, 0, 3, -7], [0, 0, 0, 1.0]])
TWO = Requirements(dimensions=2, channels=1, classes=("background", "cell"), labels="instances")
THREE = Requirements(dimensions=3, channels=1, classes=("background", "organ", "lesion"), labels="classes")
BOTH = Requirements(
    dimensions=3, channels=2, classes=("background", "organ", "lesion"), labels="classes", modalities=("T1", "T2")
)
ZERO = Requirements(
    dimensions=3,
    channels=2,
    classes=("background", "organ", "lesion"),
    labels="classes",
    modalities=("T1", "T2"),
    missing_modality="zero",
)


@dataclass(frozen=True)
class Place:
    """Where a case is built, with writers for files; `series` is the fixture `write_series`."""

    folder: Path
    series: Callable[..., list[Path]]

    def image(self, name: str) -> Path:
        return self.folder / "images" / name

    def label(self, name: str) -> Path:
        return self.folder / "labels" / name

    def nifti(self, path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
        """`array` is (z, y, x) or (z, y, x, channel)."""
        nib.save(nib.Nifti1Image(np.moveaxis(array, (0, 1, 2), (2, 1, 0)), affine), path)
        return path

    def tiff(self, path: Path, array: np.ndarray, **options: Any) -> Path:
        tifffile.imwrite(path, array, **options)
        return path


@dataclass(frozen=True)
class BadInput:
    """One kind of bad input.

    Attributes
    ----------
    build : makes the files and returns the cases they are; without any, there is nothing to be found.
    codes : what must be found. Where none of them is an error the case stays usable.
    requirements : of the study, whose dimensions the sound neighbours have.
    validation : names of cases that are validated on.
    """

    name: str
    codes: frozenset[str]
    build: Callable[[Place], list[Case]]
    requirements: Requirements = THREE
    label_map: Mapping[int, int] | None = None
    validation: frozenset[str] = field(default_factory=frozenset)


CORPUS: list[BadInput] = []


def bad(*codes: str, **options: Any) -> Callable[[Callable[[Place], Case | list[Case]]], Callable[[Place], list[Case]]]:
    """Adds a builder to the corpus; its name is the function's."""

    def register(build: Callable[[Place], Case | list[Case]]) -> Callable[[Place], list[Case]]:
        def built(at: Place) -> list[Case]:
            found = build(at)
            return found if isinstance(found, list) else [found]

        CORPUS.append(BadInput(build.__name__.strip("_"), frozenset(codes), built, **options))
        return built

    return register


def voxels(seed: int = 0, shape: tuple[int, ...] = SHAPE, dtype: Any = np.int16) -> np.ndarray:
    return np.random.default_rng(seed).integers(20, 220, shape).astype(dtype)


def organ(seed: int = 0, shape: tuple[int, ...] = SHAPE, dtype: Any = np.uint8) -> np.ndarray:
    """A box of class 1 with a few voxels of class 2; each seed another one."""
    label = np.zeros(shape, dtype)
    label[..., 2:7, 2:8] = 1
    label[..., 3 + seed % 3, 3 + seed // 3 % 4] = 2
    return label


def plane(seed: int = 0, dtype: Any = np.uint8) -> np.ndarray:
    return voxels(seed, (24, 30), dtype)


def cells(seed: int = 0) -> np.ndarray:
    """Numbered rectangles, of other sizes for each seed."""
    sizes = np.random.default_rng(seed).integers(4, 8, (6, 2))
    label = np.zeros((24, 30), np.uint16)
    for number, (height, width) in enumerate(sizes):
        y, x = 2 + 11 * (number // 3), 2 + 9 * (number % 3)
        label[y : y + height, x : x + width] = number + 1
    return label


def neighbours(at: Place, requirements: Requirements) -> list[Case]:
    """Sound cases, which must stay usable whatever lies beside them."""
    cases = []
    for index in (1, 2, 3):
        name, seed = f"good-{index}", 100 + index
        if requirements.dimensions == 2:
            images = {"": Source(at.tiff(at.image(f"{name}.tif"), plane(seed)))}
            label = at.tiff(at.label(f"{name}.tif"), cells(seed))
        else:
            images = {
                modality: Source(at.nifti(at.image(f"{name}{_suffix(modality)}.nii.gz"), voxels(seed + 10 * number)))
                for number, modality in enumerate(requirements.modalities or ("",))
            }
            label = at.nifti(at.label(f"{name}.nii.gz"), organ(seed))
        cases.append(Case(name, name, images, Source(label)))
    return cases


def _suffix(modality: str) -> str:
    return f"_{modality}" if modality else ""


def case_of(image: Path | Source, label: Path | Source | None, name: str = "bad", patient: str = "") -> Case:
    sources = [one if isinstance(one, Source) or one is None else Source(one) for one in (image, label)]
    assert sources[0] is not None
    return Case(name, patient or name, {"": sources[0]}, sources[1])


def with_image(at: Place, image: Path) -> Case:
    """A 3D case of a bad image and a sound label."""
    return case_of(image, at.nifti(at.label("bad.nii.gz"), organ()))


def with_label(at: Place, label: Path) -> Case:
    """A 3D case of a sound image and a bad label."""
    return case_of(at.nifti(at.image("bad.nii.gz"), voxels()), label)


def cell_image(at: Place, image: Path | Source) -> Case:
    """A 2D case of a bad image and a sound label."""
    return case_of(image, at.tiff(at.label("bad.tif"), cells()))


def cell_label(at: Place, label: Path) -> Case:
    """A 2D case of a sound image and a bad label."""
    return case_of(at.tiff(at.image("bad.tif"), plane()), label)


def two_modalities(at: Place, t2: Path | None) -> Case:
    t1 = at.nifti(at.image("bad_T1.nii.gz"), voxels(1))
    images = {"T1": Source(t1)} | ({"T2": Source(t2)} if t2 is not None else {})
    return Case("bad", "bad", images, Source(at.nifti(at.label("bad.nii.gz"), organ())))


def cut(path: Path, share: float = 0.6) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


# Files that are none, or cannot be opened. --------------------------------------------------------------------------


@bad("E101", requirements=TWO)
def truncated_tiff(at: Place) -> Case:
    return cell_image(at, cut(at.tiff(at.image("bad.tif"), plane())))


@bad("E101", requirements=TWO)
def truncated_compressed_tiff(at: Place) -> Case:
    return cell_image(at, cut(at.tiff(at.image("bad.tif"), plane(), compression="zlib")))


@bad("E101")
def truncated_nifti(at: Place) -> Case:
    return with_image(at, cut(at.nifti(at.image("bad.nii"), voxels())))


@bad("E101")
def truncated_gzip(at: Place) -> Case:
    return with_image(at, cut(at.nifti(at.image("bad.nii.gz"), voxels())))


@bad("E101")
def truncated_label(at: Place) -> Case:
    return with_label(at, cut(at.nifti(at.label("bad.nii.gz"), organ()), 0.9))


@bad("E101")
def gzip_with_another_checksum(at: Place) -> Case:
    path = at.nifti(at.image("bad.nii.gz"), voxels())
    content = bytearray(path.read_bytes())
    content[-6] ^= 0xFF
    path.write_bytes(content)
    return with_image(at, path)


@bad("E101", requirements=TWO)
def text_called_tiff(at: Place) -> Case:
    at.image("bad.tif").write_text("patient;date\n1;today\n")
    return cell_image(at, at.image("bad.tif"))


@bad("E101")
def web_page_called_nifti(at: Place) -> Case:
    at.image("bad.nii.gz").write_text("<!DOCTYPE html><html><body>Please log in</body></html>")
    return with_image(at, at.image("bad.nii.gz"))


@bad("E101")
def nifti_called_gzip(at: Place) -> Case:
    return with_image(at, at.nifti(at.image("bad.nii"), voxels()).rename(at.image("bad.nii.gz")))


@bad("E101")
def random_bytes(at: Place) -> Case:
    at.image("bad.nii").write_bytes(np.random.default_rng(0).bytes(5000))
    return with_image(at, at.image("bad.nii"))


@bad("E101")
def nifti_header_of_huge_size(at: Place) -> Case:
    path = at.nifti(at.image("bad.nii"), voxels())
    content = bytearray(path.read_bytes())
    content[40:56] = struct.pack("<8h", 3, 32000, 32000, 32000, 1, 1, 1, 1)
    path.write_bytes(content)
    return with_image(at, path)


@bad("E101", requirements=TWO)
def tiff_header_of_huge_size(at: Place) -> Case:
    path = at.tiff(at.image("bad.tif"), plane())
    with tifffile.TiffFile(path, mode="r+b") as file:
        for tag in ("ImageWidth", "ImageLength", "RowsPerStrip"):
            file.pages[0].tags[tag].overwrite(60_000)
    return cell_image(at, path)


@bad("E116", requirements=TWO)
def packed_tiff_of_huge_size(at: Place) -> Case:
    path = at.tiff(at.image("bad.tif"), plane(), compression="zlib")
    with tifffile.TiffFile(path, mode="r+b") as file:
        for tag in ("ImageWidth", "ImageLength", "RowsPerStrip"):
            file.pages[0].tags[tag].overwrite(60_000)
    return cell_image(at, path)


@bad("E115", requirements=TWO)
def level_that_the_pyramid_lacks(at: Place) -> Case:
    return cell_image(at, Source(at.tiff(at.image("bad.tif"), plane()), level=1))


@bad("E104", requirements=TWO)
def tiff_of_no_bytes(at: Place) -> Case:
    at.image("bad.tif").touch()
    return cell_image(at, at.image("bad.tif"))


@bad("E104")
def label_of_no_bytes(at: Place) -> Case:
    at.label("bad.nii.gz").touch()
    return with_label(at, at.label("bad.nii.gz"))


@bad("E103")
def folder_in_place_of_a_file(at: Place) -> Case:
    at.image("bad.nii.gz").mkdir()
    return with_image(at, at.image("bad.nii.gz"))


@bad("E103")
def pipe(at: Place) -> Case:
    os.mkfifo(at.image("bad.nii"))
    return with_image(at, at.image("bad.nii"))


@bad("E106")
def link_to_itself(at: Place) -> Case:
    at.image("bad.nii.gz").symlink_to("bad.nii.gz")
    return with_image(at, at.image("bad.nii.gz"))


@bad("E106")
def links_in_a_circle(at: Place) -> Case:
    at.image("bad.nii.gz").symlink_to(at.label("other"))
    at.label("other").symlink_to(at.image("bad.nii.gz"))
    return with_image(at, at.image("bad.nii.gz"))


@bad("E102")
def link_to_nothing(at: Place) -> Case:
    at.image("bad.nii.gz").symlink_to(at.folder / "moved away.nii.gz")
    return with_image(at, at.image("bad.nii.gz"))


@bad("E102")
def file_that_is_gone(at: Place) -> Case:
    return with_image(at, at.image("bad.nii.gz"))


@bad("E102")
def file_below_a_file(at: Place) -> Case:
    return with_image(at, at.nifti(at.folder / "whole.nii", voxels()) / "bad.nii")


@bad("E107", requirements=TWO)
def picture_of_a_format_that_is_not_read(at: Place) -> Case:
    at.image("bad.jpg").write_bytes(b"\xff\xd8\xff\xe0" + bytes(200))
    return cell_image(at, at.image("bad.jpg"))


# Sound files of a kind that is not taken. ----------------------------------------------------------------------------


@bad("E107", requirements=TWO)
def palette_tiff(at: Place) -> Case:
    colours = np.zeros((3, 256), np.uint16)
    return cell_image(at, at.tiff(at.image("bad.tif"), plane(), photometric="palette", colormap=colours))


@bad("E107", requirements=TWO)
def time_series_tiff(at: Place) -> Case:
    frames = np.stack([plane(seed) for seed in range(5)])
    return cell_image(at, at.tiff(at.image("bad.tif"), frames, imagej=True, metadata={"axes": "TYX"}))


@bad("E107", requirements=TWO)
def complex_tiff(at: Place) -> Case:
    return cell_image(at, at.tiff(at.image("bad.tif"), plane().astype(np.complex64)))


@bad("E107")
def nifti_of_five_dimensions(at: Place) -> Case:
    return with_image(at, at.nifti(at.image("bad.nii.gz"), voxels(0, (*SHAPE, 3, 2))))


@bad("E107")
def nifti_of_three_points_in_time(at: Place) -> Case:
    path = at.nifti(at.image("bad.nii.gz"), voxels(0, (*SHAPE, 3)))
    image = nib.load(path)
    series = nib.Nifti1Image(np.asarray(image.dataobj), image.affine)
    series.header.set_xyzt_units("mm", "sec")
    nib.save(series, path)
    return with_image(at, path)


@bad("E107")
def nifti_of_volumes_two_seconds_apart(at: Place) -> Case:
    path = at.nifti(at.image("bad.nii.gz"), voxels(0, (*SHAPE, 3)))
    image = nib.load(path)
    series = nib.Nifti1Image(np.asarray(image.dataobj), image.affine)
    series.header.set_zooms((1.0, 1.0, 1.0, 2.0))
    nib.save(series, path)
    return with_image(at, path)


@bad("E110")
def three_measurements_in_a_study_of_one_channel(at: Place) -> Case:
    """Three channels of a type that is no colour's."""
    return with_image(at, at.nifti(at.image("bad.nii.gz"), voxels(0, (*SHAPE, 3)).astype(np.float32)))


@bad("E107")
def complex_nifti(at: Place) -> Case:
    return with_image(at, at.nifti(at.image("bad.nii.gz"), voxels().astype(np.complex64)))


@bad("E109")
def plane_in_a_study_of_volumes(at: Place) -> Case:
    return with_image(at, at.nifti(at.image("bad.nii.gz"), voxels(0, (1, 12, 10))))


@bad("E109", requirements=TWO)
def volume_in_a_study_of_planes(at: Place) -> Case:
    return case_of(at.nifti(at.image("bad.nii.gz"), voxels()), at.nifti(at.label("bad.nii.gz"), organ()))


@bad("E109", requirements=TWO)
def stack_in_a_study_of_planes(at: Place) -> Case:
    stack = np.stack([plane(seed) for seed in range(4)])
    return cell_image(at, at.tiff(at.image("bad.tif"), stack, imagej=True, metadata={"axes": "ZYX"}))


@bad("E110")
def repeated_volume(at: Place) -> Case:
    return with_image(at, at.nifti(at.image("bad.nii.gz"), voxels(0, (*SHAPE, 5))))


@bad("E110", requirements=TWO)
def two_stains_in_a_study_of_grey(at: Place) -> Case:
    stains = np.stack([plane(1), plane(2)])
    return cell_image(at, at.tiff(at.image("bad.tif"), stains, imagej=True, metadata={"axes": "CYX"}))


@bad("E117", requirements=replace(THREE, spacing=(3.0, 1.25, 1.5)))
def micrometres_where_the_study_has_millimetres(at: Place) -> Case:
    affine = np.diag([1000, 1000, 1000, 1.0]) @ AFFINE
    label = at.nifti(at.label("bad.nii.gz"), organ(), affine)
    return case_of(at.nifti(at.image("bad.nii.gz"), voxels(), affine), label)


@bad("E114")
def affine_of_one_plane(at: Place) -> Case:
    affine = AFFINE.copy()
    affine[:3, 2] = affine[:3, 1]
    return with_image(at, with_affine(at, affine))


@bad("E114")
def affine_of_no_numbers(at: Place) -> Case:
    affine = AFFINE.copy()
    affine[0, 3] = np.nan
    return with_image(at, with_affine(at, affine))


@bad("E114")
def affine_of_zeros(at: Place) -> Case:
    return with_image(at, with_affine(at, np.diag([0.0, 0.0, 0.0, 1.0])))


def with_affine(at: Place, affine: np.ndarray) -> Path:
    """Written into the header: nibabel would not save it."""
    path = at.nifti(at.image("bad.nii"), voxels())
    content = bytearray(path.read_bytes())
    content[252:256] = struct.pack("<2h", 0, 1)  # no qform, sform
    content[280:328] = affine[:3].astype("<f4").tobytes()
    path.write_bytes(content)
    return path


# Values. ------------------------------------------------------------------------------------------------------------


@bad("E108")
def image_with_nan(at: Place) -> Case:
    array = voxels(dtype=np.float32)
    array[3, 4, 5] = np.nan
    return with_image(at, at.nifti(at.image("bad.nii.gz"), array))


@bad("E108")
def image_with_infinity(at: Place) -> Case:
    array = voxels(dtype=np.float32)
    array[3, 4, 5] = -np.inf
    return with_image(at, at.nifti(at.image("bad.nii.gz"), array))


@bad("E108")
def image_beyond_float32(at: Place) -> Case:
    array = voxels(dtype=np.float64)
    array[3, 4, 5] = 1e300
    return with_image(at, at.nifti(at.image("bad.nii.gz"), array))


@bad("E108")
def label_with_nan(at: Place) -> Case:
    label = organ(dtype=np.float32)
    label[0, 0, 0] = np.nan
    return with_label(at, at.nifti(at.label("bad.nii.gz"), label))


@bad("E111")
def constant_image(at: Place) -> Case:
    return with_image(at, at.nifti(at.image("bad.nii.gz"), np.full(SHAPE, 7, np.int16)))


@bad("E202")
def label_of_fractions(at: Place) -> Case:
    label = organ(dtype=np.float32)
    label[2:4, 2, 2] = 0.5
    return with_label(at, at.nifti(at.label("bad.nii.gz"), label))


@bad("E202")
def negative_label(at: Place) -> Case:
    label = organ(dtype=np.int16)
    label[0, 0, 0] = -1
    return with_label(at, at.nifti(at.label("bad.nii.gz"), label))


@bad("E202")
def label_beyond_int32(at: Place) -> Case:
    label = organ(dtype=np.float64)
    label[0, 0, 0] = 1e12
    return with_label(at, at.nifti(at.label("bad.nii.gz"), label))


@bad("E203", requirements=TWO)
def label_of_colours(at: Place) -> Case:
    colours = np.repeat(cells().astype(np.uint8)[..., np.newaxis], 3, axis=-1)
    return cell_label(at, at.tiff(at.label("bad.tif"), colours, photometric="rgb"))


@bad("E204")
def label_value_that_is_no_class(at: Place) -> Case:
    return with_label(at, at.nifti(at.label("bad.nii.gz"), organ() * 2))


@bad("E204", label_map={1: 1})
def label_value_beside_the_map(at: Place) -> Case:
    for index in (1, 2, 3):  # the neighbours keep to the map
        at.nifti(at.label(f"good-{index}.nii.gz"), np.where(organ(index) == 2, 0, organ(index)).astype(np.uint8))
    return with_label(at, at.nifti(at.label("bad.nii.gz"), organ()))


@bad("E204", "W223")
def instances_in_a_study_of_classes(at: Place) -> Case:
    label = np.zeros(SHAPE, np.uint16)
    for number, (z, y) in enumerate(np.ndindex(4, 4)):
        label[2 * z, 3 * y : 3 * y + 2, 2:5] = number + 1
    return with_label(at, at.nifti(at.label("bad.nii.gz"), label))


@bad("W222", requirements=TWO)
def classes_in_a_study_of_instances(at: Place) -> Case:
    return cell_label(at, at.tiff(at.label("bad.tif"), np.minimum(cells(), 1).astype(np.uint8) * 255))


@bad("W220")
def empty_label(at: Place) -> Case:
    return with_label(at, at.nifti(at.label("bad.nii.gz"), np.zeros(SHAPE, np.uint8)))


@bad("W221")
def label_without_background(at: Place) -> Case:
    return with_label(at, at.nifti(at.label("bad.nii.gz"), np.ones(SHAPE, np.uint8)))


# An image and its label. ---------------------------------------------------------------------------------------------


@bad("E201")
def no_label(at: Place) -> Case:
    return case_of(at.nifti(at.image("bad.nii.gz"), voxels()), None)


@bad("E205")
def label_of_half_the_grid(at: Place) -> Case:
    return with_label(at, at.nifti(at.label("bad.nii.gz"), organ()[::2], AFFINE @ np.diag([1, 1, 2, 1.0])))


@bad("E205")
def label_with_swapped_axes(at: Place) -> Case:
    return with_label(at, at.nifti(at.label("bad.nii.gz"), organ().transpose(0, 2, 1)))


@bad("E205", requirements=TWO)
def label_of_another_size(at: Place) -> Case:
    return cell_label(at, at.tiff(at.label("bad.tif"), cells()[:, :-1]))


@bad("E206")
def label_of_another_spacing(at: Place) -> Case:
    return with_label(at, at.nifti(at.label("bad.nii.gz"), organ(), AFFINE @ np.diag([1, 1, 5 / 3, 1.0])))


@bad("E207")
def label_beside_its_image(at: Place) -> Case:
    affine = AFFINE.copy()
    affine[2, 3] += 6
    return with_label(at, at.nifti(at.label("bad.nii.gz"), organ(), affine))


@bad("E207")
def mirrored_label(at: Place) -> Case:
    return with_label(at, at.nifti(at.label("bad.nii.gz"), organ(), np.diag([-1, 1, 1, 1]) @ AFFINE))


@bad("E207")
def rotated_label(at: Place) -> Case:
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]]
    return with_label(at, at.nifti(at.label("bad.nii.gz"), organ(), turn @ AFFINE))


# Modalities. --------------------------------------------------------------------------------------------------------


@bad("E301", requirements=BOTH)
def missing_modality(at: Place) -> Case:
    return two_modalities(at, None)


@bad("W320", requirements=ZERO)
def missing_modality_that_is_taken_as_zeros(at: Place) -> Case:
    return two_modalities(at, None)


@bad("E301", requirements=ZERO)
def all_modalities_missing(at: Place) -> Case:
    label = at.nifti(at.label("bad.nii.gz"), organ())
    return Case("bad", "bad", {"CT": Source(at.nifti(at.image("bad_CT.nii.gz"), voxels()))}, Source(label))


@bad("E302", requirements=BOTH)
def modalities_of_two_places(at: Place) -> Case:
    affine = AFFINE.copy()
    affine[0, 3] += 500
    return two_modalities(at, at.nifti(at.image("bad_T2.nii.gz"), voxels(2), affine))


@bad("E302", requirements=BOTH)
def modalities_of_different_shape_and_no_orientation(at: Place) -> Case:
    t2 = at.tiff(at.image("bad_T2.tif"), voxels(2, (4, 6, 5)), imagej=True, metadata={"axes": "ZYX"})
    return two_modalities(at, t2)


@bad("W321", requirements=BOTH)
def modalities_on_different_grids(at: Place) -> Case:
    affine = AFFINE @ np.diag([2, 2, 1, 1.0])
    return two_modalities(at, at.nifti(at.image("bad_T2.nii.gz"), voxels(2, (8, 6, 5)), affine))


@bad("W322", requirements=BOTH)
def one_image_as_two_modalities(at: Place) -> Case:
    return two_modalities(at, at.nifti(at.image("bad_T2.nii.gz"), voxels(1)))


@bad("E101", requirements=ZERO)
def damaged_modality_is_not_a_missing_one(at: Place) -> Case:
    return two_modalities(at, cut(at.nifti(at.image("bad_T2.nii.gz"), voxels(2))))


# Cases beside each other. --------------------------------------------------------------------------------------------


@bad("E401")
def one_file_under_two_names(at: Place) -> list[Case]:
    for path in (at.image("good-1.nii.gz"), at.label("good-1.nii.gz")):
        os.link(path, path.with_name("later.nii.gz"))
    return [case_of(at.image("later.nii.gz"), at.label("later.nii.gz"), "later")]


@bad("E401")
def one_image_in_two_formats(at: Place) -> list[Case]:
    image, label = at.image("good-1.nii.gz"), at.label("good-1.nii.gz")
    at.image("later.nii").write_bytes(gzip.decompress(image.read_bytes()))
    at.label("later.nii").write_bytes(gzip.decompress(label.read_bytes()))
    return [case_of(at.image("later.nii"), at.label("later.nii"), "later")]


@bad("E402")
def one_image_with_two_labels(at: Place) -> list[Case]:
    return [
        case_of(
            at.nifti(at.image(f"bad-{seed}.nii.gz"), voxels()),
            at.nifti(at.label(f"bad-{seed}.nii.gz"), organ(seed)),
            f"bad-{seed}",
        )
        for seed in (1, 2)
    ]


@bad("W420")
def one_label_on_two_images(at: Place) -> list[Case]:
    return [
        case_of(
            at.nifti(at.image(f"bad-{seed}.nii.gz"), voxels(seed)),
            at.nifti(at.label(f"bad-{seed}.nii.gz"), organ()),
            f"bad-{seed}",
        )
        for seed in (1, 2)
    ]


@bad("W421", requirements=BOTH)
def modality_of_another_case(at: Place) -> list[Case]:
    cases = []
    for seed in (1, 2):
        images = {
            "T1": Source(at.nifti(at.image(f"bad-{seed}_T1.nii.gz"), voxels(seed))),
            "T2": Source(at.nifti(at.image(f"bad-{seed}_T2.nii.gz"), voxels(9))),
        }
        label = Source(at.nifti(at.label(f"bad-{seed}.nii.gz"), organ(seed)))
        cases.append(Case(f"bad-{seed}", f"bad-{seed}", images, label))
    return cases


@bad("E403", validation=frozenset({"bad-2"}))
def patient_in_training_and_validation(at: Place) -> list[Case]:
    return [
        case_of(
            at.nifti(at.image(f"bad-{seed}.nii.gz"), voxels(seed)),
            at.nifti(at.label(f"bad-{seed}.nii.gz"), organ(seed)),
            f"bad-{seed}",
            patient="one",
        )
        for seed in (1, 2)
    ]


# What looks odd and is fine. -----------------------------------------------------------------------------------------


@bad(requirements=Requirements(2, 3, ("background", "cell"), "instances"))
def fine_rgb_of_16_bits(at: Place) -> Case:
    colours = np.stack([plane(seed, np.uint16) * 200 for seed in range(3)], axis=-1)
    return cell_image(at, at.tiff(at.image("bad.tif"), colours, photometric="rgb"))


@bad(requirements=TWO)
def fine_names_of_all_scripts(at: Place) -> list[Case]:
    cases = []
    for seed, name in enumerate(("Łukasz Żółć", "病例 7", "e\u0301tude", "حالة", "🧠 & <b>'\"", "a.b.c")):
        image = at.tiff(at.image(f"{name}.tif"), plane(seed))
        cases.append(case_of(image, at.tiff(at.label(f"{name}.tif"), cells(seed)), name))
    return cases


@bad()
def fine_label_stored_as_float(at: Place) -> Case:
    return with_label(at, at.nifti(at.label("bad.nii.gz"), organ(dtype=np.float64)))


@bad()
def fine_label_stored_the_other_way_round(at: Place) -> Case:
    affine = AFFINE @ np.array([[-1, 0, 0, SHAPE[2] - 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    return with_label(at, at.nifti(at.label("bad.nii.gz"), organ()[:, :, ::-1], affine))


@bad()
def fine_image_of_the_other_byte_order(at: Place) -> Case:
    return with_image(at, at.nifti(at.image("bad.nii"), voxels(dtype=">i2")))


@bad()
def fine_link_to_a_file_elsewhere(at: Place) -> Case:
    elsewhere = at.nifti(at.folder / "elsewhere.nii.gz", voxels())
    at.image("bad.nii.gz").symlink_to(elsewhere)
    return with_image(at, at.image("bad.nii.gz"))
