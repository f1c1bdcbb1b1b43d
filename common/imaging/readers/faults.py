"""What is wrong with a file, in a form that a program can act on; the words for people are the error's message."""

from __future__ import annotations

from enum import Enum, auto

import numpy as np
import numpy.typing as npt

from common.errors import DataError
from common.imaging.volume import Volume

MOST_VOXELS = 1 << 31
"""The most voxels, each channel counted, that any reader takes (docs/checks.md, E116).

A small packed file can unpack to any size. No scanner makes images of so many voxels; of a slide, a smaller level of
its pyramid is read.
"""


class Fault(Enum):
    """The cause of a `ReadError`."""

    UNREADABLE = auto()  # damaged, incomplete or of another format
    EMPTY_FILE = auto()
    NOT_A_FILE = auto()  # a folder or a pipe where a file should be, or a folder without images
    MISSING_SERIES = auto()  # the folder does not hold the one that is asked for
    SEVERAL_SERIES = auto()  # and nothing says which is meant
    NOT_TAKEN = auto()  # sound, but of a kind that has no one meaning as an image or label
    NO_LEVEL = auto()  # of a pyramid
    TOO_LARGE = auto()
    DIMENSIONS = auto()
    NOT_FINITE = auto()
    NO_GEOMETRY = auto()  # orientation or spacing that no grid can have
    SLICES = auto()  # missing, doubled, uneven, or of different kinds
    LABEL_VALUES = auto()  # negative, fractional, too large
    LABEL_CHANNELS = auto()
    LABEL_SHAPE = auto()  # not that of its image
    LABEL_PLACE = auto()  # beside its image, or across


class ReadError(DataError):
    """An image or label that a reader does not take.

    Attributes
    ----------
    fault : the cause. The message says it in words: what is wrong and where, then what to do.
    """

    def __init__(self, fault: Fault, message: str) -> None:
        super().__init__(message)
        self.fault = fault


class NoGridError(ValueError):
    """A spacing or an affine that a `Volume` refuses, before the file's name and format are put to it."""


def refuse_too_many(voxels: int, what: str, advice: str) -> None:
    """Raise a ReadError where an image would have more voxels, each channel counted, than are taken.

    Parameters
    ----------
    what : the start of the message, such as "the file describes".
    advice : what to do, a sentence.
    """
    if voxels > MOST_VOXELS:
        raise ReadError(Fault.TOO_LARGE, f"{what} {voxels} voxels, of at most {MOST_VOXELS}. {advice}")


def refuse_no_grid(spacing: tuple[float, float, float], affine: npt.NDArray[np.float64]) -> None:
    """Raise NoGridError where no volume can have this spacing and affine, whatever its voxels are."""
    try:
        Volume(np.zeros((1, 1, 1, 1), np.uint8), spacing, affine)
    except ValueError as error:
        raise NoGridError(str(error)) from error
