"""Where the slices of a DICOM image lie: their order, the spacing between them and the affine of their stack.

DICOM's world is LPS+ (x to the patient's left, y to the posterior, z to the superior); everything that leaves this
module is RAS+. Source: DICOM PS3.3, C.7.6.2 (Image Plane Module).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from common.imaging.readers.faults import Fault, ReadError
from common.imaging.volume import Stated, Volume, scaling_affine

_RAS_OF_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
# Cosines are often stored with five or six digits.
_COSINE_TOLERANCE = 1e-4
_SPACING_TOLERANCE = 1e-3
# A slice may be this far from its place on a grid it is laid onto, in voxels.
_PLACE_TOLERANCE = 0.25
_EXPORT = "Export the whole series again, as it was acquired."

Vector = tuple[float, ...]
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Plane:
    """What a file says of where one slice lies.

    Attributes
    ----------
    name : the file's name, with the frame's number where the file holds several.
    rows, columns : the number of voxels along y and x.
    spacing : (y, x) in millimetres, None where the file does not say.
    position : (x, y, z), the centre of the first voxel in millimetres, LPS+, None where the file does not say.
    orientation : the directions in which x, then y grows, LPS+, six numbers, None where the file does not say.
    depth : SliceThickness in millimetres. Never the distance of two slices; it serves where there is one slice alone.
    """

    name: str
    rows: int
    columns: int
    spacing: Vector | None
    position: Vector | None
    orientation: Vector | None
    depth: float | None


@dataclass(frozen=True)
class Stack:
    """Slices in the order of their place along the slice normal, as one grid.

    Attributes
    ----------
    order : for every z, the index of the plane.
    spacing, affine, stated : as in `Volume`.
    """

    order: list[int]
    spacing: tuple[float, float, float]
    affine: Array
    stated: Stated = "place"


def stack_planes(planes: Sequence[Plane]) -> Stack:
    """Order slices by their position projected on their normal, and see that they make a regular grid.

    Neither the files' order nor InstanceNumber, SliceThickness or SpacingBetweenSlices play a part.

    Parameters
    ----------
    planes : sequence of Plane
        At least one.

    Raises
    ------
    ReadError
        Slices of different size, spacing or orientation, two at one position, a missing slice, uneven distances, or a
        tilted gantry (slices that are shifted against each other sideways). It names the files.
    """
    first = planes[0]
    for plane in planes[1:]:
        _refuse_difference(first, plane)
    if len(planes) == 1 and (first.position is None or first.orientation is None):
        flat = (1.0, *_in_plane_spacing(first)) if first.spacing is not None else (1.0, 1.0, 1.0)
        return Stack([0], flat, scaling_affine(flat), "nothing" if first.spacing is None else "spacing")
    x_axis, y_axis, normal = _axes(first)
    y, x = _in_plane_spacing(first)
    positions = np.array([_position(plane) for plane in planes])
    order = np.argsort(positions @ normal, kind="stable")
    positions = positions[order]
    if len(planes) == 1:
        step = normal * (first.depth if first.depth is not None and first.depth > 0 else 1.0)
    else:
        _refuse_irregular(positions, normal, [planes[i].name for i in order], min(y, x))
        step = (positions[-1] - positions[0]) / (len(planes) - 1)
    lps = np.eye(4)
    lps[:3, :3] = np.stack([x_axis * x, y_axis * y, step], axis=1)
    lps[:3, 3] = positions[0]
    return Stack(order.tolist(), (float(np.linalg.norm(step)), y, x), _RAS_OF_LPS @ lps)


def spanning_stack(planes: Sequence[Plane], distance: float | None) -> tuple[Stack, int]:
    """The smallest regular grid through slices of which some may be missing and some may share a position.

    Parameters
    ----------
    planes : sequence of Plane
        At least one.
    distance : float or None
        Between neighbouring slices in millimetres, where it is stated; else the smallest that occurs.

    Returns
    -------
    stack : Stack
        `order` holds one plane for every position that occurs.
    depth : int
        The number of slices of the grid.

    Raises
    ------
    ReadError
        As `stack_planes`, and where the positions are no multiples of the distance.
    """
    if all(plane.position is None for plane in planes):
        return stack_planes(planes[:1]), 1  # several segments of one image that lies nowhere
    for plane in planes[1:]:
        _refuse_difference(planes[0], plane)
    *_, normal = _axes(planes[0])
    along = np.array([_position(plane) for plane in planes]) @ normal
    order = np.argsort(along, kind="stable")
    kept = [int(order[0])]
    for index in order[1:]:
        if along[index] - along[kept[-1]] > 1e-3:
            kept.append(int(index))
    if len(kept) == 1:
        alone = planes[kept[0]]
        return stack_planes([replace(alone, depth=distance or alone.depth)]), 1
    gaps = np.diff(along[kept])
    step = distance if distance is not None and distance > 0 else float(gaps.min())
    counts = np.rint(gaps / step).astype(int)
    worst = int(np.abs(gaps - counts * step).argmax())
    if counts.min() < 1 or abs(gaps[worst] - counts[worst] * step) > _PLACE_TOLERANCE * step:
        raise ReadError(
            Fault.SLICES,
            f"uneven slices: {gaps[worst]:.4g} mm between {planes[kept[worst]].name} and "
            f"{planes[kept[worst + 1]].name} is no multiple of {step:.4g} mm. {_EXPORT}",
        )
    last = int(counts.sum())
    base = stack_planes([planes[kept[0]]])
    offset = np.subtract(_position(planes[kept[-1]]), _position(planes[kept[0]])) / last
    affine = base.affine.copy()
    affine[:3, 2] = _RAS_OF_LPS[:3, :3] @ offset
    _, y, x = base.spacing
    return Stack(kept, (float(np.linalg.norm(offset)), y, x), affine), last + 1


def slices_on(grid: Volume, planes: Sequence[Plane]) -> list[int]:
    """Which slice z of a grid each plane is.

    Parameters
    ----------
    grid : Volume
        The image. Its voxels are not read.
    planes : sequence of Plane
        In any order; any number of them, also several at one slice.

    Raises
    ------
    ReadError
        A plane has another size, voxel spacing or orientation than the grid, or lies between or beside its slices.
    """
    depth, rows, columns = grid.shape
    index_of_lps = np.linalg.inv(_RAS_OF_LPS @ grid.affine)
    slices = []
    for plane in planes:
        if (plane.rows, plane.columns) != (rows, columns):
            raise ReadError(
                Fault.LABEL_SHAPE,
                f"{plane.name} has {plane.rows} x {plane.columns} voxels (y, x), the image has {rows} x {columns}. "
                "Export the label on the image's grid.",
            )
        if depth == 1 and plane.position is None:
            slices.append(0)
            continue
        x_axis, y_axis, _ = _axes(plane)
        y, x = _in_plane_spacing(plane)
        corners = np.ones((4, 3))
        # The first voxel and the last along each axis tell position, orientation and spacing at once.
        corners[:3, 0] = _position(plane)
        corners[:3, 1] = corners[:3, 0] + x_axis * x * (columns - 1)
        corners[:3, 2] = corners[:3, 0] + y_axis * y * (rows - 1)
        index = (index_of_lps @ corners)[:3].T
        nearest = round(float(index[0, 2]))
        expected = np.array([(0, 0, nearest), (columns - 1, 0, nearest), (0, rows - 1, nearest)])
        shift = float(np.abs(index - expected).max())
        if shift > _PLACE_TOLERANCE:
            raise ReadError(
                Fault.LABEL_PLACE,
                f"{plane.name} does not lie on a slice of the image: it is {shift:.2f} voxels beside the closest. "
                "Export the label on the image's grid, without resampling.",
            )
        if not 0 <= nearest < depth:
            raise ReadError(
                Fault.LABEL_PLACE,
                f"{plane.name} lies outside the image, at slice {nearest} of {depth}. Check that label and image "
                "belong together.",
            )
        slices.append(nearest)
    return slices


def _refuse_difference(first: Plane, plane: Plane) -> None:
    if (plane.rows, plane.columns) != (first.rows, first.columns):
        raise ReadError(
            Fault.SLICES,
            f"slices of different size: {first.name} has {first.rows} x {first.columns} voxels (y, x), {plane.name} "
            f"has {plane.rows} x {plane.columns}. Keep one of the two kinds.",
        )
    difference = np.abs(np.subtract(_orientation(first), _orientation(plane))).max()
    if difference > _COSINE_TOLERANCE:
        raise ReadError(
            Fault.SLICES,
            f"slices of different orientation: {first.name} and {plane.name}. Remove scouts and slices of other planes "
            "from the series.",
        )
    usual, spacing = _in_plane_spacing(first), _in_plane_spacing(plane)
    if not np.allclose(spacing, usual, rtol=_SPACING_TOLERANCE, atol=0.0):
        raise ReadError(
            Fault.SLICES,
            f"slices of different PixelSpacing: {first.name} has {_list(usual)} mm (y, x), {plane.name} has "
            f"{_list(spacing)} mm. Keep one of the two kinds.",
        )


def _orientation(plane: Plane) -> Vector:
    if plane.orientation is None:
        raise ReadError(Fault.NO_GEOMETRY, f"{plane.name} states no ImageOrientationPatient. {_EXPORT}")
    return plane.orientation


def _axes(plane: Plane) -> tuple[Array, Array, Array]:
    """Unit vectors along x, y and the slice normal, LPS+."""
    orientation = _orientation(plane)
    x_axis, y_axis = np.array(orientation[:3]), np.array(orientation[3:])
    lengths = np.array([np.linalg.norm(x_axis), np.linalg.norm(y_axis)])
    if not np.allclose(lengths, 1.0, atol=1e-2) or abs(x_axis @ y_axis) > 1e-3:
        raise ReadError(
            Fault.NO_GEOMETRY,
            f"{plane.name} states directions that are not perpendicular unit vectors (ImageOrientationPatient "
            f"{_list(orientation)}). {_EXPORT}",
        )
    x_axis, y_axis = x_axis / lengths[0], y_axis / lengths[1]
    normal = np.cross(x_axis, y_axis)
    return x_axis, y_axis, normal / np.linalg.norm(normal)


def _in_plane_spacing(plane: Plane) -> tuple[float, float]:
    if plane.spacing is None:
        raise ReadError(Fault.NO_GEOMETRY, f"{plane.name} states no PixelSpacing. {_EXPORT}")
    y, x = plane.spacing
    if not (y > 0 and x > 0):
        raise ReadError(
            Fault.NO_GEOMETRY, f"{plane.name} states a PixelSpacing of {_list(plane.spacing)} mm. {_EXPORT}"
        )
    return y, x


def _position(plane: Plane) -> Vector:
    if plane.position is None:
        raise ReadError(Fault.NO_GEOMETRY, f"{plane.name} states no ImagePositionPatient. {_EXPORT}")
    return plane.position


def _refuse_irregular(positions: Array, normal: Array, names: list[str], pixel: float) -> None:
    """`positions`, shape (z, 3), and `names` are in order along the normal."""
    along = (positions - positions[0]) @ normal
    gaps = np.diff(along)
    usual = float(np.median(gaps))
    same = np.flatnonzero(gaps < max(1e-3, 0.01 * usual))
    if same.size:
        raise ReadError(
            Fault.SLICES,
            f"two slices at one position: {names[same[0]]} and {names[same[0] + 1]}. Remove copies; export several "
            "time points, echoes or b-values as a series each.",
        )
    # Some scanners store positions to a tenth of a millimetre.
    tolerance = min(max(0.02 * usual, 0.1), 0.2 * usual)
    wrong = np.flatnonzero(np.abs(gaps - usual) > tolerance)
    if wrong.size:
        smallest = float(gaps.min())
        counts = np.rint(gaps / smallest)
        if (np.abs(gaps - counts * smallest) <= 2 * tolerance).all():
            at, usual = int(counts.argmax()), smallest
            said = f"missing slices: {int(counts.sum()) - len(gaps)}, "
            advice = _EXPORT
        else:
            at, said = int(wrong[0]), "uneven slices: "
            advice = "Take a series that was reconstructed at even distances."
        raise ReadError(
            Fault.SLICES,
            f"{said}between {names[at]} and {names[at + 1]} are {gaps[at]:.4g} mm where {usual:.4g} mm are usual. "
            f"{advice}",
        )
    drift = np.abs(along - np.linspace(0.0, along[-1], len(along))).max()
    if drift > 2 * tolerance:
        raise ReadError(
            Fault.SLICES,
            f"uneven slices: the distance changes along the series, by {drift:.4g} mm in all from {names[0]} to "
            f"{names[-1]}. Take a series that was reconstructed at even distances.",
        )
    sideways = np.linalg.norm(positions - positions[0] - np.outer(along, normal), axis=1)
    worst = int(sideways.argmax())
    if sideways[worst] > 0.2 * pixel:
        angle = np.degrees(np.arctan2(sideways[worst], along[worst]))
        raise ReadError(
            Fault.SLICES,
            f"slices shifted sideways: {names[worst]} by {sideways[worst]:.4g} mm against {names[0]} (a gantry tilt of "
            f"{angle:.1f} degrees). Correct the tilt at the scanner's console or take a series without.",
        )


def _list(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)
