"""A case as the network takes it: read from where it lies and prepared as the study says."""

from __future__ import annotations

from collections.abc import Mapping

from common.errors import DataError
from common.imaging.case import Case
from common.imaging.preprocessing import Prepared, prepare_case
from common.imaging.readers import read_image, read_label
from common.study import Study


def load_case(case: Case, study: Study, label_map: Mapping[int, int] | None = None) -> Prepared:
    """Read the images of a case and its label, and prepare them.

    Parameters
    ----------
    case : its images keyed by the study's modalities, or by "" where it names none.
    study : Study
    label_map : stored value to class index; None: stored values are class indices.

    Raises
    ------
    DataError : a file cannot be read, or the case does not fit the study; the message names the case.
    """
    dimensions = study.task.dimensions
    try:
        images = [
            read_image(case.images[modality], dimensions) if modality in case.images else None
            for modality in study.task.modalities or ("",)
        ]
        grid = next((image for image in images if image is not None), None)
        label = read_label(case.label, dimensions, grid=grid) if case.label is not None else None
        return prepare_case(images, label, study, label_map)
    except DataError as error:
        raise DataError(f"case {case.name}: {error}") from error
