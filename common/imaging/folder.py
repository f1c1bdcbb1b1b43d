"""A site's folder of cases: which image belongs to which label, whether all of them fit the study, and their split.

The layout is `images/<name>.<suffix>` and `labels/<name>.<suffix>`, paired by name; the suffixes may differ.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import DataError
from common.imaging.preprocessing import CHANNELS_ADVICE, LABELS, channels_fit
from common.imaging.readers import SUFFIXES, read_image, read_label, suffix_of
from common.imaging.volume import Volume

_NAMED = 5


@dataclass(frozen=True)
class Case:
    """One image and its label; `name` is the file name without its suffix."""

    name: str
    image: Path
    label: Path


def find_cases(folder: Path) -> list[Case]:
    """Pair the images and labels of a folder. Hidden files are ignored; nothing is opened.

    Parameters
    ----------
    folder : Path
        Holds `images/` and `labels/`.

    Returns
    -------
    list of Case
        Sorted by name, at least one.

    Raises
    ------
    DataError
        A folder is missing, there are no images, an image or a label has no partner, two files have one name, or a
        file is of a type that no reader takes. One error states all of it.
    """
    images, image_problems = _by_name(folder / "images")
    labels, label_problems = _by_name(folder / "labels")
    problems = image_problems + label_problems
    unlabelled = [images[name][0].name for name in sorted(images.keys() - labels.keys())]
    without_image = [labels[name][0].name for name in sorted(labels.keys() - images.keys())]
    if unlabelled:
        problems.append(f"images without a label of the same name: {_list(unlabelled)}")
    if without_image:
        problems.append(f"labels without an image of the same name: {_list(without_image)}")
    if problems:
        raise DataError(
            f"{folder}: {'; '.join(problems)}. Give every image exactly one label of the same name, as a file of type "
            f"{', '.join(SUFFIXES)}, and move everything else out of images/ and labels/."
        )
    if not images:
        raise DataError(f"{folder}: no cases found. Put images into images/ and labels of the same names into labels/.")
    return [Case(name, images[name][0], labels[name][0]) for name in sorted(images)]


def check_cases(cases: Sequence[Case], *, dimensions: int, channels: int, classes: int, labels: str) -> None:
    """Read every case once and see that all of them can be trained on.

    Parameters
    ----------
    cases : sequence of Case
    dimensions : 2 or 3
    channels : int
        What the network takes; grey images serve for 3 channels and RGB images for 1.
    classes : int
        The number of classes with the background, so that a label's values are below it.
    labels : "classes" or "instances"
        What the labels' values are; instance numbers may be of any size.

    Raises
    ------
    DataError
        One error for all cases, one line for each problem: unreadable files, an image and a label of different shapes
        or (in 3D) on different grids, a number of channels that does not serve, a label value that is no class.
    """
    if labels not in LABELS:
        raise ValueError(f"labels: expected one of {LABELS}, found {labels!r}")
    problems: list[str] = []
    faulty = 0
    for case in cases:
        found = _problems_of(case, dimensions, channels, classes if labels == "classes" else None)
        faulty += bool(found)
        problems += found
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise DataError(
            f"{faulty} of {len(cases)} cases cannot be used:\n{lines}\n"
            "Correct these files, or move each image out of images/ together with its label out of labels/."
        )


def split_cases(cases: Sequence[Case], fraction: float, seed: int) -> tuple[list[Case], list[Case]]:
    """Choose the cases for validation by a hash of seed and name.

    The choice does not depend on the order of the cases or on the machine, and a case that is added later moves few
    others.

    Parameters
    ----------
    cases : sequence of Case
    fraction : float in [0, 1)
        The share for validation, rounded to whole cases: at least one if the fraction is above 0 and there are two
        cases or more, and never all.
    seed : int

    Returns
    -------
    training, validation : lists of Case, each sorted by name
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction: expected a number from 0 to below 1, found {fraction}")
    count = math.floor(len(cases) * fraction + 0.5)
    if fraction > 0:
        count = max(count, 1)
    count = max(min(count, len(cases) - 1), 0)
    order = sorted(cases, key=lambda case: (hashlib.sha256(f"{seed}:{case.name}".encode()).digest(), case.name))
    return sorted(order[count:], key=_name), sorted(order[:count], key=_name)


def _name(case: Case) -> str:
    return case.name


def _by_name(folder: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """The files of a folder by case name, and what is wrong with them."""
    try:
        entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except FileNotFoundError:
        raise DataError(
            f"{folder}: the folder does not exist. Check the path; a folder of cases holds images/ and labels/."
        ) from None
    except OSError as error:
        raise DataError(
            f"{folder}: the folder cannot be listed ({error.strerror}). Check that it is a folder this user may read."
        ) from error
    files: defaultdict[str, list[Path]] = defaultdict(list)
    unknown: list[str] = []
    for path in entries:
        suffix = suffix_of(path)
        if suffix is None:
            unknown.append(path.name)
        else:
            files[path.name[: -len(suffix)]].append(path)
    problems = []
    twice = [path.name for paths in files.values() if len(paths) > 1 for path in paths]
    if twice:
        problems.append(f"two files of one name in {folder.name}/: {_list(twice)}")
    if unknown:
        problems.append(f"files of another type in {folder.name}/: {_list(unknown)}")
    return dict(files), problems


def _list(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _problems_of(case: Case, dimensions: int, channels: int, classes: int | None) -> list[str]:
    problems: list[str] = []
    image = _try(read_image, case.image, dimensions, problems)
    label = _try(read_label, case.label, dimensions, problems)
    if image is not None and not channels_fit(image.channels, channels):
        problems.append(
            f"image {case.image.name}: expected {channels} channels, found {image.channels}. {CHANNELS_ADVICE}"
        )
    if label is not None and classes is not None and int(label.array.max()) >= classes:
        wrong = np.unique(label.array[label.array >= classes])
        problems.append(
            f"label {case.label.name}: expected class indices 0 to {classes - 1}, found {_list(map(str, wrong))}. "
            "Correct the label, or the study's classes."
        )
    if image is not None and label is not None:
        if image.shape != label.shape:
            problems.append(
                f"label {case.label.name}: expected the image's shape {_shape(image)}, found {_shape(label)}. "
                "Export the label on the image's grid."
            )
        # TIFF labels seldom carry the pixel size of their image, so only volumes are compared.
        elif dimensions == 3 and _largest_shift(image, label) > 0.5:
            problems.append(
                f"label {case.label.name}: its affine puts it {_largest_shift(image, label):.1f} voxels beside the "
                "image. Export the label on the image's grid."
            )
    return problems


def _try(read: Callable[[Path, int], Volume], path: Path, dimensions: int, problems: list[str]) -> Volume | None:
    try:
        return read(path, dimensions)
    except DataError as error:
        problems.append(str(error))
        return None


def _shape(volume: Volume) -> str:
    return " x ".join(str(n) for n in volume.shape) + " (z, y, x)"


def _largest_shift(image: Volume, label: Volume) -> float:
    """How far apart the two affines put a corner of the image, in voxels of the image."""
    z, y, x = image.shape
    corners = np.array([(i, j, k, 1) for i in (0, x - 1) for j in (0, y - 1) for k in (0, z - 1)], dtype=np.float64).T
    index = np.linalg.solve(image.affine, label.affine @ corners)
    return float(np.abs(index - corners).max())
