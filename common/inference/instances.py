"""Objects from what a model says of every voxel: a watershed of depth maps, or connected components.

The watershed floods the foreground from each maximum of a depth map, so that basins meet along its valleys. Which
maxima are objects, and which only dents of one, is decided by their dynamics (Grimaud 1992, doi:10.1117/12.60650): how
far one must go down from the lower of two peaks to reach the other. Basins are joined where that is less than a
`height`, which finds the objects that flooding from the h-maxima would, for every height from one flooding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, Literal, get_args

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from common.inference.lite import Head

Labels = npt.NDArray[np.int32]
Depth = npt.NDArray[np.float32]
Method = Literal["components", "shape", "distance", "both"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Splitting:
    """How foreground becomes objects.

    Attributes
    ----------
    method : "components": voxels that hang together by their faces are one object. "shape": a watershed of each voxel's
        distance to the background, over the largest of its component, which parts what is thin between. "distance": a
        watershed of the distance that the head "distance" predicts. "both": of the mean of these two; the shape parts
        what the network was not sure of.
    threshold : foreground is above this probability.
    smoothing : standard deviation of the Gaussian that smooths the depth map, in voxels (of the finest axis).
    height : how deep the valley between two objects is at least, as part of the depth map's range from 0 to 1.
    least_size : objects of fewer voxels are left out.
    """

    method: Method
    threshold: float = 0.5
    smoothing: float = 1.0
    height: float = 0.1
    least_size: int = 12

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ValueError(f"method: expected {', '.join(get_args(Method))}, found {self.method!r}")
        if not (0 <= self.threshold < 1 and self.smoothing >= 0 and 0 < self.height <= 1 and self.least_size >= 0):
            raise ValueError(f"expected a threshold in [0, 1), smoothing >= 0, height in (0, 1], a size, found {self}")

    @property
    def by_shape(self) -> bool:
        """Whether it looks at distances to the background."""
        return self.method in ("shape", "both")

    @property
    def by_distance(self) -> bool:
        """Whether it looks at the distance that the network predicts."""
        return self.method in ("distance", "both")


DEFAULTS: Final[Mapping[Head, Splitting]] = MappingProxyType(
    {
        "softmax": Splitting(method="shape"),
        "sigmoid": Splitting(method="shape"),
        # The best mean AP over the sites' validation cases of the shipped nuclei study, as it is published; "both" was
        # not clearly better in any run (docs/instances.md).
        "distance": Splitting(method="distance", threshold=0.5, smoothing=1.0, height=0.1, least_size=24),
    }
)
"""What `instances_of` does for each head; `benchmarks/instances.py` tunes on validation cases."""


def instances_of(
    probabilities: npt.NDArray[np.float32],
    head: Head,
    splitting: Splitting | None = None,
    *,
    least_size: int | None = None,
    spacing: Sequence[float] | None = None,
) -> Labels:
    """Number the objects of one foreground class; the same input gives the same numbers.

    Beside its arguments it takes about 40 bytes of memory for each voxel of the box around the foreground.

    Parameters
    ----------
    probabilities : float32, shape (y, x, outputs) or (z, y, x, outputs)
        Two outputs for softmax (background, foreground) and distance (foreground, distance), one for sigmoid.
    head : "softmax", "sigmoid" or "distance"
    splitting : None takes `DEFAULTS` of the head; the methods "distance" and "both" need the head "distance".
    least_size : instead of the splitting's own.
    spacing : distances between voxels along the spatial axes; None: the same along all.

    Returns
    -------
    int32 array, shape (y, x) or (z, y, x)
        0 is background, objects are 1, 2, ... in the order of their first voxels.

    Raises
    ------
    ValueError : the number of outputs is not the head's, or the head has no distance to split by.
    """
    splitting = splitting or DEFAULTS[head]
    if least_size is not None:
        splitting = replace(splitting, least_size=least_size)
    outputs = 1 if head == "sigmoid" else 2
    if probabilities.ndim not in (3, 4) or probabilities.shape[-1] != outputs:
        raise ValueError(
            f"expected probabilities (spatial..., {outputs}) of the head {head}, found shape {probabilities.shape}"
        )
    if splitting.by_distance and head != "distance":
        raise ValueError(f"expected the head distance for a watershed of distances, found {head}")
    depth = distance_in(probabilities, head) if splitting.by_distance else None
    return objects_of(foreground_in(probabilities, head, splitting.threshold), depth, splitting, spacing)


def foreground_in(probabilities: npt.NDArray[np.float32], head: Head, threshold: float) -> npt.NDArray[np.bool_]:
    """Where a network's outputs, shape (spatial..., outputs), say that there is an object."""
    return np.asarray(probabilities[..., 1 if head == "softmax" else 0] > threshold)


def distance_in(probabilities: npt.NDArray[np.float32], head: Head) -> Depth | None:
    """The distance that a network predicts, of its outputs (spatial..., outputs); None where its head has none."""
    return probabilities[..., 1] if head == "distance" else None


def objects_of(
    foreground: npt.NDArray[np.bool_], depth: Depth | None, splitting: Splitting, spacing: Sequence[float] | None
) -> Labels:
    """As `instances_of`, of the foreground, shape (spatial...), and the predicted distance where `by_distance`."""
    if not foreground.any():
        return np.zeros(foreground.shape, np.int32)
    # Flooding takes memory for every voxel it is given, so it is given no more than the foreground's own box.
    (box,) = ndimage.find_objects(foreground.astype(np.uint8))
    inside = foreground[box]
    if splitting.method == "components":
        found = np.asarray(ndimage.label(inside)[0], np.int32)
    else:
        shape = _depth_of_shape(foreground, spacing)[box] if splitting.by_shape else None
        depth = depth_of(depth[box] if depth is not None and splitting.by_distance else None, shape)
        found = split(inside, smoothed(depth, splitting.smoothing, spacing), splitting.height)
    result = np.zeros(foreground.shape, np.int32)
    result[box] = numbered(found, splitting.least_size)
    return result


def depth_of(predicted: Depth | None, shape: Depth | None) -> Depth:
    """The depth map to flood: the predicted distance, that of the shape (each from 0 to 1), or the mean of both."""
    given = [np.asarray(one, np.float32) for one in (predicted, shape) if one is not None]
    assert given  # whoever floods has one
    return np.ascontiguousarray(given[0] if len(given) == 1 else (given[0] + given[1]) / np.float32(2))


def split(foreground: npt.NDArray[np.bool_], depth: Depth, height: float) -> Labels:
    """Part the foreground into the watersheds of a depth map.

    Parameters
    ----------
    foreground : bool, shape (y, x) or (z, y, x)
    depth : float32 of the same shape, largest inside objects.
    height : basins are joined where the lower of their peaks is less than this above the highest pass between them.

    Returns
    -------
    int32 array of the same shape: 0 outside the foreground, every voxel of which is in a basin.
    """
    from skimage.morphology import local_maxima

    # Peaks, basins and passes go by the same neighbours, faces, so that every component has a peak of its own. The rim
    # of lowest voxels makes one where the depth is the same all over, too.
    lowest = np.float32(depth.min()) - np.float32(1)
    rimmed = np.full([size + 2 for size in depth.shape], lowest, np.float32)
    within = (slice(1, -1),) * depth.ndim
    np.copyto(rimmed[within], depth, where=foreground)
    peaks = local_maxima(rimmed, connectivity=1, allow_borders=False)[within]  # type: ignore[no-untyped-call]
    depth = rimmed[within]
    markers, count = ndimage.label(peaks)
    tops = np.full(count + 1, lowest, np.float32)
    tops[markers[peaks]] = depth[peaks]
    basins = _basins(foreground, depth, markers, peaks)
    roots = _joined(tops, *_passes(basins, depth, count), height)
    return np.asarray(roots[basins], np.int32)


def _basins(foreground: npt.NDArray[np.bool_], depth: Depth, markers: Labels, peaks: npt.NDArray[np.bool_]) -> Labels:
    """The basin of each voxel of the foreground; only components of several peaks are flooded, which takes longest."""
    from skimage.segmentation import watershed

    components, count = ndimage.label(foreground)
    lowest, highest = np.full(count + 1, np.iinfo(np.int32).max, np.int32), np.zeros(count + 1, np.int32)
    np.minimum.at(lowest, components[peaks], markers[peaks])
    np.maximum.at(highest, components[peaks], markers[peaks])
    several = lowest < highest
    basins = np.where(several, 0, highest).astype(np.int32)[components]
    if several.any():
        heights = _without_ties(depth, peaks)
        basins += watershed(heights, markers, connectivity=1, mask=several[components])  # type: ignore[no-untyped-call]
    return np.asarray(basins, np.int32)


def _without_ties(depth: Depth, peaks: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Heights to flood: minus the depth, where of peaks that are as deep the earlier voxel is lower by very little.

    Flooding starts from equals in an order that depends on everything else in the image; so it does not, and a
    component floods alike wherever it is looked at. float64 has 2^29 numbers between two of float32: no voxels but
    equals change places.
    """
    heights = -depth.astype(np.float64)
    bits = heights[peaks].view(np.int64)
    lowest = np.iinfo(np.int64).min
    # Integers in the order of the numbers that they are the bits of.
    ordered = np.where(bits < 0, lowest - bits, bits) - np.arange(len(bits), 0, -1)
    heights[peaks] = np.where(ordered < 0, lowest - ordered, ordered).view(np.float64)
    return heights


def _passes(basins: Labels, depth: Depth, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Pairs (n, 2) of basins that touch, and the highest pass between the two of each: the lower of two voxels."""
    keys, heights = [], []
    for axis in range(basins.ndim):
        before = tuple(slice(None, -1) if other == axis else slice(None) for other in range(basins.ndim))
        after = tuple(slice(1, None) if other == axis else slice(None) for other in range(basins.ndim))
        one, two = basins[before], basins[after]
        border = (one != two) & (one > 0) & (two > 0)
        first, second = one[border].astype(np.int64), two[border].astype(np.int64)
        keys.append(np.minimum(first, second) * (count + 1) + np.maximum(first, second))
        heights.append(np.minimum(depth[before][border], depth[after][border]))
    pairs, places = np.unique(np.concatenate(keys), return_inverse=True)
    highest = np.full(len(pairs), -np.inf, np.float32)
    np.maximum.at(highest, places, np.concatenate(heights))
    return np.stack(np.divmod(pairs, count + 1), axis=1), highest


def _joined(
    tops: npt.NDArray[np.float32], pairs: npt.NDArray[np.int64], passes: npt.NDArray[np.float32], height: float
) -> npt.NDArray[np.int64]:
    """The basin that each is joined to, by a forest of sets over the passes from the highest down."""
    parent = list(range(len(tops)))
    peak = tops.tolist()

    def root(basin: int) -> int:
        while parent[basin] != basin:
            parent[basin] = parent[parent[basin]]
            basin = parent[basin]
        return basin

    order = np.argsort(-passes, kind="stable")
    for (one, two), level in zip(pairs[order].tolist(), passes[order].tolist(), strict=True):
        first, second = sorted((root(one), root(two)))
        if first != second and min(peak[first], peak[second]) - level < height:
            parent[second] = first
            peak[first] = max(peak[first], peak[second])
    return np.array([root(basin) for basin in range(len(tops))], np.int64)


def distance_to_background(foreground: npt.NDArray[np.bool_], spacing: Sequence[float] | None) -> Depth:
    """Each voxel's distance to the nearest centre of the background, of which there is some; 0 there.

    The image's border is not background, as `common.imaging.distance` has it.
    """
    return np.asarray(ndimage.distance_transform_edt(foreground, sampling=spacing), np.float32)


def _depth_of_shape(foreground: npt.NDArray[np.bool_], spacing: Sequence[float] | None) -> Depth:
    """The distance to the background over the largest of its component, so that objects of all sizes compare."""
    if foreground.all():
        return np.ones(foreground.shape, np.float32)
    depth = distance_to_background(foreground, spacing)
    components, count = ndimage.label(foreground)
    largest = np.ones(count + 1, np.float32)
    largest[1:] = ndimage.maximum(depth, components, np.arange(1, count + 1))
    return np.asarray(depth / largest[components], np.float32)


def smoothed(depth: Depth, smoothing: float, spacing: Sequence[float] | None) -> Depth:
    """A depth map through a Gaussian of `smoothing` voxels of the finest axis."""
    if not smoothing:
        return depth
    return np.asarray(ndimage.gaussian_filter(depth, _deviations(smoothing, spacing, depth.ndim)), np.float32)


def smoothing_reach(smoothing: float, spacing: Sequence[float] | None, dimensions: int) -> tuple[int, ...]:
    """How many voxels beside it, along each axis, `smoothed` looks at for one."""
    return tuple(int(4.0 * deviation + 0.5) for deviation in _deviations(smoothing, spacing, dimensions))


def _deviations(smoothing: float, spacing: Sequence[float] | None, dimensions: int) -> list[float]:
    steps = [1.0] * dimensions if spacing is None else spacing
    return [smoothing * min(steps) / step for step in steps]


def numbered(found: Labels, least_size: int) -> Labels:
    """Objects of at least a size, numbered 1, 2, ... by their first voxels."""
    flat = found.reshape(-1)
    sizes = np.bincount(flat)
    sizes[0] = 0
    kept = np.flatnonzero(sizes >= max(least_size, 1))
    first = np.full(len(sizes), flat.size, np.int64)
    places = np.flatnonzero(flat)
    first[flat[places[::-1]]] = places[::-1]  # of several places the last one written stays, which is the first
    numbers = np.zeros(len(sizes), np.int32)
    numbers[kept[np.argsort(first[kept], kind="stable")]] = np.arange(1, len(kept) + 1)
    return numbers[found]
