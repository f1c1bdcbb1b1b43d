"""Whether two images, or an image and its label, show the same place: by the facts of their grids, without a voxel."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from common.errors import DataError
from common.imaging import geometry
from common.imaging.facts import SourceFacts
from common.imaging.findings import Code
from common.imaging.resampling import Zoom
from common.imaging.volume import Volume

_SAME_SPACING = 0.01
_SAMPLE = 64


def same_grid(a: SourceFacts, b: SourceFacts) -> bool:
    """Whether both have the same voxels at the same places, within half a voxel, however they are stored."""
    return geometry.same_grid(_turned(a), _turned(b))


def is_placed(facts: SourceFacts) -> bool:
    """Whether the file says more of where its voxels lie than their spacing."""
    return not geometry.is_unplaced(_turned(facts))


def grid_fault(image: SourceFacts, label: SourceFacts) -> tuple[Code, str] | None:
    """How a label's grid differs from its image's, both turned to RAS; None where it does not.

    A different shape is said first, then a different spacing, then a different place: each of them brings the next.
    """
    a, b = _turned(image), _turned(label)
    if geometry.same_grid(a, b):
        return None
    if a.shape != b.shape:
        return Code.SHAPE_MISMATCH, f"expected the image's shape {_times(a.shape)}, found {_times(b.shape)}"
    if not np.allclose(a.spacing, b.spacing, rtol=_SAME_SPACING, atol=0.0):
        return Code.SPACING_MISMATCH, f"expected the image's spacing {_times(a.spacing)}, found {_times(b.spacing)}"
    voxels, distance = geometry.displacement(a, b)
    return Code.AFFINE_MISMATCH, f"its affine puts it up to {voxels:.1f} voxels ({distance:.3g}) beside the image"


def overlap(a: SourceFacts, b: SourceFacts) -> float:
    """The share of `a`'s voxels whose centres lie within `b`'s field of view, 0 to 1; of a sample beyond 64 an axis."""
    points = [(np.arange(min(n, _SAMPLE)) + 0.5) * n / min(n, _SAMPLE) - 0.5 for n in a.shape[::-1]]
    centres = np.stack([*np.meshgrid(*points, indexing="ij"), np.ones([len(axis) for axis in points])])
    index = np.linalg.solve(np.array(b.affine), np.array(a.affine) @ centres.reshape(4, -1))[:3]
    ends = np.array(b.shape[::-1], np.float64)[:, np.newaxis] - 0.5
    return float(np.all((index >= -0.5) & (index <= ends), axis=0).mean())


def resampling_fault(image: SourceFacts, spacing: Sequence[float]) -> str | None:
    """Why preprocessing refuses to resample an image to a study's spacing, (z, y, x) or (y, x); None where it does not.

    In 2D the plane keeps its depth, as in preprocessing.
    """
    turned = _turned(image)
    try:
        Zoom.to_spacing(turned.shape, turned.spacing, (*turned.spacing[: 3 - len(spacing)], *spacing))
    except DataError as error:
        return str(error).removeprefix("spacing: ").partition(". ")[0]
    return None


def ras_spacing(facts: SourceFacts) -> tuple[float, float, float]:
    """The spacing (z, y, x) after turning to RAS."""
    return _turned(facts).spacing


def _turned(facts: SourceFacts) -> Volume:
    """As preprocessing turns it: planes stay as they are stored."""
    return facts.volume if facts.shape[0] == 1 else geometry.to_ras(facts.volume)


def _times(values: tuple[float, ...]) -> str:
    return " x ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values) + " (z, y, x)"
