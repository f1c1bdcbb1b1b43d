"""The way from a stored grid to the prepared one, and back for what a network predicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from common.imaging.geometry import Affine, Orientation, Shape, spacing_of
from common.imaging.resampling import Zoom
from common.imaging.volume import Volume

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


@dataclass(frozen=True, eq=False)
class Grid:
    """How the first image of a case that is present became the prepared grid: turned, resampled, cropped.

    Attributes
    ----------
    dimensions : 2 or 3
    stored_shape : (z, y, x), as the file has it.
    stored_affine : as in `Volume`.
    orientation : how the stored array was turned.
    zoom : from the turned grid to the resampled one.
    crop : (first, end) along (z, y, x), the part of the resampled grid that was kept.
    """

    dimensions: Literal[2, 3]
    stored_shape: Shape
    stored_affine: Affine
    orientation: Orientation
    zoom: Zoom
    crop: Box

    def __post_init__(self) -> None:
        if self.orientation.shape(self.stored_shape) != self.zoom.before:
            raise ValueError(f"a grid of {self.stored_shape}, turned, does not have the shape {self.zoom.before}")
        if not all(0 <= first < end <= n for (first, end), n in zip(self.crop, self.zoom.after, strict=True)):
            raise ValueError(f"the crop {self.crop} is not inside {self.zoom.after}")
        if self.stored_affine.shape != (4, 4) or (self.dimensions == 2 and self.crop[0] != (0, 1)):
            raise ValueError(f"expected a 4x4 affine, and one plane in 2D, found {self}")

    @property
    def shape(self) -> tuple[int, ...]:
        """The prepared shape: (y, x) in 2D, (z, y, x) in 3D."""
        return tuple(end - first for first, end in self.crop)[3 - self.dimensions :]

    @property
    def affine(self) -> Affine:
        """The prepared grid's affine, as in `Volume`."""
        turned = self.orientation.affine(self.stored_affine, self.stored_shape)
        move = np.eye(4)
        move[:3, 3] = [first for first, _ in self.crop[::-1]]
        prepared: Affine = self.zoom.affine(turned) @ move
        return prepared

    def restore(self, classes: npt.NDArray[np.uint8]) -> Volume:
        """Bring class indices back to the stored grid: each voxel takes the class of the nearest prepared voxel.

        Parameters
        ----------
        classes : uint8, shape `shape`

        Returns
        -------
        Volume
            uint8, shape (*stored_shape, 1); background where the prepared grid does not reach.
        """
        known = self._spatial(classes, ())
        turned = np.zeros(self.zoom.before, np.uint8)
        where, back = self.zoom.back(self.crop)
        if back is not None:
            turned[where] = back.label(known)
        return self._stored(turned)

    def restore_probabilities(
        self, probabilities: npt.NDArray[np.float32], head: Literal["softmax", "sigmoid"] = "softmax"
    ) -> Volume:
        """Bring a network's probabilities back to the stored grid, linearly, and decide there.

        Smoother borders than `restore` gives. One output is interpolated at a time, so that no more than two are held
        on the stored grid.

        Parameters
        ----------
        probabilities : float32, shape (*shape, outputs)
        head : "softmax" or "sigmoid"
            What the outputs are: the classes, of which the likeliest is taken (the lowest of equals), or the foreground
            classes, of which the likeliest is taken where it is above 0.5.

        Returns
        -------
        Volume : as of `restore`.
        """
        if head not in ("softmax", "sigmoid"):
            raise ValueError(f"head: expected softmax or sigmoid, found {head!r}")
        known = self._spatial(probabilities, (probabilities.shape[-1],))
        turned = np.zeros(self.zoom.before, np.uint8)
        where, back = self.zoom.back(self.crop)
        if back is not None:
            first = 0 if head == "softmax" else 1
            best = np.full(back.after, -np.inf if head == "softmax" else 0.5, np.float32)
            classes = np.zeros(back.after, np.uint8)
            for output in range(known.shape[-1]):
                value = back.image(known[..., output : output + 1], order=1)[..., 0]
                wins = value > best
                classes[wins] = output + first
                best[wins] = value[wins]
            turned[where] = classes
        return self._stored(turned)

    def to_json(self) -> dict[str, Any]:
        """Numbers, strings and lists alone, exact: `from_json` gives the same grid back."""
        return {
            "dimensions": self.dimensions,
            "stored_shape": list(self.stored_shape),
            "stored_affine": self.stored_affine.tolist(),
            "axes": list(self.orientation.axes),
            "flips": list(self.orientation.flips),
            "resampled_shape": list(self.zoom.after),
            "scale": list(self.zoom.scale),
            "offset": list(self.zoom.offset),
            "crop": [list(ends) for ends in self.crop],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Grid:
        """The grid that `to_json` described. Raises ValueError where it is no such description."""
        try:
            orientation = Orientation(_triple(values["axes"], int), _triple(values["flips"], bool))
            stored = _triple(values["stored_shape"], int)
            zoom = Zoom(
                orientation.shape(stored),
                _triple(values["resampled_shape"], int),
                _triple(values["scale"], float),
                _triple(values["offset"], float),
            )
            z, y, x = ((int(first), int(end)) for first, end in values["crop"])
            affine = np.array(values["stored_affine"], np.float64)
            if values["dimensions"] not in (2, 3):
                raise ValueError(f"expected 2 or 3 dimensions, found {values['dimensions']}")
            return cls(values["dimensions"], stored, affine, orientation, zoom, (z, y, x))
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"not the description of a grid: {error!r}") from error

    def _spatial(self, array: npt.NDArray[Any], trailing: tuple[int, ...]) -> npt.NDArray[Any]:
        if array.shape != (*self.shape, *trailing):
            raise ValueError(f"expected the prepared shape {(*self.shape, *trailing)}, found {array.shape}")
        return array if self.dimensions == 3 else array[np.newaxis]

    def _stored(self, turned: npt.NDArray[np.uint8]) -> Volume:
        array = np.ascontiguousarray(self.orientation.undo(turned))[..., np.newaxis]
        return Volume(array, spacing_of(self.stored_affine), self.stored_affine)


def _triple(values: Any, kind: type) -> Any:
    z, y, x = (kind(value) for value in values)
    return z, y, x
