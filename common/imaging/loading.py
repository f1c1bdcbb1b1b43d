"""A case as the network takes it: read from where it lies and prepared as the study says."""

from __future__ import annotations

from collections.abc import Mapping

from common.errors import DataError
from common.imaging.case import Case
from common.imaging.preprocessing import Prepared, prepare_case
from common.imaging.readers import read_image, read_label
from common.imaging.volume import Volume
from common.study import Study


def read_case(case: Case, study: Study) -> tuple[list[Volume | None], Volume | None]:
    """Read the images of a case, one for each of the study's modalities or None where it is missing, and its label.

    Parameters
    ----------
    case : its images keyed by the study's modalities, or by "" where it names none.
    study : Study

    Returns
    -------
    images : on the grids as stored.
    label : as stored, or None where the case has none.

    Raises
    ------
    DataError : a file cannot be read; the message names the case.
    """
    dimensions = study.task.dimensions
    try:
        images = [
            read_image(case.images[modality], dimensions) if modality in case.images else None
            for modality in study.task.modalities or ("",)
        ]
        grid = next((image for image in images if image is not None), None)
        return images, read_label(case.label, dimensions, grid=grid) if case.label is not None else None
    except DataError as error:
        raise DataError(f"case {case.name}: {error}") from error


def load_case(case: Case, study: Study, label_map: Mapping[int, int] | None = None) -> Prepared:
    """Read a case and prepare it.

    Parameters
    ----------
    case, study : as for `read_case`.
    label_map : stored value to class index; None: stored values are class indices.

    Raises
    ------
    DataError : a file cannot be read, or the case does not fit the study; the message names the case.
    """
    images, label = read_case(case, study)
    try:
        return prepare_case(images, label, study, label_map)
    except DataError as error:
        raise DataError(f"case {case.name}: {error}") from error
