"""Shared by the tests of images: DICOM files as a scanner would write them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, EnhancedMRImageStorage, ExplicitVRLittleEndian, generate_uid

LPS_OF_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def _dataset(sop_class: str, stored: np.ndarray, series: str) -> FileDataset:
    """`stored` has shape (y, x), (z, y, x), or (y, x, 3) where it is bytes with three channels."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = sop_class
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = sop_class, meta.MediaStorageSOPInstanceUID
    dataset.SeriesInstanceUID, dataset.StudyInstanceUID = series, generate_uid(entropy_srcs=[series, "study"])
    dataset.FrameOfReferenceUID = generate_uid(entropy_srcs=[series, "frame"])
    dataset.PatientID, dataset.Modality, dataset.SeriesDescription = "P-7", "CT", "thorax"
    dataset.PatientName, dataset.PatientBirthDate, dataset.PatientSex = "", "", ""
    dataset.StudyDate, dataset.StudyTime, dataset.StudyID, dataset.AccessionNumber = "", "", "", ""
    dataset.ReferringPhysicianName, dataset.SeriesNumber, dataset.PositionReferenceIndicator = "", 1, ""
    dataset.Rows, dataset.Columns = stored.shape[:2] if stored.shape[-1] == 3 else stored.shape[-2:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    if stored.shape[-1] == 3:
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PlanarConfiguration = 3, "RGB", 0
    bits = stored.dtype.itemsize * 8
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, bits, bits - 1
    dataset.PixelRepresentation = int(stored.dtype.kind == "i")
    dataset.PixelData = np.ascontiguousarray(stored).tobytes()
    return dataset


def _geometry(affine: np.ndarray) -> tuple[list[float], list[float], list[list[float]]]:
    """PixelSpacing, ImageOrientationPatient and a function's worth of positions: the LPS affine's columns."""
    lps = LPS_OF_RAS @ affine
    lengths = np.linalg.norm(lps[:3, :3], axis=0)
    cosines = [*(lps[:3, 0] / lengths[0]), *(lps[:3, 1] / lengths[1])]
    return [lengths[1], lengths[0]], cosines, lps.tolist()


def _decimals(numbers: list[float]) -> list[str]:
    """A decimal string holds 16 characters."""
    return [f"{number:.10f}"[:16] for number in numbers]


@pytest.fixture(scope="session")
def write_series() -> Callable[..., list[Path]]:
    """Writes a series of one file a slice: `write_series(folder, voxels, affine)`.

    `voxels` has shape (z, y, x[, 3]) and `affine` takes (x, y, z) to RAS; the files' names and InstanceNumbers say
    nothing of the order. `edit(dataset, z)` changes a slice before it is written, or leaves it out by returning False.
    """

    def write(
        folder: Path,
        voxels: np.ndarray,
        affine: np.ndarray,
        *,
        edit: Callable[[Dataset, int], bool | None] = lambda dataset, z: None,
        sop_class: str = CTImageStorage,
        series: str = "",
    ) -> list[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        series = series or generate_uid()
        spacing, cosines, lps = _geometry(affine)
        paths = []
        for z in range(len(voxels)):
            dataset = _dataset(sop_class, voxels[z], series)
            dataset.PixelSpacing, dataset.ImageOrientationPatient = _decimals(spacing), _decimals(cosines)
            dataset.ImagePositionPatient = _decimals((np.array(lps) @ (0, 0, z, 1))[:3].tolist())
            dataset.SliceThickness = "9.5"  # never the distance of two slices
            dataset.InstanceNumber = (z * 7) % 5
            if edit(dataset, z) is False:
                continue
            path = folder / f"IM{(z * 5 + 3) % 97:02d}{series[-4:]}"
            dataset.save_as(path, enforce_file_format=True)
            paths.append(path)
        return paths

    return write


@pytest.fixture(scope="session")
def write_multiframe() -> Callable[..., Path]:
    """Writes one file of several frames, in shuffled order: `write_multiframe(path, voxels, affine)`."""

    def write(
        path: Path,
        voxels: np.ndarray,
        affine: np.ndarray,
        *,
        edit: Callable[[Dataset], None] = lambda dataset: None,
        rescale: Callable[[int], tuple[float, float]] = lambda z: (1.0, 0.0),
    ) -> Path:
        spacing, cosines, lps = _geometry(affine)
        order = np.random.default_rng(len(voxels)).permutation(len(voxels))
        dataset = _dataset(EnhancedMRImageStorage, voxels[order], generate_uid())
        dataset.NumberOfFrames = len(voxels)
        orientation, measures, shared = Dataset(), Dataset(), Dataset()
        orientation.ImageOrientationPatient = _decimals(cosines)
        measures.PixelSpacing, measures.SliceThickness = _decimals(spacing), "9.5"
        shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [orientation], [measures]
        dataset.SharedFunctionalGroupsSequence = [shared]
        groups = []
        for z in order:
            position, transform, group = Dataset(), Dataset(), Dataset()
            position.ImagePositionPatient = _decimals((np.array(lps) @ (0, 0, z, 1))[:3].tolist())
            transform.RescaleSlope, transform.RescaleIntercept = (f"{number:g}" for number in rescale(int(z)))
            group.PlanePositionSequence, group.PixelValueTransformationSequence = [position], [transform]
            groups.append(group)
        dataset.PerFrameFunctionalGroupsSequence = groups
        edit(dataset)
        pydicom.dcmwrite(path, dataset, enforce_file_format=True)
        return path

    return write
