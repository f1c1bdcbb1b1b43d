"""The one in-memory form of an image or a label: voxels, their spacing, and where they lie in the world."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Stated = Literal["nothing", "spacing", "place"]
"""What a file says of its grid: nothing, the distances of its voxels alone, or where they lie."""


def scaling_affine(spacing: tuple[float, float, float]) -> npt.NDArray[np.float64]:
    """The affine of an image whose file states no orientation: axis-aligned, first voxel at the origin.

    Parameters
    ----------
    spacing : (z, y, x)
        As in `Volume`; the result's diagonal is in (x, y, z) order.
    """
    z, y, x = spacing
    return np.diag([x, y, z, 1.0])


@dataclass(frozen=True, eq=False)
class Volume:
    """Voxels on a regular grid.

    Attributes
    ----------
    array : shape (z, y, x, channel)
        Integers or real floating point numbers. A 2D image has z = 1; a label has one channel.
    spacing : (z, y, x)
        The distance between the centres of neighbouring voxels along each axis: millimetres for medical images,
        micrometres for microscopy, 1.0 where the file does not say.
    affine : shape (4, 4), float64
        Takes a voxel's index to the world position of the voxel's *centre*, in the unit of `spacing`. The index is in
        (x, y, z) order, the reverse of the array's axes, and the world is RAS+ (x to the patient's right, y to the
        anterior, z to the superior), as in NIfTI-1::

            world_x, world_y, world_z, 1 = affine @ (x, y, z, 1)        # of the voxel array[z, y, x]

        So the length of column 0 is `spacing[2]`, of column 1 `spacing[1]` and of column 2 `spacing[0]`. A file
        without orientation (TIFF) gets `scaling_affine(spacing)`; its world is a frame of the image alone.
    stated : "nothing", "spacing" or "place"
        What of it the file states. The affine cannot tell: the identity is what a silent file gets, and a place like
        any other where a file states it.
    stored : the type of the voxels in the file, such as "uint8", where reading changed it; "" where `array` has it.

    Raises
    ------
    ValueError
        The parts are of a wrong shape or type, or contradict each other. Readers turn it into a `DataError` with the
        file's name.
    """

    array: npt.NDArray[Any]
    spacing: tuple[float, float, float]
    affine: npt.NDArray[np.float64]
    stated: Stated = "place"
    stored: str = ""

    def __post_init__(self) -> None:
        if self.array.ndim != 4 or 0 in self.array.shape:
            raise ValueError(f"expected voxels of shape (z, y, x, channel), none empty, found {self.array.shape}")
        if self.array.dtype.kind not in "iuf":
            raise ValueError(f"expected integer or real voxels, found {self.array.dtype}")
        if len(self.spacing) != 3 or not all(np.isfinite(s) and s > 0 for s in self.spacing):
            raise ValueError(f"expected a positive spacing for each of (z, y, x), found {self.spacing}")
        if self.affine.shape != (4, 4) or self.affine.dtype != np.float64:
            raise ValueError(f"expected a 4x4 float64 affine, found {self.affine.dtype} of shape {self.affine.shape}")
        if not np.isfinite(self.affine).all() or not np.array_equal(self.affine[3], (0.0, 0.0, 0.0, 1.0)):
            raise ValueError("expected a finite affine whose last row is 0 0 0 1")
        lengths = np.linalg.norm(self.affine[:3, :3], axis=0)
        if not np.allclose(lengths[::-1], self.spacing, rtol=1e-3, atol=0.0):
            raise ValueError(f"the affine's spacing (z, y, x) {tuple(lengths[::-1])} is not the stated {self.spacing}")
        # The determinant over the voxel's volume is 0 for axes in one plane, whatever the unit.
        if abs(np.linalg.det(self.affine[:3, :3] / lengths)) < 1e-3:
            raise ValueError("the affine's axes lie in one plane")

    @property
    def shape(self) -> tuple[int, int, int]:
        """The number of voxels along (z, y, x)."""
        z, y, x, _ = self.array.shape
        return z, y, x

    @property
    def channels(self) -> int:
        """The number of channels: 1 for grey images and labels, 3 for RGB."""
        return int(self.array.shape[3])
