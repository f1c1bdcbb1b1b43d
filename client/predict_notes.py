"""What `predict` says of inputs: that an image is of another kind than the model was made for, and why one fails.

Readers advise whoever registers data for training; here the advice is for who has a model and an image.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pydicom

from common.imaging.case import Case, Source
from common.imaging.facts import format_of
from common.imaging.readers.dicom_folder import scan_folder
from common.imaging.readers.dicom_headers import text_of
from common.inference.images import OpenCase
from common.study import Study

# DICOM's Modality of what a study calls its modalities (PS3.3, C.7.3.1.1.1). Of other names nothing is known.
_KINDS = (
    ("MR", r"mri?|t1.*|t2.*|flair|dwi|adc|swi|pdw?"),
    ("CT", r"ct.*"),
    ("PT", r"pet|pt"),
    ("US", r"us"),
    ("MG", r"mg|mammo.*"),
)
_ADVICE = (
    (
        r"Save one slice a file: the study is of 2 dimensions.*",
        "This model takes single slices: save each slice as a file of its own.",
    ),
    (
        r"Save the whole volume in one NIfTI file.*",
        "This model takes volumes: give one NIfTI file, or the folder of a DICOM series.",
    ),
    (
        r"Register the data again without --level, or with one of these\.",
        "Give one of these with --level, or leave --level out.",
    ),
    (r"Register the data again without --level, or convert.*", "Leave --level out."),
    (r"Register the data with a smaller level of its pyramid,", "Give a smaller level of its pyramid with --level,"),
    (r"Use it as a label\.", "Give the series of images that it was drawn on."),
    (r"Say which one is meant by its SeriesInstanceUID, or keep each", "Keep each"),
    (r", or register the data again\b", ", or correct the table that names it"),
    (r"Convert the image, or ask for a study of its channels", "Convert the image to what the model takes"),
)


def fitting_advice(reason: str) -> str:
    """A reason why an image cannot be segmented, in which no advice asks for a data set or a coordinator."""
    for found, instead in _ADVICE:
        reason = re.sub(found, instead, reason, flags=re.DOTALL)
    return reason


def notes_on_headers(case: Case) -> list[str]:
    """Where DICOM's Modality of an image is not that of the modality it is taken for.

    Parameters
    ----------
    case : its images keyed by the study's modalities.
    """
    notes = []
    for name, source in case.images.items():
        expected = next((kind for kind, names in _KINDS if re.fullmatch(names, name, re.IGNORECASE)), "")
        found = _modality_of(source) if expected else ""
        if found and found != expected:
            notes.append(f"its header says {found}, and the model was made for {name}, which is {expected}")
    return notes


def notes_on_channels(opened: OpenCase, study: Study) -> list[str]:
    """Where an image is grey and the model takes colours, or the other way round."""
    found, wanted = opened.stored.shape[-1], 1 if study.task.modalities else study.task.channels
    if (found, wanted) == (1, 3):
        return ["a grey image, and the model takes three channels: its grey is repeated for each"]
    if (found, wanted) == (3, 1):
        return ["a colour image, and the model takes grey: its luminance is taken"]
    return []


def left_aside(kinds: Sequence[str]) -> str:
    """Files that are no images, in words, by their suffixes."""
    names = ", ".join(sorted(set(kinds)))
    return f"{len(kinds)} {'file' if len(kinds) == 1 else 'files'} left aside ({names})"


def _modality_of(source: Source) -> str:
    """DICOM's Modality; "" for other formats, and where it cannot be read, which whoever reads the image says."""
    if format_of(source) != "DICOM":
        return ""
    try:
        if source.path.is_dir():
            series = [one for one in scan_folder(source.path).series if one.frames and not one.is_segmentation]
            return next((one.modality for one in series if source.series in ("", one.uid)), "")
        return _modality_in(source.path)
    except Exception:  # damaged
        return ""


def _modality_in(file: Path) -> str:
    return text_of(pydicom.dcmread(file, stop_before_pixels=True, specific_tags=["Modality"]), "Modality")
