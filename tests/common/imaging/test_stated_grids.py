"""A label is compared with its image by what their files state: a spacing of 1 that is meant is no silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import tifffile

from common.imaging.case import Case, Source
from common.imaging.checks import examine_case
from common.imaging.facts import SourceFacts
from common.imaging.grid_checks import grid_fault
from common.imaging.readers import read_image, read_label

SHAPE = (6, 12, 10)
RNG = np.random.default_rng(0)
IMAGE = RNG.integers(1, 200, SHAPE).astype(np.uint16)
LABEL = np.zeros(SHAPE, np.uint8)
LABEL[2:4, 3:8, 2:9] = 1
CENTIMETRE = "CENTIMETER"


def nifti(path: Path, array: np.ndarray, spacing: tuple[float, ...], unit: str = "mm", code: str = "sform") -> Path:
    """Of a spacing (x, y, z), and an orientation that only the sform or only the qform states."""
    affine = np.diag([*spacing, 1.0])
    image = nib.Nifti1Image(array.transpose(2, 1, 0), affine)
    image.set_sform(affine, code=2 if code == "sform" else 0)
    image.set_qform(affine, code=1 if code == "qform" else 0)
    if unit:
        image.header.set_xyzt_units(unit)
    nib.save(image, path)
    return path


def tiff(path: Path, array: np.ndarray, **options: Any) -> Path:
    tifffile.imwrite(path, array, **options)
    return path


def codes_of(image: Path, label: Path) -> set[str]:
    _, findings = examine_case(Case("a", "a", {"": Source(image)}, Source(label)))
    return {finding.code for finding in findings}


@pytest.mark.parametrize("code", ["sform", "qform"])
@pytest.mark.parametrize("unit", ["mm", ""])
@pytest.mark.parametrize("other", [(2, 2, 2), (1, 1, 3)])
def test_a_nifti_label_of_another_spacing_is_refused_whichever_of_the_two_has_the_identity(
    tmp_path: Path, code: str, unit: str, other: tuple[float, ...]
) -> None:
    for image, label in (((1, 1, 1), other), (other, (1, 1, 1))):
        pair = (
            nifti(tmp_path / "a.nii", IMAGE, image, unit, code),
            nifti(tmp_path / "b.nii", LABEL, label, unit, code),
        )
        assert codes_of(*pair) == {"E206"}
        assert read_image(pair[0], 3).stated == "place"
    assert codes_of(pair[0], nifti(tmp_path / "b.nii", LABEL, other, unit, code)) == set()


def test_a_nifti_label_without_orientation_is_compared_too(tmp_path: Path) -> None:
    """Neither form is there: NIfTI's third way, the spacing alone, still is a spacing."""
    image = nifti(tmp_path / "a.nii", IMAGE, (1, 1, 1), code="")
    assert codes_of(image, nifti(tmp_path / "b.nii", LABEL, (2, 2, 2), code="")) == {"E206"}
    assert codes_of(image, nifti(tmp_path / "b.nii", LABEL, (1, 1, 1), code="")) == set()


@pytest.mark.parametrize("style", ["ome", "imagej"])
def test_a_tiff_label_of_another_spacing_is_refused_where_both_state_one(tmp_path: Path, style: str) -> None:
    def stack(name: str, array: np.ndarray, spacing: float | None) -> Path:
        options: dict[str, Any] = {style: True, "metadata": {"axes": "ZYX"}}
        if style == "ome" and spacing is not None:
            options["metadata"] |= {f"PhysicalSize{axis}": spacing for axis in "XYZ"}
        elif spacing is not None:
            options["metadata"] |= {"unit": "um", "spacing": spacing}
            options["resolution"] = (1 / spacing, 1 / spacing)
        return tiff(tmp_path / name, array, **options)

    for image, label in ((1.0, 2.0), (2.0, 1.0)):
        pair = stack("a.tif", IMAGE, image), stack("b.tif", LABEL, label)
        assert codes_of(*pair) == {"E206"}
        assert read_label(pair[1], 3).stated == "spacing"
        silent = stack("c.tif", LABEL, None)
        assert read_label(silent, 3).stated == "nothing"
        assert codes_of(pair[0], silent) == set(), "a file that states nothing takes the grid of its image"


def test_planes_without_orientation_go_by_shape_and_planes_with_one_by_place(tmp_path: Path) -> None:
    image = tiff(tmp_path / "a.tif", IMAGE[0], resolution=(10000, 10000), resolutionunit=CENTIMETRE)
    label = tiff(tmp_path / "b.tif", LABEL[2], resolution=(5000, 5000), resolutionunit=CENTIMETRE)
    assert codes_of(image, label) == set()
    flat = nifti(tmp_path / "a.nii", IMAGE[:1], (1, 1, 1)), nifti(tmp_path / "b.nii", LABEL[2:3], (2, 2, 1))
    assert codes_of(*flat) == {"E206"}


def test_what_a_file_states_is_kept_with_its_facts(tmp_path: Path) -> None:
    silent = tiff(tmp_path / "a.tif", IMAGE, metadata=None)
    facts, _ = examine_case(Case("a", "a", {"": Source(silent)}, None))
    assert facts is not None
    again: SourceFacts = type(facts).from_json(facts.to_json()).images[""]
    assert again.stated == again.volume.stated == "nothing"
    assert grid_fault(again, again) is None
