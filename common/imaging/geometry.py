"""Where voxels lie in the world: orientation, and whether two grids are one.

Everything here goes by the world position of voxel *centres*. Array axes are ordered (z, y, x), affines take (x, y, z).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import nibabel as nib
import numpy as np
import numpy.typing as npt

from common.imaging.volume import Volume

Shape = tuple[int, int, int]
Triple = tuple[float, float, float]
Affine = npt.NDArray[np.float64]

# Within half a voxel the nearest voxel is the right one: laying one grid onto the other would change nothing.
GRID_TOLERANCE = 0.5


class Placed(Protocol):
    """Anything with a grid in the world, such as a `Volume`."""

    @property
    def shape(self) -> Shape:
        """The number of voxels along (z, y, x)."""

    @property
    def affine(self) -> Affine:
        """As in `Volume`."""


# Orientation. -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Orientation:
    """How an array is turned without changing a voxel: axes are permuted, then some reversed.

    Attributes
    ----------
    axes : the old axis of each new one, both counted in array order (z, y, x).
    flips : whether each new axis is reversed.
    """

    axes: tuple[int, int, int] = (0, 1, 2)
    flips: tuple[bool, bool, bool] = (False, False, False)

    def __post_init__(self) -> None:
        if sorted(self.axes) != [0, 1, 2] or len(self.flips) != 3:
            raise ValueError(f"expected a permutation of three axes and three flips, found {self}")

    @classmethod
    def to_ras(cls, affine: Affine) -> Orientation:
        """What brings each axis to the world axis it is closest to: x to the right, y to anterior, z to superior."""
        orientations: Any = nib.orientations
        axes, flips = [0, 0, 0], [False, False, False]
        for voxel_axis, (world_axis, sign) in enumerate(orientations.io_orientation(affine)):
            axes[2 - int(world_axis)] = 2 - voxel_axis
            flips[2 - int(world_axis)] = bool(sign < 0)
        return cls((axes[0], axes[1], axes[2]), (flips[0], flips[1], flips[2]))

    def apply(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Turn an array of shape (z, y, x, ...); a view where that is possible."""
        turned = array.transpose(*self.axes, *range(3, array.ndim))
        return turned[tuple(slice(None, None, -1) if flip else slice(None) for flip in self.flips)]

    def undo(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The reverse of `apply`."""
        flipped = array[tuple(slice(None, None, -1) if flip else slice(None) for flip in self.flips)]
        return flipped.transpose(*np.argsort(self.axes), *range(3, array.ndim))

    def shape(self, stored: Sequence[int]) -> Shape:
        """The shape (z, y, x) after turning."""
        z, y, x = (int(stored[axis]) for axis in self.axes)
        return z, y, x

    def affine(self, stored: Affine, shape: Sequence[int]) -> Affine:
        """The affine after turning, of a grid whose shape was `shape` before: no voxel moves in the world."""
        # Takes (x, y, z) after turning to (x, y, z) before.
        back = np.zeros((4, 4))
        back[3, 3] = 1.0
        for new, (old, flip) in enumerate(zip(self.axes, self.flips, strict=True)):
            back[2 - old, 2 - new] = -1.0 if flip else 1.0
            back[2 - old, 3] = shape[old] - 1 if flip else 0.0
        turned: Affine = stored @ back
        return turned


def to_ras(volume: Volume) -> Volume:
    """Turn a volume to the orientation closest to RAS, by flips and permutations alone.

    An oblique volume stays oblique: no voxel is interpolated and none moves in the world.
    """
    orientation = Orientation.to_ras(volume.affine)
    if orientation == Orientation():
        return volume
    affine = orientation.affine(volume.affine, volume.shape)
    z, y, x = (volume.spacing[axis] for axis in orientation.axes)
    return replace(volume, array=orientation.apply(volume.array), spacing=(z, y, x), affine=affine)


# Agreement of two grids. --------------------------------------------------------------------------------------------


def spacing_of(affine: Affine) -> Triple:
    """The distance between neighbouring voxels' centres along (z, y, x)."""
    x, y, z = (float(length) for length in np.linalg.norm(affine[:3, :3], axis=0))
    return z, y, x


def displacement(a: Placed, b: Placed) -> tuple[float, float]:
    """How far apart two grids of one shape put the same voxel, at the corner where it is most.

    Returns
    -------
    voxels : the largest difference along an axis, in voxels of `a`.
    distance : the largest distance in the world, in the unit of the affine.
    """
    corners = np.array([(*index, 1) for index in itertools.product(*((0, n - 1) for n in a.shape[::-1]))], float).T
    world = b.affine @ corners
    voxels = np.abs(np.linalg.solve(a.affine, world) - corners)[:3].max()
    distance = np.linalg.norm((a.affine @ corners - world)[:3], axis=0).max()
    return float(voxels), float(distance)


def is_unplaced(grid: Volume) -> bool:
    """Whether the file says at most a spacing, and neither orientation nor position."""
    return grid.stated != "place"


def same_grid(a: Volume, b: Volume, tolerance: float = GRID_TOLERANCE) -> bool:
    """Whether two grids have one shape and put every voxel at the same place, within `tolerance` voxels of `a`.

    A file that says nothing of its grid agrees with any of the same shape that says at most a spacing: labels of
    microscopy seldom carry the pixel size of their image. For single planes without orientation the shape decides
    alone, because there the pixel sizes of label and image are rarely written by the same program.
    """
    if a.shape != b.shape:
        return False
    if is_unplaced(a) and is_unplaced(b) and (a.shape[0] == 1 or "nothing" in (a.stated, b.stated)):
        return True
    return displacement(a, b)[0] <= tolerance
