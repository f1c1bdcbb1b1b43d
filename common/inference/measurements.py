"""What is measured on a segmentation: the volume or area of every class, and how many objects there are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from common.inference.scratch import let_go, parts

Unit = Literal["mm", "um", ""]


@dataclass(frozen=True)
class Measurement:
    """One class of one case. What does not apply, or cannot be known, is None.

    Attributes
    ----------
    case, name : of the case and of the class.
    voxels : pixels in a plane.
    volume_ml, volume_um3 : of volumes in millimetres and in micrometres.
    area_mm2, area_um2 : of planes.
    objects : how many there are.
    mean_voxels : of an object.
    mean_area_um2, mean_volume_um3 : of an object.
    """

    case: str
    name: str
    voxels: int
    volume_ml: float | None = None
    volume_um3: float | None = None
    area_mm2: float | None = None
    area_um2: float | None = None
    objects: int | None = None
    mean_voxels: float | None = None
    mean_area_um2: float | None = None
    mean_volume_um3: float | None = None

    def row(self) -> dict[str, Any]:
        """As a row of a table: the columns are `COLUMNS`."""
        values = asdict(self)
        return {"case": values.pop("case"), "class": values.pop("name"), **values}


COLUMNS = tuple(Measurement("", "", 0).row())


def measurements_of(
    case: str,
    classes: npt.NDArray[np.uint8],
    names: Sequence[str],
    spacing: tuple[float, float, float],
    unit: Unit,
    objects: npt.NDArray[np.int32] | None = None,
) -> list[Measurement]:
    """Measure a segmentation.

    Parameters
    ----------
    case : its name.
    classes : class indices (z, y, x); z = 1 makes a plane.
    names : of the foreground classes, 1, 2, ....
    spacing : (z, y, x) in `unit`; "" where it is not known.
    objects : numbers of objects on the same grid, from 1 without gaps, of the only foreground class; each is measured
        as it is there.
    """
    counts = _counts(classes, len(names) + 1)
    result = []
    for index, name in enumerate(names, start=1):
        voxels = int(counts[index])
        found: dict[str, Any] = dict(_sizes(voxels, classes.shape, spacing, unit))
        if objects is not None:
            number = _largest(objects)
            found["objects"] = number
            if number:
                mean = int(_counts(objects, number + 1)[1:].sum()) / number
                found["mean_voxels"] = mean
                sizes = _sizes(mean, classes.shape, spacing, unit)
                found |= {f"mean_{key}": value for key, value in sizes.items() if key.endswith(("um2", "um3"))}
        result.append(Measurement(case, name, voxels, **found))
    return result


def _sizes(voxels: float, shape: Sequence[int], spacing: Sequence[float], unit: Unit) -> dict[str, float]:
    if not unit:
        return {}
    if shape[0] == 1:
        area = voxels * spacing[1] * spacing[2]
        return {"area_mm2" if unit == "mm" else "area_um2": area}
    volume = voxels * math.prod(spacing)
    return {"volume_ml": volume / 1000} if unit == "mm" else {"volume_um3": volume}


def _counts(labels: npt.NDArray[Any], length: int) -> npt.NDArray[np.int64]:
    """How often each label occurs; a part of the image at a time, as counting copies it to wider integers."""
    total = np.zeros(length, np.int64)
    for part in parts(labels.shape):
        total += np.bincount(labels[part].ravel(), minlength=length)
        let_go(labels)
    return total


def _largest(labels: npt.NDArray[Any]) -> int:
    """The highest label; 0 of an empty image."""
    largest = 0
    for part in parts(labels.shape):
        largest = max(largest, int(labels[part].max(initial=0)))
        let_go(labels)
    return largest
