"""Where `predict` writes what, and how each result becomes a file."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.imaging.case import Case, Source
from common.imaging.facts import format_of
from common.imaging.readers import suffix_of
from common.imaging.volume import Stated
from common.imaging.writers import dicom_seg, nifti, overlay, tiff
from common.imaging.writers.codes import SegmentCodes
from common.imaging.writers.whole_file import appearing_whole
from common.inference.explanation import explained_planes
from common.inference.instance_masks import numbered_masks
from common.inference.lite import LiteModel
from common.inference.mask_file import write_masks
from common.inference.measurements import Unit
from common.inference.pictures import planes_of
from common.inference.prediction import Predicted
from common.inference.published import PublishedModel
from common.inference.scratch import let_go
from common.study import Study
from common.version import VERSION


@dataclass(frozen=True)
class Targets:
    """The files of one case; those that are not wanted are None.

    Attributes
    ----------
    source : the image whose grid the results lie on, and whose format they have.
    explanations : by class.
    """

    source: Source
    segmentation: Path
    objects: Path | None
    masks: Path | None
    overlay: Path | None
    explanations: Mapping[str, Path] = field(default_factory=dict)

    @property
    def files(self) -> dict[str, Path]:
        """By what they are."""
        files = {
            "segmentation": self.segmentation,
            "objects": self.objects,
            "masks": self.masks,
            "overlay": self.overlay,
            **{f"explanation of {name}": path for name, path in self.explanations.items()},
        }
        return {what: path for what, path in files.items() if path is not None}


def targets_of(
    case: Case,
    modalities: Sequence[str],
    out: Path,
    *,
    instances: bool,
    picture: bool,
    explained: Sequence[str] = (),
) -> Targets:
    """The files that a case's results go to, in the folder `out`; `explained` are the classes that get a picture."""
    source = next(case.images[modality] for modality in modalities or ("",) if modality in case.images)
    file_format = format_of(source)
    if file_format == "TIFF":
        suffix = labels = ".ome.tif" if _is_ome(source.path) else ".tif"
    elif file_format == "NIfTI":
        suffix = labels = suffix_of(source.path) or ".nii.gz"
    else:
        suffix, labels = ".dcm", ".nii.gz"
    return Targets(
        source,
        out / f"{case.name}_seg{suffix}",
        out / f"{case.name}_objects{labels}" if instances else None,
        out / f"{case.name}_objects.json" if instances else None,
        out / f"{case.name}_overlay.png" if picture else None,
        {
            name: out / f"{case.name}_explain_{part}.png"
            for name, part in zip(explained, _parts(explained), strict=True)
        },
    )


def _parts(names: Sequence[str]) -> list[str]:
    """Of file names, one for each class; numbered where characters that were replaced told them apart."""
    parts = [re.sub(r"[^\w.-]+", "_", name) for name in names]
    folded = [part.casefold() for part in parts]
    return [
        part if folded.count(part.casefold()) == 1 else f"{part}_{index}" for index, part in enumerate(parts, start=1)
    ]


def unit_of(source: Source, stated: Stated) -> Unit:
    """The unit of an image's spacing; "" where its file states none, as secondary captures of DICOM may not."""
    if stated == "nothing":
        return ""
    return "um" if format_of(source) == "TIFF" else "mm"


def check_target(targets: Targets, model: PublishedModel, codes: Mapping[str, SegmentCodes]) -> None:
    """Before any work: raises DataError where the headers of a DICOM series do not serve for a DICOM-SEG."""
    if format_of(targets.source) == "DICOM":
        dicom_seg.check(targets.source, model.study.task.foreground, _algorithm(model), codes)


def write_results(
    predicted: Predicted,
    targets: Targets,
    model: PublishedModel,
    codes: Mapping[str, SegmentCodes],
    force: bool,
) -> None:
    """Writes the files of a case but for its explanations; each appears whole."""
    source, names = targets.source, model.study.task.foreground
    classes = predicted.classes
    file_format = format_of(source)
    with appearing_whole(targets.segmentation, force) as path:
        if file_format == "DICOM":
            dicom_seg.write(path, classes.array[..., 0], source, names, _algorithm(model), codes)
        else:
            _write_labels(path, classes.array[..., 0], predicted, source)
    if predicted.objects is not None and targets.objects is not None and targets.masks is not None:
        highest = predicted.object_count or 0
        dtype = np.dtype(np.uint16 if highest <= np.iinfo(np.uint16).max else np.int32)
        with appearing_whole(targets.objects, force) as path:
            _write_labels(path, predicted.objects, predicted, source, dtype)
        with appearing_whole(targets.masks, force) as path:
            depth, height, width = predicted.objects.shape
            masks = numbered_masks(predicted.objects)
            write_masks(path, masks, (depth, height, width), source.name, names[0])
    if targets.overlay is not None:
        with appearing_whole(targets.overlay, force) as path:
            legend = names if predicted.objects is None else ()  # objects are of one class, in all colours
            overlay.write(path, planes_of(predicted, is_patient=file_format != "TIFF"), legend)


def write_explanations(
    predicted: Predicted,
    targets: Targets,
    model: LiteModel,
    study: Study,
    force: bool,
    progress: Callable[[float], None],
) -> None:
    """Writes a picture for each class of where the model saw it; `model` is of `open_explanation`."""
    is_patient = format_of(targets.source) != "TIFF"
    drawn = explained_planes(model, study, predicted, is_patient, progress)
    for target, planes in zip(targets.explanations.values(), drawn, strict=True):
        with appearing_whole(target, force) as path:
            overlay.write(path, planes)


def _algorithm(model: PublishedModel) -> dicom_seg.Algorithm:
    return dicom_seg.Algorithm(model.study.name, model.version, VERSION)


def _write_labels(
    path: Path, array: npt.NDArray[Any], predicted: Predicted, source: Source, dtype: np.dtype[Any] | None = None
) -> None:
    classes = predicted.classes
    if format_of(source) == "TIFF":
        is_stated = classes.stated != "nothing"
        tiff.write(
            path,
            array,
            classes.spacing,
            source.path,
            is_stated=is_stated,
            dtype=dtype,
            done=lambda: let_go(array),
        )
    else:
        like = source.path if format_of(source) == "NIfTI" else None
        nifti.write(path, array if dtype is None else array.astype(dtype, copy=False), classes.affine, like)


def _is_ome(path: Path) -> bool:
    try:
        return tiff.is_ome(path)
    except Exception:  # damaged; whoever reads it says so
        return False
